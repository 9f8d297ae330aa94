"""Reads the HDF5 part of an archive, checking every object before anything is allocated for it.

The checks are in :mod:`h5traces.storage.hdf5.safety`.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5s, h5t

from h5traces.errors import (
    ArchiveError,
    CorruptArchiveError,
    HostileFileError,
    NotAnArchiveError,
    Problem,
)
from h5traces.format import layout
from h5traces.format.entries import ChunkTable, ObjectEntry, SampleEntry, carrier_dtype
from h5traces.storage.arrays import check_sizes
from h5traces.storage.codecs import ZSTD, codec_of
from h5traces.storage.files import LocalFile
from h5traces.storage.hdf5 import safety
from h5traces.storage.hdf5.types import (
    file_dtype,
    is_archives_own,
    null_padded,
    read_attributes,
    stored_type,
    table_file_dtype,
)
from h5traces.storage.hdf5.uncoded import check_uncoded, read_uncoded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.format.document import Attrs
    from h5traces.format.limits import ReadLimits


# What h5py and numpy raise about what a file says; MemoryError for a size.
LIBRARY_ERRORS = (
    OSError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    ArithmeticError,
    MemoryError,
)


@dataclass(frozen=True, slots=True)
class Foreign:
    """An object or attribute of an archive that is none of the format's.

    Attributes
    ----------
    place
        Absolute path of the group or dataset that has it; empty for the root.
    name
        Its name there.
    is_attribute
        Whether it is an attribute.
    """

    place: str
    name: str
    is_attribute: bool = False

    @property
    def is_users(self) -> bool:
        """Whether it has a name that the format leaves to users."""
        return self.name.startswith(layout.USER_PREFIX)

    @property
    def path(self) -> str:
        """The path of the object; for an attribute, of the object that has it."""
        return (self.place or "/") if self.is_attribute else f"{self.place}/{self.name}"

    def __str__(self) -> str:
        what = f"attribute {self.name!r}" if self.is_attribute else "object"
        return f"{self.path}: {what}"


class Hdf5Reader:
    """An archive's HDF5 part, open for reading.

    `locked_by_us` is for a ``.part`` whose writer holds its lock; HDF5 must not ask for it.
    """

    def __init__(self, path: Path, limits: ReadLimits, *, locked_by_us: bool = False) -> None:
        self.path = path
        self._limits = limits
        safety.check_superblock(path)
        try:
            with safety.no_plugin_search(allowed=limits.search_plugins):
                locking = False if locked_by_us else "best-effort"
                self._file = h5py.File(path, "r", locking=locking)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            errno = getattr(error, "errno", None)
            if errno is not None and not isinstance(error, BlockingIOError):
                raise
            message = (
                f"{path}: HDF5 cannot open it ({error}): another program has it open for writing, "
                "or one crashed while it had ('h5clear -s' may help), or it is damaged; restore it "
                "from a copy"
            )
            raise CorruptArchiveError(message) from error
        self._root = self._file.id
        self._bytes = LocalFile(path)
        self._nbytes = self._bytes.nbytes
        self._samples: h5g.GroupID | None = None
        # What was met and passed over, since it is not the format's.
        self.foreign: dict[Foreign, None] = {}

    def close(self) -> None:
        """Close the file."""
        self._samples = None
        self._bytes.close()
        # Damaged metadata may surface only here, when all is read.
        with contextlib.suppress(*LIBRARY_ERRORS):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def root_attributes(self) -> Attrs:
        """Attributes of the root group."""
        with self._translated(f"{self.path}: /"):
            return self._attributes(h5g.open(self._root, b"/"), "")

    @cached_property
    def _is_newer(self) -> bool:
        """Whether a newer version of the format may give a meaning to names not known here."""
        attrs = read_attributes(h5g.open(self._root, b"/"), self._limits, [])
        version = layout.parse_version(str(attrs.get("format_version")))
        return version is not None and version > layout.KNOWN_VERSION

    @cached_property
    def _kind_names(self) -> frozenset[str]:
        if not safety.has_link(self._root, layout.KINDS_GROUP):
            return frozenset(layout.KINDS)
        group = safety.open_group(self._root, layout.KINDS_GROUP)
        return frozenset((*layout.KINDS, *self._few_names(group, "kinds")))

    def kinds(self) -> dict[str, Attrs]:
        """Attributes of every group under ``/kinds``."""
        place = f"/{layout.KINDS_GROUP}"
        with self._translated(f"{self.path}: {place}"):
            if not safety.has_link(self._root, layout.KINDS_GROUP):
                return {}
            group = safety.open_group(self._root, layout.KINDS_GROUP)
            found: dict[str, Attrs] = {}
            for name in self._few_names(group, "kinds"):
                if name.startswith(layout.USER_PREFIX) or not safety.is_group(group, name):
                    if name not in layout.KINDS:
                        self.foreign[Foreign(place, name)] = None
                        continue
                found[name] = self._attributes(safety.open_group(group, name), f"{place}/{name}")
            return found

    def root_names(self) -> list[str]:
        """Names of the objects in the root group."""
        with self._translated(f"{self.path}: /"):
            return self._few_names(self._root, "objects in the root group")

    def note_outer(self) -> None:
        """Add to `foreign` what lies outside of samples and scales."""
        names = self.root_names()
        found = [Foreign("", name) for name in names if name not in layout.ROOT_GROUPS]
        with self._translated(f"{self.path}: /"):
            if layout.KINDS_GROUP in names:
                kinds = safety.open_group(self._root, layout.KINDS_GROUP)
                for kind in self._few_names(kinds, "kinds"):
                    place = f"/{layout.KINDS_GROUP}/{kind}"
                    if not safety.is_group(kinds, kind):
                        found.append(Foreign(f"/{layout.KINDS_GROUP}", kind))
                        continue
                    inside = self._few_names(safety.open_group(kinds, kind), f"objects in {place}")
                    found += [Foreign(place, name) for name in inside]
            if layout.INDEX_GROUP in names:
                index = safety.open_group(self._root, layout.INDEX_GROUP)
                place = f"/{layout.INDEX_GROUP}"
                inside = self._few_names(index, f"objects in {place}")
                table = layout.INDEX_TABLE.partition("/")[2]
                found += [Foreign(place, name) for name in inside if name != table]
        self.foreign |= dict.fromkeys(found)

    def foreign_hazards(self) -> Iterator[Problem]:
        """What other programs would follow or open in the foreign objects that were met."""
        addresses: set[int] = set()
        for each in self.foreign:
            if each.is_attribute:
                continue
            with self._translated(f"{self.path}: {each.place}"):
                group: h5g.GroupID = h5g.open(self._root, b"/")
                for part in each.place.split("/"):
                    group = safety.open_group(group, part) if part else group
                yield from self._hazards(addresses, group, each.name, each.path, depth=0)

    def _hazards(
        self, addresses: set[int], group: h5g.GroupID, name: str, path: str, *, depth: int
    ) -> Iterator[Problem]:
        try:
            if depth > self._limits.max_depth:
                message = f"groups are nested deeper than {self._limits.max_depth} levels"
                raise HostileFileError(message)
            found, address = safety.open_child(group, name)
            if address in addresses:
                message = "it was met before under another name; archives link objects once"
                raise HostileFileError(message)
            addresses.add(address)
            names = []
            if isinstance(found, h5g.GroupID):
                names = safety.link_names(found, self._limits.max_objects, "objects")
            else:
                safety.check_storage(found.get_create_plist(), found.shape or ())
        except ArchiveError as error:
            message = f"no such object belongs in an archive: {error}"
            yield Problem(path, message, problem_kind(error))
            return
        for each in names:
            yield from self._hazards(addresses, found, each, f"{path}/{each}", depth=depth + 1)

    def sample_names(self) -> list[str]:
        """Names of the sample groups, in order."""
        with self._translated(f"{self.path}: /{layout.SAMPLES_GROUP}"):
            if not safety.has_link(self._root, layout.SAMPLES_GROUP):
                message = "there is no group of samples; expected an archive that h5traces wrote"
                raise NotAnArchiveError(message)
            group = self._sample_group()
            return safety.link_names(group, self._limits.max_samples, "samples")

    def sample_addresses(self) -> dict[str, int]:
        """Where the group of every sample lies in the file, by its name."""
        found: dict[str, int] = {}
        with self._translated(f"{self.path}: /{layout.SAMPLES_GROUP}"):
            links = self._sample_group().links
            for name in self.sample_names():
                info = links.get_info(name.encode("utf-8", "surrogateescape"))
                if info.type == h5l.TYPE_HARD:
                    found[name] = int(info.u)
        return found

    def sample_attributes(self, name: str) -> Attrs:
        """Attributes of one sample group."""
        with self._translated(f"{self.path}: /{layout.SAMPLES_GROUP}/{name}"):
            place = f"/{layout.SAMPLES_GROUP}/{name}"
            return self._attributes(self._open_sample(name), place)

    def sample(self, name: str, *, problems: list[Problem] | None = None) -> SampleEntry:
        """A sample's attributes and the entries of all objects in it.

        What is wrong with single objects is added to `problems`; without it, the first one raises.
        """
        place = f"{self.path}: /{layout.SAMPLES_GROUP}/{name}"
        with self._translated(place):
            group = self._open_sample(name)
            inside = f"/{layout.SAMPLES_GROUP}/{name}"
            attrs = self._attributes(group, inside)
            objects: dict[str, ObjectEntry] = {}
            self._walk(_Walk(inside, objects, problems), group, "", depth=0)
            self._leave_out_empty_extra(inside, objects)
        ordinal = int(name) if layout.is_sample_name(name) else -1
        return SampleEntry(ordinal, attrs, dict(sorted(objects.items())))

    def _leave_out_empty_extra(self, place: str, objects: dict[str, ObjectEntry]) -> None:
        """A group of further fields in which all is foreign is foreign itself."""
        name = layout.EXTRA_GROUP
        inside = f"{place}/{name}"
        if name in objects and not any(path.startswith(f"{name}/") for path in objects):
            if any(each.place == inside for each in self.foreign):
                del objects[name]
                self.foreign = {each: None for each in self.foreign if each.place != inside}
                self.foreign[Foreign(place, name)] = None

    def scales(self, *, problems: list[Problem] | None = None) -> SampleEntry | None:
        """The objects of ``/scales`` by their paths below the root, as `sample`; None if none."""
        place = f"{self.path}: /{layout.SCALES_GROUP}"
        with self._translated(place):
            if not safety.has_link(self._root, layout.SCALES_GROUP):
                return None
            group = safety.open_group(self._root, layout.SCALES_GROUP)
            attrs = self._attributes(group, f"/{layout.SCALES_GROUP}")
            objects = {layout.SCALES_GROUP: ObjectEntry(layout.SCALES_GROUP, attrs)}
            self._walk(_Walk("", objects, problems), group, f"{layout.SCALES_GROUP}/", depth=0)
        return SampleEntry(-1, {}, dict(sorted(objects.items())))

    def read_values(self, sample: str, entry: ObjectEntry) -> NDArray[Any]:
        """A dataset's values, in the carrier dtype of its stored type; bfloat16 as bits.

        Through HDF5 itself where its codec is known, which shows what stock tools see. Datasets
        that archives never write are read without HDF5's filters.
        """
        place = f"{self.path}: /{layout.SAMPLES_GROUP}/{sample}/{entry.path}"
        with self._translated(place):
            check_sizes(entry, self._limits, self._nbytes)
            dataset: Any = self._open_sample(sample)
            for part in entry.path.split("/"):
                dataset, _ = safety.open_child(dataset, part)
            if entry.codec is None:
                dtype = file_dtype(dataset.get_type())
                values = read_uncoded(dataset, dtype, self._bytes)
                if dtype.kind != "S":
                    return values.astype(dtype.newbyteorder("<"), copy=False)
                texts = [null_padded(dataset.get_type(), each) for each in values.ravel().tolist()]
                return np.array(texts, dtype=dtype).reshape(values.shape)
            return _through_hdf5(dataset, entry)

    def index_table(self) -> NDArray[Any] | None:
        """The table ``/index/samples``, None if there is none."""
        with self._translated(f"{self.path}: /{layout.INDEX_TABLE}"):
            if not safety.has_link(self._root, layout.INDEX_GROUP):
                return None
            group = safety.open_group(self._root, layout.INDEX_GROUP)
            name = layout.INDEX_TABLE.removeprefix(f"{layout.INDEX_GROUP}/")
            if not safety.has_link(group, name):
                return None
            dataset, _ = safety.open_child(group, name)
            if not isinstance(dataset, h5d.DatasetID):
                message = "is a group, expected a table"
                raise HostileFileError(message)
            return self._read_table(dataset)

    def _read_table(self, dataset: h5d.DatasetID) -> NDArray[Any]:
        dtype, shape = table_file_dtype(dataset.get_type()), dataset.shape
        safety.check_storage(dataset.get_create_plist(), shape)
        if len(shape) != 1 or shape[0] > self._limits.max_samples:
            message = f"the table has the shape {shape}; limit {self._limits.max_samples} rows"
            raise HostileFileError(message)
        safety.filters_of(dataset.get_create_plist(), dtype.itemsize)
        entry = ObjectEntry(layout.INDEX_TABLE, {}, f"text:{dtype.itemsize}", shape)
        check_sizes(entry, self._limits, self._nbytes)
        check_uncoded(dataset, entry.raw_nbytes, self._limits, self._nbytes)
        return read_uncoded(dataset, dtype, self._bytes)

    @contextlib.contextmanager
    def _translated(self, place: str) -> Iterator[None]:
        """As the function, with no search for plugins."""
        with _translated(place), safety.no_plugin_search(allowed=self._limits.search_plugins):
            yield

    def _attributes(self, location: Any, place: str) -> Attrs:
        foreign: list[str] = []
        attrs = read_attributes(location, self._limits, foreign, is_newer=self._is_newer)
        self.foreign |= dict.fromkeys(Foreign(place, name, is_attribute=True) for name in foreign)
        return attrs

    def _few_names(self, group: h5g.GroupID, what: str) -> list[str]:
        return safety.link_names(group, self._limits.max_kinds, what)

    def _sample_group(self) -> h5g.GroupID:
        # Kept open: HDF5 looks through all of its links whenever it opens it.
        if self._samples is None:
            self._samples = safety.open_group(self._root, layout.SAMPLES_GROUP)
        return self._samples

    def _open_sample(self, name: str) -> h5g.GroupID:
        return safety.open_group(self._sample_group(), name)

    def _walk(self, walk: _Walk, group: h5g.GroupID, prefix: str, *, depth: int) -> None:
        if depth > self._limits.max_depth:
            message = f"groups are nested deeper than {self._limits.max_depth} levels"
            raise HostileFileError(message)
        left = self._limits.max_objects - len(walk.objects)
        for name in safety.link_names(group, left, "objects in the sample"):
            path = f"{prefix}{name}"
            if self._is_foreign(walk, group, name, path):
                self.foreign[Foreign(f"{walk.place}/{prefix}".rstrip("/"), name)] = None
                continue
            try:
                with _translated(path):
                    self._visit(walk, group, name, path, depth=depth)
            except ArchiveError as error:
                if walk.problems is None:
                    raise
                message = str(error).removeprefix(f"{path}: ")
                walk.problems.append(Problem(path, message, problem_kind(error)))

    def _is_foreign(self, walk: _Walk, group: h5g.GroupID, name: str, path: str) -> bool:
        if not walk.place:
            return name.startswith(layout.USER_PREFIX)
        if self._is_newer and not (path == name and name.startswith(layout.USER_PREFIX)):
            return False
        return is_foreign(group, name, path, self._kind_names)

    def _visit(self, walk: _Walk, group: h5g.GroupID, name: str, path: str, *, depth: int) -> None:
        found, address = safety.open_child(group, name)
        # HDF5 believes what an object says of the number of links to it.
        if address in walk.addresses:
            message = f"{name!r} was met before under another name; archives link objects once"
            raise HostileFileError(message)
        walk.addresses.add(address)
        if isinstance(found, h5g.GroupID):
            walk.objects[path] = ObjectEntry(path, self._attributes(found, f"{walk.place}/{path}"))
            self._walk(walk, found, f"{path}/", depth=depth + 1)
            return
        walk.objects[path] = self._dataset_entry(found, path, f"{walk.place}/{path}")
        if walk.problems is not None:
            walk.problems += _presentation_problems(found, path)

    def _dataset_entry(self, dataset: h5d.DatasetID, path: str, place: str) -> ObjectEntry:
        options, type_id, shape = dataset.get_create_plist(), dataset.get_type(), dataset.shape
        dtype = stored_type(type_id)
        safety.check_storage(options, shape)
        attrs = {
            name: value
            for name, value in self._attributes(dataset, place).items()
            if name not in layout.IMAGE_ATTRS
        }
        is_chunked = options.get_layout() == h5d.CHUNKED
        chunk = options.get_chunk() if is_chunked else ()
        filters = safety.filters_of(options, type_id.get_size()) if is_chunked else ()
        # Sizes first: listing the chunks of a dataset of 2^60 elements would never end.
        entry = ObjectEntry(path, attrs, dtype, shape, chunk)
        check_sizes(entry, self._limits, self._nbytes)
        codec = codec_of(filters) if is_archives_own(type_id) else None
        if codec is not None:
            stored = safety.stored_chunks(dataset, shape, chunk, self._nbytes)
            # Where a chunk skipped a filter, it is of no codec.
            if not any(each.filter_mask for each in stored):
                offsets = tuple(each.byte_offset for each in stored)
                table = ChunkTable(offsets, tuple(each.size for each in stored), None)
                entry = ObjectEntry(path, attrs, dtype, shape, chunk, codec, table)
                check_sizes(entry, self._limits, self._nbytes)
                return entry
        check_uncoded(dataset, entry.raw_nbytes, self._limits, self._nbytes)
        return entry


def is_foreign(group: h5g.GroupID, name: str, path: str, kinds: frozenset[str]) -> bool:
    """Whether an object of a group is none of the format's; `path` is below the sample."""
    if path == f"{layout.EXTRA_GROUP}/{name}":
        # Fields may have any name.
        return not safety.is_encoded(group, name)
    return layout.is_foreign(path, kinds)


@dataclass(slots=True)
class _Walk:
    """What walking through one sample, or with an empty place through the scales, has found."""

    place: str
    objects: dict[str, ObjectEntry]
    problems: list[Problem] | None
    addresses: set[int] = field(default_factory=set)


@contextlib.contextmanager
def _translated(place: str) -> Iterator[None]:
    """Turn h5py's errors, which name neither file nor object, into our own."""
    try:
        yield
    except ArchiveError as error:
        message = str(error)
        if message.startswith(place):
            raise
        msg = f"{place}: {message}"
        raise type(error)(msg) from error
    except LIBRARY_ERRORS as error:
        message = f"{place}: HDF5 cannot read it: {error}"
        raise CorruptArchiveError(message) from error


def problem_kind(error: Exception) -> str:
    """A stable identifier for an error: ``HostileFileError`` is ``hostile_file``."""
    name = type(error).__name__.removesuffix("Error")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _presentation_problems(dataset: h5d.DatasetID, path: str) -> Iterator[Problem]:
    """What viewers would show wrongly: images without attributes, text of another padding."""
    if layout.is_picture(path):
        for name, value in layout.IMAGE_ATTRS.items():
            if not h5a.exists(dataset, name.encode()):
                message = f"the attribute {name!r} is missing, expected {value!r}"
                yield Problem(path, message, "missing_attribute")
    type_id = dataset.get_type()
    if type_id.get_class() == h5t.STRING and (
        type_id.get_strpad() != h5t.STR_NULLPAD or type_id.get_cset() != h5t.CSET_UTF8
    ):
        message = "text is not UTF-8 padded with NUL, which embedded NULs need"
        yield Problem(path, message, "wrong_type")


def _through_hdf5(dataset: h5d.DatasetID, entry: ObjectEntry) -> NDArray[Any]:
    dtype = carrier_dtype(entry.dtype)
    values = np.empty(entry.shape, dtype=dtype)
    if entry.codec == ZSTD.name:
        safety.require_zstd()
    if values.size:
        if dtype.kind == "S" or entry.dtype == "bfloat16":
            # As stored: HDF5's conversion of bfloat16 to float32 gives NaN other bits.
            dataset.read(h5s.ALL, h5s.ALL, values, mtype=dataset.get_type())
        else:
            dataset.read(h5s.ALL, h5s.ALL, values)
    return values
