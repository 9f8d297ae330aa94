#!/usr/bin/env python3
"""Takes the pictures of docs/viewing.md: the page of `h5traces view` with the shipped example.

    python tools/make_view_pictures.py docs/images

writes view-archive.png, view-sample.png, view-attention.png and view-compare.png. Needs the extras
dev and view, and Chromium.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import h5traces

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT: Final = Path(__file__).resolve().parents[1]
WIDTH: Final = 1100


class View(NamedTuple):
    """A view: its place in the address, and what is there when it is drawn."""

    place: str
    drawn: str
    height: int
    picture: str | None = None  # that is pointed at, here:
    right: float = 0.7  # shares of its width and height
    down: float = 0.6


VIEWS: Final = {
    "archive": View("", "tr:nth-child(9) td:nth-child(4) bdi:not(:empty)", 600),
    "sample": View("view=sample&sample=2", "[data-testid=map]", 440, "map"),
    "attention": View(
        "view=attention&sample=2&layer=3&head=1", "[data-drawn]", 760, "head", 0.45, 0.7
    ),
    # Two prompts that begin alike: no difference before the questions do.
    "compare": View(
        "view=compare&sample=2&otherSample=3", "[data-testid=difference]", 440, "difference"
    ),
}


def taken(browser: Browser, url: str, name: str, script: str = "") -> bytes:
    """A PNG of a view of the page at `url`, which runs `script` first."""
    view = VIEWS[name]
    page: Any = browser.new_page(viewport={"width": WIDTH, "height": view.height})
    try:
        page.add_init_script(script)
        page.goto(f"{url}#{view.place}")
        page.wait_for_selector(view.drawn)
        page.wait_for_load_state("networkidle")
        if view.picture is not None:
            box = page.locator(f"[data-testid={view.picture}]").bounding_box()
            page.mouse.move(
                box["x"] + view.right * box["width"], box["y"] + view.down * box["height"]
            )
        page.wait_for_timeout(300)  # colours follow the pointer after a pause
        content: bytes = page.screenshot()
        return content
    finally:
        page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    target = parser.parse_args().folder
    os.environ.setdefault("SOURCE_DATE_EPOCH", "1767225600")  # when the archive was written
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        h5traces.convert(ROOT / "examples" / "legacy", f"{folder}/archives/")
        command = [sys.executable, "-m", "h5traces", "view", f"{folder}/archives/", "--no-browser"]
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            try:
                for view in VIEWS:
                    path = target / f"view-{view}.png"
                    path.write_bytes(taken(browser, url, view))
                    print(path)
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
