"""What the page and its server say of what they cannot show."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xxhash
from view_helpers import WAIT, item, served, show, written

import h5traces
from h5traces.storage import footer
from h5traces.view import server

if TYPE_CHECKING:
    from collections.abc import Callable

TOOLS = Path(__file__).parents[2] / "tools"


def with_directory(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the directory of an archive's index, and its checksums with it."""
    data = path.read_bytes()
    body, stored, _, hdf5, _, version, _ = footer.TRAILER.unpack_from(data, len(data) - 64)
    document = json.loads(zlib.decompress(data[hdf5 + body : hdf5 + body + stored]))
    change(document)
    raw = json.dumps(document).encode()
    packed = zlib.compress(raw)
    checksum = xxhash.xxh3_64_intdigest(packed)
    head = footer.TRAILER.pack(body, len(packed), len(raw), hdf5, checksum, version, 0)
    tail = footer.TRAILER_END.pack(xxhash.xxh3_64_intdigest(head), footer.MAGIC)
    path.write_bytes(data[: hdf5 + body] + packed + head + tail)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "2.0"}, "has format 2.0, this page knows 1.x; take a newer h5traces"),
        ({"required_features": ["folds"]}, "needs folds, which this page does not know"),
    ],
)
def test_a_newer_format_is_named(
    page: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = written(tmp_path / "new.h5", item(0, 4))
    with_directory(path, lambda document: document["archive"].update(changes))
    good = written(tmp_path / "good.h5", item(0, 4))
    with served(path, good) as url:
        show(page, url)
        page.wait_for_selector(f"text={message}", timeout=WAIT)
        # The others are shown.
        page.select_option("select", "1")
        page.wait_for_selector("text=Answer 0.", timeout=WAIT)


def test_an_old_browser_is_told(page: Any, tmp_path: Path) -> None:
    page.add_init_script("delete globalThis.DecompressionStream")
    with served(written(tmp_path / "run.h5", item(0, 4))) as url:
        show(page, url)
        page.wait_for_selector("text=this browser cannot inflate", timeout=WAIT)


def test_seventy_thousand_samples_can_be_listed(page: Any, tmp_path: Path) -> None:
    one = written(
        tmp_path / "one.h5",
        {"question_id": "q", "hidden_states": [np.ones((2, 4), "f2")], "label": 1},
    )
    path = tmp_path / "many.h5"
    make = runpy.run_path(str(TOOLS / "make_sparse.py"))["make_sparse"]
    assert make(one, path, num_samples=70_000) == 70_000
    with served(path) as url:
        show(page, url)
        page.wait_for_selector("text=70000 of 70000 samples", timeout=WAIT)
        page.wait_for_selector("text=5000 samples read", timeout=3 * WAIT)
        page.fill("input[type=search]", "q_69999")
        page.wait_for_selector("text=1 of 70000 samples", timeout=WAIT)
        page.evaluate("location.hash = '#view=sample&sample=69999'")
        page.wait_for_selector("text=sample 69999 of 70000", timeout=WAIT)
        show(page, url, sort="-length")
        page.wait_for_selector("text=read the index of the other 65000 samples", timeout=WAIT)


def test_a_damaged_index_is_named(page: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "run.h5", item(0, 4))
    data = bytearray(path.read_bytes())
    data[-70] ^= 1
    path.write_bytes(data)
    with served(path) as url:
        show(page, url)
        page.wait_for_selector("text=run.h5: index: the checksum does not fit", timeout=WAIT)


def test_an_archive_without_index_is_named(page: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "run.h5", item(0, 4))
    hdf5 = footer.TRAILER.unpack_from(path.read_bytes(), path.stat().st_size - 64)[3]
    os.truncate(path, hdf5)
    with served(path) as url:
        show(page, url)
        page.wait_for_selector("text=run 'h5traces seal run.h5'", timeout=WAIT)


def test_samples_without_tokens_or_arrays_and_with_nan(page: Any, tmp_path: Path) -> None:
    states = np.ones((2, 3, 4), "f2")
    states[1, 2, 0] = np.nan
    path = written(
        tmp_path / "odd.h5",
        {"question_id": "text", "question": "Only a text?", "hidden_states": [], "attentions": []},
        {"question_id": "states", "hidden_states": list(states)},
    )
    with served(path) as url:
        show(page, url)
        page.wait_for_selector("text=there are no arrays: sample 0", timeout=WAIT)
        page.wait_for_selector("text=values are NaN: sample 1", timeout=WAIT)
        for view in ("sample", "attention", "compare"):
            show(page, url, view=view, sample=0)
            page.wait_for_selector("text=/stores no (arrays|attentions)/", timeout=WAIT)
        show(page, url, view="sample", sample=1)
        page.wait_for_selector("[data-testid=map]", timeout=WAIT)
        assert page.locator("[data-testid=words] span").all_inner_texts() == ["[0]", "[1]", "[2]"]
        page.mouse.move(1, 1)
        page.locator("[data-testid=map]").focus()
        for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
            page.keyboard.press(key)
        page.wait_for_selector("text=/position 1, token 2.*\u2013/", timeout=WAIT)


def test_what_the_checks_find_is_shown(page: Any, tmp_path: Path) -> None:
    bad = item(0, 6)
    bad["hidden_states"][1][:] = 1
    path = written(tmp_path / "run.h5", bad)
    (found,) = h5traces.inspect(path)
    expected = [str(each) for each in found.findings if each.severity != "note"]
    assert any("[constant-layer]" in each for each in expected)
    with served(path) as url:
        show(page, url)
        page.wait_for_selector("text=[constant-layer]", timeout=WAIT)
        assert page.locator("[data-testid=warnings] li").all_inner_texts() == expected


def test_no_display_means_no_browser(tmp_path: Path) -> None:
    """Terminal browsers would take over the terminal."""
    path = written(tmp_path / "run.h5", item(0, 4))
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-m", "h5traces", "view", str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        assert "there is no browser with a display here" in process.stderr.readline()
        process.terminate()
        process.communicate(timeout=120)


def test_a_browser_that_stays_does_not_hold_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, stop = threading.Event(), threading.Event()

    def blocking(_address: str) -> None:
        opened.set()
        stop.wait(120)

    monkeypatch.setenv("BROWSER", "true")
    monkeypatch.setattr(server.webbrowser, "get", lambda: True)
    monkeypatch.setattr(server.webbrowser, "open", blocking)
    ran = []
    monkeypatch.setattr(
        server.uvicorn.Server, "run", lambda *_a, **_k: ran.append(opened.wait(120))
    )
    server.serve(written(tmp_path / "run.h5", item(0, 4)))
    stop.set()
    assert ran == [True]
