"""The range in which viewers show attention: black to white, without the weights of the first key.

The first key takes most of a row's weight in many models ("attention sink", Xiao et al., ICLR
2024). On a scale that reaches up to it, nearly all other weights are black.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from h5traces.format.dtypes import bfloat16_to_float32
from h5traces.format.entries import carrier_dtype
from h5traces.format.layout import is_picture
from h5traces.storage.arrays import as_bytes, chunk_offsets, chunk_slices
from h5traces.storage.codecs import get_codec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from h5traces.storage.arrays import EncodedArray, Shape

# Share of the weights that are not white.
_SHARE: Final = 0.95
_NUM_QUERIES: Final = 4


class Picture(NamedTuple):
    """What may be shown: the path in a sample, type and values as stored, and shape of a chunk."""

    path: str
    dtype: str
    values: NDArray[Any]
    chunk: Shape


def whites_of(pictures: Sequence[Picture]) -> list[float | None]:
    """The stored value of each picture that is white, 0 being black; None for no picture.

    Parameters
    ----------
    pictures
        With values ``(..., query, key)``, of which four rows are looked at. Those that follow each
        other and are alike take the time of one.

    Returns
    -------
    list of float or None
        Their 95th percentile without the first key and keys behind the query, rounded up to two
        digits; None if all are 0, or for arrays that are not squares.
    """
    found: list[float | None] = []
    for (is_shown, dtype, shape, chunk), some in groupby(pictures, _likeness):
        arrays = [each.values for each in some]
        if is_shown:
            part = chunk_slices(_middle(shape, chunk), shape, chunk)
            found += _whites([each[part] for each in arrays], dtype, part)
        else:
            found += [None] * len(arrays)
    return found


def _likeness(picture: Picture) -> tuple[bool, str, Shape, Shape]:
    path, dtype, values, chunk = picture
    return is_picture(path) and _is_square(values.shape), dtype, values.shape, chunk


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
    values = values[tuple(slice(each.stop - each.start) for each in part)]
    return _whites([values], dtype, part)[0]


def _is_square(shape: Shape) -> bool:
    return len(shape) in (2, 3) and shape[-1] == shape[-2] > 1 and math.prod(shape) > 0


def _middle(shape: Shape, chunk: Shape) -> Shape:
    """Where the chunk begins that holds the middle of an array."""
    return tuple(length // 2 // size * size for length, size in zip(shape, chunk, strict=True))


def _whites(
    arrays: Sequence[NDArray[Any]], dtype: str, part: tuple[slice, ...]
) -> list[float | None]:
    """Of the same part of some arrays."""
    places = _places(arrays[0].shape, part[-2].start, part[-1].start)
    weights = np.array([each.reshape(-1)[places] for each in arrays])
    numbers = bfloat16_to_float32(weights) if dtype == "bfloat16" else weights.astype(np.float32)
    is_finite = np.isfinite(numbers)
    counts = [numbers.shape[1]] * len(numbers)
    if not is_finite.all():
        counts = np.count_nonzero(is_finite, axis=1).tolist()
        # Behind all others.
        numbers[~is_finite] = np.inf
    ranks = [int(_SHARE * max(0, count - 1)) for count in counts]
    numbers.partition(sorted(set(ranks)), axis=1)
    whites = (
        float(row[rank]) if count else 0.0
        for row, rank, count in zip(numbers, ranks, counts, strict=True)
    )
    return [_rounded_up(white) if white > 0 else None for white in whites]


@lru_cache(maxsize=128)
def _places(shape: Shape, query: int, key: int) -> NDArray[np.int64]:
    """Places of the weights that count in a part of an array, given by its first query and key."""
    length, width = shape[-2:]
    rows = (length * number // _NUM_QUERIES - 1 for number in range(1, _NUM_QUERIES + 1))
    places = np.concatenate(
        [
            np.arange(max(0, 1 - key), min(width, max(0, query + row + 1 - key))) + row * width
            for row in rows
            if row >= 0
        ]
    )
    heads = np.arange(math.prod(shape[:-2])) * length * width
    found: NDArray[np.int64] = (heads[:, np.newaxis] + places).reshape(-1)
    return found


def _rounded_up(number: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return float(f"{math.ceil(round(number / unit, 6)) * unit:.1e}")
