"""Stored objects of a sample, described alike by HDF5 and by the index."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import ArchiveError, UnsupportedEncodingError
from h5traces.format import layout
from h5traces.format.dtypes import CARRIERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from h5traces.format.document import Attrs

# Of what lies in no sample.
NO_ORDINAL: Final = -1
_TEXT_TYPE = re.compile(r"text:([1-9][0-9]{0,9})\Z")
INTEGER_TYPES = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


@cache
def carrier_dtype(stored_type: str) -> np.dtype[Any]:
    """The numpy dtype that carries the bytes of a stored type.

    Types are ``float16``, ``bfloat16``, ``float32``, ``float64``, ``int8`` … ``uint64``, and
    ``text:<n>`` for UTF-8 fields of n bytes; UnsupportedEncodingError for others.
    """
    if stored_type in CARRIERS:
        return CARRIERS[stored_type]
    if stored_type in INTEGER_TYPES:
        return np.dtype(stored_type).newbyteorder("<")
    text = _TEXT_TYPE.match(stored_type)
    if text:
        return np.dtype(f"S{text[1]}")
    message = f"stored type {stored_type!r} cannot be stored in an archive"
    raise UnsupportedEncodingError(message)


def stored_type_of(values: NDArray[Any]) -> str:
    """The stored type of an array of integers, floats or fixed-length bytes."""
    if values.dtype.kind == "S":
        return f"text:{max(1, values.dtype.itemsize)}"
    return values.dtype.name


def digest_type(stored_type: str) -> str:
    """The type name that enters a dataset's digest: texts are ``text`` whatever their width."""
    return "text" if stored_type.startswith("text:") else stored_type


@dataclass(frozen=True, slots=True)
class ChunkTable:
    """Where the chunks of one dataset lie in the file, in C order of the chunk grid."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    # xxh3-64 of the stored bytes; None if only HDF5 is known, which keeps none.
    checksums: tuple[int, ...] | None

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Offset and size of every chunk."""
        return list(zip(self.offsets, self.sizes, strict=True))


NO_CHUNKS: Final = ChunkTable((), (), ())


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """A group or dataset inside a sample; `path` is below the sample's group."""

    path: str
    # Without those that every reader can derive (the IMAGE attributes).
    attrs: Attrs = field(default_factory=dict)
    # Stored type; the empty string for a group.
    dtype: str = ""
    shape: tuple[int, ...] = ()
    chunk: tuple[int, ...] = ()
    # Both None for groups, and where only the HDF5 library can read the dataset.
    codec: str | None = None
    chunks: ChunkTable | None = None

    @property
    def is_group(self) -> bool:
        """Whether the object is a group."""
        return not self.dtype

    @property
    def raw_nbytes(self) -> int:
        """Bytes of the uncompressed array."""
        if self.is_group:
            return 0
        return math.prod(self.shape) * carrier_dtype(self.dtype).itemsize

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the stored chunks."""
        return sum(self.chunks.sizes) if self.chunks else 0


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """A sample as stored: its attributes and its objects by path, in order of path."""

    ordinal: int
    attrs: Attrs
    objects: Mapping[str, ObjectEntry]


def object_place(ordinal: int, path: str) -> str:
    """Absolute path of an object of a sample, or of one outside of all samples."""
    return f"/{path}" if ordinal == NO_ORDINAL else f"{layout.sample_path(ordinal)}/{path}"


def located(error: ArchiveError, file: str, ordinal: int, path: str) -> ArchiveError:
    """The error with file, sample and object in front."""
    what = str(error).removeprefix(f"{file}: ")
    return type(error)(f"{file}: {object_place(ordinal, path)}: {what}")
