"""A local server for the page and for byte ranges of the archives that were named."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import sys
import tempfile
import threading
import webbrowser
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from h5traces.arguments import checked
from h5traces.errors import H5TracesError, OptionError
from h5traces.paths import expand_sources
from h5traces.storage.files import open_regular
from h5traces.storage.remote.file import RemoteFile
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemoteOptions, RemotePath
from h5traces.view.beside import Shown, checks_document, shown
from h5traces.view.static import LIST_FILE, PAGE_FILES, list_document, page_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from h5traces.paths import PathLike, Source

_HOST: Final = "127.0.0.1"
_RANGE: Final = re.compile(r"bytes=(?:(\d{1,19})-(\d{0,19})|-(\d{1,19}))\Z", re.ASCII)
# A browser asks for the chunks of one layer at a time.
_MOST_NBYTES: Final = 512 << 20
_HEADERS: Final = {
    # Nothing of other servers, no inline scripts; the checksums are compiled in the page.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; "
        "connect-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, slots=True)
class Page:
    """A page that is served.

    Attributes
    ----------
    url
        Its address, with the token that every request needs.
    num_archives
        How many archives it shows.
    has_browser
        False where a browser was to be opened, and this machine has none with a display.
    """

    url: str
    num_archives: int
    has_browser: bool = True


@checked
def serve(
    sources: Source | Iterable[Source],
    *,
    port: int = 0,
    browser: bool = True,
    labels: PathLike | Literal[False] | None = None,
    scores: PathLike | None = None,
    remote: RemoteOptions = DEFAULT_REMOTE,
    started: Callable[[Page], None] | None = None,
) -> None:
    """Show archives in the browser until Ctrl-C.

    Parameters
    ----------
    sources
        Archives, globs, folders, or addresses (``s3://``, ``hf://``, ``https://``).
    port
        Of 127.0.0.1; a free one by default.
    browser
        Whether to open the browser.
    labels
        As for `h5traces.open`: by default those beside the archives.
    scores
        A features file (``.h5``, ``.npz``) whose numbers are shown for layers and tokens.
    remote
        How archives on servers are read.
    started
        Called once the page can be opened.

    Raises
    ------
    OptionError
        The port is in use, or `scores` is not a features file of these archives.
    FileNotFoundError
        There is no such archive.
    """
    paths = expand_sources(sources, remote=remote)
    with _listener(port) as listener, tempfile.TemporaryDirectory() as folder:
        token, host = secrets.token_urlsafe(16), f"{_HOST}:{listener.getsockname()[1]}"
        can_open = browser and _has_browser()
        page = Page(f"http://{host}/{token}/", len(paths), can_open or not browser)
        app = make_app(
            shown(paths, Path(folder), labels=labels, scores=scores), token, host, remote
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
        if started is not None:
            started(page)
        if can_open:
            # Some browsers return when they are closed.
            threading.Thread(target=webbrowser.open, args=(page.url,), daemon=True).start()
        # Ctrl-C is how it ends.
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def _has_browser() -> bool:
    """Whether a browser can be opened; those that would take over the terminal do not count."""
    has_display = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER"} & set(
        os.environ
    )
    with contextlib.suppress(webbrowser.Error):
        return bool(has_display and webbrowser.get())
    return False


def _listener(port: int) -> socket.socket:
    try:
        return socket.create_server((_HOST, port))
    except OSError as error:
        why = os.strerror(error.errno or 0)
        message = f"port={port}: {why}; name another, or none to take a free one"
        raise OptionError(message) from error


def make_app(archives: Sequence[Shown], token: str, host: str, remote: RemoteOptions) -> ASGIApp:
    """The application of `serve`: everything lies below ``/token/``, all else does not exist."""
    listed, paths = [], [each.path for each in archives]
    for number, each in enumerate(archives):
        entry: dict[str, Any] = {
            "url": f"files/{number}/{quote(each.path.name)}",
            "name": each.path.name,
            "checks": f"beside/{number}/checks",
            "scores": [],
        }
        if each.sidecar is not None and each.sidecar.exists():
            entry["labels"] = f"beside/{number}/labels"
        for scores in each.scores:
            url = f"files/{len(paths)}/{scores.path.name}"
            entry["scores"].append({**scores.entry, "url": url})
            paths.append(scores.path)
        listed.append(entry)
    fixed = {name: (page_file(name), kind) for name, kind in PAGE_FILES.items()}
    fixed[""] = fixed["index.html"]
    fixed[LIST_FILE] = (list_document(listed), "application/json")
    open_files: dict[int, RemoteFile] = {}

    def part(number: int, request: Request) -> Response:
        path = paths[number]
        if not isinstance(path, RemotePath):
            with os.fdopen(open_regular(path), "rb") as file:
                status = os.fstat(file.fileno())
                tag = f'"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"'
                read = partial(os.pread, file.fileno())
                return _answer(request, status.st_size, tag, lambda start, size: read(size, start))
        if number not in open_files:
            open_files[number] = RemoteFile(path, remote)
        # A file of another version is an error of `RemoteFile` itself.
        return _answer(request, open_files[number].nbytes, '"remote"', open_files[number].read_at)

    async def page(request: Request) -> Response:
        found = fixed.get(request.path_params["name"])
        return _missing() if found is None else Response(found[0], media_type=found[1])

    async def archive(request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(paths):
            return _missing()
        try:
            return await run_in_threadpool(part, number, request)
        except FileNotFoundError:
            return _missing()
        except (H5TracesError, OSError) as error:
            return PlainTextResponse(str(error), 502)

    async def beside(request: Request) -> Response:
        number, name = request.path_params["number"], request.path_params["name"]
        if number >= len(archives) or name not in ("labels", "checks"):
            return _missing()
        each = archives[number]
        read = each.labels if name == "labels" else partial(checks_document, each)
        try:
            content = await run_in_threadpool(read)
        except (H5TracesError, OSError) as error:
            return PlainTextResponse(str(error), 502)
        return _missing() if content is None else Response(content, media_type="application/json")

    routes = [
        Route(f"/{token}/beside/{{number:int}}/{{name}}", beside),
        Route(f"/{token}/files/{{number:int}}/{{name}}", archive),
        Route(f"/{token}/{{name:path}}", page),
    ]
    return _Guard(Starlette(routes=routes), host)


def _answer(request: Request, size: int, tag: str, read: Callable[[int, int], bytes]) -> Response:
    """The range of a file that a request asks for."""
    headers = {"Accept-Ranges": "bytes", "ETag": tag}
    if request.headers.get("if-match", tag) not in (tag, "*"):
        return Response(status_code=412, headers=headers)
    stated = _RANGE.match(request.headers.get("range", ""))
    if stated is None:
        message = "archives are read by ranges: send 'Range: bytes=FIRST-LAST'"
        return PlainTextResponse(message, 416, {**headers, "Content-Range": f"bytes */{size}"})
    first, last, suffix = (
        None if each is None or not each else int(each) for each in stated.groups()
    )
    start = max(0, size - suffix) if suffix is not None else first or 0
    stop = size if suffix is not None or last is None else min(size, last + 1)
    if start >= stop or stop - start > _MOST_NBYTES:
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    data = b"" if request.method == "HEAD" else read(start, stop - start)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Response(data, 206, headers, media_type="application/octet-stream")


def _missing() -> Response:
    return PlainTextResponse(
        "there is nothing here; the address is printed by 'h5traces view'", 404
    )


class _Guard:
    """Turns away requests that other pages or other names of this machine send."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        is_own = headers.get("host") == self._host and origin in (None, f"http://{self._host}")
        if not is_own:
            await PlainTextResponse("requests come from this page only", 403)(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_guarded)
