"""Arrays of a sample in the types of their source: encodings, casts and generation steps undone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.errors import CorruptArchiveError, UnsupportedEncodingError
from h5traces.format import layout
from h5traces.format.dtypes import CARRIERS, FLOAT_TYPES, FloatType, TypedArray, cast_values
from h5traces.precision.decoding import EXCEPTION_COLUMNS, decode, is_encoded, num_exceptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.archive.stored_sample import StoredSample
    from h5traces.format.document import Attrs

_STEPS_TABLE_AXES = 3
_FLAT_AXES = 2


def restored(
    sample: StoredSample, kind: str, name: str, dtype: str, attrs: Attrs
) -> TypedArray | list[TypedArray]:
    """An array by kind and dataset name, of this stored type; a list where it holds steps.

    CorruptArchiveError where it is damaged, UnsupportedEncodingError where it is not known.
    """
    path = f"{kind}/{name}"
    stored = sample.values(path)
    if "encoding" in attrs and _is_encoded(sample, path, attrs):
        return _decoded(sample, kind, name, dtype, attrs, stored)
    if f"{kind}/{layout.STEPS_TABLE}" in sample.objects:
        steps = _steps(sample, kind, name, stored)
        return [_cast_back(sample, step, dtype, attrs, path) for step in steps]
    return _cast_back(sample, stored, dtype, attrs, path)


def _is_encoded(sample: StoredSample, path: str, attrs: Attrs) -> bool:
    """Whether a dataset with the attribute ``encoding`` has to be decoded."""
    try:
        encoded = is_encoded(attrs)
    except UnsupportedEncodingError as error:
        message = f"{sample.place}/{path}: {error}"
        raise UnsupportedEncodingError(message) from error
    if sample.file.metadata.precision is None:
        message = (
            f"{sample.place}/{path}: is encoded as {attrs['encoding']}, but the archive does not "
            "say so (the root attribute 'precision' is missing); restore the file from a copy"
        )
        raise CorruptArchiveError(message)
    return encoded


def _cast_back(
    sample: StoredSample, stored: NDArray[Any], dtype: str, attrs: Attrs, path: str
) -> TypedArray:
    """Stored values in the type they are to be read in."""
    array = TypedArray(stored, _float_type(sample, path, dtype))
    source = attrs.get("source_dtype")
    return array if source is None else cast_values(array, _float_type(sample, path, source))


def _float_type(sample: StoredSample, path: str, name: object) -> FloatType:
    if name not in FLOAT_TYPES:
        message = f"{sample.place}/{path}: stored type {name!r} is not one of {', '.join(CARRIERS)}"
        raise CorruptArchiveError(message)
    return name


def _decoded(
    sample: StoredSample, kind: str, name: str, dtype: str, attrs: Attrs, stored: NDArray[Any]
) -> TypedArray:
    file = sample.file
    try:
        return decode(
            stored,
            attrs,
            scale=sample.scale,
            exceptions=lambda: _exceptions(sample, kind, name),
            unrounded=file.unrounded,
            stored_type=dtype,
        )
    except CorruptArchiveError as error:
        what = str(error).removeprefix(f"{file.path}: ")
        message = f"{sample.place}/{kind}/{name}: {what}"
        raise type(error)(message) from error


def _exceptions(sample: StoredSample, kind: str, name: str) -> NDArray[np.float64]:
    """Flat index and value of every exception of a layer."""
    path = f"{kind}/{layout.EXCEPTIONS_TABLE}"
    if path not in sample.objects:
        message = f"its exceptions are missing; expected the table {path}"
        raise CorruptArchiveError(message)
    table = sample.table(path, lambda: _sorted_table(sample, kind, path))
    layer = layout.parse_layer_name(name)
    wanted = layout.EMBEDDING_LAYER if layer is None else layer
    start, stop = (table[:, 0].searchsorted(wanted, side) for side in ("left", "right"))
    found: NDArray[np.float64] = table[start:stop, 1:]
    return found


def _sorted_table(sample: StoredSample, kind: str, path: str) -> NDArray[np.float64]:
    """The exceptions of all layers of a kind, in order of these."""
    _check_table(sample, kind, path)
    table = sample.values(path)
    return table[np.argsort(table[:, 0], kind="stable")]


def _check_table(sample: StoredSample, kind: str, path: str) -> None:
    """Rows are counted by the layers; a table may claim any number."""
    entry = sample.entry(path)
    layers = (each for each in sample.objects if each.startswith(f"{kind}/"))
    count = num_exceptions(sample.file.attrs(sample.sample, each) for each in layers)
    if entry.dtype != "float64" or entry.shape != (count, EXCEPTION_COLUMNS):
        message = (
            f"{path} is {entry.dtype or 'a group'} {entry.shape}, expected float64 "
            f"({count}, {EXCEPTION_COLUMNS}), as layers list {count} exceptions"
        )
        raise CorruptArchiveError(message)


def _steps(sample: StoredSample, kind: str, name: str, stored: NDArray[Any]) -> list[NDArray[Any]]:
    """Generation steps out of the flat dataset that holds them."""
    names = sample.names_with_steps(kind)
    table = sample.table(f"{kind}/{layout.STEPS_TABLE}")
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
        message = f"{sample.place}/{kind}/{name}: {stored.shape} does not fit its steps table"
        raise CorruptArchiveError(message)
    return steps
