"""A server that answers as no honest one does: the first part of the path says how.

It writes to sockets itself, since no library lets one. It runs in its own process.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import socket
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HTML = b"Content-Type: text/html\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
OK, PARTIAL = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 206 Partial Content\r\n"
XML = b'<?xml version="1.0" encoding="UTF-8"?>'
MEGABYTE = 1 << 20
SECONDS_PER_BYTE = 0.05
BOMB = gzip.compress(b" " * (256 * MEGABYTE), 1)

asked: list[dict[str, object]] = []


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def endless(head: bytes, piece: bytes) -> Iterator[bytes]:
    yield head
    while True:
        yield piece


def with_length(head: bytes, body: bytes) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def page(*links: str) -> bytes:
    return with_length(OK + HTML, "".join(f'<a href="{each}">x</a>' for each in links).encode())


def ranged(headers: dict[str, str]) -> tuple[bytes, int]:
    """The head of an honest answer to a range of an object of a gigabyte, and its bytes."""
    first, _, last = headers.get("range", "bytes=-100").removeprefix("bytes=").partition("-")
    size = 1 << 30
    start, stop = (int(first), int(last) + 1) if first else (size - int(last), size)
    line = f'Content-Range: bytes {start}-{stop - 1}/{size}\r\nETag: "1"\r\n'
    return PARTIAL + line.encode(), stop - start


def answer(how: str, path: str, headers: dict[str, str]) -> Iterator[bytes]:
    """The bytes to send, piece by piece."""
    honest, nbytes = ranged(headers)
    links = b'<a href="0123456789.h5">x</a>' * (MEGABYTE // 29)
    match how:
        # --- listings of web servers
        case "endless-page":
            return endless(OK + HTML + CHUNKED + b"\r\n", chunk(b" " * MEGABYTE))
        case "endless-page-without-length":
            return endless(OK + HTML + b"\r\n", b"a" * MEGABYTE)
        case "endless-links":
            return endless(OK + HTML + CHUNKED + b"\r\n", chunk(links))
        case "many-links":
            return iter([with_length(OK + HTML, b'<a href="a.h5"/>' * 900_000)])
        case "bomb":
            return iter([with_length(OK + HTML + b"Content-Encoding: gzip\r\n", BOMB)])
        case "tree":
            return iter([page("a/", "b/", "c/")])
        case "deep":
            return iter([page("a/", "file.h5")])
        case "slow-page":
            return (bytes([byte]) for byte in with_length(OK + HTML, b" " * 10_000))
        # --- heads
        case "endless-headers":
            lines = itertools.repeat(b"X: " + b"y" * 1000 + b"\r\n")
            return itertools.chain([OK], lines)
        case "endless-header":
            return endless(OK + b"X: ", b"y" * MEGABYTE)
        case "endless-status":
            return endless(b"HTTP/1.1 200 ", b"y" * MEGABYTE)
        case "endless-continue":
            return endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000)
        case "slow-head":
            return (bytes([byte]) for byte in OK + b"X: " + b"y" * 8000)
        case "endless-trailers":
            head = OK + HTML + CHUNKED + b"\r\n" + chunk(b" ") + b"0\r\n"
            return endless(head, b"X-Trailer: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n" * 10_000)
        case "endless-extension":
            return endless(OK + HTML + CHUNKED + b"\r\n1;", b"y" * MEGABYTE)
        # --- ranges
        case "endless-range":
            return endless(honest + b"\r\n", b"x" * MEGABYTE)
        case "endless-chunked-range":
            return endless(honest + CHUNKED + b"\r\n", chunk(b"x" * MEGABYTE))
        case "endless-object":
            return endless(OK + b"\r\n", b"x" * MEGABYTE)
        case "long-range":
            return iter([with_length(honest, b"x" * (nbytes + 1))])
        case "two-lengths":
            more = b"Content-Length: 1\r\nContent-Length: %d\r\n\r\n" % nbytes
            return endless(honest + more, b"x" * MEGABYTE)
        case "range-bomb":
            head = honest + b"Content-Encoding: gzip\r\n"
            return iter([with_length(head, BOMB[:nbytes])])
        case "slow-range":
            whole = honest + b"Content-Length: %d\r\n\r\n" % nbytes
            return itertools.chain([whole], itertools.repeat(b"x"))
        case "silent-range":
            return itertools.chain(
                [honest + b"Content-Length: %d\r\n\r\nx" % nbytes], (time.sleep(60) for _ in [0])
            )
        # --- S3
        case "s3-endless-list" if "list-type" in path:
            return endless(OK + CHUNKED + b"\r\n", chunk(XML + b" " * MEGABYTE))
        case "s3-endless-entries" if "list-type" in path:
            entry = b"<Contents><Key>a.h5</Key><Size>1</Size></Contents>"
            head = OK + CHUNKED + b"\r\n" + chunk(XML + b"<ListBucketResult>")
            return endless(head, chunk(entry * 20_000))
        case "s3-endless-pages" if "list-type" in path:
            body = XML + b"<ListBucketResult><IsTruncated>true</IsTruncated>"
            body += b"<NextContinuationToken>again</NextContinuationToken></ListBucketResult>"
            return iter([with_length(OK, body)])
        case "s3-endless-error":
            head = b"HTTP/1.1 500 Oh\r\n" + CHUNKED + b"\r\n"
            return endless(head, chunk(XML + b" " * MEGABYTE))
        case "s3-no-range":
            return iter([with_length(OK, b"x" * nbytes)])
    message = f"no such way to answer: {how}"
    raise ValueError(message)


def redirect(where: str) -> Iterator[bytes]:
    head = b"HTTP/1.1 302 Found\r\nLocation: %s\r\n" % where.encode()
    return iter([with_length(head, b"")])


def redirected(how: str, path: str) -> Iterator[bytes] | None:
    """Answers that send elsewhere; the rest of the path says where."""
    rest = path.partition("/to/")[2]
    match how:
        case "redirect":
            return redirect(rest)
        case "redirect-with-body":
            head = b"HTTP/1.1 302 Found\r\nLocation: %s\r\n\r\n" % rest.encode()
            return endless(head, b"x" * MEGABYTE)
        case "circle":
            return redirect(path)
        case "s3-redirect":
            return redirect("http://127.0.0.1:9/other")
    return None


def serve(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        data = b""
        while b"\r\n\r\n" not in data:
            piece = connection.recv(65536)
            if not piece:
                return
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        path = first.split(" ")[1]
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        if path == "/__control__":
            while len(body) < int(headers.get("content-length", 0)):
                body += connection.recv(65536)
            found = json.dumps(asked).encode()
            asked.clear()
            connection.sendall(with_length(OK, found))
            return
        asked.append({"path": path, "headers": headers})
        how = path.strip("/").partition("/")[0].partition("?")[0]
        pieces = redirected(how, path) or answer(how, path, headers)
        for piece in pieces:
            if isinstance(piece, bytes):
                connection.sendall(piece)
            if how.startswith("slow"):
                time.sleep(SECONDS_PER_BYTE)


def main() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            connection, _ = server.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
