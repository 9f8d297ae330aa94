"""Compressed files as streams of what they hold, recognised by content, within limits.

A call decompresses at most one mebibyte, so that a bomb is noticed early. Decompressing releases
the GIL.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import zstandard

from h5traces.errors import ConversionError, UnsafePickleError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_open_gzip: Callable[..., Any] = gzip.GzipFile
_ERRORS: tuple[type[Exception], ...] = (
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    zstandard.ZstdError,
    OSError,
    ValueError,
)
try:
    # Inflates about twice as fast as zlib; has wheels for x86-64 and arm64 only.
    from isal import igzip, isal_zlib
except ImportError:  # pragma: no cover - depends on the machine
    pass
else:
    _open_gzip = igzip.IGzipFile
    _ERRORS = (*_ERRORS, cast("type[Exception]", isal_zlib.error))

STEP_NBYTES: Final = 1 << 20
_INPUT_NBYTES: Final = 1 << 18
# Of the dictionary that a header asks for; the largest preset of xz takes 65 MiB.
_MAX_MEMORY: Final = 128 << 20
_DEFLATE_MAX_RATIO: Final = 1032
_NO_BOUND: Final = 1 << 62
_HEAD_NBYTES: Final = 8
# Frames with the content of other programs.
_SKIPPABLE: Final = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
_SIGNATURES: Final = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bz2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x5d\0\0", "lzma"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)


def compression_of(head: bytes) -> str | None:
    """The compressor of a file that begins like this, as users call it; None if unknown."""
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    # Deflate with a window of 32 KiB, and a check of the two bytes.
    is_zlib = len(head) > 2 and head[0] == 0x78 and int.from_bytes(head[:2], "big") % 31 == 0
    return "zlib" if is_zlib else None


class ExpansionLimits(Protocol):
    """How far a compressed file may expand."""

    @property
    def max_expansion(self) -> int:
        """Bytes for each compressed byte."""

    @property
    def expansion_grace_nbytes(self) -> int:
        """Bytes that may always come out."""


class Decompressed(io.RawIOBase):
    """What a compressed file holds.

    Reading raises `ConversionError` where the file is truncated or does not fit its checksum, and
    `UnsafePickleError` where more comes out than `limits` allow.

    Parameters
    ----------
    path
        For messages.
    raw
        The open file, at its beginning.
    compression
        As `compression_of` names it.
    """

    def __init__(
        self, path: Path, raw: io.FileIO, compression: str, limits: ExpansionLimits
    ) -> None:
        self._path = path
        self._raw = raw
        self._size = raw.seek(0, io.SEEK_END)
        raw.seek(0)
        self._compression = compression
        self._limits = limits
        self._stream = _OPENERS[compression](raw)
        self._position = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def bound(self) -> int:
        """The most bytes that can follow."""
        if self._compression not in ("gzip", "zlib"):
            return _NO_BOUND
        # The extra mebibyte lies in buffers already.
        left = self._size - self._raw.tell() + STEP_NBYTES
        return left * _DEFLATE_MAX_RATIO + 2 * STEP_NBYTES

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer)[:STEP_NBYTES]
        try:
            num_bytes: int = self._stream.readinto(view)
        except EOFError:
            raise truncated(
                self._path, self._compression, "the compressed stream has no end"
            ) from None
        except _ERRORS as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk, not of the compressor
            raise self._error(error) from None
        self._position += num_bytes
        compressed = max(1, self._raw.tell())
        limit = self._limits.max_expansion
        if self._position > max(self._limits.expansion_grace_nbytes, limit * compressed):
            message = (
                f"{self._path}: {self._compression} bomb: {self._position:,} bytes came out of the "
                f"first {compressed:,}, more than {limit} times as many; if the file is trusted, "
                f"raise PickleLimits(max_expansion=...)"
            )
            raise UnsafePickleError(message)
        return num_bytes

    def _error(self, error: Exception) -> ConversionError:
        message = (
            f"{self._path}: corrupted {self._compression} file near compressed byte "
            f"{self._raw.tell():,}: {error}; copy the file again from where it was written"
        )
        return ConversionError(message)

    def close(self) -> None:
        self._stream.close()
        super().close()


def truncated(path: Path, compression: str | None, detail: str) -> ConversionError:
    """The error for a file that ends too early."""
    kind = "pickle" if compression is None else f"{compression} file"
    leftover = " (.part leftovers are)" if path.suffix == ".part" else ""
    message = (
        f"{path}: truncated {kind}: {detail}; this looks like an unfinished write{leftover}. "
        f"Convert the complete file instead"
    )
    return ConversionError(message)


class _Members(io.RawIOBase):
    """Streams of one compressor, one after the other in a file; zeros may follow them."""

    def __init__(self, raw: io.FileIO, compression: str, make: Callable[[], Any]) -> None:
        self._raw = raw
        self._compression = compression
        self._make = make
        self._member = make()
        self._data = b""

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            if self._member.eof and not self._next_member():
                return 0
            needs_input = self._member.needs_input and not self._data
            data = self._raw.read(_INPUT_NBYTES) if needs_input else self._data
            self._data = b""
            if needs_input and not data:
                raise EOFError
            found = self._member.decompress(data, len(buffer))
            if found:
                buffer[: len(found)] = found
                return len(found)

    def _next_member(self) -> bool:
        """Go to the next member; False at the end of the file."""
        data = self._member.unused_data.lstrip(b"\0")
        while len(data) < _HEAD_NBYTES and (block := self._raw.read(_INPUT_NBYTES)):
            data = (data + block).lstrip(b"\0")
        if not data:
            return False
        if compression_of(data) != self._compression:
            message = f"other bytes follow the end of the compressed data ({data[:8]!r})"
            raise ValueError(message)
        self._member, self._data = self._make(), data
        return True


class _Inflate:
    """`zlib.decompressobj` with the interface of the other decompressors."""

    def __init__(self) -> None:
        self._inflater = zlib.decompressobj()

    @property
    def eof(self) -> bool:
        return self._inflater.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflater.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inflater.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inflater.decompress(self._inflater.unconsumed_tail + data, max_length)


def _xz(name: str, form: int) -> Callable[[io.FileIO], Any]:
    return lambda raw: _Members(raw, name, lambda: lzma.LZMADecompressor(form, _MAX_MEMORY))


class _Zstd(io.RawIOBase):
    """Frames of zstd; zstandard's own reader takes one that is cut off for the end."""

    def __init__(self, raw: io.FileIO) -> None:
        machine = zstandard.ZstdDecompressor(max_window_size=_MAX_MEMORY)
        self._raw = raw
        self._stream: Any = machine.stream_reader(raw, read_across_frames=True, closefd=False)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        found: int = self._stream.readinto(buffer)
        if not found:
            _check_frames(self._raw)
        return found


def _check_frames(raw: io.FileIO) -> None:
    """EOFError unless the last frame is whole: RFC 8878, sections 3.1.1 and 3.1.2."""
    position = raw.tell()
    raw.seek(0)
    while magic := raw.read(4):
        if _SKIPPABLE.match(magic):
            _pass(raw, int.from_bytes(_exactly(raw, 4), "little"))
            continue
        (descriptor,) = _exactly(raw, 1)
        is_single, has_checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
        size = (1 if is_single else 0, 2, 4, 8)[descriptor >> 6]
        _exactly(raw, size + (0, 1, 2, 4)[descriptor & 3] + (not is_single))
        is_last = 0
        while not is_last:
            header = int.from_bytes(_exactly(raw, 3), "little")
            is_last, is_rle = header & 1, header >> 1 & 3 == 1
            _pass(raw, 1 if is_rle else header >> 3)
        _exactly(raw, 4 * has_checksum)
    raw.seek(position)


def _pass(raw: io.FileIO, nbytes: int) -> None:
    if nbytes:
        raw.seek(nbytes - 1, io.SEEK_CUR)
        _exactly(raw, 1)


def _exactly(raw: io.FileIO, nbytes: int) -> bytes:
    data = raw.read(nbytes)
    if len(data) < nbytes:
        raise EOFError
    return data


_OPENERS: Final[dict[str, Callable[[io.FileIO], Any]]] = {
    "gzip": lambda raw: _open_gzip(fileobj=raw, mode="rb"),
    "zlib": lambda raw: _Members(raw, "zlib", _Inflate),
    "bz2": lambda raw: _Members(raw, "bz2", bz2.BZ2Decompressor),
    "xz": _xz("xz", lzma.FORMAT_XZ),
    "lzma": _xz("lzma", lzma.FORMAT_ALONE),
    "zstd": _Zstd,
}
