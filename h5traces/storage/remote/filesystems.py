"""Objects on servers, through the public interface of fsspec."""

from __future__ import annotations

import asyncio
import http
import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

import fsspec
from fsspec.asyn import sync

from h5traces.errors import RemoteError
from h5traces.storage.remote.paths import ByteRange, RemotePath, Reply, TemporaryError, persistently

if TYPE_CHECKING:
    from collections.abc import Mapping

    from h5traces.storage.remote.paths import RemoteOptions, Transport


_HTTP_ERRORS: Final = 400
_TEMPORARY_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_REFUSED_STATUS: Final = frozenset({401, 403, 407})
# S3 sends these with status 400.
_REFUSED_CODES: Final = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"}
)
_RANGE_NOT_SATISFIABLE: Final = 416
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})\Z")


def reject(path: RemotePath, status: int, reason: str) -> NoReturn:
    """Raise the error that a status of HTTP means."""
    said = f"{status} {reason}".strip()
    if status in (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.GONE):
        message = f"{path}: no such object on the server ({said})"
        raise FileNotFoundError(message)
    if status in _REFUSED_STATUS or any(code in reason for code in _REFUSED_CODES):
        message = (
            f"{path}: the server refuses access ({said}): credentials are missing, wrong or "
            "expired, or may not read this; renew them, or pass them in storage_options"
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
    """Raise the error that an error of one of the libraries means."""
    for each in _causes(error):
        status, reason = _status(each)
        if status:
            reject(path, status, reason)
    if isinstance(error, FileNotFoundError):
        message = f"{path}: no such object on the server"
        raise FileNotFoundError(message) from error
    if _lacks_credentials(error):
        message = (
            f"{path}: there are no credentials ({error}); set them up for this machine, or pass "
            "them in storage_options ({'anon': True} for public data)"
        )
        raise RemoteError(message) from error
    if isinstance(error, PermissionError):
        reject(path, http.HTTPStatus.FORBIDDEN, str(error))
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


# By process, protocol, options and environment: no process can use connections of another, and
# renewed credentials are read anew.
_filesystems: dict[tuple[int, str, str, str], Any] = {}
_ENVIRONMENT: Final = ("AWS_", "HF_")


def filesystem(protocol: str, options: RemoteOptions) -> Any:
    """The file system for a protocol in this process.

    fsspec itself keeps one for each thread; connections of all threads are shared here.
    """
    arguments = {**options.storage_options, **_settings(protocol, options)}
    environment = sorted(each for each in os.environ.items() if each[0].startswith(_ENVIRONMENT))
    key = (os.getpid(), protocol, repr(sorted(arguments.items())), repr(environment))
    found = _filesystems.get(key)
    if found is None:
        try:
            found = fsspec.filesystem(protocol, skip_instance_cache=True, **arguments)
        except ValueError as error:
            message = f"{protocol}:// cannot be opened: {error}"
            raise RemoteError(message) from error
        if protocol == "s3":
            # Requests are repeated here; repeating them there as well would multiply.
            found.retries = 1
        _filesystems[key] = found
    return found


def _forget(files: Any) -> None:
    """Make a new file system for the next request: this one may hold old credentials."""
    for key in [key for key, known in _filesystems.items() if known is files]:
        _filesystems.pop(key, None)


def _settings(protocol: str, options: RemoteOptions) -> dict[str, Any]:
    """Arguments for a file system from the options; those that a user sets win."""
    given = options.storage_options
    if protocol in ("s3", "s3a"):
        config = {
            "retries": {"max_attempts": 0},
            "connect_timeout": options.timeout,
            "read_timeout": options.timeout,
            "max_pool_connections": 4 * options.max_parallel,
        }
        return {
            "use_listings_cache": given.get("use_listings_cache", False),
            "config_kwargs": {**config, **given.get("config_kwargs", {})},
        }
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=options.timeout, sock_read=options.timeout
        )
        client = {"timeout": timeout, **given.get("client_kwargs", {})}
        return {"get_client": _web_client, "client_kwargs": client}
    return {}


def transport_for(path: RemotePath, options: RemoteOptions) -> Transport:
    """The transport for an address; see `h5traces.storage.remote.paths`."""
    if path.is_web:
        return _WebTransport(path, filesystem(path.protocol, options), path.url)
    if path.protocol in ("s3", "s3a"):
        return _S3Transport(path, filesystem("s3", options))
    if path.protocol == "hf":
        return _hub_transport(path, options)
    return _PlainTransport(path, filesystem(path.protocol, options))


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


@dataclass(slots=True)
class _Request:
    """A request for a range, and what the head of its answer says."""

    path: RemotePath
    # None: the last bytes
    offset: int | None
    nbytes: int
    # of the answer; see `Reply`
    total_nbytes: int = 0
    version: str | None = None

    @property
    def header(self) -> str:
        """The value of the header ``Range``."""
        if self.offset is None:
            return f"bytes=-{self.nbytes}"
        return f"bytes={self.offset}-{self.offset + self.nbytes - 1}"

    def read_content_range(self, content_range: str) -> None:
        """Take the size of the object from a header, which must be of the range asked for."""
        found = _CONTENT_RANGE.match(content_range)
        if found is None:
            message = (
                f"{self.path}: the server answers with the range {content_range!r}, without the "
                "size"
            )
            raise RemoteError(message)
        first, last, self.total_nbytes = (int(part) for part in found.groups())
        wanted = max(0, self.total_nbytes - self.nbytes) if self.offset is None else self.offset
        if first != wanted or last - first >= self.nbytes:
            message = (
                f"{self.path}: the server answers with the range {content_range!r}, not with what "
                f"was asked for ({self.header})"
            )
            raise RemoteError(message)

    def reply(self, data: bytes) -> Reply:
        """The reply, if it is whole: up to the end of the object, where that comes first."""
        expected = max(0, min(self.nbytes, self.total_nbytes - (self.offset or 0)))
        if len(data) > expected:
            self.reject_more()
        if len(data) < expected:
            message = f"the answer has {len(data)} bytes, expected {expected}"
            raise TemporaryError(message)
        return Reply(data, self.total_nbytes, self.version)

    def reject_more(self) -> NoReturn:
        """Raise that the server sends more than it was asked for."""
        message = f"{self.path}: the server sends more than the {self.nbytes} bytes asked for"
        raise RemoteError(message)


class _FsspecTransport:
    """An object that one of fsspec's file systems reaches; a `Transport`."""

    def __init__(self, path: RemotePath, files: Any) -> None:
        self._path, self._files = path, files

    def tail(self, nbytes: int) -> Reply:
        return self._asked(_Request(self._path, None, nbytes))

    def get(self, wanted: ByteRange) -> Reply:
        return self._asked(_Request(self._path, wanted.offset, wanted.nbytes))

    def _asked(self, request: _Request) -> Reply:
        try:
            try:
                return request.reply(self._data(request))
            except (RemoteError, TemporaryError):
                raise
            except Exception as error:
                translate(self._path, error)
        except RemoteError:
            _forget(self._files)
            raise

    def _data(self, request: _Request) -> bytes:
        """The bytes of the range; size and version of the object go into the request."""
        raise NotImplementedError


class _PlainTransport(_FsspecTransport):
    """An object whose size and version take a separate request (``info``)."""

    def _data(self, request: _Request) -> bytes:
        self._files.invalidate_cache()
        facts = self._files.info(self._path.url)
        marks = (facts.get(name) for name in ("ETag", "etag", "mtime", "created", "modified"))
        request.version = next((str(mark) for mark in marks if mark is not None), None)
        request.total_nbytes = total = int(facts["size"])
        first = request.offset
        if first is None:
            first = max(0, total - request.nbytes)
        stop = first + request.nbytes
        data: bytes = self._files.cat_file(self._path.url, start=first, end=stop)
        return data


class _S3Transport(_FsspecTransport):
    """An object in an S3 bucket, or in a store that speaks S3."""

    def _data(self, request: _Request) -> bytes:
        bucket, key, version = self._files.split_path(self._path.url)
        version_id = {} if version is None else {"VersionId": version}
        found = self._files.call_s3(
            "get_object", Bucket=bucket, Key=key, Range=request.header, **version_id
        )
        request.version = found.get("ETag")
        try:
            request.read_content_range(found.get("ContentRange", ""))
            data: bytes = sync(self._files.loop, found["Body"].read)
        finally:
            found["Body"].close()
        return data


class _WebTransport(_FsspecTransport):
    """An object on a web server.

    `path` is its address for messages, `url` that of requests; `headers` are sent beside those of
    the storage options.
    """

    def __init__(
        self, path: RemotePath, files: Any, url: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(path, files)
        self._url = url
        self._more = {"headers": dict(headers)} if headers else {}

    def _data(self, request: _Request) -> bytes:
        start, stop = -request.nbytes, None
        if request.offset is not None:
            start, stop = request.offset, request.offset + request.nbytes
        data: bytes = self._files.cat_file(
            self._url, start=start, end=stop, trace_request_ctx=request, **self._more
        )
        return data


async def _web_client(**arguments: Any) -> Any:
    """aiohttp's client, which checks the head of every answer before its body is read."""
    import aiohttp

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(_read_head)
    # Ranges are of the bytes as they are sent, so they must not be compressed on the way.
    headers = {"Accept-Encoding": "identity", **arguments.pop("headers", {})}
    return aiohttp.ClientSession(headers=headers, trace_configs=[trace], **arguments)


async def _read_head(_: Any, context: Any, answered: Any) -> None:
    """Note size and version of an object; close an answer whose body must not be read."""
    request, answer = context.trace_request_ctx, answered.response
    # Listings have no such request.
    if not isinstance(request, _Request):
        return
    try:
        _check_head(request, answer)
    except BaseException:
        answer.close()
        raise


def _check_head(request: _Request, answer: Any) -> None:
    if answer.status >= _HTTP_ERRORS:
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


def _hub_transport(path: RemotePath, options: RemoteOptions) -> Transport:
    """A file of a repository on the Hugging Face hub, by its web address."""
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
    return _WebTransport(path, web, url, headers)
