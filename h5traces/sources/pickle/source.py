"""Reads the bytes of a pickle forwards, from a file or from memory, within limits.

Compressors are recognised by content, as batches have been renamed freely.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

from h5traces.errors import ConversionError
from h5traces.sources.compressed import STEP_NBYTES, Decompressed, compression_of, truncated
from h5traces.storage.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator


MIB = 1 << 20
GIB = 1 << 30
_BUFFER_NBYTES = 1 << 16
# Requests above this are read in blocks, so that a declared length alone allocates nothing.
_BLOCK_NBYTES = 1 << 26


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
        Bytes that come out of each byte of a compressed file, checked once that many bytes are
        out. Deflate can reach 1032; float16 traces stay below 10.
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
        if num_bytes > STEP_NBYTES and num_bytes > (bound := self._bound()):
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
        for _ in self._blocks(num_bytes, STEP_NBYTES):
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
    """A plain or compressed file; a context manager.

    Reading raises `ConversionError` if the file is truncated or its checksum does not fit, and
    `UnsafePickleError` if it expands more than `limits` allow.

    Attributes
    ----------
    compression
        The compressor around the pickle, such as ``gzip``; None if there is none.
    """

    def __init__(self, path: str | os.PathLike[str], limits: PickleLimits) -> None:
        self.path = Path(path)
        self.file: io.BufferedReader
        self._raw = io.FileIO(open_regular(self.path, ConversionError))
        try:
            self.compressed_size = os.fstat(self._raw.fileno()).st_size
            self.compression = compression_of(self._raw.read(8))
            self._raw.seek(0)
            self._exact_bound = self.compression is None
            self._inflater = (
                None
                if self.compression is None
                else Decompressed(self.path, self._raw, self.compression, limits)
            )
            self.file = io.BufferedReader(
                self._inflater or self._raw,
                STEP_NBYTES if self._inflater else _BUFFER_NBYTES,
            )
        except BaseException:
            self._raw.close()
            raise

    @property
    def compressed_position(self) -> int:
        """Bytes of the file read so far, for progress bars."""
        return self.file.tell() if self._inflater is None else self._raw.tell()

    def at_end(self) -> bool:
        """True if nothing follows; for gzip this also checks the last member's CRC and size."""
        return not self.file.peek(1)

    def skip(self, num_bytes: int) -> None:
        if self._inflater is not None:
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
        return self._inflater.bound()

    def truncated_error(self, detail: str) -> ConversionError:
        """The error for a file that ends too early."""
        return truncated(self.path, self.compression, detail)
