"""Exports samples as files of named arrays: numpy's ``.npz``, and safetensors."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.lib import format as npy

from h5traces.format.dtypes import TypedArray
from h5traces.format.text import utf8
from h5traces.rewriting.plain_values import JSON_ENDING, ascii_json, plain_fields

if TYPE_CHECKING:
    from h5traces.archive.trace import Trace
    from h5traces.storage.publish import PartFile

_SAFETENSORS_TYPES: Final = {
    **{"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "bool": "BOOL"},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
_ALIGNMENT: Final = 8
_METADATA: Final = "__metadata__"


def write_npz(trace: Trace, part: PartFile) -> list[str]:
    """Write a sample as ``numpy.savez`` does; bfloat16 as float32. Fields that are left out."""
    fields = plain_fields(trace)
    with zipfile.ZipFile(part.file, "w", zipfile.ZIP_STORED) as archive:
        for name, value in fields.named.items():
            array = value.to_numpy() if isinstance(value, TypedArray) else np.asarray(value)
            if isinstance(value, (str, list)) and array.tolist() != value:
                # numpy cuts NUL characters off the end of texts.
                name, array = name + JSON_ENDING, np.asarray(ascii_json(value))
                if name in fields.named:
                    fields.left_out.append(name)
                    continue
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)
            part.file.raise_error()
    return fields.left_out


def write_safetensors(trace: Trace, part: PartFile) -> list[str]:
    """Write a sample as safetensors; text goes to the header. Fields that are left out."""
    fields = plain_fields(trace)
    facts, arrays = {}, {}
    for name, value in fields.named.items():
        if name == _METADATA:
            fields.left_out.append(name)
        elif isinstance(value, str) and utf8(value) == value:
            facts[name] = value
        elif isinstance(value, (str, list)):
            if name + JSON_ENDING in fields.named:
                fields.left_out.append(name)
            facts.setdefault(name + JSON_ENDING, ascii_json(value))
        else:
            typed = value if isinstance(value, TypedArray) else _typed(np.asarray(value))
            if typed.dtype not in _SAFETENSORS_TYPES:
                fields.left_out.append(name)
                continue
            arrays[name] = typed
    header: dict[str, Any] = {_METADATA: facts} if facts else {}
    # Wide types first, so that each begins at a multiple of its size, as their library writes them.
    ordered = dict(sorted(arrays.items(), key=lambda item: -item[1].values.itemsize))
    start = 0
    for name, typed in ordered.items():
        end = start + typed.values.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[typed.dtype],
            "shape": list(typed.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    part.append(len(text).to_bytes(8, "little") + text)
    for typed in ordered.values():
        part.file.write(_bytes_of(typed.values))
        part.file.raise_error()
    return fields.left_out


def _typed(array: np.ndarray) -> TypedArray:
    # Any number type, of which TypedArray is only the pair.
    return TypedArray(array, array.dtype.name)  # type: ignore[arg-type]


def _bytes_of(array: np.ndarray) -> memoryview:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data
