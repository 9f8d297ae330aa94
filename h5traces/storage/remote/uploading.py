"""Writing objects to S3: whole files in one step, and small documents under a condition.

A file gets its name when all of it has arrived: until an upload of several parts is completed,
nothing can be read under the name. Every request carries a checksum of its bytes, which the server
compares, and what it says of the object is compared once more.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import http
import zlib
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final

import xxhash

from h5traces.errors import ArchiveExistsError, RemoteError
from h5traces.storage.remote.answers import http_status, translate
from h5traces.storage.remote.filesystems import filesystem, forget
from h5traces.storage.remote.paths import persistently

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from h5traces.storage.remote.paths import RemoteOptions, RemotePath

# An upload has at most 10,000 parts.
_PART_NBYTES: Final = 16 << 20
_MOST_PARTS: Final = 9_000
_BLOCK_NBYTES: Final = 8 << 20
# What an object says of the file that it is: xxh3-128 of all its bytes.
_DIGEST: Final = "h5traces-xxh3"
# Conditions that did not hold; 409 where two such requests met.
_CONDITION_FAILED: Final = (http.HTTPStatus.PRECONDITION_FAILED, http.HTTPStatus.CONFLICT)

# What the last request says of each part.
_PART: Final = ("ETag", "ChecksumCRC32")
_crc32: Callable[[bytes], int] = zlib.crc32
with contextlib.suppress(ImportError):
    from isal import isal_zlib  # faster by far

    _crc32 = isal_zlib.crc32


class _ConditionFailedError(Exception):
    """The object was there, or another version of it."""


class _Bucket:
    """Requests to S3 about one object."""

    def __init__(self, path: RemotePath, options: RemoteOptions) -> None:
        if path.protocol not in ("s3", "s3a"):
            message = f"{path}: only s3:// can be written to; write to disk, and copy it"
            raise RemoteError(message)
        self.path, self._options = path, options
        self._bucket, _, self._key = path.url.partition("://")[2].partition("/")

    def send(self, method: str, data: bytes, **arguments: Any) -> dict[str, Any]:
        """The answer to bytes, which the server compares with their checksum."""
        checksum = self._checksum(data)
        found = self.ask(method, Body=data, **checksum, **arguments)
        for name, sent in checksum.items():
            if found.get(name, sent) != sent:
                message = f"{self.path}: the server received other bytes ({name} {found[name]})"
                raise RemoteError(message)
        return {**found, **checksum}

    @functools.cached_property
    def takes_crc(self) -> bool:
        """Whether checksums are CRC32; else MD5, which every store compares, in twice the time.

        Users of stores that know MD5 only say so with AWS_REQUEST_CHECKSUM_CALCULATION.
        """
        config = filesystem("s3", self._options).s3.meta.config
        return bool(config.request_checksum_calculation != "when_required")

    def _checksum(self, data: bytes) -> dict[str, str]:
        if self.takes_crc:
            return {"ChecksumCRC32": _base64(_crc32(data).to_bytes(4, "big"))}
        return {"ContentMD5": _base64(hashlib.md5(data, usedforsecurity=False).digest())}

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """An answer of S3; asked again where it fails for a reason that may pass."""
        key = {} if "Prefix" in arguments else {"Key": self._key}
        named = {"Bucket": self._bucket, **key, **arguments}

        def request() -> dict[str, Any]:
            # Made anew where credentials were renewed.
            files = filesystem("s3", self._options)
            try:
                found: dict[str, Any] = files.call_s3(method, **named)
            except Exception as error:  # every library has its own
                if _is_failed_condition(error):
                    raise _ConditionFailedError from error
                try:
                    translate(self.path, error)
                except RemoteError:
                    forget(files)
                    raise
            return found

        return persistently(self.path, self._options.attempts, request)

    def head(self) -> dict[str, Any] | None:
        """What the server says of the object; None if there is none."""
        try:
            return self.ask("head_object")
        except FileNotFoundError:
            return None


def _is_failed_condition(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, FileExistsError) or http_status(error)[0] in _CONDITION_FAILED:
            return True
        error = error.__cause__ or error.__context__
    return False


def exists(path: RemotePath, options: RemoteOptions) -> bool:
    """Whether there is an object of the name."""
    return _Bucket(path, options).head() is not None


def upload(
    source: Path, target: RemotePath, options: RemoteOptions, *, overwrite: bool = False
) -> None:
    """Give a finished file a name on a server, in one step.

    Where the answer to the last request was lost, the object is compared with the file, so the
    same upload may be repeated.

    Raises
    ------
    ArchiveExistsError
        There is another object of that name, and `overwrite` is not set.
    RemoteError
        The server cannot be reached, rejects a request (as when credentials expire in the middle of
        it), or has stored something else. Nothing has the name then, and the file is as it was.
    """
    _Upload(source, target, options, overwrite=overwrite).run()


class _Upload:
    def __init__(
        self, source: Path, target: RemotePath, options: RemoteOptions, *, overwrite: bool
    ) -> None:
        self._source, self._target, self._options = source, target, options
        self._bucket = _Bucket(target, options)
        self._condition = {} if overwrite else {"IfNoneMatch": "*"}
        self._nbytes = source.stat().st_size
        self._part_nbytes = max(_PART_NBYTES, -(-self._nbytes // _MOST_PARTS))
        self._digest = _file_digest(source)

    def run(self) -> None:
        facts = {"Metadata": {_DIGEST: self._digest}}
        try:
            if self._nbytes <= self._part_nbytes:
                data = self._source.read_bytes()
                self._bucket.send("put_object", data, **facts, **self._condition)
            else:
                self._in_parts(facts)
        except _ConditionFailedError:
            # Perhaps by this very upload, whose answer was lost.
            self._compare(ArchiveExistsError, "exists, and holds something else")
            return
        self._compare(RemoteError, "was uploaded, but the server has something else")

    def _in_parts(self, facts: dict[str, Any]) -> None:
        if self._bucket.takes_crc:
            facts["ChecksumAlgorithm"] = "CRC32"
        upload = {"UploadId": self._bucket.ask("create_multipart_upload", **facts)["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            with self._source.open("rb") as file:
                file.seek((number - 1) * self._part_nbytes)
                data = file.read(self._part_nbytes)
            found = self._bucket.send("upload_part", data, PartNumber=number, **upload)
            return {"PartNumber": number, **{each: found[each] for each in _PART if each in found}}

        count = -(-self._nbytes // self._part_nbytes)
        try:
            with ThreadPoolExecutor(self._options.max_parallel) as pool:
                parts = list(pool.map(send, range(1, count + 1)))
            try:
                self._bucket.ask(
                    "complete_multipart_upload",
                    MultipartUpload={"Parts": parts},
                    **upload,
                    **self._condition,
                )
            except FileNotFoundError:
                # There is no such upload any more: an attempt whose answer was lost completed it.
                self._compare(RemoteError, "was uploaded, but the server has something else")
        except BaseException:
            # Else its parts would be kept, and paid for. A rule of the bucket can do the same.
            with contextlib.suppress(RemoteError, FileNotFoundError, _ConditionFailedError):
                self._bucket.ask("abort_multipart_upload", **upload)
            raise

    def _compare(self, kind: type[Exception], what: str) -> None:
        """Raise unless the object is the file."""
        head = self._bucket.head() or {}
        found = (head.get("ContentLength"), head.get("Metadata", {}).get(_DIGEST))
        if found != (self._nbytes, self._digest):
            message = (
                f"{self._target} {what}: {found[0]} bytes with the digest {found[1]}, expected "
                f"{self._nbytes} with {self._digest}; use overwrite=True to replace it, or another "
                "name"
            )
            raise kind(message)


def put_new(target: RemotePath, data: bytes, options: RemoteOptions) -> bool:
    """Write a small object if there is none of its name; whether it holds just this data now."""
    try:
        _Bucket(target, options).send("put_object", data, IfNoneMatch="*")
    except _ConditionFailedError:
        return read_document_at(target, options) == data
    return True


def version_of(target: RemotePath, options: RemoteOptions) -> str:
    """What tells an object from what may take its place; empty if there is none."""
    return str((_Bucket(target, options).head() or {}).get("ETag", ""))


def put_over(target: RemotePath, data: bytes, version: str, options: RemoteOptions) -> bool:
    """Write a small object in place of the one of that version; whether it was still there."""
    try:
        _Bucket(target, options).send("put_object", data, IfMatch=version)
    except (_ConditionFailedError, FileNotFoundError):
        return False
    return True


def put(target: RemotePath, data: bytes, options: RemoteOptions) -> None:
    """Write a small object, in place of one that has the name."""
    _Bucket(target, options).send("put_object", data)


def listed(folder: RemotePath, options: RemoteOptions) -> tuple[dict[str, float], float]:
    """Names of all objects below a folder with the time of their last change, and the time now.

    All are times of the server, in seconds since 1970.
    """
    from h5traces.storage.remote.listing import Listing

    bucket, counter = _Bucket(folder, options), Listing(folder, options)
    prefix = folder.url.partition("://")[2].partition("/")[2]
    found: dict[str, float] = {}
    more: dict[str, str] = {}
    while True:
        counter.count_request()
        answer = bucket.ask("list_objects_v2", Prefix=prefix, **more)
        entries = answer.get("Contents", ())
        counter.count(len(entries))
        for each in entries:
            found[each["Key"].removeprefix(prefix)] = each["LastModified"].timestamp()
        if not answer.get("IsTruncated"):
            date = answer["ResponseMetadata"]["HTTPHeaders"]["date"]
            return found, parsedate_to_datetime(date).timestamp()
        more = {"ContinuationToken": answer["NextContinuationToken"]}


def read_document_at(target: RemotePath, options: RemoteOptions) -> bytes:
    """All of a small object; FileNotFoundError if there is none."""
    from h5traces.storage.remote.file import RemoteFile

    file = RemoteFile(target, options)
    return file.read_at(0, file.nbytes)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _file_digest(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_NBYTES):
            state.update(block)
    return state.hexdigest()
