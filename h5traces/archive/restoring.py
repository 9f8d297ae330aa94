"""Layers as they were before they were stored: cast back, decoded, cut into generation steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.errors import CorruptArchiveError, UnsupportedEncodingError
from h5traces.format import layout
from h5traces.format.dtypes import CARRIERS, FLOAT_TYPES, FloatType, TypedArray, cast_values
from h5traces.precision.decoding import decode, is_encoded
from h5traces.precision.exceptions import EXCEPTION_COLUMNS, num_exceptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.archive.trace import Trace
    from h5traces.format.entries import ObjectEntry

_STEPS_TABLE_AXES = 3
_FLAT_AXES = 2


def restored_layer(trace: Trace, kind: str, name: str) -> TypedArray | list[TypedArray]:
    """The array of a kind by its dataset name, in its source's type; a list where in steps.

    Raises
    ------
    CorruptArchiveError
        What is stored does not go together.
    UnsupportedEncodingError
        This release does not know how to decode it.
    """
    path = f"{kind}/{name}"
    entry, stored = trace.entry(path), trace.stored(path)
    try:
        encoded = is_encoded(entry.attrs)
    except UnsupportedEncodingError as error:
        message = f"{trace.place}/{path}: {error}"
        raise UnsupportedEncodingError(message) from error
    if "encoding" in entry.attrs and trace.archive_file.metadata.precision is None:
        message = (
            f"{trace.place}/{entry.path}: is encoded as {entry.attrs['encoding']}, but the archive "
            "does not say that it is less than exact (the root attribute 'precision' is missing); "
            "restore the file from a copy"
        )
        raise CorruptArchiveError(message)
    if encoded:
        return _decoded(trace, kind, name, entry, stored)
    if f"{kind}/{layout.STEPS_TABLE}" in trace.objects:
        steps = _steps(trace, kind, name, stored)
        return [_cast_back(trace, step, entry) for step in steps]
    return _cast_back(trace, stored, entry)


def _cast_back(trace: Trace, stored: NDArray[Any], entry: ObjectEntry) -> TypedArray:
    """Stored values in the type they are to be read in."""
    place = f"{trace.place}/{entry.path}"
    array = TypedArray(stored, _float_type(entry.dtype, place))
    source = entry.attrs.get("source_dtype")
    return cast_values(array, _float_type(source, place)) if source is not None else array


def _float_type(name: object, place: str) -> FloatType:
    if name not in FLOAT_TYPES:
        message = f"{place}: stored type {name!r} is none of {', '.join(CARRIERS)}"
        raise CorruptArchiveError(message)
    return name


def _decoded(
    trace: Trace, kind: str, name: str, entry: ObjectEntry, stored: NDArray[Any]
) -> TypedArray:
    file = trace.archive_file
    try:
        return decode(
            stored,
            entry.attrs,
            scale=lambda path: file.scale(path.removeprefix(f"/{layout.SCALES_GROUP}/")),
            exceptions=lambda: _exceptions(trace, kind, name),
            unrounded=file.unrounded,
        )
    except CorruptArchiveError as error:
        what = str(error).removeprefix(f"{file.path}: ")
        message = f"{trace.place}/{entry.path}: {what}"
        raise type(error)(message) from error


def _exceptions(trace: Trace, kind: str, name: str) -> NDArray[np.float64]:
    """Flat index and value of every exception of a layer."""
    path = f"{kind}/{layout.EXCEPTIONS_TABLE}"
    if path not in trace.objects:
        message = f"its exceptions are missing; expected the table {path}"
        raise CorruptArchiveError(message)
    table = trace.table(path, check=lambda: _check_table(trace, kind, path))
    layer = layout.parse_layer_name(name)
    found: NDArray[np.float64] = table[
        table[:, 0] == (layout.EMBEDDING_LAYER if layer is None else layer)
    ]
    return found[:, 1:]


def _check_table(trace: Trace, kind: str, path: str) -> None:
    """Rows are counted by the layers; a table may claim any number."""
    entry = trace.entry(path)
    count = num_exceptions(trace.all_attrs(f"{kind}/"))
    if entry.dtype != "float64" or entry.shape != (count, EXCEPTION_COLUMNS):
        message = (
            f"{path} is {entry.dtype or 'a group'} {entry.shape}, expected float64 "
            f"({count}, {EXCEPTION_COLUMNS}), as layers list {count} exceptions"
        )
        raise CorruptArchiveError(message)


def _steps(trace: Trace, kind: str, name: str, stored: NDArray[Any]) -> list[NDArray[Any]]:
    """Generation steps out of the flat dataset that holds them."""
    names = [layout.layer_name(layer) for layer in trace.stored_layers(kind)]
    table = trace.table(f"{kind}/{layout.STEPS_TABLE}")
    fits = table.ndim == _STEPS_TABLE_AXES and table.dtype.kind == "i" and name in names
    steps, start = [], 0
    try:
        shapes = table[names.index(name)].tolist() if fits and stored.ndim == _FLAT_AXES else []
        for shape in shapes:
            if min(shape, default=0) < 0:
                break
            stop = start + math.prod(shape) // max(1, stored.shape[0])
            steps.append(np.ascontiguousarray(stored[:, start:stop]).reshape(shape))
            start = stop
    except (ValueError, IndexError, OverflowError):
        shapes = []
    if not fits or len(steps) != len(shapes) or start != stored.shape[-1]:
        message = f"{trace.place}/{kind}/{name}: {stored.shape} does not fit its steps table"
        raise CorruptArchiveError(message)
    return steps
