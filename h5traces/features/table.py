"""The table of features: columns that may be larger than memory."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


class SpooledColumn:
    """A column of float32 in a nameless file, which vanishes with the process.

    Parameters
    ----------
    folder
        Where there is room for it.
    row_shape
        Shape of one row.
    """

    def __init__(self, folder: Path, row_shape: tuple[int, ...]) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)
        self._row_shape = row_shape
        self._num_rows = 0

    def append(self, row: NDArray[np.float32]) -> None:
        """Add a row at the end."""
        self._file.write(np.ascontiguousarray(row, np.float32).data)
        self._num_rows += 1

    @property
    def width(self) -> int:
        """Length of the last axis."""
        return self._row_shape[-1]

    @property
    def values(self) -> NDArray[np.float32]:
        """All rows so far, read from the file as they are used."""
        self._file.flush()
        return np.memmap(self._file, np.float32, "r", shape=(self._num_rows, *self._row_shape))

    def close(self) -> None:
        """Delete the file, once no array of it is in use."""
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
        Origin of the features; JSON-ready.
    """

    features: dict[str, NDArray[np.float32]]
    samples: dict[str, NDArray[Any]]
    others: dict[str, NDArray[Any]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
