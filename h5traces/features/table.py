"""The table of features: columns that may be larger than memory."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


class SpooledColumn:
    """A column of float32 in a nameless file of a folder; it vanishes with the process."""

    def __init__(self, folder: Path, row_shape: tuple[int, ...]) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)
        self._row_shape = row_shape
        self.width = row_shape[-1]
        self._num_rows = 0

    def append(self, row: NDArray[np.float32]) -> None:
        """Add a row at the end."""
        self._file.write(np.ascontiguousarray(row, np.float32).data)
        self._num_rows += 1

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
    """The table of features that is written."""

    # By name, ``(samples, layers, width)``.
    features: dict[str, NDArray[np.float32]]
    # By name, one entry per sample: ids, labels and so on.
    samples: dict[str, NDArray[Any]]
    # By path, arrays that are not of samples: layer numbers, principal components.
    others: dict[str, NDArray[Any]]
    # Origin of the features; JSON-ready.
    metadata: dict[str, Any]
