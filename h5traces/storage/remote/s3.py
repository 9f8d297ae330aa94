"""Objects and folders in S3 buckets, through s3fs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import aiohttp
from aiobotocore.httpsession import AIOHTTPSession
from fsspec.asyn import sync

from h5traces.storage.remote.answers import (
    BadAnswerError,
    TooMuchError,
    in_time,
    prompt_head,
    read_body,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h5traces.storage.remote.answers import RangeRequest
    from h5traces.storage.remote.listing import Listing
    from h5traces.storage.remote.paths import RemoteOptions


_NO_SUCCESS: Final = 300


def bounded_sessions(options: RemoteOptions) -> type[AIOHTTPSession]:
    """aiobotocore's sessions, which read no answer without end and follow no redirect."""

    class BoundedSession(AIOHTTPSession):  # type: ignore[misc]  # aiobotocore has no types
        async def _get_session(self, proxy_url: str | None) -> Any:
            session = await super()._get_session(proxy_url)
            if not any(isinstance(each, _NoRedirects) for each in session.trace_configs):
                trace = _NoRedirects()
                trace.freeze()
                session.trace_configs.append(trace)
            return session

        async def send(self, request: Any) -> Any:
            is_stream, request.stream_output = request.stream_output, True
            async with prompt_head(options):
                answer = await super().send(request)
            # Listings are read as a whole, and so are errors.
            if not is_stream or answer.status_code >= _NO_SUCCESS:
                async with asyncio.timeout(options.total_timeout):
                    answer._content = await _whole(answer.raw, options)
            return answer

    return BoundedSession


class _NoRedirects(aiohttp.TraceConfig):
    """Ends a request that is redirected: headers with a session's token would travel along.

    S3 never redirects like this where the region is right.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_request_redirect.append(_reject_redirect)


async def _reject_redirect(_: Any, __: Any, redirected: Any) -> None:
    location = str(redirected.response.headers.get("Location", ""))[:200]
    redirected.response.close()
    message = (
        f"the server redirects to {location!r}, and requests with credentials follow no redirect; "
        "name that endpoint or region in storage_options"
    )
    raise BadAnswerError(message)


async def _whole(answer: Any, options: RemoteOptions) -> bytes:
    try:
        return await read_body(answer.content.read, options.max_listing_nbytes, options)
    except BaseException as error:
        answer.close()
        if not isinstance(error, TooMuchError):
            raise
    message = f"the server answers with more than {options.max_listing_nbytes} bytes"
    raise BadAnswerError(message)


def read_range(files: Any, request: RangeRequest, options: RemoteOptions) -> bytes:
    """The bytes of a range; size and version of the object go into the request."""
    bucket, key, version = files.split_path(request.path.url)
    version_id = {} if version is None else {"VersionId": version}
    found = files.call_s3("get_object", Bucket=bucket, Key=key, Range=request.header, **version_id)
    body = found["Body"]
    request.version = found.get("ETag")

    async def read() -> bytes:
        data: bytes = await in_time(
            request.path, options, read_body(body.read, request.nbytes, options)
        )
        return data

    try:
        request.read_content_range(found.get("ContentRange", ""))
        data: bytes = sync(files.loop, read)
    except TooMuchError:
        request.reject_more()
    finally:
        body.close()
    return data


class S3Folders:
    """Folders of buckets, by addresses without protocol, such as ``bucket/run/``; a `Folders`."""

    def __init__(self, files: Any, listing: Listing) -> None:
        self._files, self._listing = files, listing

    def children(self, folder: str) -> Iterator[str]:
        """Addresses of objects and, with a slash at the end, folders directly in a folder."""
        return self._names(folder, "/")

    def below(self, folder: str) -> Iterator[str]:
        """Addresses of all objects below a folder."""
        return self._names(folder, "")

    def _names(self, folder: str, delimiter: str) -> Iterator[str]:
        bucket, _, prefix = folder.partition("/")
        asked = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
        while True:
            self._listing.count_request()
            page = self._files.call_s3("list_objects_v2", **asked)
            found = [each["Key"] for each in page.get("Contents", ())]
            found += [each["Prefix"] for each in page.get("CommonPrefixes", ())]
            self._listing.count(len(found))
            # Some tools store a folder as an empty object of its name.
            yield from (f"{bucket}/{each}" for each in found if each != prefix)
            following = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or following is None:
                return
            asked["ContinuationToken"] = following
