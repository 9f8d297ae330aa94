"""Whether the index of an archive says what its HDF5 part does.

h5traces reads the index, stock tools read HDF5. A file may be made so that both are intact and say
different things; whoever copies or vouches for one must have compared it with the other.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from h5traces.archive.footer_store import FooterObjects, FooterStore
from h5traces.errors import CorruptArchiveError
from h5traces.format import layout
from h5traces.format.entries import object_place
from h5traces.format.text import counted
from h5traces.storage.footer import key_of
from h5traces.storage.hdf5.headers import HeaderCheck
from h5traces.storage.hdf5.reading import Hdf5Reader

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from h5traces.archive.trace import Trace
    from h5traces.format.entries import ObjectEntry, SampleEntry
    from h5traces.format.limits import ReadLimits

    # HDF5 path, and what the index and HDF5 say differently there.
    Difference = tuple[str, str]


class Agreement:
    """Compares the index of one archive on disk with its HDF5 part, which stays open.

    Attributes
    ----------
    num_objects
        Groups and datasets that were compared.
    """

    def __init__(self, store: FooterStore, path: Path, limits: ReadLimits) -> None:
        self._store, self.num_objects = store, 0
        self._reader = Hdf5Reader(path, limits)
        self._headers = HeaderCheck(store.file)
        self._addresses = self._reader.sample_addresses()
        self._names = self._reader.sample_names()
        self._keys = store.keys()

    def close(self) -> None:
        """Close the HDF5 part."""
        self._reader.close()

    def of_head(self) -> Iterator[Difference]:
        """Differences outside of samples."""
        if self._store.root_attrs != self._reader.root_attributes():
            yield "/", "the index has other attributes than HDF5"
        kinds = self._reader.kinds()
        for name in sorted({*self._store.kinds, *kinds}):
            if self._store.kinds.get(name) != kinds.get(name):
                message = "the index has other attributes than HDF5"
                yield f"/{layout.KINDS_GROUP}/{name}", message
        if self._store.num_samples != len(self._names):
            message = f"the index lists {self._store.num_samples} samples, {len(self._names)} are "
            yield f"/{layout.SAMPLES_GROUP}", f"{message}stored"
        place = f"/{layout.SCALES_GROUP}"
        scales = self._store.scales()
        yield from differences(place, scales, self._reader.scales())
        self.num_objects += len(kinds) + (len(scales.objects) if scales is not None else 0)

    def of_sample(self, index: int) -> Iterator[Difference]:
        """Differences of a sample, by its position."""
        listed = self._store.sample(index)
        self.num_objects += 1 + len(listed.objects)
        if self._keys[index] != key_of(listed.attrs):
            yield layout.sample_path(index), "the index finds it by another id than it has"
        name = self._names[index] if index < len(self._names) else ""
        objects, address = listed.objects, self._addresses.get(name, 0)
        assert isinstance(objects, FooterObjects)
        if not self._headers.shows(address, listed, objects.row, objects.key):
            stored = self._reader.sample(name) if name else None
            yield from differences(layout.sample_path(index), listed, stored)

    def check(self, index: int) -> None:
        """Raise CorruptArchiveError where the index and HDF5 say different things of a sample."""
        _reject(self._store, self.of_sample(index))

    def check_head(self) -> None:
        """The same for all that lies outside of samples."""
        _reject(self._store, self.of_head())


def _reject(store: FooterStore, found: Iterator[Difference]) -> None:
    for place, what in found:
        message = (
            f"{store.file.name}: {place}: {what}, so h5traces and other programs would read "
            "different things of it; restore the file from a copy, or run 'h5traces seal' to make "
            "the index say what HDF5 does"
        )
        raise CorruptArchiveError(message)


def differences(
    place: str, listed: SampleEntry | None, stored: SampleEntry | None
) -> Iterator[Difference]:
    """Where the index and HDF5 describe objects differently; None stands for nothing there."""
    if listed is None or stored is None:
        if listed is not stored:
            yield place, "only one of the index and HDF5 has it"
        return
    if listed.attrs != stored.attrs or set(listed.objects) != set(stored.objects):
        yield place, "the index has other metadata than HDF5"
        return
    for path, entry in stored.objects.items():
        if not _same_entry(listed.objects[path], entry):
            yield (
                object_place(stored.ordinal, path),
                "the index describes another dataset than HDF5",
            )


def _same_entry(listed: ObjectEntry, stored: ObjectEntry) -> bool:
    """Whether two entries agree but for checksums, which only the footer has."""

    def facts(entry: ObjectEntry) -> tuple[object, ...]:
        extents = entry.chunks and (entry.chunks.offsets, entry.chunks.sizes)
        return entry.attrs, entry.dtype, entry.shape, entry.chunk, entry.codec, extents

    return facts(listed) == facts(stored)


class ComparedTraces:
    """Compares traces with HDF5 before they are copied; a context that closes what it opens."""

    def __init__(self) -> None:
        self._open: dict[Path, Agreement | None] = {}
        self._until_done = ExitStack()
        self._num_remote = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._until_done.close()

    def check(self, trace: Trace) -> None:
        """Raise CorruptArchiveError where the index and HDF5 say different things of a trace.

        Archives on servers are only counted, since comparing would take a request per object.
        """
        file = trace._stored.file
        if not isinstance(file.path, Path):
            self._num_remote += 1
            return
        if file.path not in self._open:
            self._open[file.path] = None
            # Without an index, HDF5 is what is read.
            if isinstance(file.store, FooterStore):
                found = Agreement(file.store, file.path, file.limits)
                self._until_done.callback(found.close)
                found.check_head()
                self._open[file.path] = found
        agreement = self._open[file.path]
        if agreement is not None:
            agreement.check(trace.position_in_file)

    def traces(self, archive: Iterable[Trace]) -> Iterator[Trace]:
        """The traces of an archive, each compared before it is used."""
        for trace in archive:
            self.check(trace)
            yield trace

    @property
    def warnings(self) -> list[str]:
        """What was not compared."""
        if not self._num_remote:
            return []
        samples = counted(self._num_remote, "sample was", "samples were")
        return [
            f"{samples} taken from servers as the index lists them, not compared with HDF5; where "
            "you do not trust the files, download them first"
        ]
