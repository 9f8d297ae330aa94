"""One archive file, read through its index or, without one, through HDF5."""

from __future__ import annotations

import contextlib
import json
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from h5traces.archive.footer_store import FooterObjects, FooterStore
from h5traces.archive.foreign import error_for
from h5traces.archive.hdf5_store import Hdf5Store
from h5traces.archive.labels import read_sidecar, sidecar_path
from h5traces.archive.scales import stored_scale, stored_scales
from h5traces.archive.whole_file import stored_sizes
from h5traces.errors import (
    ArchiveError,
    CorruptArchiveError,
    NotAnArchiveError,
    RemoteError,
    SchemaError,
    StoredStateWarning,
    UnsupportedVersionError,
    warn,
)
from h5traces.format import layout
from h5traces.format.archive import ArchiveMetadata
from h5traces.format.digests import DIGEST, difference
from h5traces.format.document import Attrs, from_attributes
from h5traces.storage.files import LocalFile
from h5traces.storage.footer_rows import FooterError
from h5traces.storage.remote.file import RemoteFile
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemotePath

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.archive.footer_store import Wanted
    from h5traces.archive.hdf5_store import Store
    from h5traces.archive.labels import FileLabels
    from h5traces.archive.whole_file import StoredSize
    from h5traces.format.entries import ObjectEntry, SampleEntry
    from h5traces.format.limits import ReadLimits
    from h5traces.precision.scales import ChannelScale
    from h5traces.storage.plans import Reading, Restoration
    from h5traces.storage.remote.paths import RemoteOptions

_T = TypeVar("_T")

_MOST_FEATURES_NAMED = 10


class ArchiveFile:
    """One archive file: opens when needed, survives pickling and fork, falls back to HDF5.

    `opened` is called whenever the file was opened, so that others can be closed. `label_folder`
    is where its labels lie, if not beside it; False to read none. With `unrounded`, encoded layers
    come as float32 where their source was float16.
    """

    def __init__(
        self,
        path: Path | RemotePath,
        limits: ReadLimits,
        *,
        opened: Callable[[ArchiveFile], None] | None = None,
        remote: RemoteOptions = DEFAULT_REMOTE,
        label_folder: Path | Literal[False] | None = None,
        unrounded: bool = False,
    ) -> None:
        self.path = path
        self.unrounded = unrounded
        self._scales: dict[str, ChannelScale] = {}
        # How the kernels restore layers, by what decides it.
        self.restorations: dict[Any, Restoration | None] = {}
        self.limits = limits
        self._remote = remote
        self._opened = opened
        self._store: Store | None = None
        self._without_footer = False
        self.metadata = self._read_metadata(self.store)
        self.num_samples = self.store.num_samples
        self.labels = self._read_labels(label_folder)
        if self.num_samples != self.metadata.num_samples:
            self._warn(
                f"holds {self.num_samples} samples, its metadata says {self.metadata.num_samples}; "
                "it was edited"
            )

    @property
    def store(self) -> Store:
        """The store in use; opened on first use in a process, and again after `close`."""
        # Local, so that a `close` in another thread cannot take it away in between.
        store = self._store
        if store is None:
            store = self._open()
            if hasattr(self, "metadata"):
                self._check_same(store)
            self._store = store
            if self._opened is not None:
                self._opened(self)
        return store

    def reduction(self, kind: str) -> str | None:
        """How heads were reduced in a kind of arrays; None if unknown."""
        found = self.store.kinds.get(kind, {}).get("reduction")
        return None if found in (None, "unknown") else str(found)

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's own layer numbers that are stored, of the first kind that has layers.

        Positions if no kind knows its layers.
        """
        for numbers in ("layers", "positions"):
            for kind in (layout.HIDDEN_STATES, layout.ATTENTIONS, *self.store.kinds):
                found = self.store.kinds.get(kind, {}).get(numbers, ())
                if isinstance(found, tuple) and found:
                    return found
        return ()

    @property
    def has_footer(self) -> bool:
        """Whether the archive is read through its index."""
        return isinstance(self.store, FooterStore)

    def _from_store(self, read: Callable[[Store], _T]) -> _T:
        """What `read` gives; read again through HDF5 where the index turns out to be damaged."""
        try:
            return read(self.store)
        except FooterError as error:
            return read(self._fall_back(error))

    def _from_sample(self, sample: SampleEntry, read: Callable[[SampleEntry], _T]) -> _T:
        """The same for a sample that came from the store in use."""
        try:
            return read(sample)
        except FooterError as error:
            return read(self._fall_back(error).sample(sample.ordinal))

    def sample(self, index: int) -> SampleEntry:
        """One sample and its objects."""
        return self._from_store(lambda store: store.sample(index))

    def keys(self) -> list[tuple[str | None, int | None]]:
        """Id and generation index of every sample, None for what it lacks."""
        return self._from_store(lambda store: store.keys())

    def sample_attrs(self, index: int) -> Attrs:
        """Attributes of one sample."""
        return self._from_store(lambda store: store.sample_attrs(index))

    def samples_attrs(self) -> Iterator[Attrs]:
        """Attributes of every sample, in order; many are read at a time."""
        done = 0
        try:
            for attrs in self.store.samples_attrs():
                done += 1
                yield attrs
        except FooterError as error:
            yield from islice(self._fall_back(error).samples_attrs(), done, None)

    def entry(self, sample: SampleEntry, path: str) -> ObjectEntry:
        """One object of a sample; KeyError if it has no such object."""
        return self._from_sample(sample, lambda each: each.objects[path])

    def raw_nbytes(self, sample: SampleEntry) -> int:
        """Bytes of all uncompressed arrays of a sample."""

        def read(each: SampleEntry) -> int:
            objects = each.objects
            if isinstance(objects, FooterObjects):
                return objects.raw_nbytes
            return sum(entry.raw_nbytes for entry in objects.values())

        return self._from_sample(sample, read)

    def digests(self, sample: SampleEntry) -> dict[str, Any]:
        """Digests of all objects of a sample by path; None of one without."""

        def read(each: SampleEntry) -> dict[str, Any]:
            objects = each.objects
            if isinstance(objects, FooterObjects):
                return objects.digests
            return {path: entry.attrs.get(DIGEST) for path, entry in objects.items()}

        return self._from_sample(sample, read)

    def attrs(self, sample: SampleEntry, path: str) -> Attrs:
        """Attributes of one object of a sample; perhaps without its digest."""
        return self.facts(sample, path)[1]

    def facts(self, sample: SampleEntry, path: str) -> tuple[str, Attrs]:
        """Stored type and attributes of one object of a sample; perhaps without its digest."""
        objects = sample.objects
        if isinstance(objects, FooterObjects):
            # Without the function that others give to `_from_sample`: asked for every array.
            try:
                return objects.facts(path)
            except FooterError as error:
                objects = self._fall_back(error).sample(sample.ordinal).objects
        return objects[path].dtype, objects[path].attrs

    def begin(self, wanted: Sequence[Wanted], workers: int, **options: Any) -> Reading:
        """Begin to read many datasets, as `FooterStore.begin`; `read` reads what it leaves out."""
        return self.store.begin(wanted, workers, **options)

    def read(self, sample: SampleEntry, path: str) -> NDArray[Any]:
        """Values of one dataset in its carrier dtype; bfloat16 as bits."""

        def read(each: SampleEntry) -> NDArray[Any]:
            store = self.store
            values = store.read(each, path)
            if isinstance(store, Hdf5Store):
                self._warn_of_edit(each, each.objects[path], values)
            return values

        return self._from_sample(sample, read)

    def _warn_of_edit(self, sample: SampleEntry, entry: ObjectEntry, values: NDArray[Any]) -> None:
        """HDF5's checksums do not show that two chunks were exchanged; the digest does."""
        if entry.codec is None or DIGEST not in entry.attrs:
            return
        differs = difference(entry, values)
        if differs is not None:
            self._warn(f"{layout.sample_path(sample.ordinal)}/{entry.path}: {differs}")

    def scale(self, path: str) -> ChannelScale:
        """The scale of a layer such as ``hidden_states/layer_005``; an error without one."""
        # Local, so that a `close` in another thread cannot take them away in between.
        known = self._scales
        if path not in known:
            self._from_store(lambda store: self._read_scales(store, path, known))
        return known[path]

    def _read_scales(self, store: Store, path: str, known: dict[str, ChannelScale]) -> None:
        if isinstance(self.path, RemotePath):
            # Another request for each layer would take longer than fetching all.
            found = stored_scales(store)
            known |= found.layers if found is not None else {}
        if path not in known:
            known[path] = stored_scale(store, path)

    def sizes(self) -> dict[str, StoredSize]:
        """Sizes of all datasets by the first part of their path."""
        return self._from_store(stored_sizes)

    @contextlib.contextmanager
    def prefetched(
        self, ranges: Iterable[tuple[int, int]], samples: Iterable[int]
    ) -> Iterator[None]:
        """Inside the block, these ranges of some samples are read from memory; on servers only.

        Errors name the samples.
        """
        with contextlib.ExitStack() as fetched:
            file = self.store.file
            try:
                fetched.enter_context(file.prefetched(ranges))
            except (CorruptArchiveError, RemoteError) as error:
                places = ", ".join(layout.sample_path(each) for each in sorted(set(samples)))
                what = str(error).removeprefix(f"{file.name}: ")
                message = f"{file.name}: {places}: {what}"
                raise type(error)(message) from error
            yield

    def close(self) -> None:
        """Let go of the open file and of its scales; the next use opens it again."""
        store, self._store = self._store, None
        # There may be thousands of shards with scales.
        self._scales, self.restorations = {}, {}
        if store is not None:
            store.file.close()

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.store.file.nbytes

    def _open(self) -> Store:
        if isinstance(self.path, RemotePath):
            return self._open_remote(self.path)
        if not self._without_footer:
            try:
                return FooterStore(LocalFile(self.path), self.limits)
            except FooterError as error:
                try:
                    store = Hdf5Store(self.path, self.limits)
                    check_format(store.root_attrs, self.path)
                except ArchiveError as other:
                    raise error_for(self.path, other) from None
                self._without_footer = True
                self._warn_without_footer(error)
                return store
        return Hdf5Store(self.path, self.limits)

    def _open_remote(self, path: RemotePath) -> Store:
        file = RemoteFile(path, self._remote)
        try:
            return FooterStore(file, self.limits)
        except FooterError as error:
            if file.read_at(0, min(8, file.nbytes)) != layout.HDF5_SIGNATURE:
                message = f"{path}: is not an HDF5 file, so not an h5traces archive"
                raise NotAnArchiveError(message) from None
            raise self._needs_footer(error) from error

    def _needs_footer(self, error: FooterError) -> CorruptArchiveError:
        return CorruptArchiveError(
            f"{self.path}: {error}; without an index, HDF5 would read an archive on a server piece "
            "by tiny piece; download it, run 'h5traces seal' on it, and upload it again"
        )

    def _fall_back(self, error: FooterError) -> Store:
        """Switch to HDF5 for good: the index turned out to be damaged."""
        if isinstance(self.path, RemotePath):
            raise self._needs_footer(error) from error
        if not self._without_footer:
            self._without_footer = True
            self._warn_without_footer(error)
            self._store = None
        return self.store

    def _warn_without_footer(self, error: FooterError) -> None:
        self._warn(f"{error}; reading through HDF5, run 'h5traces seal {self.path}' for speed")

    def _warn(self, message: str) -> None:
        warn(f"{self.path}: {message}", StoredStateWarning)

    def _read_metadata(self, store: Store) -> ArchiveMetadata:
        attrs = store.root_attrs
        check_format(attrs, self.path)
        check_version(attrs, str(self.path))
        try:
            metadata = from_attributes(ArchiveMetadata, attrs)
        except SchemaError as error:
            message = f"{self.path}: /: {error}"
            raise SchemaError(message, error.problems) from error
        if not metadata.complete:
            message = (
                f"{self.path}: the archive was not finished ('complete' is not set); run the "
                "command that wrote it again"
            )
            raise CorruptArchiveError(message)
        return metadata

    def _read_labels(self, folder: Path | Literal[False] | None) -> FileLabels | None:
        place = None if folder is False else sidecar_path(self.path, folder)
        return None if place is None else read_sidecar(place, self.path, self.metadata)

    def _check_same(self, store: Store) -> None:
        found = store.root_attrs.get("archive_id")
        if found != self.metadata.archive_id:
            message = (
                f"{self.path}: the file was replaced since it was opened (archive_id {found}, "
                f"expected {self.metadata.archive_id}); open it again"
            )
            raise CorruptArchiveError(message)

    def __getstate__(self) -> dict[str, Any]:
        # Scales are read again where they are needed; a model's take megabytes.
        return {**self.__dict__, "_store": None, "_scales": {}, "restorations": {}}


def check_format(attrs: Attrs, path: Path | RemotePath) -> None:
    """Raise NotAnArchiveError for HDF5 whose root does not say that it is an archive."""
    check_other_format(attrs, f"{path}: ")
    if attrs.get("format") != layout.FORMAT_NAME:
        message = (
            f"{path}: is HDF5, but not an h5traces archive: the root attribute 'format' is not "
            "'h5traces'; expected a file that 'h5traces convert' or 'h5traces.create' wrote"
        )
        raise NotAnArchiveError(message)


def check_other_format(attrs: Attrs, place: str = "") -> None:
    """Raise NotAnArchiveError for a file of scales or features, by the attributes of its root."""
    found = layout.OTHER_FORMATS.get(str(attrs.get("format")))
    if found is not None:
        what, use = found
        message = f"{place}is a file of {what} that h5traces wrote, not an archive of traces; {use}"
        raise NotAnArchiveError(message)


def check_version(attrs: Attrs, place: str) -> None:
    """Raise UnsupportedVersionError for a newer major version or an unknown required feature."""
    version = str(attrs.get("format_version", ""))
    found = layout.parse_version(version)
    if found is None or found[0] != layout.FORMAT_MAJOR:
        message = (
            f"{place}: format version is {version!r}, this release reads major version "
            f"{layout.FORMAT_MAJOR}; upgrade h5traces, or use the release that wrote the archive"
        )
        raise UnsupportedVersionError(message)
    features = attrs.get("required_features", "[]")
    try:
        unknown = sorted(set(json.loads(str(features))) - layout.KNOWN_FEATURES)
        # A TypeError, as above, where something is not text.
        names = ", ".join(unknown[:_MOST_FEATURES_NAMED])[:1000]
    except (ValueError, TypeError, RecursionError) as error:
        message = f"{place}: required_features {str(features)[:80]!r} is not a list of names"
        raise CorruptArchiveError(message) from error
    if unknown:
        message = f"{place}: the archive requires {names}; upgrade h5traces"
        raise UnsupportedVersionError(message)
