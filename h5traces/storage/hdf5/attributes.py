"""Attributes of HDF5 objects, read within limits and written as fixed-length values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from h5py import h5a, h5o, h5s, h5t

from h5traces.errors import CorruptArchiveError, HostileFileError
from h5traces.format import layout, text
from h5traces.format.archive import ArchiveMetadata, KindMetadata
from h5traces.format.trace import TraceMetadata
from h5traces.storage.hdf5.types import null_padded, number_type, text_type

if TYPE_CHECKING:
    from collections.abc import Mapping

    from h5traces.format.attributes import Attrs, AttrValue
    from h5traces.format.limits import ReadLimits

_SCALAR = h5s.create(h5s.SCALAR)
_NUMBER_NBYTES: Final = 8
FORMAT_ATTRIBUTES = frozenset(
    {*ArchiveMetadata.model_fields, *KindMetadata.model_fields, *TraceMetadata.model_fields}
    | layout.OBJECT_ATTRS
)


def write_attributes(location: Any, attrs: Mapping[str, AttrValue]) -> None:
    """Create attributes on an open group or dataset id.

    Parameters
    ----------
    location
        Low-level id of the object.
    attrs
        Text, int64, float64 or 1-D int64 values by name.
    """
    for name, value in attrs.items():
        values, type_id, space = _prepare(value)
        attribute = h5a.create(location, name.encode(), type_id, space)
        attribute.write(values, mtype=type_id)


def _prepare(value: AttrValue) -> tuple[np.ndarray, h5t.TypeID, h5s.SpaceID]:
    if isinstance(value, str):
        encoded = text.encode(value) or b"\0"
        return np.array(encoded, dtype=f"S{len(encoded)}"), text_type(len(encoded)), _SCALAR
    if isinstance(value, tuple):
        values = np.array(value, dtype="<i8")
        return values, h5t.STD_I64LE, h5s.create_simple((len(value),))
    if isinstance(value, float):
        return np.array(value, dtype="<f8"), h5t.IEEE_F64LE, _SCALAR
    return np.array(value, dtype="<i8"), h5t.STD_I64LE, _SCALAR


def read_attributes(
    location: Any, limits: ReadLimits, *, ignored: list[str] | None = None
) -> Attrs:
    """The attributes of an open object.

    Parameters
    ----------
    location
        Low-level id of the object.
    limits
        What it may ask of its reader.
    ignored
        Receives the names of attributes that are not the format's and of no type it uses, such as
        the variable-length strings that h5py writes by default; they are passed over.

    Raises
    ------
    HostileFileError
        There are more attributes, or larger ones, than `limits` allows, or one of a type that
        archives never hold.
    CorruptArchiveError
        A text is no UTF-8.
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
        if name not in FORMAT_ATTRIBUTES and not _is_readable(attribute):
            if ignored is not None:
                ignored.append(name)
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
    return number_type(type_id) not in (None, "uint64", "bfloat16")


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
