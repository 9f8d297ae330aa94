"""Objects on servers, through fsspec; nothing else here knows of it."""

from __future__ import annotations

import asyncio
import http
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

import fsspec
from fsspec.asyn import sync

from h5traces.errors import RemoteError
from h5traces.storage.remote.paths import RemotePath
from h5traces.storage.remote.transport import Reply, TemporaryError, persistently

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from h5traces.storage.remote.paths import RemoteOptions
    from h5traces.storage.remote.transport import ByteRange, Transport


_TEMPORARY_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_REFUSED_STATUS: Final = frozenset({401, 403, 407})
# S3 says so with status 400.
_REFUSED_CODES: Final = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"}
)
_RANGE_NOT_SATISFIABLE: Final = 416


def refuse(path: RemotePath, status: int, reason: str) -> NoReturn:
    """Raise what a status of HTTP means.

    Raises
    ------
    FileNotFoundError, RemoteError, TemporaryError
        As `Transport` says.
    """
    said = f"{status} {reason}".strip()
    if status in (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.GONE):
        message = f"{path}: no such object on the server ({said})"
        raise FileNotFoundError(message)
    if status in _REFUSED_STATUS or any(code in reason for code in _REFUSED_CODES):
        message = (
            f"{path}: the server refuses access ({said}): credentials are missing, wrong or "
            "expired, or may not read this; renew them, or hand them over in storage_options"
        )
        raise RemoteError(message)
    if status in _TEMPORARY_STATUS:
        raise TemporaryError(said)
    if status == _RANGE_NOT_SATISFIABLE:
        message = f"{path}: the object is empty, or shorter than it was ({said}); no archive"
        raise RemoteError(message)
    message = f"{path}: the server refuses the request ({said})"
    raise RemoteError(message)


def translate(path: RemotePath, error: Exception) -> NoReturn:
    """Raise what an error of one of the libraries means.

    Raises
    ------
    FileNotFoundError, RemoteError, TemporaryError
        As `Transport` says.
    """
    for each in _causes(error):
        status, reason = _status(each)
        if status:
            refuse(path, status, reason)
    if isinstance(error, FileNotFoundError):
        message = f"{path}: no such object on the server"
        raise FileNotFoundError(message) from error
    if _lacks_credentials(error):
        message = (
            f"{path}: there are no credentials ({error}); set them up for this machine, or hand "
            "them over in storage_options ({'anon': True} for public data)"
        )
        raise RemoteError(message) from error
    if isinstance(error, PermissionError):
        refuse(path, http.HTTPStatus.FORBIDDEN, str(error))
    if _is_network_failure(error):
        raise TemporaryError(str(error) or type(error).__name__) from error
    if isinstance(error, ImportError):
        raise error
    message = f"{path}: cannot be read: {type(error).__name__}: {error}"
    raise RemoteError(message) from error


def _causes(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found


def _status(error: BaseException) -> tuple[int, str]:
    """The status of HTTP that an error of botocore, aiohttp or httpx carries; 0 for none."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        said = answer.get("Error", {})
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return int(status), f"{said.get('Code', '')}: {said.get('Message', '')}"
    status = getattr(error, "status", None) or getattr(answer, "status_code", None)
    if isinstance(status, int):
        reason = getattr(error, "message", None) or getattr(answer, "reason_phrase", "")
        return status, str(reason)
    return 0, ""


def _lacks_credentials(error: Exception) -> bool:
    names = {each.__name__ for each in type(error).__mro__}
    return bool(
        names & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
    )


def _is_network_failure(error: Exception) -> bool:
    """Whether trying again makes sense; by name, since which library is there depends."""
    if isinstance(error, (OSError, asyncio.TimeoutError)):
        return True
    names = {each.__name__ for each in type(error).__mro__}
    return bool(
        names
        & {
            "HTTPClientError",  # botocore: timed out, connection closed
            "ConnectionError",
            "IncompleteReadError",
            "ResponseStreamingError",
            "ClientError",  # aiohttp's; botocore's has a status
            "TransportError",  # httpx
        }
    )


_HTTP_ERRORS: Final = 400

_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})\Z")

# By process, protocol, options and environment: connections of one process are of no use in
# another, and credentials that were renewed are read anew.
_filesystems: dict[tuple[int, str, str, str], Any] = {}
_ENVIRONMENT: Final = ("AWS_", "HF_")


def filesystem(protocol: str, options: RemoteOptions) -> Any:
    """The file system for a protocol in this process.

    fsspec itself keeps one for each thread; connections of all threads are shared here.

    Raises
    ------
    ImportError
        The library for the protocol is not installed.
    RemoteError
        fsspec knows no such protocol.
    """
    arguments = {**_defaults(protocol, options), **options.storage_options}
    environment = sorted(each for each in os.environ.items() if each[0].startswith(_ENVIRONMENT))
    key = (os.getpid(), protocol, repr(sorted(arguments.items())), repr(environment))
    found = _filesystems.get(key)
    if found is None:
        try:
            found = fsspec.filesystem(protocol, skip_instance_cache=True, **arguments)
        except ValueError as error:
            message = f"{protocol}:// cannot be opened: {error}"
            raise RemoteError(message) from error
        _filesystems[key] = found
    return found


def _forget(files: Any) -> None:
    """The next request makes a new file system: a refused one may hold old credentials."""
    for key in [key for key, known in _filesystems.items() if known is files]:
        _filesystems.pop(key, None)


def _defaults(protocol: str, options: RemoteOptions) -> dict[str, Any]:
    if protocol in ("s3", "s3a"):
        # Our own attempts are enough: theirs would multiply.
        config = {
            "retries": {"max_attempts": 0},
            "connect_timeout": options.timeout,
            "read_timeout": options.timeout,
            "max_pool_connections": 4 * options.max_parallel,
        }
        given: Mapping[str, Any] = options.storage_options.get("config_kwargs", {})
        return {"config_kwargs": {**config, **given}, "use_listings_cache": False}
    return {}


def transport_for(path: RemotePath, options: RemoteOptions) -> Transport:
    """The transport for an address; see `h5traces.storage.remote.transport`."""
    if path.is_web:
        return WebTransport(path, path.url, filesystem(path.protocol, options), options)
    if path.protocol in ("s3", "s3a"):
        return S3Transport(path, filesystem("s3", options))
    if path.protocol == "hf":
        return _hub_transport(path, options)
    return PlainTransport(path, filesystem(path.protocol, options))


def list_objects(
    path: RemotePath, suffixes: tuple[str, ...], options: RemoteOptions
) -> list[RemotePath]:
    """What a pattern matches, or what lies below a folder, by address."""
    files = filesystem(path.protocol, options)

    def found() -> list[str]:
        try:
            files.invalidate_cache()
            if path.is_pattern:
                return list(files.glob(path.url))
            return [each for each in files.find(path.url) if each.endswith(suffixes)]
        except FileNotFoundError:
            return []
        except Exception as error:  # every library has its own
            translate(path, error)

    try:
        names = persistently(path, options.attempts, found)
    except RemoteError:
        _forget(files)
        raise
    return sorted(RemotePath(files.unstrip_protocol(each)) for each in names)


def _asked(path: RemotePath, files: Any, request: Coroutine[Any, Any, Reply]) -> Reply:
    """The answer to a request, run in the file system's loop."""

    async def run() -> Reply:
        return await request

    try:
        try:
            reply: Reply = sync(files.loop, run)
        except (RemoteError, TemporaryError, FileNotFoundError):
            raise
        except Exception as error:
            translate(path, error)
    except RemoteError:
        _forget(files)
        raise
    return reply


class WebTransport:
    """An object on a web server.

    Parameters
    ----------
    path
        The address for messages.
    url
        Where it is asked for.
    files
        fsspec's file system for web servers.
    options
        For its timeout.
    headers
        To send beside those of the storage options.
    """

    def __init__(
        self,
        path: RemotePath,
        url: str,
        files: Any,
        options: RemoteOptions,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        import aiohttp

        self._path, self._url, self._files = path, url, files
        self._headers = headers or {}
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=options.timeout, sock_read=options.timeout
        )

    def tail(self, nbytes: int) -> Reply:
        return self._ask(None, nbytes)

    def get(self, wanted: ByteRange) -> Reply:
        return self._ask(wanted.offset, wanted.nbytes)

    def _ask(self, offset: int | None, nbytes: int) -> Reply:
        return _asked(self._path, self._files, self._request(offset, nbytes))

    async def _request(self, offset: int | None, nbytes: int) -> Reply:
        arguments = dict(self._files.kwargs)
        # Ranges are of the bytes as they are sent, so they must not be compressed on the way.
        headers = {**arguments.pop("headers", {}), **self._headers, "Accept-Encoding": "identity"}
        session = await self._files.set_session()
        url = self._files.encode_url(self._url)
        async with session.get(
            url,
            headers={**headers, "Range": _range(offset, nbytes)},
            timeout=self._timeout,
            **arguments,
        ) as reply:
            if reply.status >= _HTTP_ERRORS:
                refuse(self._path, reply.status, reply.reason or "")
            version = reply.headers.get("ETag") or reply.headers.get("Last-Modified")
            if reply.status == http.HTTPStatus.PARTIAL_CONTENT:
                content_range = reply.headers.get("Content-Range", "")
                total = _total(self._path, content_range, offset, nbytes)
            else:
                total = self._whole(reply.content_length, nbytes)
            data = await self._body(reply.content, nbytes)
        return _complete(Reply(data, total, version), nbytes, offset)

    async def _body(self, content: Any, nbytes: int) -> bytes:
        """What the server sends, if it is no more than was asked for."""
        parts, found = [], 0
        while part := await content.read(nbytes + 1 - found):
            parts.append(part)
            found += len(part)
            if found > nbytes:
                message = f"{self._path}: the server sends more than the {nbytes} bytes asked for"
                raise RemoteError(message)
        return b"".join(parts)

    def _whole(self, length: int | None, nbytes: int) -> int:
        """Where a server sends all: its length, if no more was asked for."""
        if length is None or length > nbytes:
            message = (
                f"{self._path}: the server does not support range requests; download the archive "
                "and open the file"
            )
            raise RemoteError(message)
        return length


class S3Transport:
    """An object in an S3 bucket, or in a store that speaks S3."""

    def __init__(self, path: RemotePath, files: Any) -> None:
        self._path, self._files = path, files
        self._bucket, self._key, self._object_version = files.split_path(path.url)

    def tail(self, nbytes: int) -> Reply:
        return self._ask(None, nbytes)

    def get(self, wanted: ByteRange) -> Reply:
        return self._ask(wanted.offset, wanted.nbytes)

    def _ask(self, offset: int | None, nbytes: int) -> Reply:
        return _asked(self._path, self._files, self._request(offset, nbytes))

    async def _request(self, offset: int | None, nbytes: int) -> Reply:
        await self._files.set_session()
        client = await self._files.get_s3(self._bucket)
        arguments = {**self._files.req_kw, "Bucket": self._bucket, "Key": self._key}
        if self._object_version is not None:
            arguments["VersionId"] = self._object_version
        found = await client.get_object(Range=_range(offset, nbytes), **arguments)
        total = _total(self._path, found.get("ContentRange", ""), offset, nbytes)
        async with found["Body"] as body:
            data = await body.read()
        return _complete(Reply(data, total, found.get("ETag")), nbytes, offset)


class PlainTransport:
    """An object that fsspec reads in its own way; its version is what ``info`` says of it."""

    def __init__(self, path: RemotePath, files: Any) -> None:
        self._path, self._files = path, files

    def tail(self, nbytes: int) -> Reply:
        return self._ask(None, nbytes)

    def get(self, wanted: ByteRange) -> Reply:
        return self._ask(wanted.offset, wanted.nbytes)

    def _ask(self, offset: int | None, nbytes: int) -> Reply:
        try:
            self._files.invalidate_cache()
            facts = self._files.info(self._path.url)
            total = int(facts["size"])
            start = max(0, total - nbytes) if offset is None else offset
            data = self._files.cat_file(self._path.url, start=start, end=start + nbytes)
        except Exception as error:
            translate(self._path, error)
        marks = (facts.get(name) for name in ("ETag", "etag", "mtime", "created", "modified"))
        version = next((str(mark) for mark in marks if mark is not None), None)
        return _complete(Reply(data, total, version), nbytes, offset)


def _hub_transport(path: RemotePath, options: RemoteOptions) -> WebTransport:
    """A file of a repository on the Hugging Face hub: a web address behind its path."""
    from huggingface_hub import get_token, hf_hub_url

    files = filesystem("hf", options)
    try:
        found = files.resolve_path(path.url)
        url = hf_hub_url(
            found.repo_id,
            found.path_in_repo,
            repo_type=found.repo_type,
            revision=found.revision,
            endpoint=files.endpoint,
        )
    except Exception as error:
        translate(path, error)
    token = files.token if isinstance(files.token, str) else get_token()
    headers = {"Authorization": f"Bearer {token}"} if token and files.token is not False else {}
    web = filesystem("https", replace(options, storage_options={}))
    return WebTransport(path, url, web, options, headers)


def _range(offset: int | None, nbytes: int) -> str:
    """The header for a range, or for the last bytes."""
    return f"bytes=-{nbytes}" if offset is None else f"bytes={offset}-{offset + nbytes - 1}"


def _total(path: RemotePath, content_range: str, offset: int | None, nbytes: int) -> int:
    """Size of the object by the header of an answer, which must be the range asked for."""
    found = _CONTENT_RANGE.match(content_range)
    if found is None:
        message = f"{path}: the server answers with the range {content_range!r}, without the size"
        raise RemoteError(message)
    first, last, total = (int(part) for part in found.groups())
    expected = max(0, total - nbytes) if offset is None else offset
    if first != expected or last - first >= nbytes:
        message = f"{path}: the server answers with the range {content_range!r}, not with what was "
        msg = f"{message}asked for ({_range(offset, nbytes)})"
        raise RemoteError(msg)
    return total


def _complete(reply: Reply, nbytes: int, offset: int | None) -> Reply:
    """The reply, if it is whole: up to the end of the object, where that comes first."""
    expected = max(0, min(nbytes, reply.total_nbytes - (offset or 0)))
    if len(reply.data) != expected:
        message = f"the answer has {len(reply.data)} bytes, expected {expected}"
        raise TemporaryError(message)
    return reply
