"""HDF5 types of stored types, and back."""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
from h5py import h5t

from h5traces.errors import HostileFileError
from h5traces.storage.objects import carrier_dtype

# sign position, exponent position and width, mantissa position and width; exponent bias 127
_BFLOAT16_FIELDS: Final = (15, 7, 8, 0, 7)
_BFLOAT16_BIAS: Final = 127
_IEEE_FIELDS: Final = {
    2: (15, 10, 5, 0, 10),
    4: (31, 23, 8, 0, 23),
    8: (63, 52, 11, 0, 52),
}


def text_type(nbytes: int) -> h5t.TypeID:
    """Fixed-length UTF-8, padded with NUL: null-terminated would cut embedded NULs."""
    made = h5t.C_S1.copy()
    made.set_size(nbytes)
    made.set_strpad(h5t.STR_NULLPAD)
    made.set_cset(h5t.CSET_UTF8)
    return made


def _bfloat16_type() -> h5t.TypeID:
    made = h5t.IEEE_F32LE.copy()
    made.set_fields(*_BFLOAT16_FIELDS)
    made.set_precision(16)
    made.set_offset(0)
    made.set_size(2)
    made.set_ebias(_BFLOAT16_BIAS)
    return made


@cache
def hdf5_type(stored_type: str) -> h5t.TypeID:
    """The HDF5 type that a stored type has in the file."""
    if stored_type == "bfloat16":
        return _bfloat16_type()
    if stored_type.startswith("text:"):
        return text_type(int(stored_type.removeprefix("text:")))
    return h5t.py_create(carrier_dtype(stored_type))


def stored_type(type_id: h5t.TypeID) -> str | None:
    """The stored type behind an HDF5 type, None for a number type only HDF5 itself can decode.

    Raises
    ------
    HostileFileError
        The type is of a class that archives never hold: references, variable length, arrays,
        compounds, enumerations, opaque bytes, or a named type.
    """
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
        message = f"the type class is {type_class}; archives hold integers, floats and text only"
        raise HostileFileError(message)
    if type_id.get_size() > 1 and type_id.get_order() != h5t.ORDER_LE:
        return None
    if type_class == h5t.INTEGER:
        sign = "" if type_id.get_sign() == h5t.SGN_2 else "u"
        return f"{sign}int{8 * type_id.get_size()}"
    return _float_name(type_id)


def _float_name(type_id: h5t.TypeFloatID) -> str | None:
    size, fields = type_id.get_size(), type_id.get_fields()
    if size == 2 and fields == _BFLOAT16_FIELDS and type_id.get_ebias() == _BFLOAT16_BIAS:
        return "bfloat16"
    if _IEEE_FIELDS.get(size) == fields:
        return f"float{8 * size}"
    return None


def table_dtype(columns: dict[str, np.dtype]) -> np.dtype:
    """The compound dtype of a table."""
    return np.dtype(list(columns.items()))
