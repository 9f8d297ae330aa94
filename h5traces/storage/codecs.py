"""Codecs: bytes in, bytes out, chunk by chunk; each is a pipeline of HDF5 filters.

A codec's output is what HDF5's own filters would accept, so stock tools read every chunk, and a
codec also decodes what stock tools wrote.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import zstandard

from h5traces.errors import UnsupportedEncodingError
from h5traces.format.limits import Scratch
from h5traces.storage import deflate

_FILTER_DEFLATE: Final = 1
FILTER_SHUFFLE: Final = 2
FILTER_ZSTD: Final = 32015
_ZSTD_LEVEL: Final = 3
# The codecs that `convert --codec` offers for layered arrays.
ArrayCodec = Literal["gzip", "zstd"]


@dataclass(frozen=True, slots=True)
class Filter:
    """One step of an HDF5 filter pipeline: its registered number and its client data values."""

    filter_id: int
    parameters: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DeflateCodec:
    """HDF5's own gzip filter, with or without its byte shuffle in front."""

    name: str
    shuffle: bool

    def pipeline(self, itemsize: int) -> tuple[Filter, ...]:
        """The HDF5 filters, in order of writing, for elements of `itemsize` bytes."""
        steps = (Filter(FILTER_SHUFFLE, (itemsize,)),) if self.shuffle else ()
        # The level is nominal.
        return (*steps, Filter(_FILTER_DEFLATE, (6,)))

    def encode(self, raw: memoryview, itemsize: int) -> bytes:
        """The stored bytes of a chunk; `raw` is C order, little-endian."""
        return deflate.encode(raw, itemsize=itemsize if self.shuffle else 1)

    def decode(self, stored: memoryview, out: memoryview, itemsize: int) -> None:
        """Fill `out` with exactly the raw bytes of a chunk; ValueError where they do not fit."""
        deflate.decode(stored, out, itemsize=itemsize if self.shuffle else 1)


@dataclass(frozen=True, slots=True)
class ZstdCodec:
    """HDF5's byte shuffle and the registered Zstandard filter, whose chunks are plain frames."""

    name: str

    def pipeline(self, itemsize: int) -> tuple[Filter, ...]:
        """As for `DeflateCodec`."""
        return Filter(FILTER_SHUFFLE, (itemsize,)), Filter(FILTER_ZSTD, (_ZSTD_LEVEL,))

    def encode(self, raw: memoryview, itemsize: int) -> bytes:
        """One Zstandard frame, with its content size, of the shuffled bytes."""
        data = np.frombuffer(raw, np.uint8)
        shuffled = deflate.shuffle(data, itemsize, out=_SCRATCH.take(data.size))
        return _ZSTD_CONTEXTS.compressor.compress(shuffled.data)

    def decode(self, stored: memoryview, out: memoryview, itemsize: int) -> None:
        """As for `DeflateCodec`."""
        # Checked first: the library allocates what the frame claims.
        try:
            claimed = zstandard.frame_content_size(stored)
            if claimed != len(out):
                message = f"the Zstandard frame claims {claimed} bytes, expected {len(out)}"
                raise ValueError(message)
            data = _ZSTD_CONTEXTS.decompressor.decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as error:
            message = f"the stored bytes are not an intact Zstandard frame: {error}"
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
        self.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True)


_ZSTD_CONTEXTS: Final = _ZstdContexts()
_SCRATCH: Final = Scratch()
GZIP: Final = DeflateCodec("gzip", shuffle=True)
# For bytes and text, which a shuffle by element would only scatter.
DEFLATE: Final = DeflateCodec("deflate", shuffle=False)
ZSTD: Final = ZstdCodec("zstd")
Codec: TypeAlias = DeflateCodec | ZstdCodec
CODECS: Final[dict[str, Codec]] = {codec.name: codec for codec in (GZIP, DEFLATE, ZSTD)}


def get_codec(name: str) -> Codec:
    """The codec of that name."""
    try:
        return CODECS[name]
    except KeyError:
        message = f"codec {name!r} is unknown; expected one of {', '.join(CODECS)}"
        raise UnsupportedEncodingError(message) from None


def codec_of(filters: tuple[Filter, ...]) -> str | None:
    """The codec that reads chunks of these filters; None if no codec does."""
    numbers = [each.filter_id for each in filters]
    for codec in CODECS.values():
        # With any parameters.
        if [each.filter_id for each in codec.pipeline(1)] == numbers:
            return codec.name
    return None


def tools_note(codec: str | None) -> str | None:
    """Which tools open archives of this codec; None for gzip, which all of them open."""
    if codec in (None, GZIP.name):
        return None
    filters = ", ".join(str(each.filter_id) for each in get_codec(codec).pipeline(2))
    return (
        f"codec {codec} uses the HDF5 filters {filters}: h5py reads it after 'import hdf5plugin'; "
        "HDFView, h5dump and others need the HDF5 plugins installed; gzip needs nothing"
    )
