"""Codecs: bytes in, bytes out, chunk by chunk; each is a pipeline of HDF5 filters.

A codec's output is what HDF5's own filters would accept, so stock tools read every chunk, and a
codec also decodes what stock tools wrote.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
import zstandard

from h5traces.errors import UnsupportedEncodingError
from h5traces.format.scratch import Scratch
from h5traces.storage import deflate

_FILTER_DEFLATE: Final = 1
FILTER_SHUFFLE: Final = 2
FILTER_ZSTD: Final = 32015
# What `convert --codec` offers for the layered arrays.
ArrayCodec = Literal["gzip", "zstd"]


@dataclass(frozen=True, slots=True)
class Filter:
    """One step of an HDF5 filter pipeline.

    Attributes
    ----------
    filter_id
        Number that the HDF Group registered.
    parameters
        Client data values; for deflate its nominal level, for shuffle the element size.
    """

    filter_id: int
    parameters: tuple[int, ...]


class Codec(Protocol):
    """Compresses chunks. Implementations hold no state and are called from many threads."""

    @property
    def name(self) -> str:
        """Name in metadata and on the command line."""

    def pipeline(self, itemsize: int) -> tuple[Filter, ...]:
        """The HDF5 filters, in order of writing, for elements of `itemsize` bytes."""

    def accepts(self, filters: tuple[Filter, ...]) -> bool:
        """Whether `decode` reads chunks that went through these filters."""

    def encode(self, raw: memoryview, itemsize: int) -> bytes:
        """The stored bytes of a chunk; `raw` is C order, little-endian."""

    def decode(self, stored: memoryview, out: memoryview, itemsize: int) -> None:
        """Fill `out` with exactly the raw bytes of a chunk; ValueError where they do not fit."""


@dataclass(frozen=True, slots=True)
class DeflateCodec:
    """HDF5's own gzip filter, with or without its byte shuffle in front."""

    name: str
    shuffle: bool

    def pipeline(self, itemsize: int) -> tuple[Filter, ...]:
        """Shuffle (where the codec has it) and deflate."""
        steps = (Filter(FILTER_SHUFFLE, (itemsize,)),) if self.shuffle else ()
        return (*steps, Filter(_FILTER_DEFLATE, (6,)))

    def accepts(self, filters: tuple[Filter, ...]) -> bool:
        """Deflate of any level, with shuffle where the codec has it."""
        return _same_filters(filters, self.pipeline(1))

    def encode(self, raw: memoryview, itemsize: int) -> bytes:
        """One zlib stream of the (shuffled) bytes."""
        return deflate.encode(raw, itemsize=itemsize if self.shuffle else 1)

    def decode(self, stored: memoryview, out: memoryview, itemsize: int) -> None:
        """Inflate exactly ``len(out)`` bytes and undo the shuffle."""
        deflate.decode(stored, out, itemsize=itemsize if self.shuffle else 1)


@dataclass(frozen=True, slots=True)
class ZstdCodec:
    """HDF5's byte shuffle and the registered Zstandard filter, whose chunks are plain frames."""

    name: str
    level: int

    def pipeline(self, itemsize: int) -> tuple[Filter, ...]:
        """Shuffle and Zstandard."""
        return Filter(FILTER_SHUFFLE, (itemsize,)), Filter(FILTER_ZSTD, (self.level,))

    def accepts(self, filters: tuple[Filter, ...]) -> bool:
        """Shuffle and Zstandard of any level."""
        return _same_filters(filters, self.pipeline(1))

    def encode(self, raw: memoryview, itemsize: int) -> bytes:
        """One Zstandard frame, with its content size, of the shuffled bytes."""
        data = np.frombuffer(raw, np.uint8)
        shuffled = deflate.shuffle(data, itemsize, out=_SCRATCH.take(data.size))
        return _ZSTD_CONTEXTS.compressor(self.level).compress(shuffled.data)

    def decode(self, stored: memoryview, out: memoryview, itemsize: int) -> None:
        """Decompress exactly ``len(out)`` bytes and undo the shuffle."""
        # Checked first: the library allocates what the frame claims.
        try:
            claimed = zstandard.frame_content_size(stored)
            if claimed != len(out):
                message = f"the Zstandard frame claims {claimed} bytes, expected {len(out)}"
                raise ValueError(message)
            data = _ZSTD_CONTEXTS.decompressor.decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as error:
            message = f"the stored bytes are no intact Zstandard frame: {error}"
            raise ValueError(message) from error
        if len(data) != len(out):
            message = f"the Zstandard frame holds {len(data)} bytes, expected {len(out)}"
            raise ValueError(message)
        target = np.frombuffer(out, np.uint8)
        deflate.unshuffle(np.frombuffer(data, np.uint8), target, itemsize)


class _ZstdContexts(threading.local):
    """Contexts are costly to make and must not be shared between threads."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()
        self._compressors: dict[int, zstandard.ZstdCompressor] = {}

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        """This thread's compressor; frames carry a checksum of their content."""
        if level not in self._compressors:
            made = zstandard.ZstdCompressor(level=level, write_checksum=True)
            self._compressors[level] = made
        return self._compressors[level]


_ZSTD_CONTEXTS: Final = _ZstdContexts()
_SCRATCH: Final = Scratch()
GZIP: Final = DeflateCodec("gzip", shuffle=True)
# For bytes and text, which a shuffle by element would only scatter.
DEFLATE: Final = DeflateCodec("deflate", shuffle=False)
ZSTD: Final = ZstdCodec("zstd", level=3)
CODECS: Final[dict[str, Codec]] = {codec.name: codec for codec in (GZIP, DEFLATE, ZSTD)}


def get_codec(name: str) -> Codec:
    """The codec of that name."""
    try:
        return CODECS[name]
    except KeyError:
        message = f"codec {name!r} is unknown; expected one of {', '.join(CODECS)}"
        raise UnsupportedEncodingError(message) from None


def codec_of(filters: tuple[Filter, ...]) -> str | None:
    """The codec that reads chunks of these filters; None if there is none."""
    return next((codec.name for codec in CODECS.values() if codec.accepts(filters)), None)


def _same_filters(found: tuple[Filter, ...], expected: tuple[Filter, ...]) -> bool:
    """Whether two pipelines have the same filters, whatever their parameters."""
    return [each.filter_id for each in found] == [each.filter_id for each in expected]


def tools_note(codec: str | None) -> str | None:
    """Which tools open archives of this codec; None for gzip, which all of them open."""
    if codec in (None, GZIP.name):
        return None
    filters = ", ".join(str(each.filter_id) for each in get_codec(codec).pipeline(2))
    return (
        f"codec {codec} uses the HDF5 filters {filters}: h5py reads it after 'import hdf5plugin'; "
        "HDFView, h5dump and others need the HDF5 plugins installed; gzip needs nothing"
    )
