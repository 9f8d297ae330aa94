"""Codecs: bytes in, bytes out, chunk by chunk; each is a pipeline of HDF5 filters.

A codec's output is what HDF5's own filters would accept, so stock tools read every chunk, and a
codec also decodes what stock tools wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Protocol

from h5traces.errors import UnsupportedEncodingError
from h5traces.storage import deflate

FILTER_DEFLATE: Final = 1
FILTER_SHUFFLE: Final = 2


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
        return (*steps, Filter(FILTER_DEFLATE, (6,)))

    def encode(self, raw: memoryview, itemsize: int) -> bytes:
        """One zlib stream of the (shuffled) bytes."""
        return deflate.encode(raw, itemsize=itemsize if self.shuffle else 1)

    def decode(self, stored: memoryview, out: memoryview, itemsize: int) -> None:
        """Inflate exactly ``len(out)`` bytes and undo the shuffle."""
        deflate.decode(stored, out, itemsize=itemsize if self.shuffle else 1)


GZIP: Final = DeflateCodec("gzip", shuffle=True)
# For bytes and text, which a shuffle by element would only scatter.
DEFLATE: Final = DeflateCodec("deflate", shuffle=False)

CODECS: Final[dict[str, Codec]] = {codec.name: codec for codec in (GZIP, DEFLATE)}
# What `convert --codec` offers for the layered arrays.
ArrayCodec = Literal["gzip"]


def get_codec(name: str) -> Codec:
    """The codec of that name.

    Raises
    ------
    UnsupportedEncodingError
        This release knows no such codec.
    """
    try:
        return CODECS[name]
    except KeyError:
        message = f"codec {name!r} is unknown; expected one of {', '.join(CODECS)}"
        raise UnsupportedEncodingError(message) from None


def codec_of(filters: tuple[Filter, ...], itemsize: int) -> str | None:
    """The codec whose pipeline is `filters`, whatever their parameters; None if there is none."""
    found = [each.filter_id for each in filters]
    for codec in CODECS.values():
        if [each.filter_id for each in codec.pipeline(itemsize)] == found:
            return codec.name
    return None
