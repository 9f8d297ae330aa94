"""Runs moto's S3 server on a free port, which it prints; counts requests and fails on order."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Watched:
    """The server behind a list of what it was asked, and errors to answer with before it is."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.requests: list[dict[str, str]] = []
        # Status and S3's code for the next requests.
        self.failures: list[tuple[int, str]] = []
        # A failure of every request of a method whose query holds a text; `lost` does as it is
        # asked, and loses the answer; `reset` cuts the connection. All as often as they say.
        self.fail: dict[str, Any] = {}

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/__control__":
            return self.control(environ, start)
        asked = {
            "method": environ["REQUEST_METHOD"],
            "path": environ["PATH_INFO"],
            "query": environ["QUERY_STRING"],
            "range": environ.get("HTTP_RANGE", ""),
            "crc32": environ.get("HTTP_X_AMZ_CHECKSUM_CRC32", ""),
            "md5": environ.get("HTTP_CONTENT_MD5", ""),
            "condition": environ.get("HTTP_IF_NONE_MATCH", ""),
        }
        self.requests.append(asked)
        if self.failures:
            status, code = self.failures.pop(0)
            body = f"<Error><Code>{code}</Code><Message>said the test</Message></Error>".encode()
            start(f"{status} {code}", [("Content-Type", "application/xml")])
            return [body]
        fail = self.fail
        if fail and asked["method"] == fail["method"] and fail["query"] in asked["query"]:
            fail["after"] = fail.get("after", 0) - 1
            if fail["after"] < 0 and fail["times"]:
                fail["times"] -= 1
                if fail.get("lost"):
                    # All of it, so that it is done.
                    b"".join(self.app(environ, lambda *_: None))
                if fail.get("reset"):
                    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                    raise ConnectionResetError
                code = fail["code"]
                body = f"<Error><Code>{code}</Code><Message>said the test</Message></Error>"
                start(f"{fail['status']} {code}", [("Content-Type", "application/xml")])
                return [body.encode()]
        return self.app(environ, start)

    def control(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        for name, value in json.loads(environ["wsgi.input"].read(length) or "{}").items():
            setattr(self, name, value)
        found, self.requests = self.requests, []
        start("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(found).encode()]


class Quiet(WSGIRequestHandler):
    """Says nothing."""

    protocol_version = "HTTP/1.1"

    def log(self, *_: Any, **__: Any) -> None:
        pass


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, Watched(), threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)
    server.serve_forever()
