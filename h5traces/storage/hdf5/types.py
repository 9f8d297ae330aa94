"""HDF5 types of stored types, and back."""

from __future__ import annotations

import math
import struct
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from h5py import h5a, h5o, h5t

from h5traces.errors import CorruptArchiveError, HostileFileError
from h5traces.format import layout, text
from h5traces.format.archive import ArchiveMetadata, KindMetadata
from h5traces.format.entries import carrier_dtype
from h5traces.format.precision import CalibrationRecord
from h5traces.format.record import TraceMetadata

if TYPE_CHECKING:
    from h5traces.format.document import Attrs, AttrValue
    from h5traces.format.limits import ReadLimits


# sign position, exponent position and width, mantissa position and width; exponent bias 127
_BFLOAT16_FIELDS: Final = (15, 7, 8, 0, 7)
_BFLOAT16_BIAS: Final = 127
# the same fields and the exponent's bias, by size
_IEEE_LAYOUTS: Final = {
    2: ((15, 10, 5, 0, 10), 15),
    4: ((31, 23, 8, 0, 23), 127),
    8: ((63, 52, 11, 0, 52), 1023),
}
_CLASS_NAMES: Final = {
    h5t.REFERENCE: "a reference",
    h5t.VLEN: "of variable length",
    h5t.ARRAY: "an array",
    h5t.COMPOUND: "a compound",
    h5t.ENUM: "an enumeration",
    h5t.OPAQUE: "opaque bytes",
    h5t.BITFIELD: "a bit field",
    h5t.TIME: "a time",
}
_MAX_COLUMNS: Final = 256


@lru_cache(maxsize=1024)
def text_type(nbytes: int) -> h5t.TypeID:
    """Fixed-length UTF-8, padded with NUL: null-terminated would cut embedded NULs."""
    made = h5t.C_S1.copy()
    made.set_size(nbytes)
    made.set_strpad(h5t.STR_NULLPAD)
    made.set_cset(h5t.CSET_UTF8)
    return made


@cache
def hdf5_type(stored_type: str) -> h5t.TypeID:
    """The HDF5 type that a stored type has in the file."""
    if stored_type == "bfloat16":
        made = h5t.IEEE_F32LE.copy()
        made.set_fields(*_BFLOAT16_FIELDS)
        made.set_precision(16)
        made.set_offset(0)
        made.set_size(2)
        made.set_ebias(_BFLOAT16_BIAS)
        return made
    if stored_type.startswith("text:"):
        return text_type(int(stored_type.removeprefix("text:")))
    return h5t.py_create(carrier_dtype(stored_type))


def stored_type(type_id: h5t.TypeID) -> str:
    """The stored type of an HDF5 type of either byte order."""
    type_class = type_id.get_class()
    if type_id.committed():
        message = "the type is a named (committed) type; archives hold plain ones"
        raise HostileFileError(message)
    if type_class == h5t.STRING:
        if type_id.is_variable_str():
            message = "the type is a variable-length string; archives hold fixed-length text"
            raise HostileFileError(message)
        return f"text:{type_id.get_size()}"
    if type_class not in (h5t.INTEGER, h5t.FLOAT):
        what = _CLASS_NAMES.get(type_class, f"class {type_class}")
        message = f"the type is {what}; archives hold integers, floats and text only"
        raise HostileFileError(message)
    name = _number_type(type_id)
    if name is None:
        message = (
            f"the type is a number of {type_id.get_size()} bytes in an unusual layout; archives "
            "hold whole integers, IEEE floats and bfloat16"
        )
        raise CorruptArchiveError(message)
    return name


def _number_type(type_id: h5t.TypeID) -> str | None:
    """The stored type of an integer or float, None if its bits lie otherwise."""
    size = type_id.get_size()
    if type_id.get_order() not in (h5t.ORDER_LE, h5t.ORDER_BE) and size > 1:
        return None
    # All bits of the element count, or HDF5 reads other numbers than numpy.
    if type_id.get_precision() != 8 * size or type_id.get_offset() != 0:
        return None
    if type_id.get_class() == h5t.INTEGER:
        sign = "" if type_id.get_sign() == h5t.SGN_2 else "u"
        return f"{sign}int{8 * size}" if size in (1, 2, 4, 8) else None
    if type_id.get_norm() != h5t.NORM_IMPLIED:
        return None
    fields, bias = type_id.get_fields(), type_id.get_ebias()
    if (size, fields, bias) == (2, _BFLOAT16_FIELDS, _BFLOAT16_BIAS):
        return "bfloat16"
    return f"float{8 * size}" if _IEEE_LAYOUTS.get(size) == (fields, bias) else None


def file_dtype(type_id: h5t.TypeID) -> np.dtype[Any]:
    """The dtype of the bytes of a stored type, in the file's byte order; bfloat16 as bits."""
    dtype = carrier_dtype(stored_type(type_id))
    is_text = type_id.get_class() == h5t.STRING
    big_endian = not is_text and type_id.get_size() > 1 and type_id.get_order() == h5t.ORDER_BE
    return dtype.newbyteorder(">") if big_endian else dtype


def is_archives_own(type_id: h5t.TypeID) -> bool:
    """Whether elements are stored as archives store them: little-endian, text padded with NUL."""
    if type_id.get_class() == h5t.STRING:
        return bool(type_id.get_strpad() == h5t.STR_NULLPAD)
    return file_dtype(type_id).byteorder != ">"


def null_padded(type_id: h5t.TypeID, stored: bytes) -> bytes:
    """Text of a fixed-length type without its padding."""
    padding = type_id.get_strpad()
    if padding == h5t.STR_NULLTERM:
        # What follows the first NUL is whatever was in memory.
        return stored.partition(b"\0")[0]
    return stored.rstrip(b" ") if padding == h5t.STR_SPACEPAD else stored


def table_file_dtype(type_id: h5t.TypeID) -> np.dtype[Any]:
    """The structured dtype of the bytes of a table's rows."""
    if type_id.get_class() != h5t.COMPOUND or type_id.committed():
        message = "the type is not a plain compound; the table of samples has named columns"
        raise HostileFileError(message)
    count = type_id.get_nmembers()
    if count > _MAX_COLUMNS:
        message = f"the table has {count} columns; the limit is {_MAX_COLUMNS}"
        raise HostileFileError(message)
    names = [type_id.get_member_name(index).decode() for index in range(count)]
    return np.dtype(
        {
            "names": names,
            "formats": [file_dtype(type_id.get_member_type(index)) for index in range(count)],
            "offsets": [type_id.get_member_offset(index) for index in range(count)],
            "itemsize": type_id.get_size(),
        }
    )


_NUMBER_NBYTES: Final = 8
# Only a range that viewers show is a list of floats.
StoredValue: TypeAlias = "AttrValue | tuple[float, ...]"
FORMAT_ATTRIBUTES = frozenset(
    {*ArchiveMetadata.model_fields, *KindMetadata.model_fields, *TraceMetadata.model_fields}
    | set(CalibrationRecord.model_fields)
    | layout.OBJECT_ATTRS
)


def attribute_value(value: StoredValue) -> tuple[h5t.TypeID, tuple[int, ...], bytes]:
    """The type, shape and bytes of an attribute; lists are of int64, or of float64."""
    if isinstance(value, str):
        # Fixed-length text cannot be empty.
        data = text.encode(value) or b"\0"
        return text_type(len(data)), (), data
    if isinstance(value, tuple):
        if any(isinstance(each, float) for each in value):
            return h5t.IEEE_F64LE, (len(value),), struct.pack(f"<{len(value)}d", *value)
        return h5t.STD_I64LE, (len(value),), struct.pack(f"<{len(value)}q", *value)
    if isinstance(value, float):
        return h5t.IEEE_F64LE, (), struct.pack("<d", value)
    return h5t.STD_I64LE, (), struct.pack("<q", value)


def read_attributes(
    location: Any, limits: ReadLimits, foreign: list[str], *, is_newer: bool = False
) -> Attrs:
    """The attributes of an open object, given by its low-level id.

    Those that are not the format's are passed over, whatever their type; their names are added to
    `foreign`, but for the range that viewers show. Where the file `is_newer`, a name that is not
    known may be the format's.
    """
    info = h5o.get_info(location)
    if info.num_attrs > limits.max_attributes:
        message = (
            f"the object has {info.num_attrs} attributes; the limit is {limits.max_attributes}"
        )
        raise HostileFileError(message)
    heap_nbytes = info.meta_size.attr.heap_size
    if heap_nbytes > limits.max_attribute_nbytes:
        message = (
            f"the object's attributes take {heap_nbytes} bytes; the limit is "
            f"{limits.max_attribute_nbytes}"
        )
        raise HostileFileError(message)
    attrs: Attrs = {}
    # By name: opening by index reads all attributes each time, 11 s for a thousand of 10 kB.
    stored_names: list[bytes] = []
    h5a.iterate(location, stored_names.append)
    for stored_name in stored_names:
        attribute = h5a.open(location, stored_name)
        name = stored_name.decode("utf-8", "surrogateescape")
        if name == layout.IMAGE_RANGE:
            continue
        is_known = name in FORMAT_ATTRIBUTES
        is_users = name.startswith(layout.USER_PREFIX)
        if not is_known and (is_users or not is_newer or not _is_readable(attribute)):
            foreign.append(name)
            continue
        attrs[name] = _read_value(attribute, name, limits)
    return attrs


def _is_readable(attribute: h5a.AttrID) -> bool:
    """Whether the attribute is of a type and shape that the format uses."""
    type_id, shape = attribute.get_type(), attribute.shape
    type_class = type_id.get_class()
    if type_class == h5t.STRING:
        return not type_id.is_variable_str() and shape in ((), (1,))
    if type_class not in (h5t.INTEGER, h5t.FLOAT) or shape is None or len(shape) > 1:
        return False
    # HDF5 clips what does not fit into 64 signed bits.
    return _number_type(type_id) not in (None, "uint64", "bfloat16")


def _read_value(attribute: h5a.AttrID, name: str, limits: ReadLimits) -> AttrValue:
    if not _is_readable(attribute):
        message = (
            f"attribute {name!r} is of a type or shape that archives never hold; expected "
            "fixed-length text, a number, or a list of integers"
        )
        raise HostileFileError(message)
    type_id, shape = attribute.get_type(), attribute.shape
    is_text = type_id.get_class() == h5t.STRING
    nbytes = type_id.get_size() if is_text else math.prod(shape) * _NUMBER_NBYTES
    if nbytes > limits.max_attribute_nbytes:
        limit = limits.max_attribute_nbytes
        message = f"attribute {name!r} has {nbytes} bytes; the limit is {limit}"
        raise HostileFileError(message)
    if is_text:
        stored = np.empty(shape, dtype=f"S{nbytes}")
        attribute.read(stored, mtype=type_id)
        try:
            return text.decode(null_padded(type_id, stored.tobytes()))
        except CorruptArchiveError as error:
            message = f"attribute {name!r}: {error}"
            raise CorruptArchiveError(message) from error
    is_integer = type_id.get_class() == h5t.INTEGER
    values = np.empty(shape, dtype="<i8" if is_integer else "<f8")
    # HDF5 cannot read no elements.
    if values.size:
        attribute.read(values)
    return tuple(values.tolist()) if shape else values.item()
