"""Objects and folders on web servers, read with aiohttp through fsspec's session."""

from __future__ import annotations

import contextlib
import http
import re
from html import unescape
from typing import TYPE_CHECKING, Any, Final

from fsspec.asyn import sync
from yarl import URL

from h5traces.errors import RemoteError
from h5traces.storage.remote.answers import (
    HTTP_ERRORS,
    RangeRequest,
    TooMuchError,
    in_time,
    prompt_head,
    read_body,
    reject,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from h5traces.storage.remote.listing import Listing
    from h5traces.storage.remote.paths import RemoteOptions, RemotePath


_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS: Final = 10
# Bodies of redirects up to this are read, so that the connection can be used again.
_MOST_UNREAD_NBYTES: Final = 64 << 10
# What goes to every host; all else in the storage options may be secret.
_FOR_ALL_HOSTS: Final = frozenset({"ssl", "proxy", "proxy_auth", "proxy_headers"})
# Of folders in folders; a page that links to a folder below it would never end.
_MOST_DEPTH: Final = 32
_LINK: Final = re.compile(
    r"""href\s*=\s*(?:"([^"<>]{1,4096})"|'([^'<>]{1,4096})')""", re.IGNORECASE
)


class WebClient:
    """A web server as a user reaches it.

    `files` is fsspec's file system with the user's storage options, `bare` one without: for other
    hosts that the server redirects to. `headers` are sent beside those of the storage options.
    """

    def __init__(
        self,
        files: Any,
        bare: Any,
        options: RemoteOptions,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.files, self._bare, self._options = files, bare, options
        self._headers = dict(headers or {})

    def read(self, request: RangeRequest, url: str) -> bytes:
        """The bytes of a range; size and version of the object go into the request."""
        data: bytes = self._wait(request.path, self._read, request, url)
        return data

    def links(self, listing: Listing, url: str) -> list[str]:
        """The addresses that the page of a folder links to; none if there is no such page."""
        found: list[str] = self._wait(listing.path, self._links, listing, url)
        return found

    def _wait(self, path: RemotePath, function: Any, *arguments: Any) -> Any:
        async def run() -> Any:
            return await in_time(path, self._options, function(*arguments))

        return sync(self.files.loop, run)

    async def _read(self, request: RangeRequest, url: str) -> bytes:
        async with self._answer(request.path, url, {"Range": request.header}) as answer:
            _check_head(request, answer)
            try:
                return await read_body(answer.content.read, request.nbytes, self._options)
            except TooMuchError:
                request.reject_more()

    async def _links(self, listing: Listing, url: str) -> list[str]:
        listing.count_request()
        async with self._answer(listing.path, url, {}) as answer:
            if answer.status == http.HTTPStatus.NOT_FOUND:
                return []
            if answer.status >= HTTP_ERRORS:
                reject(listing.path, answer.status, answer.reason or "")
            if answer.content_type != "text/html":
                return []
            most = self._options.max_listing_nbytes
            try:
                data = await read_body(answer.content.read, most, self._options)
            except TooMuchError:
                listing.reject_length()
        # Relative to the address asked for, wherever that redirects to.
        base, found = URL(url), []
        for parts in _LINK.finditer(data.decode("utf-8", "ignore")):
            listing.count(1)
            with contextlib.suppress(ValueError):
                found.append(str(base.join(URL(unescape(parts[1] or parts[2])))))
        return found

    @contextlib.asynccontextmanager
    async def _answer(
        self, path: RemotePath, url: str, headers: Mapping[str, str]
    ) -> AsyncIterator[Any]:
        """The answer of the server, or of the one that it redirects to; its body is not read.

        What the user gave goes to the named host only, and https never becomes http.
        """
        place, is_own = self.files.encode_url(url), True
        for _ in range(_MOST_REDIRECTS + 1):
            answer = await self._ask(place, headers, is_own=is_own)
            try:
                if answer.status not in _REDIRECTS:
                    yield answer
                    return
                with contextlib.suppress(TooMuchError):
                    await read_body(answer.content.read, _MOST_UNREAD_NBYTES, self._options)
            finally:
                # One that was read to its end has given its connection back before.
                answer.close()
            target = _redirected(path, place, answer.headers.get("Location", ""))
            # Not again, either, once another host has had its say.
            is_own = is_own and _is_same_host(place, target)
            place = target
        message = f"{path}: the server redirects more than {_MOST_REDIRECTS} times"
        raise RemoteError(message)

    async def _ask(self, place: URL, headers: Mapping[str, str], *, is_own: bool) -> Any:
        """The head of one answer."""
        given = dict(self.files.kwargs)
        if is_own:
            given["headers"] = {**given.get("headers", {}), **self._headers, **headers}
        else:
            given = {name: value for name, value in given.items() if name in _FOR_ALL_HOSTS}
            given["headers"] = dict(headers)
        session = await (self.files if is_own else self._bare).set_session()
        async with prompt_head(self._options):
            return await session.get(place, allow_redirects=False, **given)


def _redirected(path: RemotePath, place: URL, location: str) -> URL:
    """Where a redirect leads to."""
    try:
        target = place.join(URL(location))
    except ValueError:
        target = URL()
    if not location or target.scheme not in ("http", "https") or not target.host:
        message = f"{path}: the server redirects to no web address"
        raise RemoteError(message)
    if place.scheme == "https" and target.scheme == "http":
        message = (
            f"{path}: the server redirects from https to http ({target.host}), where anybody on "
            "the way can read and change what is sent; name an address that stays with https"
        )
        raise RemoteError(message)
    return target


def _is_same_host(place: URL, target: URL) -> bool:
    if place.host != target.host:
        return False
    is_upgrade = place.scheme == "http" and target.scheme == "https"
    if is_upgrade and place.is_default_port() and target.is_default_port():
        return True
    return place.port == target.port and place.scheme == target.scheme


def _check_head(request: RangeRequest, answer: Any) -> None:
    """Note size and version of an object; an error where the body must not be read."""
    if answer.status >= HTTP_ERRORS:
        reject(request.path, answer.status, answer.reason or "")
    request.version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
    length = answer.content_length
    if answer.status == http.HTTPStatus.PARTIAL_CONTENT:
        request.read_content_range(answer.headers.get("Content-Range", ""))
        if length is None:
            message = f"{request.path}: the server does not say how many bytes it sends"
            raise RemoteError(message)
        if length > request.nbytes:
            request.reject_more()
        return
    # The server sends the whole object: good if no more was asked for.
    if length is None or length > request.nbytes or request.offset:
        message = (
            f"{request.path}: the server does not support range requests; download the archive "
            "and open the file"
        )
        raise RemoteError(message)
    request.total_nbytes = length


class WebFolders:
    """Folders of a web server: pages that link to what lies below them; a `Folders`."""

    def __init__(self, client: WebClient, listing: Listing) -> None:
        self._client, self._listing = client, listing

    def children(self, folder: str) -> Iterator[str]:
        """Addresses of what the page of a folder links to directly below it."""
        place = str(URL(folder))
        for url in dict.fromkeys(self._client.links(self._listing, folder)):
            below = url.removeprefix(place) if url.startswith(place) else ""
            path = below.partition("?")[0].partition("#")[0]
            if path and "/" not in path[:-1]:
                yield f"{folder}{below}"

    def below(self, folder: str, depth: int = 0) -> Iterator[str]:
        """Addresses of all objects below a folder."""
        if depth > _MOST_DEPTH:
            return
        for url in self.children(folder):
            if url.endswith("/"):
                yield from self.below(url, depth + 1)
            else:
                yield url


async def new_session(**arguments: Any) -> Any:
    """aiohttp's session, for fsspec."""
    import aiohttp

    # Ranges are of the bytes as they are sent, so they must not be compressed on the way.
    headers = {"Accept-Encoding": "identity", **arguments.pop("headers", {})}
    return aiohttp.ClientSession(headers=headers, **arguments)
