"""Reads the HDF5 part of an archive, checking every object before anything is allocated for it.

HDF5 follows links out of the file, opens other files for external and virtual storage and believes
every size it is told. Archives use none of these, which makes them easy to refuse.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any, Final, Self

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t

from h5traces import layout
from h5traces.errors import (
    ArchiveError,
    CorruptArchiveError,
    HostileFileError,
    MissingFilterError,
    NotAnArchiveError,
    Problem,
)
from h5traces.storage import chunks as grid
from h5traces.storage.arrays import check_sizes
from h5traces.storage.codecs import Filter, codec_of
from h5traces.storage.hdf5.attributes import read_attributes
from h5traces.storage.hdf5.types import stored_type
from h5traces.storage.objects import ChunkTable, ObjectEntry, SampleEntry, carrier_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.limits import ReadLimits
    from h5traces.schema.attributes import Attrs

# deflate, shuffle, fletcher32: what HDF5 itself brings and stock tools put on numbers
_BUILT_IN_FILTERS: Final = frozenset({1, 2, 3})


@contextlib.contextmanager
def translated(place: str) -> Iterator[None]:
    """Turns h5py's errors, which name neither file nor object, into ours."""
    try:
        yield
    except ArchiveError as error:
        message = str(error)
        if message.startswith(place):
            raise
        msg = f"{place}: {message}"
        raise type(error)(msg) from error
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        message = f"{place}: HDF5 cannot read it: {error}"
        raise CorruptArchiveError(message) from error


def _cannot_open(path: Path, error: OSError) -> ArchiveError:
    """What HDF5's refusal means: no HDF5 at all, or a file that is open, torn or damaged."""
    with path.open("rb") as file:
        is_hdf5 = file.read(len(layout.HDF5_SIGNATURE)) == layout.HDF5_SIGNATURE
    if not is_hdf5:
        message = f"{path}: is no HDF5 file; expected an archive that h5traces wrote"
        return NotAnArchiveError(message)
    message = (
        f"{path}: HDF5 cannot open it ({error}): another program has it open for writing, or one "
        "crashed while it had ('h5clear -s' may help), or it is damaged; restore it from a copy"
    )
    return CorruptArchiveError(message)


def problem_kind(error: Exception) -> str:
    """A stable identifier for an error: ``HostileFileError`` is ``hostile_file``."""
    name = type(error).__name__.removesuffix("Error")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


class Hdf5Reader:
    """An archive's HDF5 part, open for reading.

    Parameters
    ----------
    path
        The file.
    limits
        What it may ask of its reader.
    locked_by_us
        The file is a ``.part`` whose writer holds its lock; HDF5 must not ask for it.

    Raises
    ------
    NotAnArchiveError
        The file is no HDF5 file.
    """

    def __init__(self, path: Path, limits: ReadLimits, *, locked_by_us: bool = False) -> None:
        self.path = path
        self._limits = limits
        try:
            self._file = h5py.File(path, "r", locking=False if locked_by_us else "best-effort")
        except OSError as error:
            if error.errno is not None and not isinstance(error, BlockingIOError):
                raise
            raise _cannot_open(path, error) from error
        self._root = self._file.id
        self._nbytes = path.stat().st_size
        # Path and name of attributes that are not the format's and were passed over.
        self.ignored_attributes: list[tuple[str, str]] = []

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def root_attributes(self) -> Attrs:
        """Attributes of the root group."""
        with translated(f"{self.path}: /"):
            return self._attributes(h5g.open(self._root, b"/"), "/")

    def kinds(self) -> dict[str, Attrs]:
        """Attributes of every group under ``/kinds``."""
        with translated(f"{self.path}: /{layout.KINDS_GROUP}"):
            if not self._has(layout.KINDS_GROUP):
                return {}
            group = self._open(self._root, layout.KINDS_GROUP)
            names = self._names(group)
            place = f"/{layout.KINDS_GROUP}"
            return {
                name: self._attributes(self._open(group, name), f"{place}/{name}") for name in names
            }

    def root_names(self) -> list[str]:
        """Names of the objects in the root group."""
        return self._names(self._root)

    def stray_names(self) -> list[str]:
        """Paths below ``/kinds`` and ``/index`` that have no place there."""
        with translated(f"{self.path}: /"):
            found = []
            if self._has(layout.KINDS_GROUP):
                kinds = self._open(self._root, layout.KINDS_GROUP)
                for kind in self._names(kinds):
                    inside = self._names(self._open(kinds, kind))
                    found += [f"/{layout.KINDS_GROUP}/{kind}/{name}" for name in inside]
            if self._has(layout.INDEX_GROUP):
                names = self._names(self._open(self._root, layout.INDEX_GROUP))
                paths = [f"/{layout.INDEX_GROUP}/{name}" for name in names]
                found += [path for path in paths if path != f"/{layout.INDEX_TABLE}"]
            return found

    def sample_names(self) -> list[str]:
        """Names of the sample groups, in order."""
        with translated(f"{self.path}: /{layout.SAMPLES_GROUP}"):
            if not self._has(layout.SAMPLES_GROUP):
                message = "there is no group of samples; expected an archive that h5traces wrote"
                raise NotAnArchiveError(message)
            group = self._open(self._root, layout.SAMPLES_GROUP)
            if group.get_num_objs() > self._limits.max_samples:
                message = f"{group.get_num_objs()} samples; limit {self._limits.max_samples}"
                raise HostileFileError(message)
            return self._names(group)

    def sample_attributes(self, name: str) -> Attrs:
        """Attributes of one sample group."""
        with translated(f"{self.path}: /{layout.SAMPLES_GROUP}/{name}"):
            return self._attributes(self._open_sample(name), layout.SAMPLES_GROUP)

    def sample(self, name: str, *, problems: list[Problem] | None = None) -> SampleEntry:
        """A sample's attributes and the entries of all objects in it.

        Parameters
        ----------
        name
            The group's name.
        problems
            Where given, what is wrong with single objects is added here, and the rest is read;
            else the first wrong object raises.
        """
        place = f"{self.path}: /{layout.SAMPLES_GROUP}/{name}"
        with translated(place):
            group = self._open_sample(name)
            attrs = self._attributes(group, f"/{layout.SAMPLES_GROUP}/{name}")
            objects: dict[str, ObjectEntry] = {}
            self._walk(group, "", objects, problems, depth=0)
        ordinal = int(name) if layout.is_sample_name(name) else -1
        return SampleEntry(ordinal, attrs, dict(sorted(objects.items())))

    def read_values(self, sample: str, entry: ObjectEntry) -> NDArray[Any]:
        """A dataset's values through HDF5 itself, in the carrier dtype of its stored type.

        bfloat16 comes back as its bits.
        """
        with translated(f"{self.path}: /{layout.SAMPLES_GROUP}/{sample}/{entry.path}"):
            check_sizes(entry, self._limits, self._nbytes)
            dataset = self._open_sample(sample)
            for part in entry.path.split("/"):
                dataset = self._open(dataset, part)
            dtype = np.dtype("<f4") if entry.dtype == "bfloat16" else carrier_dtype(entry.dtype)
            values = np.empty(entry.shape, dtype=dtype)
            if values.size:
                if dtype.kind == "S":
                    dataset.read(h5s.ALL, h5s.ALL, values, mtype=dataset.get_type())
                else:
                    dataset.read(h5s.ALL, h5s.ALL, values)
            if entry.dtype == "bfloat16":
                return (values.view(np.uint32) >> np.uint32(16)).astype("<u2")
            return values

    def index_table(self) -> NDArray[Any] | None:
        """The table ``/index/samples``, None where there is none."""
        with translated(f"{self.path}: /{layout.INDEX_TABLE}"):
            if not self._has(layout.INDEX_GROUP):
                return None
            group = self._open(self._root, layout.INDEX_GROUP)
            if b"samples" not in group:
                return None
            dataset = self._open(group, "samples")
            if int(np.prod(dataset.shape, dtype=object)) > self._limits.max_samples:
                message = f"the table has {dataset.shape} rows; limit {self._limits.max_samples}"
                raise HostileFileError(message)
            table = np.empty(dataset.shape, dtype=dataset.dtype)
            if table.size:
                dataset.read(h5s.ALL, h5s.ALL, table, mtype=dataset.get_type())
            return table

    def _attributes(self, location: Any, place: str) -> Attrs:
        ignored: list[str] = []
        attrs = read_attributes(location, self._limits, ignored=ignored)
        self.ignored_attributes += ((place, name) for name in ignored)
        return attrs

    def _has(self, name: str) -> bool:
        return name.encode() in self._root

    def _open_sample(self, name: str) -> h5g.GroupID:
        return self._open(self._open(self._root, layout.SAMPLES_GROUP), name)

    def _names(self, group: h5g.GroupID) -> list[str]:
        names: list[str] = []
        # The callback must return None: anything else ends the iteration.
        group.links.iterate(lambda name: names.append(name.decode("utf-8", "surrogateescape")))
        return sorted(names)

    def _open(self, group: h5g.GroupID, name: str) -> Any:
        """The group or dataset behind a hard link that is the only one to it."""
        link = group.links.get_info(name.encode("utf-8", "surrogateescape"))
        if link.type != h5l.TYPE_HARD:
            message = f"{name!r} is a soft or external link; archives hold hard links only"
            raise HostileFileError(message)
        found = h5o.open(group, name.encode("utf-8", "surrogateescape"))
        if not isinstance(found, (h5g.GroupID, h5d.DatasetID)):
            message = f"{name!r} is neither group nor dataset"
            raise HostileFileError(message)
        if h5o.get_info(found).rc != 1:
            message = f"{name!r} has several hard links; archives link every object once"
            raise HostileFileError(message)
        return found

    def _walk(
        self,
        group: h5g.GroupID,
        prefix: str,
        objects: dict[str, ObjectEntry],
        problems: list[Problem] | None,
        *,
        depth: int,
    ) -> None:
        if depth > self._limits.max_depth:
            message = f"groups are nested deeper than {self._limits.max_depth} levels"
            raise HostileFileError(message)
        if len(objects) + group.get_num_objs() > self._limits.max_objects:
            message = f"the sample holds more than {self._limits.max_objects} objects"
            raise HostileFileError(message)
        for name in self._names(group):
            path = f"{prefix}{name}"
            try:
                with translated(path):
                    found = self._open(group, name)
                    if isinstance(found, h5g.GroupID):
                        objects[path] = ObjectEntry(path, self._attributes(found, path))
                        self._walk(found, f"{path}/", objects, problems, depth=depth + 1)
                    else:
                        objects[path] = self._dataset_entry(found, path)
                        if problems is not None:
                            problems += _presentation_problems(found, path)
            except ArchiveError as error:
                if problems is None:
                    raise
                message = str(error).removeprefix(f"{path}: ")
                problems.append(Problem(path, message, problem_kind(error)))

    def _dataset_entry(self, dataset: h5d.DatasetID, path: str) -> ObjectEntry:
        options = dataset.get_create_plist()
        dtype = stored_type(dataset.get_type())
        shape = dataset.shape
        _check_storage(options, shape)
        attrs = {
            name: value
            for name, value in self._attributes(dataset, path).items()
            if name not in layout.IMAGE_ATTRS
        }
        if dtype is None:
            # Big-endian numbers and the like: HDF5 converts them to the nearest numpy type.
            dtype = dataset.dtype.newbyteorder("<").name
            chunked = False
        else:
            chunked = options.get_layout() == h5d.CHUNKED
        codec = None
        chunk: tuple[int, ...] = ()
        if chunked:
            chunk = options.get_chunk()
            codec = _codec(options)
        table = None
        if codec is not None:
            # Sizes first: listing the chunks of a dataset of 2^60 elements would never end.
            claimed = ObjectEntry(path, attrs, dtype, shape, chunk)
            check_sizes(claimed, self._limits, self._nbytes)
            table = _chunk_table(dataset, shape, chunk)
            codec = codec if table is not None else None
        entry = ObjectEntry(path, attrs, dtype, shape, chunk, codec, table)
        check_sizes(entry, self._limits, self._nbytes)
        return entry


def _presentation_problems(dataset: h5d.DatasetID, path: str) -> Iterator[Problem]:
    """What viewers would show wrongly: pictures without attributes, text of another padding."""
    kind = layout.KINDS.get(path.partition("/")[0])
    if kind is not None and kind.image and not path.endswith(f"/{layout.STEPS_TABLE}"):
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


def _check_storage(options: Any, shape: tuple[int, ...] | None) -> None:
    if options.get_layout() == h5d.VIRTUAL:
        message = "a virtual dataset; archives hold their own bytes"
        raise HostileFileError(message)
    if options.get_external_count():
        message = "a dataset with external storage; archives hold their own bytes"
        raise HostileFileError(message)
    if shape is None:
        message = "a dataset without a simple shape; archives hold none"
        raise HostileFileError(message)


def _codec(options: Any) -> str | None:
    """The codec of a chunked dataset, None where only HDF5 itself knows its filters."""
    filters = tuple(
        Filter(number, tuple(parameters))
        for number, _, parameters, _ in map(options.get_filter, range(options.get_nfilters()))
    )
    numbers = [each.filter_id for each in filters]
    codec = codec_of(filters)
    if codec is not None:
        return codec
    if len(set(numbers)) != len(numbers):
        message = f"the filters {numbers} repeat one another; archives use each at most once"
        raise HostileFileError(message)
    foreign = set(numbers) - _BUILT_IN_FILTERS
    if foreign:
        message = (
            f"the filters {sorted(foreign)} are none that archives use; expected gzip (1) with or "
            "without shuffle (2); rewrite the file with h5repack -f GZIP=6 if you trust it"
        )
        raise MissingFilterError(message)
    return None


def _chunk_table(
    dataset: h5d.DatasetID, shape: tuple[int, ...], chunk: tuple[int, ...]
) -> ChunkTable | None:
    """Where the chunks lie, None where a chunk skipped a filter and only HDF5 can read it."""
    stored = dataset.get_num_chunks() if 0 not in shape else 0
    expected = grid.num_chunks(shape, chunk)
    if stored != expected:
        message = f"{stored} chunks are stored, expected {expected}; the dataset is incomplete"
        raise CorruptArchiveError(message)
    offsets, sizes = [], []
    for offset in grid.chunk_offsets(shape, chunk):
        info = dataset.get_chunk_info_by_coord(offset)
        if info.byte_offset is None:
            message = f"the chunk at {offset} is not stored; the dataset is incomplete"
            raise CorruptArchiveError(message)
        if info.filter_mask:
            return None
        offsets.append(info.byte_offset)
        sizes.append(info.size)
    return ChunkTable(tuple(offsets), tuple(sizes), None)
