"""Reads the bytes of a pickle forwards, from a plain or gzip file or from memory, within limits.

Gzip is recognised by its magic bytes, as batches have been renamed freely. Each call inflates at
most one mebibyte, so a gzip bomb is noticed early; inflating releases the GIL.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self, cast

from h5traces.errors import ConversionError, UnsafePickleError
from h5traces.storage.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


_open_gzip: Callable[..., gzip.GzipFile] = gzip.GzipFile
_INFLATE_ERRORS: tuple[type[Exception], ...] = (gzip.BadGzipFile, zlib.error)
try:
    # Inflates about twice as fast as zlib; has wheels for x86-64 and arm64 only.
    from isal import igzip, isal_zlib
except ImportError:  # pragma: no cover - depends on the machine
    pass
else:
    _open_gzip = igzip.IGzipFile
    _INFLATE_ERRORS = (*_INFLATE_ERRORS, cast("type[Exception]", isal_zlib.error))

MIB = 1 << 20
GIB = 1 << 30
GZIP_MAGIC = b"\x1f\x8b"
_BUFFER_NBYTES = 1 << 16
_INFLATE_NBYTES = MIB
# Requests above this are read in blocks, so that a declared length alone allocates nothing.
_BLOCK_NBYTES = 1 << 26
_DEFLATE_MAX_RATIO = 1032


@dataclass(frozen=True, kw_only=True)
class PickleLimits:
    """Limits of the reader of pickles; an item is one element of the batch.

    Attributes
    ----------
    max_item_opcodes
        Opcodes executed for one item, including those of embedded torch storages.
    max_item_memo
        Memo entries written by one item.
    max_mark_depth
        Marks open at the same time.
    max_depth
        Levels of lists, tuples and dicts inside an item.
    max_payload_nbytes
        Bytes of one array, bytes or bytearray object.
    max_string_nbytes
        Bytes of one encoded string; protocols 0 to 2 store arrays as strings.
    max_item_nbytes
        Bytes of all arrays, bytes and strings of one item.
    max_created_ratio, max_created_nbytes
        Bytes that shims may create by copying (expanded tensors, decoded strings) per item: the
        ratio times what was read, plus the constant. A stride of 0 can expand to terabytes.
    max_portion_items
        Items on the stack before they are appended to the list; picklers append 1000 at a time.
    max_kept_entries, max_kept_nbytes
        Memo entries kept because later items share them.
    max_unfolded_ratio, unfolded_grace_nbytes
        Bytes of all items, counting every use of a shared object, per byte of pickle, plus the
        constant. A megabyte shared by a hundred thousand arrays would fill a disk when written.
    max_expansion, expansion_grace_nbytes
        Inflated bytes per compressed byte of a gzip file, checked once that many bytes are
        inflated. Deflate can reach 1032; float16 traces stay below 10.
    """

    max_item_opcodes: int = 2_000_000
    max_item_memo: int = 1_000_000
    max_mark_depth: int = 256
    max_depth: int = 64
    max_payload_nbytes: int = 4 * GIB
    max_string_nbytes: int = 512 * MIB
    max_item_nbytes: int = 16 * GIB
    max_created_ratio: int = 4
    max_created_nbytes: int = 64 * MIB
    max_portion_items: int = 100_000
    max_kept_entries: int = 200_000
    max_kept_nbytes: int = 2 * GIB
    max_unfolded_ratio: int = 50
    unfolded_grace_nbytes: int = 256 * MIB
    max_expansion: int = 300
    expansion_grace_nbytes: int = 64 * MIB


class RejectedError(Exception):
    """A pickle asks for what is not allowed; `locate` makes an UnsafePickleError of it."""


class MalformedError(Exception):
    """A pickle contradicts itself; `locate` makes a ConversionError of it."""


class TruncatedError(MalformedError):
    """Fewer bytes follow than an opcode needs."""


def reject(message: str) -> NoReturn:
    """Raise `RejectedError`."""
    raise RejectedError(message)


def contradict(message: str) -> NoReturn:
    """Raise `MalformedError`."""
    raise MalformedError(message)


class Source:
    """What the pickle machine reads from: exact reads from a buffered stream.

    Methods raise `TruncatedError` if the pickle ends too early.
    """

    # Single bytes are read from it directly.
    file: io.BufferedReader | io.BytesIO
    # Whether `_bound` is exact, so that no request within it comes up short.
    _exact_bound = False

    def _bound(self) -> int:
        """The most bytes that can follow."""
        raise NotImplementedError

    def _truncated(self, wanted: int, found: int) -> TruncatedError:
        return TruncatedError(f"{wanted:,} bytes are declared and only {found:,} follow")

    def _check(self, num_bytes: int) -> None:
        if num_bytes > _INFLATE_NBYTES and num_bytes > (bound := self._bound()):
            raise self._truncated(num_bytes, bound)

    def read(self, num_bytes: int) -> bytes:
        """Exactly that many bytes."""
        self._check(num_bytes)
        if num_bytes > _BLOCK_NBYTES and not self._exact_bound:
            return b"".join(self._blocks(num_bytes))
        data = self.file.read(num_bytes)
        if len(data) != num_bytes:
            raise self._truncated(num_bytes, len(data))
        return data

    def _blocks(self, num_bytes: int, block_nbytes: int = _BLOCK_NBYTES) -> Iterator[bytes]:
        left = num_bytes
        while left:
            block = self.file.read(min(left, block_nbytes))
            if not block:
                raise self._truncated(num_bytes, num_bytes - left)
            left -= len(block)
            yield block

    def read_buffer(self, num_bytes: int) -> bytearray:
        """Exactly that many bytes, in a new bytearray."""
        self._check(num_bytes)
        first = num_bytes if self._exact_bound else min(num_bytes, _BLOCK_NBYTES)
        buffer = bytearray(first)
        found = self.file.readinto(buffer)
        if found != first:
            raise self._truncated(num_bytes, found)
        for block in self._blocks(num_bytes - first):
            buffer += block
        return buffer

    def readline(self, max_nbytes: int) -> bytes:
        """A line without its newline."""
        line = self.file.readline(max_nbytes + 1)
        if not line.endswith(b"\n"):
            if len(line) > max_nbytes:
                reject(f"a text argument is longer than {max_nbytes:,} bytes")
            raise self._truncated(len(line) + 1, len(line))
        return line[:-1]

    def skip(self, num_bytes: int) -> None:
        """Move forwards."""
        for _ in self._blocks(num_bytes, _INFLATE_NBYTES):
            pass

    @property
    def inflated_bytes(self) -> int:
        """Position in the pickle."""
        return self.file.tell()


class MemorySource(Source):
    """A pickle inside the bytes of another one."""

    _exact_bound = True

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data
        self.file = io.BytesIO(data)

    def _bound(self) -> int:
        return len(self.data) - self.file.tell()


class FileSource(Source):
    """A plain or gzip file; a context manager.

    Reading raises `ConversionError` if the file is truncated or its checksum does not fit, and
    `UnsafePickleError` if the gzip stream expands more than `limits` allow.
    """

    def __init__(self, path: str | os.PathLike[str], limits: PickleLimits) -> None:
        self.path = Path(path)
        self.file: io.BufferedReader
        self._raw = io.FileIO(open_regular(self.path, ConversionError))
        try:
            self.compressed_size = os.fstat(self._raw.fileno()).st_size
            self.is_gzip = self._raw.read(2) == GZIP_MAGIC
            self._raw.seek(0)
            self._exact_bound = not self.is_gzip
            self._inflater = _Inflater(self, self._raw, limits) if self.is_gzip else None
            self.file = io.BufferedReader(
                self._inflater or self._raw,
                _INFLATE_NBYTES if self.is_gzip else _BUFFER_NBYTES,
            )
        except BaseException:
            self._raw.close()
            raise

    @property
    def compressed_position(self) -> int:
        """Bytes of the file read so far, for progress bars."""
        return self._raw.tell() if self.is_gzip else self.file.tell()

    def at_end(self) -> bool:
        """True if nothing follows; for gzip this also checks the last member's CRC and size."""
        return not self.file.read(1)

    def skip(self, num_bytes: int) -> None:
        if self.is_gzip:
            super().skip(num_bytes)
            return
        if num_bytes > (bound := self._bound()):
            raise self._truncated(num_bytes, bound)
        self.file.seek(num_bytes, os.SEEK_CUR)

    def close(self) -> None:
        self.file.close()
        if self._inflater is not None:
            self._inflater.close()
        self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bound(self) -> int:
        if self._inflater is None:
            return self.compressed_size - self.file.tell()
        # The most that deflate can expand the rest to; the extra mebibyte is in buffers already.
        left = self.compressed_size - self._raw.tell() + MIB
        return left * _DEFLATE_MAX_RATIO + 2 * _INFLATE_NBYTES

    def truncated_error(self, detail: str) -> ConversionError:
        """The error for a file that ends too early."""
        kind = "gzip file" if self.is_gzip else "pickle"
        leftover = " (.part leftovers are)" if self.path.suffix == ".part" else ""
        message = (
            f"{self.path}: truncated {kind}: {detail}; this looks like an unfinished write"
            f"{leftover}. Convert the complete file instead, or delete this one"
        )
        return ConversionError(message)


class _Inflater(io.RawIOBase):
    """Inflates a gzip file, translates errors and limits the expansion."""

    def __init__(self, owner: FileSource, raw: io.FileIO, limits: PickleLimits) -> None:
        self._owner = owner
        self._raw = raw
        self._limits = limits
        self._gzip = _open_gzip(fileobj=raw, mode="rb")
        self._position = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer)[:_INFLATE_NBYTES]
        try:
            num_bytes: int = self._gzip.readinto(view)
        except EOFError:
            detail = "the compressed stream has no end"
            raise self._owner.truncated_error(detail) from None
        except _INFLATE_ERRORS as error:
            message = (
                f"{self._owner.path}: corrupted gzip file near compressed byte "
                f"{self._raw.tell():,}: {error}; copy the file again from where it was written"
            )
            raise ConversionError(message) from None
        self._position += num_bytes
        compressed = max(1, self._raw.tell())
        limit = self._limits.max_expansion
        if self._position > max(self._limits.expansion_grace_nbytes, limit * compressed):
            message = (
                f"{self._owner.path}: gzip bomb: {self._position:,} bytes came out of the first "
                f"{compressed:,}, more than {limit} times as many; if the file is trusted, raise "
                f"PickleLimits(max_expansion=...)"
            )
            raise UnsafePickleError(message)
        return num_bytes

    def close(self) -> None:
        self._gzip.close()
        super().close()
