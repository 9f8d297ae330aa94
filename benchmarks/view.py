"""What the page of ``h5traces view`` costs: an archive of 100 GB, a layer of heads, frames.

    python benchmarks/view.py [--rounds N] [--latency MS]

Headless Chromium opens the page, as `h5traces view --export` writes it, from a web server of the
standard library that answers every request after ``--latency`` milliseconds. Archives are synthetic
(``tools/make_synthetic.py``: hidden size 4096, 32 heads). The large one is sparse
(``tools/make_sparse.py``): one sample of 43 tokens and 32 layers is there, and the index lists it
thousands of times, each at another place.

- *first sample*: from the moment that the page is there (its script runs) until the map of layers
  and tokens is drawn, index included; and requests to the archive meanwhile.
- *layer of heads*: from the change of the layer, of 1,024 tokens, until all 32 heads are drawn.
- *frames*: animation frames per second while the pointer moves over a head of 4,096 tokens, or the
  wheel turns over it, an event in every frame.

Times are medians of the rounds, frames those of the slowest.

Outcome on two cores, which run server, browser and threads together, with real-time priority over
what else ran there (``chrt -r 5``): the first sample after 0.6 s with 3 requests, 60 frames/s of
both kinds. A layer of heads took 745 ms, which misses the target: 67 MB are inflated (250 ms of one
core by zlib itself), sent by a server in Python, and made into pictures, all on these two cores.
"""

from __future__ import annotations

import argparse
import http.server
import multiprocessing
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from make_sparse import make_sparse
from make_synthetic import Generator, Shape
from playwright.sync_api import sync_playwright
from remote import Handler
from suite.folder import made_folder

import h5traces
from h5traces.view.static import PAGE_FILES, page_file

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from playwright.sync_api import Browser

NBYTES = 100_000_000_000
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
# Frames that pass while an event comes in every one of them.
FRAMES = """async ([selector, isWheel]) => {
    const canvas = document.querySelector(selector);
    const box = canvas.getBoundingClientRect();
    const frame = () => new Promise(requestAnimationFrame);
    await frame();
    const start = performance.now();
    let count = 0;
    for (; performance.now() - start < 2000; count += 1) {
        const share = (count % 97) / 97;
        const place = {
            clientX: box.left + share * box.width, clientY: box.top + (1 - share) * box.height,
            bubbles: true, cancelable: true,
        };
        canvas.dispatchEvent(isWheel
            ? new WheelEvent("wheel", { ...place, deltaY: count % 40 < 20 ? -60 : 60 })
            : new MouseEvent("mousemove", place));
        await frame();
    }
    return count / ((performance.now() - start) / 1000);
}"""
# Milliseconds from the change of the layer until its heads are drawn.
LAYER = """async (layer) => {
    const start = performance.now();
    location.hash = location.hash.replace(/layer=\\d+/, `layer=${layer}`);
    while (!document.querySelector(`[data-testid=heads][data-drawn=layer_00${layer}]`)) {
        await new Promise(requestAnimationFrame);
    }
    return performance.now() - start;
}"""
# Notes when the page is there, and when its map is.
WATCH = """document.addEventListener("DOMContentLoaded", () => {
    const start = performance.now();
    const look = () => {
        if (document.querySelector("[data-testid=map]")) window.taken = performance.now() - start;
        else requestAnimationFrame(look);
    };
    look();
});"""


class PageHandler(Handler):
    """Browsers run no script whose type is not said."""

    def do_GET(self) -> None:
        self.path = self.path.split("?")[0]
        super().do_GET()

    def end_headers(self) -> None:
        self.send_header("Content-Type", KINDS.get(Path(self.path).suffix, "text/plain"))
        super().end_headers()


def serve(folder: Path, latency: float, port: Connection) -> None:
    PageHandler.folder, PageHandler.latency = folder, latency
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), PageHandler)
    port.send(server.server_address[1])
    server.serve_forever()


def write(path: Path, shape: Shape, num_tokens: int) -> None:
    sample = Generator(shape).sample(0, num_tokens)
    with h5traces.create(path) as writer:
        writer.append({**sample, "prompt_length": num_tokens // 2})


def make_files(folder: Path) -> None:
    write(folder / "one.h5", Shape(32), 43)
    count = make_sparse(folder / "one.h5", folder / "sparse.h5", NBYTES)
    print(f"{(folder / 'sparse.h5').stat().st_size / 1e9:.1f} GB, {count:,} samples")
    write(folder / "wide.h5", Shape(num_layers=4), 1024)
    write(folder / "long.h5", Shape(num_layers=1, num_heads=4), 4096)
    for name in PAGE_FILES:
        (folder / name).write_bytes(page_file(name))


def first_sample(browser: Browser, url: str) -> tuple[float, int]:
    page, requests = browser.new_page(), []
    page.on("request", lambda each: requests.append(each.url))
    page.add_init_script(WATCH)
    page.goto(f"{url}?archive=sparse.h5#view=sample&sample=0")
    page.wait_for_function("window.taken", timeout=60_000)
    taken = page.evaluate("window.taken") / 1000
    page.close()
    return taken, sum(each.endswith("/sparse.h5") for each in requests)


def layer_of_heads(browser: Browser, url: str) -> list[float]:
    page = browser.new_page()
    page.goto(f"{url}?archive=wide.h5#view=attention&sample=0&layer=0")
    page.wait_for_selector("[data-testid=heads][data-drawn=layer_000]", timeout=60_000)
    page.wait_for_timeout(1000)
    times = []
    for layer in (1, 2, 3):
        times.append(page.evaluate(LAYER, layer))
        page.wait_for_timeout(1000)
    page.close()
    return times


def frames(browser: Browser, url: str) -> dict[str, float]:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(f"{url}?archive=long.h5#view=attention&sample=0&layer=0")
    page.wait_for_selector("[data-testid=head]", timeout=60_000)
    page.wait_for_timeout(1000)
    canvas = "[data-testid=head]"
    found = {
        name: page.evaluate(FRAMES, [canvas, name == "wheel"]) for name in ("pointer", "wheel")
    }
    page.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=5.0, help="milliseconds")
    parser.add_argument("--folder", type=made_folder, help="where the archives go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name, sync_playwright() as playwright:
        folder = Path(name)
        make_files(folder)
        receiving, sending = multiprocessing.Pipe()
        arguments = (folder, options.latency / 1000, sending)
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=arguments, daemon=True
        )
        server.start()
        url = f"http://127.0.0.1:{receiving.recv()}/index.html"
        chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        first = [first_sample(browser, url) for _ in range(options.rounds)]
        layers = [each for _ in range(options.rounds) for each in layer_of_heads(browser, url)]
        rates = [frames(browser, url) for _ in range(options.rounds)]
        browser.close()
        server.terminate()
    median = statistics.median
    rows = [
        ("first sample of 100 GB, s", f"{median(each[0] for each in first):.2f}", "<= 2"),
        ("requests for it", str(max(each[1] for each in first)), "<= 3"),
        ("layer of 32 heads at 1,024 tokens, ms", f"{median(layers):.0f}", "<= 300"),
        (
            "frames/s, pointer at 4,096 tokens",
            f"{min(each['pointer'] for each in rates):.0f}",
            ">= 30",
        ),
        ("frames/s, wheel at 4,096 tokens", f"{min(each['wheel'] for each in rates):.0f}", ">= 30"),
    ]
    print("\n| measured | | target |\n|---|---:|---:|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
