"""What the failures of servers, and of the libraries that talk to them, mean to a reader."""

from __future__ import annotations

import asyncio
import http
from typing import TYPE_CHECKING, Final, NoReturn

from h5traces.errors import RemoteError
from h5traces.storage.remote.transport import TemporaryError

if TYPE_CHECKING:
    from h5traces.storage.remote.paths import RemotePath

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
