"""Read access to one archive file through HDF5, where its index is missing or does not fit."""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

from h5traces.archive.footer_store import SAMPLES_KEPT, FooterStore
from h5traces.archive.stored_form import kept
from h5traces.errors import CorruptArchiveError
from h5traces.format import layout
from h5traces.format.entries import NO_ORDINAL, located
from h5traces.storage.arrays import read_array
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import key_of
from h5traces.storage.hdf5.reading import Hdf5Reader
from h5traces.storage.plans import NothingRead

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.format.document import Attrs
    from h5traces.format.entries import SampleEntry
    from h5traces.format.limits import ReadLimits
    from h5traces.storage.plans import Reading


class Hdf5Store:
    """Reads through HDF5: for archives whose footer is missing or does not fit."""

    def __init__(self, path: Path, limits: ReadLimits) -> None:
        self._path, self._limits = path, limits
        self.file = LocalFile(path)
        self._reader = Hdf5Reader(path, limits)
        self._pid = os.getpid()
        # Reading array by array takes the same sample again and again.
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

    @property
    def has_foreign(self) -> bool:
        """Whether there may be objects or attributes that are not the format's."""
        return True

    def sample_place(self, index: int) -> str:
        """Absolute path of a sample's group."""
        return f"/{layout.SAMPLES_GROUP}/{self._name_of(index)}"

    def keys(self) -> list[tuple[str | None, int | None]]:
        """Id and generation index of every sample, None for what it lacks."""
        return [key_of(attrs) for attrs in self.samples_attrs()]

    def sample_attrs(self, index: int) -> Attrs:
        return self._hdf5.sample_attributes(self._name_of(index))

    def samples_attrs(self) -> Iterator[Attrs]:
        """Attributes of every sample, in order."""
        return (self.sample_attrs(index) for index in range(self.num_samples))

    def sample(self, index: int) -> SampleEntry:
        return kept(
            self._walked, index, lambda: self._hdf5.sample(self._name_of(index)), SAMPLES_KEPT
        )

    def scales(self) -> SampleEntry | None:
        return self._hdf5.scales()

    def close(self) -> None:
        """Close the file."""
        self._reader.close()
        self.file.close()

    def _name_of(self, index: int) -> str:
        if index >= len(self._names):
            # The number came from a wrong index.
            message = (
                f"{self._path}: sample {index} is missing, as there are {len(self._names)} in the "
                "HDF5 part; the index lists more, open the file again"
            )
            raise CorruptArchiveError(message)
        return self._names[index]

    def check_index(self) -> None:
        """Read the table of samples, which no reader needs; CorruptArchiveError if damaged."""
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

    def begin(self, *_: object, **__: object) -> Reading:
        """Nothing: `read` reads one array at a time."""
        return NothingRead()


Store = FooterStore | Hdf5Store
