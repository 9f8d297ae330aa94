"""Answers of servers: what their errors mean, and how much of them is read."""

from __future__ import annotations

import asyncio
import contextlib
import http
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from h5traces.errors import RemoteError
from h5traces.storage.remote.paths import RemotePath, Reply, TemporaryError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from h5traces.storage.remote.paths import RemoteOptions


HTTP_ERRORS: Final = 400
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
        if isinstance(each, TemporaryError):
            raise each
        if isinstance(each, BadAnswerError):
            message = f"{path}: {each}"
            raise RemoteError(message) from error
        status, reason = http_status(each)
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
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def http_status(error: BaseException) -> tuple[int, str]:
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


@dataclass(slots=True)
class RangeRequest:
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
        if first != wanted or not 0 <= last - first < self.nbytes:
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


_PIECE_NBYTES: Final = 1 << 20


class BadAnswerError(Exception):
    """A server answered as it must not; `translate` puts the address in front."""


class TooMuchError(Exception):
    """An answer is longer than its reader takes; users never see it."""


async def read_body(
    read: Callable[[int], Awaitable[bytes]], most: int, options: RemoteOptions
) -> bytes:
    """The body of an answer; `read` gives its next bytes, and none at its end.

    TooMuchError if there are more than `most`; TemporaryError if they come more slowly than
    ``options.min_bytes_per_second``, which counts once ``options.timeout`` is over.
    """
    pieces: list[bytes] = []
    nbytes, started = 0, time.monotonic()
    while piece := await read(min(_PIECE_NBYTES, most + 1 - nbytes)):
        pieces.append(piece)
        nbytes += len(piece)
        if nbytes > most:
            raise TooMuchError
        seconds = time.monotonic() - started
        if seconds > options.timeout and nbytes < seconds * options.min_bytes_per_second:
            message = (
                f"it sends {nbytes / seconds:.0f} bytes per second, expected at least "
                f"{options.min_bytes_per_second} (min_bytes_per_second of RemoteOptions)"
            )
            raise TemporaryError(message)
    return b"".join(pieces)


@contextlib.asynccontextmanager
async def prompt_head(options: RemoteOptions) -> AsyncIterator[None]:
    """The block waits for the head of an answer, which a server may send byte by byte."""
    most = 2 * options.timeout
    try:
        async with asyncio.timeout(most) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        message = f"it did not begin to answer within {most:g} s (twice the timeout)"
        raise TemporaryError(message) from error


async def in_time(path: RemotePath, options: RemoteOptions, request: Awaitable[Any]) -> Any:
    """What `request` returns; RemoteError if it takes longer than ``options.total_timeout``."""
    try:
        async with asyncio.timeout(options.total_timeout) as limit:
            return await request
    except TimeoutError:
        if not limit.expired():
            raise
    message = (
        f"{path}: the server has not finished its answer after {options.total_timeout:g} s "
        "(total_timeout of RemoteOptions)"
    )
    raise RemoteError(message)
