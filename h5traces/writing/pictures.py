"""The range in which viewers show attention: black to white, without the weights of the first key.

The first key takes most of a row's weight in many models ("attention sink", Xiao et al., ICLR
2024). On a scale that reaches up to it, nearly all other weights are black.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.format.dtypes import bfloat16_to_float32
from h5traces.format.entries import carrier_dtype
from h5traces.format.layout import is_picture
from h5traces.storage.arrays import as_bytes, chunk_offsets, chunk_slices
from h5traces.storage.codecs import get_codec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.storage.arrays import EncodedArray, Shape

# Share of the weights that are not white.
_SHARE: Final = 0.95
_NUM_QUERIES: Final = 4


def white_of(path: str, dtype: str, values: NDArray[Any], chunk: Shape) -> float | None:
    """The stored value that is white, 0 being black; None for no picture.

    Parameters
    ----------
    path
        Of the dataset, in its sample.
    values
        Stored values ``(..., query, key)`` of the type `dtype`, of which four rows are looked at.
    chunk
        Shape of a chunk.

    Returns
    -------
    float or None
        Their 95th percentile without the first key and keys behind the query, rounded up to two
        digits; None if all are 0, or for arrays that are not squares.
    """
    if not is_picture(path) or not _is_square(values.shape):
        return None
    part = chunk_slices(_middle(values.shape, chunk), values.shape, chunk)
    return _white(values[part], dtype, part)


def white_of_stored(path: str, dtype: str, encoded: EncodedArray) -> float | None:
    """The same from chunks, of which one is decoded."""
    if not is_picture(path) or not _is_square(encoded.shape):
        return None
    carrier = carrier_dtype(dtype)
    offsets = list(chunk_offsets(encoded.shape, encoded.chunk))
    number = offsets.index(_middle(encoded.shape, encoded.chunk))
    values = np.empty(encoded.chunk, carrier)
    stored = memoryview(encoded.chunks[number])
    get_codec(encoded.codec).decode(stored, as_bytes(values), carrier.itemsize)
    part = chunk_slices(offsets[number], encoded.shape, encoded.chunk)
    return _white(values[tuple(slice(each.stop - each.start) for each in part)], dtype, part)


def _is_square(shape: Shape) -> bool:
    return len(shape) in (2, 3) and shape[-1] == shape[-2] > 1 and math.prod(shape) > 0


def _middle(shape: Shape, chunk: Shape) -> Shape:
    """Where the chunk begins that holds the middle of an array."""
    return tuple(length // 2 // size * size for length, size in zip(shape, chunk, strict=True))


def _white(values: NDArray[Any], dtype: str, part: tuple[slice, ...]) -> float | None:
    queries, first_key = part[-2], part[-1].start
    length = queries.stop - queries.start
    found = []
    for number in range(1, _NUM_QUERIES + 1):
        row = length * number // _NUM_QUERIES - 1
        keys = slice(max(0, 1 - first_key), max(0, queries.start + row + 1 - first_key))
        if row >= 0:
            found.append(values[..., row, keys].ravel())
    weights = np.concatenate(found)
    numbers = bfloat16_to_float32(weights) if dtype == "bfloat16" else weights.astype(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return None
    place = int(_SHARE * (numbers.size - 1))
    white = float(np.partition(numbers, place)[place])
    return _rounded_up(white) if white > 0 else None


def _rounded_up(number: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return float(f"{math.ceil(round(number / unit, 6)) * unit:.1e}")
