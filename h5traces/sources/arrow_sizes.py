"""How much memory Arrow and Parquet ask for, from their headers: pyarrow believes what these say.

Flatbuffers of Arrow messages (format/Message.fbs, version V5) and page headers of Parquet
(parquet.thrift, 2.10, in Thrift's compact protocol), as far as sizes stand in them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

# Of messages: what `Message.header_type` says.
_DICTIONARY: Final = 2
_BATCH: Final = 3
# Old pyarrow named the compression of a message here.
_NAMED_COMPRESSION: Final = b"ARROW:experimental_compression"
_HEAD_NBYTES: Final = 4096
# The most that pyarrow reads of a page's header.
_MAX_HEADER_NBYTES: Final = 16 << 20
_MAX_DEPTH: Final = 8
# Types of Thrift's compact protocol.
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 7, 8, 12
# Fields of a page's header, and of the header of each kind of page.
_UNCOMPRESSED, _COMPRESSED = 2, 3
_DATA_PAGES: Final = (5, 8)


def inflated_nbytes(metadata: bytes, body: Any) -> int:
    """Bytes that the compressed buffers of a message claim to become.

    Raises
    ------
    ValueError
        The message is damaged.
    """
    try:
        message = _Table.root(metadata)
        kind, batch = message.number(1, "B"), message.table(2)
        if batch is not None and kind == _DICTIONARY:
            batch = batch.table(1)
        if batch is None or kind not in (_DICTIONARY, _BATCH):
            return 0
        if batch.table(3) is None and _NAMED_COMPRESSION not in metadata:
            return 0
        total = 0
        for offset, nbytes in struct.iter_unpack("<qq", batch.vector(2, 16)):
            if nbytes > 0:
                # -1 stands before what is not compressed.
                total += max(struct.unpack_from("<q", body, offset)[0], 0)
    except (struct.error, IndexError) as error:
        message_ = f"a message is damaged: {error}"
        raise ValueError(message_) from error
    else:
        return total


class _Table:
    """A table of flatbuffers."""

    def __init__(self, data: bytes, place: int) -> None:
        self._data, self._place = data, place
        (back,) = struct.unpack_from("<i", data, place)
        self._fields = place - back
        (self._nbytes,) = struct.unpack_from("<H", data, self._fields)

    @classmethod
    def root(cls, data: bytes) -> _Table:
        """The table that a buffer begins with."""
        return cls(data, struct.unpack_from("<I", data)[0])

    def _at(self, number: int) -> int | None:
        """Where a field lies; None if it has its default."""
        at = 4 + 2 * number
        if at + 2 > self._nbytes:
            return None
        (offset,) = struct.unpack_from("<H", self._data, self._fields + at)
        return self._place + offset if offset else None

    def number(self, number: int, form: str) -> int:
        """A number, by default 0."""
        at = self._at(number)
        return 0 if at is None else int(struct.unpack_from(f"<{form}", self._data, at)[0])

    def table(self, number: int) -> _Table | None:
        """A table; None without one."""
        at = self._at(number)
        return None if at is None else _Table(self._data, self._beyond(at))

    def vector(self, number: int, itemsize: int) -> bytes:
        """The elements of a vector of structures."""
        at = self._at(number)
        if at is None:
            return b""
        begin = self._beyond(at)
        (count,) = struct.unpack_from("<I", self._data, begin)
        return self._data[begin + 4 : begin + 4 + count * itemsize]

    def _beyond(self, at: int) -> int:
        return at + int(struct.unpack_from("<I", self._data, at)[0])


@dataclass(frozen=True, slots=True)
class Page:
    """A page of Parquet, as its header says.

    Attributes
    ----------
    header_nbytes
        Of the header itself.
    compressed_nbytes, nbytes
        Size of the content in the file, and of what it becomes.
    num_values
        Values in it; 0 for a dictionary.
    """

    header_nbytes: int
    compressed_nbytes: int
    nbytes: int
    num_values: int


def read_page(read_at: Callable[[int, int], bytes], offset: int) -> Page:
    """The header of the page that begins at `offset`; `read_at` gives bytes of the file.

    Raises
    ------
    ValueError
        There is no header.
    """
    for nbytes in (_HEAD_NBYTES, _MAX_HEADER_NBYTES):
        thrift = _Thrift(read_at(offset, nbytes))
        try:
            header = thrift.structure()
            counts = [header[each].get(1, 0) for each in _DATA_PAGES if each in header]
            sizes = header[_COMPRESSED], header[_UNCOMPRESSED], max(counts, default=0)
            is_sound = min(sizes) >= 0
        except IndexError:
            continue
        except (KeyError, TypeError, AttributeError) as error:
            message = f"the header of a page at {offset:,} is damaged: {error!r}"
            raise ValueError(message) from error
        if not is_sound:
            break
        return Page(thrift.place, *sizes)
    message = f"the header of a page at {offset:,} is damaged"
    raise ValueError(message)


class _Thrift:
    """Structures of Thrift's compact protocol: integers and structures by the number of a field."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.place = 0

    def structure(self, depth: int = 0) -> dict[int, Any]:
        """One structure; IndexError where the data end before."""
        if depth > _MAX_DEPTH:
            message = "structures are nested too deep"
            raise TypeError(message)
        found: dict[int, Any] = {}
        number = 0
        while True:
            head = self._byte()
            if head == 0:
                return found
            number = number + (head >> 4) if head >> 4 else self._signed()
            value = self._value(head & 15, depth)
            # pyarrow takes the last of several; the first stays where it is the larger.
            if isinstance(value, int) and isinstance(found.get(number), int):
                value = max(value, found[number])
            found[number] = value

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind == _BYTE:
            return self._byte()
        if kind < _DOUBLE:
            return self._signed()
        if kind == _DOUBLE:
            return self._skip(8)
        if kind == _BINARY:
            return self._skip(self._varint())
        if kind == _STRUCT:
            return self.structure(depth + 1)
        message = f"a value is of type {kind}"
        raise TypeError(message)

    def _byte(self) -> int:
        self.place += 1
        return self._data[self.place - 1]

    def _skip(self, nbytes: int) -> None:
        self.place += nbytes
        if self.place > len(self._data):
            raise IndexError

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        message = "a number is too long"
        raise TypeError(message)

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
