"""Compares what object headers hold with what the index of an archive lists, without the library.

`Hdf5Writer` puts every header into one piece, of messages that follow from what it describes. So a
header that holds exactly these messages says what the index does; the library would take ten times
as long to tell. Any other header, such as one that a stock tool wrote, is left to the library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from h5traces.errors import ArchiveError
from h5traces.format import layout
from h5traces.storage.hdf5.header_patterns import RANGE_NAME, Header, HeaderPattern
from h5traces.storage.hdf5.indexes import write_fixed_array
from h5traces.storage.hdf5.messages import (
    ATTRIBUTE_INFO,
    UNDEFINED,
    attribute_message,
    attribute_name,
    dataset_messages,
    datatype_message,
    fixed_array_layout,
    group_messages,
    layout_address,
    link_target,
    messages_of,
    single_chunk_layout,
)
from h5traces.storage.hdf5.types import hdf5_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from h5traces.format.document import Attrs, AttrValue
    from h5traces.format.entries import ObjectEntry, SampleEntry
    from h5traces.storage.files import ByteFile
    from h5traces.storage.footer_rows import FooterRow

# Headers of a sample lie side by side, before that of its group.
_BEFORE_NBYTES: Final = 256 << 10
_AFTER_NBYTES: Final = 64 << 10
_PREFIX_NBYTES: Final = 10
_PATTERNS_KEPT: Final = 256


class _UnknownError(Exception):
    """A header is not as `Hdf5Writer` would have written it; it may still be right."""


class HeaderCheck:
    """Compares headers of one file with entries of its index."""

    def __init__(self, file: ByteFile) -> None:
        self._file, self._nbytes = file, file.nbytes
        self._start, self._block = 0, b""
        # Headers of the objects of one sample, which are linked once, by address.
        self._met: dict[int, tuple[str, Header]] = {}
        # By the key that like samples share; None if they have no pattern.
        self._patterns: dict[Any, HeaderPattern | None] = {}

    def shows(self, address: int, sample: SampleEntry, row: FooterRow, key: Any) -> bool:
        """Whether the group at `address` holds this sample and nothing else.

        False, too, if only the library can tell. Samples of one `key` have objects that
        differ in digests and chunks alone.
        """
        self._met.clear()
        try:
            pattern = self._patterns.get(key)
            if pattern is not None and self._fits(pattern, address, sample, row):
                return True
            self._met.clear()
            children: dict[str, list[ObjectEntry]] = {}
            for entry in sample.objects.values():
                children.setdefault(entry.path.rpartition("/")[0], []).append(entry)
            self._check_group(address, "", sample.attrs, children)
            if not children:
                if len(self._patterns) >= _PATTERNS_KEPT:
                    self._patterns.clear()
                self._patterns[key] = self._pattern(address, sample, row)
        except (_UnknownError, ArchiveError, UnicodeEncodeError):
            return False
        return not children

    def _fits(
        self, pattern: HeaderPattern, address: int, sample: SampleEntry, row: FooterRow
    ) -> bool:
        """Whether all headers of a sample are as the pattern says; False may be wrong."""
        expected = b"".join([*pattern.group(address), *_attributes(sample.attrs)])
        if self._body(address, "") != expected:
            return False
        return pattern.fits(self._bytes(address - pattern.nbytes, pattern.nbytes), address, row)

    def _pattern(self, address: int, sample: SampleEntry, row: FooterRow) -> HeaderPattern | None:
        """The pattern of a sample that was looked at; None if it would be no use."""
        start = min(self._met)
        if not 0 < address - start <= _BEFORE_NBYTES:
            return None
        _, group = self._met.pop(address)
        places = {path: place for place, path in enumerate(sample.objects)}
        try:
            pattern = HeaderPattern(start, self._bytes(start, address - start), group.body)
            for at, (path, header) in self._met.items():
                pattern.add(at, header, row, places[path])
        except ValueError:
            return None
        return pattern

    def _check_group(
        self, address: int, path: str, attrs: Attrs, children: dict[str, list[ObjectEntry]]
    ) -> None:
        messages = _messages(self._body(address, path))
        targets = [(message, link_target(message)) for message in messages]
        links = dict(target for _, target in targets if target is not None)
        inside = children.pop(path, ())
        expected = {entry.path.rpartition("/")[2].encode(): entry for entry in inside}
        others = [message for message, target in targets if target is None]
        _compare(b"".join(others), [group_messages(), *_attributes(attrs)])
        # Two links of one name would be counted once in `links`.
        if links.keys() != expected.keys() or len(targets) - len(others) != len(inside):
            raise _UnknownError
        for name, entry in expected.items():
            if entry.is_group:
                self._check_group(links[name], entry.path, entry.attrs, children)
            else:
                self._check_dataset(links[name], entry)

    def _check_dataset(self, address: int, entry: ObjectEntry) -> None:
        found = self._body(address, entry.path)
        if entry.codec is None or entry.chunks is None:
            raise _UnknownError
        itemsize = hdf5_type(entry.dtype).get_size()
        described = dataset_messages(
            datatype_message(entry.dtype), itemsize, entry.shape, entry.codec
        )
        offsets, sizes = entry.chunks.offsets, entry.chunks.sizes
        if entry.shape == entry.chunk:
            if len(sizes) != 1:
                raise _UnknownError
            stored = single_chunk_layout(itemsize, entry.chunk, sizes[0], offsets[0])
        else:
            addresses = map(layout_address, _messages(found))
            index = next((each for each in addresses if each is not None), 0)
            if sizes:
                self._check_chunk_index(index, entry, itemsize)
            elif index != UNDEFINED:
                raise _UnknownError
            stored = fixed_array_layout(itemsize, entry.chunk, index)
        attributes = _attributes(_shown_attributes(entry))
        _compare(_without_range(found), [described, stored, *attributes])

    def _check_chunk_index(self, address: int, entry: ObjectEntry, itemsize: int) -> None:
        assert entry.chunks is not None
        raw_nbytes = itemsize
        for length in entry.chunk:
            raw_nbytes *= length
        position = address

        def compare(data: bytes) -> int:
            nonlocal position
            if data != self._bytes(position, len(data)):
                raise _UnknownError
            position += len(data)
            return position - len(data)

        write_fixed_array(entry.chunks.offsets, entry.chunks.sizes, raw_nbytes, compare)

    def _body(self, address: int, path: str) -> bytes:
        """Messages of the object header at an address, which must be a new one."""
        if address in self._met:
            raise _UnknownError
        prefix = self._bytes(address, _PREFIX_NBYTES)
        width = 1 << (prefix[5] & 3)
        if prefix[:5] != b"OHDR\2" or prefix[5] > 2:
            raise _UnknownError
        nbytes = int.from_bytes(prefix[6 : 6 + width], "little")
        body = self._bytes(address + 6 + width, nbytes)
        self._met[address] = path, Header(6 + width, body)
        return body

    def _bytes(self, address: int, nbytes: int) -> bytes:
        stop = address + nbytes
        if stop > self._nbytes:
            raise _UnknownError
        if not self._start <= address <= stop <= self._start + len(self._block):
            self._start = max(0, address - _BEFORE_NBYTES)
            end = min(self._nbytes, max(stop, address + _AFTER_NBYTES))
            self._block = self._file.read_at(self._start, end - self._start)
        return self._block[address - self._start : stop - self._start]


def _messages(body: bytes) -> list[bytes]:
    try:
        return messages_of(body)
    except ValueError as error:
        raise _UnknownError from error


def _compare(found: bytes, expected: Iterable[bytes]) -> None:
    """Compare messages, in any order."""
    joined = b"".join(expected)
    # Mostly in the order in which `Hdf5Writer` makes them.
    if found != joined and sorted(_messages(found)) != sorted(_messages(joined)):
        raise _UnknownError


def _without_range(body: bytes) -> bytes:
    """Messages but for that of the range in which viewers show an array, of any type."""
    if RANGE_NAME not in body:
        return body
    return b"".join(each for each in _messages(body) if attribute_name(each) != RANGE_NAME)


def _attributes(attrs: Mapping[str, AttrValue]) -> list[bytes]:
    messages = [attribute_message(name, value) for name, value in attrs.items()]
    if None in messages:
        raise _UnknownError
    return [ATTRIBUTE_INFO, *(each for each in messages if each)] if messages else []


def _shown_attributes(entry: ObjectEntry) -> Mapping[str, AttrValue]:
    return {**layout.IMAGE_ATTRS, **entry.attrs} if layout.is_picture(entry.path) else entry.attrs
