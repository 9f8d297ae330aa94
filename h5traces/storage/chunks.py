"""How an array is cut into chunks, and put together again.

A dataset is one chunk up to about 4 MiB of raw data; larger ones are tiled along their leading
axes: tokens of hidden states, heads and then queries of attentions.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

TARGET_NBYTES: Final = 4 << 20

Shape = tuple[int, ...]


def chunk_shape(shape: Shape, itemsize: int, target_nbytes: int = TARGET_NBYTES) -> Shape:
    """The chunk shape for an array: whole where it is small, else tiles of nearly equal size.

    Parameters
    ----------
    shape
        Shape of the array; axes of length 0 count as 1, as HDF5 wants chunk axes of at least 1.
    itemsize
        Bytes per element.
    target_nbytes
        Largest raw size of a chunk, unless one element is larger.
    """
    chunk = [max(1, length) for length in shape]
    for axis, length in enumerate(chunk):
        row_nbytes = itemsize * math.prod(chunk[axis + 1 :])
        if length * row_nbytes <= target_nbytes:
            break
        rows = max(1, target_nbytes // row_nbytes)
        num_tiles = math.ceil(length / rows)
        chunk[axis] = math.ceil(length / num_tiles)
        if chunk[axis] > 1:
            break
    return tuple(chunk)


def grid_shape(shape: Shape, chunk: Shape) -> Shape:
    """The number of chunks along every axis."""
    return tuple(math.ceil(length / size) for length, size in zip(shape, chunk, strict=True))


def num_chunks(shape: Shape, chunk: Shape) -> int:
    """The number of chunks of an array."""
    return math.prod(grid_shape(shape, chunk))


def chunk_offsets(shape: Shape, chunk: Shape) -> Iterator[Shape]:
    """Index of the first element of every chunk, in C order of the grid."""
    starts = (range(0, length, size) for length, size in zip(shape, chunk, strict=True))
    return itertools.product(*starts)


def chunk_slices(offset: Shape, shape: Shape, chunk: Shape) -> tuple[slice, ...]:
    """The part of the array that the chunk at `offset` holds."""
    return tuple(
        slice(start, min(start + size, length))
        for start, length, size in zip(offset, shape, chunk, strict=True)
    )


def cut(array: NDArray[Any], offset: Shape, chunk: Shape) -> NDArray[Any]:
    """The chunk at `offset`: C-contiguous and of full size, zeros beyond the array's edge."""
    part = array[chunk_slices(offset, array.shape, chunk)]
    if part.shape == chunk:
        return np.ascontiguousarray(part)
    full = np.zeros(chunk, dtype=array.dtype)
    full[tuple(slice(0, length) for length in part.shape)] = part
    return full
