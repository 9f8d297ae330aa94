"""Copies what users put into archives beside the format's own objects, from one file to another.

A file is untrusted: whatever HDF5 would have to follow, resolve or inflate is named, not copied.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5o, h5s, h5t

from h5traces.errors import ArchiveError, HostileFileError
from h5traces.format import layout
from h5traces.storage.hdf5 import safety
from h5traces.storage.hdf5.heaps import Heaps
from h5traces.storage.hdf5.reading import LIBRARY_ERRORS, is_foreign
from h5traces.storage.hdf5.types import FORMAT_ATTRIBUTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from h5traces.format.limits import ReadLimits
    from h5traces.storage.publish import LatchedFile

# Of one attribute or dataset. Every one may take as many bytes as the file.
_MAX_TEXTS: Final = 100_000
_PLAIN: Final = frozenset(
    {h5t.INTEGER, h5t.FLOAT, h5t.STRING, h5t.ENUM, h5t.OPAQUE, h5t.BITFIELD, h5t.TIME}
)


@dataclass(frozen=True, slots=True)
class Origin:
    """The archive that a group of a new file was made of.

    Attributes
    ----------
    file
        That archive.
    place
        The group in it, as absolute path.
    target
        The group in the new file.
    """

    file: Path
    place: str
    target: str


@dataclass(slots=True)
class Copied:
    """What was copied.

    Attributes
    ----------
    number
        Objects and attributes in the new file.
    left
        What could not be copied, and why.
    """

    number: int = 0
    left: list[str] = field(default_factory=list)


def copy_foreign(
    file: LatchedFile, origins: list[Origin], limits: ReadLimits, *, keep: bool
) -> Copied:
    """Copy users' own objects and attributes to a new file, and with `keep` all foreign ones.

    Only those of the groups that `origins` name, and below them; samples are origins themselves.
    """
    found = Copied()
    with contextlib.ExitStack() as files:
        opened: dict[Path, Any] = {}
        target: h5py.File | None = None
        files.enter_context(safety.no_plugin_search(allowed=limits.search_plugins))
        for each in origins:
            source = opened.get(each.file)
            if source is None:
                for other in opened.values():
                    other.close()
                safety.check_superblock(each.file)
                source = h5py.File(each.file, "r", locking="best-effort")
                opened = {each.file: files.enter_context(source)}
                heaps = Heaps(source, each.file)
            if target is None:
                target = files.enter_context(h5py.File(file, "r+", libver=("v110", "v110")))
            nbytes = each.file.stat().st_size
            copying = _Copying(found, each, limits, heaps, keep=keep, nbytes=nbytes)
            copying.run(source, target)
    return found


class _Copying:
    """The copying of one group."""

    def __init__(
        self,
        found: Copied,
        origin: Origin,
        limits: ReadLimits,
        heaps: Heaps,
        *,
        keep: bool,
        nbytes: int,
    ) -> None:
        self._found, self._origin, self._limits, self._heaps = found, origin, limits, heaps
        self._keep, self._nbytes = keep, nbytes
        self._addresses: set[int] = set()
        self._kinds: frozenset[str] = frozenset(layout.KINDS)

    def run(self, source: h5py.File, target: h5py.File) -> None:
        with self._named(self._origin.place):
            if safety.has_link(source.id, layout.KINDS_GROUP):
                group = safety.open_group(source.id, layout.KINDS_GROUP)
                names = safety.link_names(group, self._limits.max_kinds, "kinds")
                self._kinds = frozenset((*layout.KINDS, *names))
            here: Any = h5g.open(source.id, b"/")
            for part in self._origin.place.split("/"):
                here = safety.open_group(here, part) if part else here
            self._overlay(here, h5g.open(target.id, self._origin.target.encode()), "")

    def _overlay(self, source: Any, target: Any, path: str) -> None:
        """Add the source's foreign objects to those that the format has in both files."""
        self._copy_attributes(source, target, path)
        if not isinstance(source, h5g.GroupID):
            return
        for name in safety.link_names(source, self._limits.max_objects, "objects"):
            inside = f"{path}/{name}" if path else name
            place = f"{self._origin.place}/{inside}".replace("//", "/")
            with self._named(place):
                if self._is_foreign(source, name, inside):
                    if name.startswith(layout.USER_PREFIX) or self._keep:
                        self._copy(source, target, name, place)
                elif self._goes_on(inside) and safety.has_link(target, name):
                    below, _ = safety.open_child(source, name)
                    self._overlay(below, safety.open_child(target, name)[0], inside)

    def _goes_on(self, inside: str) -> bool:
        """Samples are origins themselves."""
        return self._origin.place != "/" or inside != layout.SAMPLES_GROUP

    def _is_foreign(self, group: Any, name: str, inside: str) -> bool:
        if self._origin.place != "/":
            if inside == layout.EXTRA_GROUP and safety.is_group(group, name):
                fields = safety.open_group(group, name)
                names = safety.link_names(fields, self._limits.max_objects, "fields")
                return not any(safety.is_encoded(fields, each) for each in names)
            return is_foreign(group, name, inside, self._kinds)
        first, _, rest = inside.partition("/")
        if not rest:
            return first not in layout.ROOT_GROUPS
        if first == layout.KINDS_GROUP:
            return "/" in rest or not safety.is_group(group, name)
        return first == layout.INDEX_GROUP and inside != layout.INDEX_TABLE

    def _copy(self, source: Any, target: Any, name: str, place: str) -> None:
        """Copy an object and all below it; what exists already is only compared."""
        reason = self._why_not(source, name, place.count("/"))
        if reason is not None:
            self._found.left.append(f"{self._origin.file}: {place}: {reason}")
            return
        found, _ = safety.open_child(source, name)
        encoded = name.encode("utf-8", "surrogateescape")
        exists = safety.has_link(target, name)
        if isinstance(found, h5g.GroupID):
            below = h5g.open(target, encoded) if exists else h5g.create(target, encoded)
            self._found.number += 1
            self._copy_all_attributes(found, below, place)
            for each in safety.link_names(found, self._limits.max_objects, "objects"):
                with self._named(f"{place}/{each}"):
                    self._copy(found, below, each, f"{place}/{each}")
        elif not exists:
            self._found.number += 1
            self._copy_dataset(found, source, target, encoded, place)
        elif not _is_same(found, safety.open_child(target, name)[0]):
            self._found.left.append(
                f"{self._origin.file}: {place}: another source has a different object of this name"
            )

    def _why_not(self, source: Any, name: str, depth: int) -> str | None:
        """Why an object cannot be copied; None if it can."""
        if depth > self._limits.max_depth:
            return f"lies deeper than {self._limits.max_depth} levels"
        try:
            found, address = safety.open_child(source, name)
            if address in self._addresses:
                return "was met before under another name"
            self._addresses.add(address)
            if isinstance(found, h5g.GroupID):
                return None
            shape = found.shape
            safety.check_storage(found.get_create_plist(), shape or ())
        except ArchiveError as error:
            return str(error)
        if found.get_storage_size() > self._nbytes:
            return f"takes {found.get_storage_size()} bytes in a file of {self._nbytes}"
        points = found.get_space().get_simple_extent_npoints()
        return _type_problem(found.get_type(), points, self._heaps)

    def _copy_dataset(
        self, dataset: Any, source: Any, target: Any, name: bytes, place: str
    ) -> None:
        if not _has_texts(dataset.get_type()):
            options = h5py.h5p.create(h5py.h5p.OBJECT_COPY)
            options.set_copy_object(h5o.COPY_WITHOUT_ATTR_FLAG)
            h5o.copy(source, name, target, name, copypl=options)
            self._copy_all_attributes(dataset, h5d.open(target, name), place)
            return
        values = self._texts(h5py.Dataset(dataset), place)
        if values is not None:
            made = h5py.Group(target).create_dataset(
                name, dataset.shape, h5py.string_dtype(), data=values
            )
            self._copy_all_attributes(dataset, made.id, place)

    def _texts(self, dataset: h5py.Dataset, place: str) -> Any:
        """Texts of any length, read one by one: each may be as long as the file."""
        values = np.empty(dataset.shape, dtype=object)
        nbytes = 0
        for index in np.ndindex(dataset.shape):
            values[index] = value = dataset[index]
            nbytes += len(value)
            if nbytes > self._nbytes:
                message = f"its texts take more than the {self._nbytes} bytes of the file"
                self._found.left.append(f"{self._origin.file}: {place}: {message}")
                return None
        return values if dataset.shape else values[()]

    def _copy_all_attributes(self, source: Any, target: Any, place: str) -> None:
        """The attributes of an object that is foreign itself."""
        for name in _attribute_names(source):
            self._copy_attribute(source, target, name, place)

    def _copy_attributes(self, source: Any, target: Any, path: str) -> None:
        """Foreign attributes of an object of the format."""
        place = f"{self._origin.place}/{path}".replace("//", "/").rstrip("/") or "/"
        for name in _attribute_names(source):
            text = name.decode("utf-8", "surrogateescape")
            is_users = text.startswith(layout.USER_PREFIX)
            if is_users or (self._keep and text not in FORMAT_ATTRIBUTES):
                self._copy_attribute(source, target, name, place)

    def _copy_attribute(self, source: Any, target: Any, name: bytes, place: str) -> None:
        text = name.decode("utf-8", "surrogateescape")
        if h5a.exists(target, name):
            return
        with self._named(f"{place}: attribute {text!r}"):
            attribute = h5a.open(source, name)
            type_id, space = attribute.get_type(), attribute.get_space()
            points = space.get_simple_extent_npoints()
            problem = _type_problem(type_id, points, self._heaps)
            nbytes = points * type_id.get_size()
            if nbytes > self._limits.max_attribute_nbytes:
                problem = f"takes {nbytes} bytes"
            if problem is not None:
                raise HostileFileError(problem)
            made = h5a.create(target, name, type_id, space)
            self._found.number += 1
            if space.get_simple_extent_type() == h5s.NULL or not points:
                return
            if not _has_texts(type_id):
                raw = np.empty(attribute.shape, dtype=f"V{type_id.get_size()}")
                attribute.read(raw, mtype=type_id)
                made.write(raw, mtype=type_id)
                return
            texts = np.empty(attribute.shape, dtype=h5py.string_dtype())
            attribute.read(texts)
            made.write(texts)

    @contextlib.contextmanager
    def _named(self, place: str) -> Iterator[None]:
        """An error leaves one object out, and is named."""
        try:
            yield
        except (ArchiveError, *LIBRARY_ERRORS) as error:
            reason = str(error).removeprefix(f"{place}: ")
            self._found.left.append(f"{self._origin.file}: {place}: {reason}")


def _attribute_names(location: Any) -> list[bytes]:
    names: list[bytes] = []
    h5a.iterate(location, names.append)
    return names


def _has_texts(type_id: Any) -> bool:
    return bool(type_id.get_class() == h5t.STRING and type_id.is_variable_str())


def _type_problem(type_id: Any, points: int, heaps: Heaps) -> str | None:
    """Why values of a type cannot be copied; None if they can."""
    if _has_texts(type_id):
        is_many = points > _MAX_TEXTS
        return f"holds {points} texts of variable length" if is_many else heaps.problem
    if _is_plain(type_id, depth=0):
        return None
    return "is of a type with references or variable lengths, which cannot be copied safely"


def _is_plain(type_id: Any, *, depth: int) -> bool:
    kind = type_id.get_class()
    if kind == h5t.STRING:
        return not type_id.is_variable_str()
    if kind == h5t.ARRAY and depth < 8:
        return _is_plain(type_id.get_super(), depth=depth + 1)
    if kind == h5t.COMPOUND and depth < 8:
        members = range(type_id.get_nmembers())
        return all(_is_plain(type_id.get_member_type(each), depth=depth + 1) for each in members)
    return kind in _PLAIN


def _is_same(first: Any, second: Any) -> bool:
    """Whether two datasets hold the same; large ones are taken to differ."""
    if not isinstance(second, h5d.DatasetID) or first.shape != second.shape:
        return False
    if first.get_type() != second.get_type() or first.get_storage_size() > (64 << 20):
        return False
    left, right = (h5py.Dataset(each)[()] for each in (first, second))
    return np.asarray(left).tobytes() == np.asarray(right).tobytes() or bool(
        np.array_equal(left, right)
    )
