"""An archive file through HDF5, where its footer is missing or does not fit."""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

from h5traces.archive.store import NO_ORDINAL, StoredSize, located
from h5traces.errors import CorruptArchiveError
from h5traces.format import layout
from h5traces.storage.arrays import read_array
from h5traces.storage.files import LocalFile
from h5traces.storage.hdf5.reading import Hdf5Reader

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.format.attributes import Attrs
    from h5traces.format.entries import SampleEntry
    from h5traces.format.limits import ReadLimits

# About as many as the threads of a reader are in at once.
_SAMPLES_KEPT = 8


class Hdf5Store:
    """Reads through HDF5: for archives whose footer is missing or does not fit."""

    def __init__(self, path: Path, limits: ReadLimits) -> None:
        self._path, self._limits = path, limits
        self.file = LocalFile(path)
        self._reader = Hdf5Reader(path, limits)
        self._pid = os.getpid()
        # Whoever reads array by array asks for the same sample again and again.
        self._walked: dict[int, SampleEntry] = {}

    @property
    def _hdf5(self) -> Hdf5Reader:
        # HDF5's state does not survive a fork.
        if self._pid != os.getpid():
            self._reader = Hdf5Reader(self._path, self._limits)
            self._pid = os.getpid()
        return self._reader

    @cached_property
    def root_attrs(self) -> Attrs:
        return self._hdf5.root_attributes()

    @cached_property
    def kinds(self) -> dict[str, Attrs]:
        return self._hdf5.kinds()

    @cached_property
    def _names(self) -> list[str]:
        return self._hdf5.sample_names()

    @property
    def num_samples(self) -> int:
        return len(self._names)

    def sample_attrs(self, index: int) -> Attrs:
        return self._hdf5.sample_attributes(self._name_of(index))

    def sample(self, index: int) -> SampleEntry:
        walked = self._walked
        if index not in walked:
            found = self._hdf5.sample(self._name_of(index))
            # Another dict, as other threads may be looking into the full one.
            self._walked = walked = {} if len(walked) >= _SAMPLES_KEPT else walked
            walked[index] = found
            return found
        return walked[index]

    def scales(self) -> SampleEntry | None:
        return self._hdf5.scales()

    def close(self) -> None:
        """Close the file; for whoever opened it alone."""
        self._reader.close()
        self.file.close()

    def _name_of(self, index: int) -> str:
        if index >= len(self._names):
            # Whoever asks was told so by a footer that turned out to be wrong.
            message = (
                f"{self._path}: sample {index} is missing, as there are {len(self._names)} in the "
                "HDF5 part; the footer told of more, open the file again"
            )
            raise CorruptArchiveError(message)
        return self._names[index]

    def check_index(self) -> None:
        """Read the table of samples, which no reader needs.

        Raises
        ------
        CorruptArchiveError
            It is damaged.
        """
        self._hdf5.index_table()

    def read(self, sample: SampleEntry, path: str) -> NDArray[Any]:
        entry = sample.objects[path]
        if entry.codec is None and sample.ordinal == NO_ORDINAL:
            message = (
                f"{self._path}: /{path}: is not stored in chunks with shuffle and gzip, as scales "
                "are; 'h5traces calibrate' writes such files"
            )
            raise CorruptArchiveError(message)
        if entry.codec is None:
            return self._hdf5.read_values(layout.sample_name(sample.ordinal), entry)
        # Not through HDF5's own pipeline: where a chunk inflates short, it returns memory that
        # was never written.
        try:
            return read_array(self.file, entry, self._limits)
        except CorruptArchiveError as error:
            raise located(error, str(self._path), sample.ordinal, path) from error

    def sizes(self) -> dict[str, StoredSize]:
        sizes: dict[str, StoredSize] = {}
        for index in range(self.num_samples):
            for path, entry in self.sample(index).objects.items():
                if entry.raw_nbytes:
                    first = path.partition("/")[0]
                    part = StoredSize(1, entry.raw_nbytes, entry.stored_nbytes)
                    sizes[first] = sizes.get(first, StoredSize()) + part
        return sizes
