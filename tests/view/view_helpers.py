"""Servers of the page, and archives to look at."""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import uvicorn

import h5traces
from h5traces.storage.remote.paths import DEFAULT_REMOTE
from h5traces.view.beside import shown
from h5traces.view.server import _listener, make_app

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = "token-of-the-tests"
WAIT = 60_000


@contextlib.contextmanager
def served(*paths: Path, scores: Path | None = None) -> Iterator[str]:
    """The address at which `h5traces view` would show these archives."""
    with _listener(0) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        folder = Path(tempfile.mkdtemp(dir=paths[0].parent))
        app = make_app(shown(paths, folder, scores=scores), TOKEN, host, DEFAULT_REMOTE)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://{host}/{TOKEN}/"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def published(folder: Path, *, ranges: bool = True, cors: bool = False) -> Iterator[str]:
    """A plain web server for a folder, with or without ranges, and open to other origins or not."""

    class Handler(BaseHTTPRequestHandler):
        def do_OPTIONS(self) -> None:
            self.send_response(204)
            self._allow()
            self.end_headers()

        def do_GET(self) -> None:
            file = folder / self.path.split("?")[0].strip("/")
            if not file.is_file():
                self.send_error(404)
                return
            data = file.read_bytes()
            kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
            stated = self.headers.get("Range")
            self.send_response(206 if stated and ranges else 200)
            self._allow()
            self.send_header("Content-Type", kinds.get(file.suffix, "text/plain"))
            if stated and ranges:
                first, last = stated.removeprefix("bytes=").split("-")
                start = int(first) if first else max(0, len(data) - int(last))
                stop = min(len(data), int(last) + 1) if first and last else len(data)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
                data = data[start:stop]
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data)

        def _allow(self) -> None:
            if cors:
                self.send_header("Access-Control-Allow-Origin", "*")
                self.send_header("Access-Control-Allow-Headers", "Range, If-Match")
                self.send_header("Access-Control-Expose-Headers", "Content-Range, ETag")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def item(number: int, length: int, layers: int = 3, heads: int = 2, **more: Any) -> dict[str, Any]:
    """A sample of a model with so many layers and heads."""
    rng = np.random.default_rng(number)
    weights = np.exp(rng.normal(size=(layers, heads, length, length))) * np.tri(length)
    weights /= weights.sum(-1, keepdims=True)
    return {
        "question_id": f"q{number}",
        "question": f"Question {number}?",
        "generated_answer": f"Answer {number}.",
        "hidden_states": list(rng.normal(size=(layers, length, 16)).astype(np.float16)),
        "attentions": list(weights.astype(np.float16)),
        "tokens": np.arange(length) + 10,
        "tokens_decoded": [f"w{each} " for each in range(length)],
        "prompt_length": length // 2,
        "label": number % 2,
        **more,
    }


def written(path: Path, *items: dict[str, Any], **options: Any) -> Path:
    """An archive of these samples."""
    with h5traces.create(path, **options) as writer:
        for each in items:
            writer.append(each)
    return path


def show(page: Any, url: str, **place: Any) -> None:
    """Open the page at a place."""
    page.goto("about:blank")
    page.goto(url + "#" + "&".join(f"{key}={value}" for key, value in place.items()))
    page.wait_for_selector("main, [role=alert]", timeout=WAIT)


def pointed_at(
    page: Any,
    picture: str,
    row: int,
    rows: int,
    column: int,
    columns: int,
    pattern: str = r"(layer|query|row) \d+",
) -> float:
    """The number that the page shows of a cell of a picture."""
    canvas = page.wait_for_selector(f"[data-testid={picture}]", timeout=WAIT)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x = box["x"] + (column + 0.5) / columns * box["width"]
    y = box["y"] + (row + 0.5) / rows * box["height"]
    page.mouse.move(x, y)
    page.wait_for_function(
        "pattern => RegExp(pattern).test(document.querySelector('[data-testid=value]').innerText)",
        arg=pattern,
        timeout=WAIT,
    )
    text = page.inner_text("[data-testid=value]")
    return float(re.search(r": (-?[\d.e+-]+)(?:\s|PNG|$)", text)[1])
