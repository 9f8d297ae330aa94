"""What HDF5's object headers hold, as bytes.

Written after the HDF5 File Format Specification, version 3.0, sections II.A, III.C and IV.A; names
in comments are its names. All numbers are little-endian, addresses and lengths take eight bytes.
"""

from __future__ import annotations

import struct
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Final

from h5traces.format import text
from h5traces.storage.codecs import get_codec
from h5traces.storage.hdf5.types import StoredValue, attribute_value, hdf5_type

if TYPE_CHECKING:
    from collections.abc import Iterable

    from h5py import h5t


UNDEFINED: Final = 0xFFFF_FFFF_FFFF_FFFF
_DATASPACE, _LINK_INFO, _DATATYPE, _FILL_VALUE = 0x01, 0x02, 0x03, 0x05
_LINK, _LAYOUT, _GROUP_INFO, _FILTERS, _ATTRIBUTE = 0x06, 0x08, 0x0A, 0x0B, 0x0C
_ATTRIBUTE_INFO: Final = 0x15
# Message flags, bit 0: never changes; bit 2: writers that do not know the message may go on.
_CONSTANT: Final = 0x01
_OPTIONAL: Final = 0x04
_LARGEST_MESSAGE: Final = 0xFFFF
_UTF8: Final = 1
_SINGLE_CHUNK, _FIXED_ARRAY = 1, 3
# Filters of lower numbers have their name fixed by the format.
_FIRST_NAMED_FILTER: Final = 256
PAGE_BITS: Final = 10
# Type, size and flags of a message.
_HEAD: Final = struct.Struct("<BHB")
# Version and flags of an attribute, sizes of name, type and shape, character set of the name.
_ATTRIBUTE_HEAD: Final = struct.Struct("<BBHHHB")
_ATTRIBUTE_VERSION: Final = 3
# Flags of a link, bit 4: the character set is given; bits 0 and 1: width of the name's length.
_SHORT_LINK, _LONG_LINK = 0x10, 0x11


def object_header(messages: Iterable[bytes]) -> bytes:
    """A version 2 object header in one chunk, without its checksum."""
    body = b"".join(messages)
    for flags, width in enumerate((1, 2, 4)):
        if len(body) < 1 << 8 * width:
            return b"OHDR" + bytes((2, flags)) + len(body).to_bytes(width, "little") + body
    message = f"an object header of {len(body)} bytes is more than HDF5 can hold"
    raise ValueError(message)


def _message(kind: int, body: bytes, flags: int = 0) -> bytes:
    return _HEAD.pack(kind, len(body), flags) + body


def messages_of(body: bytes) -> list[bytes]:
    """The messages that the body of an object header holds; ValueError if they do not fill it."""
    found: list[bytes] = []
    position = 0
    while position < len(body):
        stop = position + _HEAD.size
        if stop <= len(body):
            stop += _HEAD.unpack_from(body, position)[1]
        if stop > len(body) or stop < position + _HEAD.size:
            message = "the last message goes beyond the header"
            raise ValueError(message)
        found.append(body[position:stop])
        position = stop
    return found


def link_target(message: bytes) -> tuple[bytes, int] | None:
    """Name and address of a hard link as `link_message` makes it; None for anything else."""
    if message[0] != _LINK:
        return None
    flags = message[_HEAD.size + 1]
    start = _HEAD.size + (4 if flags == _SHORT_LINK else 5)
    name, address = message[start:-8], int.from_bytes(message[-8:], "little")
    return (name, address) if link_message(name, address) == message else None


def attribute_name(message: bytes) -> bytes | None:
    """The name of an attribute, NUL and all; None for other messages, and other versions of it."""
    start = _HEAD.size + _ATTRIBUTE_HEAD.size
    if message[0] != _ATTRIBUTE or len(message) < start:
        return None
    version, _, length, *_ = _ATTRIBUTE_HEAD.unpack_from(message, _HEAD.size)
    return message[start : start + length] if version == _ATTRIBUTE_VERSION else None


def attribute_start(message: bytes) -> int:
    """Where in the message of an attribute, as `attribute_name` knows it, its name ends."""
    _, _, length, *_ = _ATTRIBUTE_HEAD.unpack_from(message, _HEAD.size)
    return _HEAD.size + _ATTRIBUTE_HEAD.size + int(length)


def layout_address(message: bytes) -> int | None:
    """The address in a layout message; None for other messages."""
    return int.from_bytes(message[-8:], "little") if message[0] == _LAYOUT else None


@lru_cache(maxsize=4096)
def dataset_messages(datatype: bytes, itemsize: int, shape: tuple[int, ...], codec: str) -> bytes:
    """Dataspace, datatype, fill value and filters of a chunked dataset."""
    return b"".join(
        (
            _message(_DATASPACE, _dataspace(shape)),
            _message(_DATATYPE, datatype, _CONSTANT),
            # Version 3: allocated chunk by chunk, written if the user has set one, undefined.
            _message(_FILL_VALUE, bytes((3, 0x0B)), _CONSTANT),
            _message(_FILTERS, _filters(itemsize, codec), _CONSTANT),
        )
    )


@cache
def datatype_message(stored_type: str) -> bytes:
    """A stored type, as the HDF5 library encodes it."""
    return encoded_type(hdf5_type(stored_type))


def encoded_type(type_id: h5t.TypeID) -> bytes:
    """An HDF5 type as a datatype message has it."""
    # H5Tencode puts two bytes in front: the number of the message and a version.
    encoded: bytes = type_id.encode()
    return encoded[2:]


def _dataspace(shape: tuple[int, ...]) -> bytes:
    """Version 2; a scalar, or simple with its dimensions."""
    return struct.pack(f"<4B{len(shape)}Q", 2, len(shape), 0, bool(shape), *shape)


def _filters(itemsize: int, codec: str) -> bytes:
    filters = get_codec(codec).pipeline(itemsize)
    parts = [bytes((2, len(filters)))]
    for each in filters:
        no_name = (0,) if each.filter_id >= _FIRST_NAMED_FILTER else ()
        head = (each.filter_id, *no_name, 0, len(each.parameters))
        parts.append(struct.pack(f"<{len(head)}H", *head))
        parts.append(struct.pack(f"<{len(each.parameters)}I", *each.parameters))
    return b"".join(parts)


def single_chunk_layout(
    itemsize: int, chunk: tuple[int, ...], stored_nbytes: int, address: int
) -> bytes:
    """Layout of a dataset that is one filtered chunk."""
    head = _layout_head(itemsize, chunk, flags=2)
    tail = struct.pack("<BQIQ", _SINGLE_CHUNK, stored_nbytes, 0, address)
    return _message(_LAYOUT, head + tail)


def fixed_array_layout(itemsize: int, chunk: tuple[int, ...], address: int) -> bytes:
    """Layout of a dataset of several chunks, or of none, with the address of their index."""
    head = _layout_head(itemsize, chunk, flags=0)
    return _message(_LAYOUT, head + struct.pack("<BBQ", _FIXED_ARRAY, PAGE_BITS, address))


@lru_cache(maxsize=4096)
def _layout_head(itemsize: int, chunk: tuple[int, ...], *, flags: int) -> bytes:
    """Version 4, class chunked, flags, dimensions, of which the last is the element's size."""
    dims = (*chunk, itemsize)
    width = byte_width(max(dims))
    lengths = b"".join(length.to_bytes(width, "little") for length in dims)
    return bytes((4, 2, flags, len(dims), width)) + lengths


def chunk_nbytes_width(raw_nbytes: int) -> int:
    """Bytes that an index takes for the stored size of a chunk."""
    return min(8, 1 + byte_width(raw_nbytes))


def byte_width(number: int) -> int:
    """Bytes that a number takes."""
    return max(1, (number.bit_length() + 7) // 8)


def group_messages(heap: int = UNDEFINED, names: int = UNDEFINED) -> bytes:
    """Link info and group info; the addresses are those of dense storage, where it is used."""
    link_info = struct.pack("<BBQQ", 0, 0, heap, names)
    return _message(_LINK_INFO, link_info) + _message(_GROUP_INFO, bytes(2), _CONSTANT)


def link(name: bytes, address: int) -> bytes:
    """A hard link, as dense storage holds it."""
    flags, width = (_SHORT_LINK, 1) if len(name) < 1 << 8 else (_LONG_LINK, 2)
    head = bytes((1, flags, _UTF8)) + len(name).to_bytes(width, "little")
    return head + name + address.to_bytes(8, "little")


def link_message(name: bytes, address: int) -> bytes:
    """A hard link in its group's header."""
    return _message(_LINK, link(name, address))


# Not stored densely. Without this message the library counts no attributes.
ATTRIBUTE_INFO: Final = _message(
    _ATTRIBUTE_INFO, struct.pack("<BBQQ", 0, 0, UNDEFINED, UNDEFINED), _OPTIONAL
)


def attribute_message(name: str, value: StoredValue) -> bytes | None:
    """An attribute; None if it is too large for a header."""
    if not isinstance(value, str):
        return _attribute_message(name, value)
    # Digests, which are of one length and all differ.
    data = text.encode(value) or b"\0"
    head = _text_head(name, len(data))
    return head and head + data


@lru_cache(maxsize=4096)
def _text_head(name: str, nbytes: int) -> bytes | None:
    found = _attribute_message(name, nbytes * "x")
    return found and found[:-nbytes]


@lru_cache(maxsize=4096)
def _attribute_message(name: str, value: StoredValue) -> bytes | None:
    type_id, shape, data = attribute_value(value)
    datatype, space = encoded_type(type_id), _dataspace(shape)
    stored_name = name.encode() + b"\0"
    sizes = (len(stored_name), len(datatype), len(space))
    if max(*sizes, len(data)) > _LARGEST_MESSAGE:
        return None
    head = _ATTRIBUTE_HEAD.pack(_ATTRIBUTE_VERSION, 0, *sizes, _UTF8)
    body = b"".join((head, stored_name, datatype, space, data))
    return _message(_ATTRIBUTE, body) if len(body) <= _LARGEST_MESSAGE else None
