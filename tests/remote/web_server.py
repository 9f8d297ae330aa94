"""A web server of the standard library that knows ranges, counts requests and fails on order.

It runs in its own process: a forked reader must not inherit its sockets.
"""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import re
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d*)-(\d*)\Z")


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; ``/__control__`` tells and sets what tests need."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.lock = threading.Lock()
        self.requests: list[dict[str, str]] = []
        self.in_hand = 0
        # Statuses to answer the next requests with, before serving again.
        self.failures: list[int] = []
        # "etag", "time" or "none": what answers name as the version of a file
        self.version = "etag"
        self.ranges = True
        self.delay = 0.0
        self.token = ""
        # Another server that all requests are sent on to.
        self.redirect = ""
        # What to answer wrongly: "other range", "no size", "no length" or "more".
        self.lie = ""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        body = self.rfile.read(length)
        if self.path == "/__control__":
            with self.server.lock:
                for name, value in json.loads(body).items():
                    setattr(self.server, name, value)
                found, self.server.requests = self.server.requests, []
            self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
            return
        self.do_GET()

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.in_hand += 1
        try:
            self.do_one()
        finally:
            with self.server.lock:
                self.server.in_hand -= 1

    def do_one(self) -> None:
        asked = {
            "method": self.command,
            "path": self.path,
            "range": self.headers.get("Range", ""),
            "authorization": self.headers.get("Authorization", ""),
        }
        with self.server.lock:
            asked["at_once"] = str(self.server.in_hand)
            self.server.requests.append(asked)
            failure = self.server.failures.pop(0) if self.server.failures else 0
        time.sleep(self.server.delay)
        if failure == -1:  # half an answer, then the connection breaks
            self.send_response(206)
            first, _, last = asked["range"].removeprefix("bytes=").partition("-")
            self.send_header("Content-Length", str(int(last) + 1 - int(first)))
            self.send_header("Content-Range", f"bytes {first}-{last}/1000000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
            self.close_connection = True
            return
        if failure:
            self.answer(failure, b"failed", {})
            return
        if self.server.redirect:
            self.answer(302, b"", {"Location": self.server.redirect + self.path})
            return
        if self.server.token and asked["authorization"] != f"Bearer {self.server.token}":
            self.answer(401 if not asked["authorization"] else 403, b"", {})
            return
        self.serve(urlsplit(self.path))

    def serve(self, url) -> None:
        if url.path.startswith("/api/"):
            self.hub(url)
            return
        path = self.server.folder / unquote(url.path).lstrip("/")
        # The addresses of files in repositories of the hub.
        found = re.match(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/", url.path)
        if found:
            path = self.server.folder / found["repo"] / unquote(url.path[found.end() :])
        if path.is_dir():
            links = "".join(f'<a href="{each.name}">{each.name}</a>' for each in path.iterdir())
            self.answer(200, links.encode(), {"Content-Type": "text/html"})
        elif path.is_file():
            self.file(path)
        else:
            self.answer(404, b"", {})

    def file(self, path: Path) -> None:
        data = path.read_bytes()
        headers = {"Content-Type": "application/octet-stream"}
        if self.server.version == "etag":
            headers["ETag"] = f'"{hashlib.md5(data).hexdigest()}"'
        elif self.server.version == "time":
            headers["Last-Modified"] = self.date_time_string(path.stat().st_mtime)
        found = _RANGE.match(self.headers.get("Range", "")) if self.server.ranges else None
        if found is None:
            self.answer(200, data, headers)
            return
        if int(found[1] or 0) >= len(data):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        if found[1]:
            start, stop = int(found[1]), min(len(data), int(found[2]) + 1)
        else:
            start, stop = max(0, len(data) - int(found[2])), len(data)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        body = data[start:stop]
        if self.server.lie == "other range":
            headers["Content-Range"] = f"bytes {start + 1}-{stop}/{len(data)}"
        elif self.server.lie == "no size":
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/*"
        elif self.server.lie == "more":
            body += b"x" * 1000
        elif self.server.lie == "no length":
            self.without_length(body, headers)
            return
        self.answer(206, body, headers)

    def hub(self, url) -> None:
        """The two calls of the hub's API that reading by address and by glob make."""
        found = re.match(
            r"/api/datasets/(?P<repo>[^/]+/[^/]+)(/(?P<call>revision|tree)/(?P<revision>[^/]+))?"
            r"(/(?P<below>.*))?\Z",
            url.path,
        )
        folder = self.server.folder / found["repo"] if found else None
        if folder is None or not folder.is_dir():
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        if found["call"] == "tree":
            below = folder / unquote(found["below"] or "")
            recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
            entries = sorted(below.rglob("*") if recursive else below.iterdir())
            document: object = [
                {
                    "type": "directory" if each.is_dir() else "file",
                    "oid": "0" * 40,
                    "size": 0 if each.is_dir() else each.stat().st_size,
                    "path": str(each.relative_to(folder)),
                }
                for each in entries
            ]
        else:
            document = {"id": found["repo"], "sha": "1" * 40, "siblings": [], "private": False}
        self.answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def without_length(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(206)
        for name, value in {**headers, "Transfer-Encoding": "chunked"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    server = Server(parser.parse_args().folder)
    print(server.server_address[1], flush=True)
    server.serve_forever()
