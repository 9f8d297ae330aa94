"""Columns of features, and the table that they make up."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

# Bytes of a column that are in memory at a time.
_BLOCK_NBYTES: Final = 4 << 20


class Column(Protocol):
    """Rows of numbers, or of texts, which may be more than fit into memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the numbers; ``object`` for texts."""

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Some of the rows."""


def blocks(column: Column) -> Iterator[NDArray[Any]]:
    """All rows of a column, a few megabytes at a time."""
    row_nbytes = max(1, column.dtype.itemsize * int(np.prod(column.shape[1:], dtype=np.int64)))
    step = max(1, _BLOCK_NBYTES // row_nbytes)
    for start in range(0, column.shape[0], step):
        yield column.rows(start, min(start + step, column.shape[0]))


class ArrayColumn:
    """A column that fits into memory."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return self._values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._values.dtype

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        return self._values[start:stop]


class SpooledColumn:
    """A column of float32 in a nameless file, which vanishes with the process.

    Parameters
    ----------
    folder
        Where there is room for it.
    row_shape
        Shape of one row.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, folder: Path, row_shape: tuple[int, ...]) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)
        self._row_shape = row_shape
        self._row_nbytes = 4 * int(np.prod(row_shape, dtype=np.int64))
        self._num_rows = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._num_rows, *self._row_shape)

    def append(self, row: NDArray[np.float32]) -> None:
        """Add a row behind the others."""
        self._file.seek(self._num_rows * self._row_nbytes)
        self._file.write(np.ascontiguousarray(row).data)
        self._num_rows += 1

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        self._file.flush()
        data = self._read((stop - start) * self._row_nbytes, start * self._row_nbytes)
        return np.frombuffer(data, np.float32).reshape(stop - start, *self._row_shape)

    def layer_rows(self, layer: int, start: int, stop: int) -> NDArray[np.float32]:
        """Some of the rows of one layer, the first axis of a row; others are not read."""
        self._file.flush()
        width = self._row_shape[1]
        parts = [
            self._read(4 * width, row * self._row_nbytes + 4 * layer * width)
            for row in range(start, stop)
        ]
        return np.frombuffer(b"".join(parts), np.float32).reshape(stop - start, width)

    def _read(self, nbytes: int, offset: int) -> bytes:
        return os.pread(self._file.fileno(), nbytes, offset)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


@dataclass(slots=True)
class FeatureTable:
    """What is written.

    Attributes
    ----------
    features
        By name, ``(samples, layers, width)``.
    samples
        By name, one entry per sample: ids, labels and so on.
    others
        By path, arrays that are not of samples: layer numbers, principal components.
    metadata
        Where all this comes from; JSON-ready.
    """

    features: dict[str, Column] = field(default_factory=dict)
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    others: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Rows of every feature."""
        return len(self.samples["index"])
