"""HDF5 files of other programs as named arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from h5traces.format.text import and_more
from h5traces.sources.arrays import ArrayFile
from h5traces.storage.hdf5.others import OtherHdf5, named

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from h5traces.sources.arrays import Group


class Hdf5File(ArrayFile):
    """Datasets by path, such as ``layer_3/inputs``, and attributes, such as ``layer_3/@unit``."""

    kind = "hdf5"

    def __init__(self, path: Path) -> None:
        self._file = OtherHdf5(path)
        if self._file.links:
            links = and_more(map(repr, self._file.links), 5)
            self.understood = (f"soft links are not followed: {links}",)

    def groups(self) -> Iterator[Group]:
        """One group."""
        yield dict(named(self._file))

    @property
    def progress(self) -> tuple[int, int]:
        """The size of the file."""
        return 0, self._file.nbytes

    def close(self) -> None:
        """Close the file."""
        self._file.close()
