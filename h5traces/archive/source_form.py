"""The arrays of a kind in the container that held them in the legacy dict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.archive.tensors import fresh_array
from h5traces.errors import ConversionError, CorruptArchiveError
from h5traces.format.dtypes import TypedArray
from h5traces.meaning.axes import LAYER, STEPS_FIRST, view

if TYPE_CHECKING:
    from h5traces.archive.stored_trace import StoredTrace
    from h5traces.archive.tensors import Container
    from h5traces.format.record import SourceForm


def in_source_form(trace: StoredTrace, kind: str, names: list[str], container: Container) -> Any:
    """The named arrays of a kind as the source had them: their sequence, keys and axes."""
    form = trace.form(kind)
    try:
        if form.sequence == "array":
            return _stacked(trace, kind, form, names, container)
        values = [_item(trace, kind, form, name, container) for name in names]
    except (ConversionError, ValueError) as error:
        message = f"{trace.place}/{kind}: does not fit its attribute 'source_axes': {error}"
        raise CorruptArchiveError(message) from error
    present = [each for each in values if each is not None]
    if form.source_axes == STEPS_FIRST and present:
        # The inner sequence is that of the steps, also with the layers inside.
        absent = [None] * len(present[0])
        layers = [absent if each is None else each for each in values]
        values = [type(present[0])(each) for each in zip(*layers, strict=True)]
    if form.keys is not None:
        by_name = dict(zip(names, values, strict=True))
        return {key: by_name[name] for key, name in form.keys if name in by_name}
    return tuple(values) if form.sequence == "tuple" else values


def _item(trace: StoredTrace, kind: str, form: SourceForm, name: str, container: Container) -> Any:
    if name in (form.absent or ()):
        return None
    if form.source_axes in (None, STEPS_FIRST):
        return trace.read_layer(kind, name, container)
    array = _one_array(trace, kind, name)
    values = view(array.values, trace.axes(kind), form.source_axes or (), name)
    return fresh_array(TypedArray(values, array.dtype), container, _held(trace, kind, name))


def _stacked(
    trace: StoredTrace, kind: str, form: SourceForm, names: list[str], container: Container
) -> Any:
    arrays = [_one_array(trace, kind, name) for name in names]
    same = len({each.dtype for each in arrays}) == 1
    values = np.stack([each.values if same else each.to_numpy() for each in arrays])
    axes = (LAYER, *trace.axes(kind))
    values = np.ascontiguousarray(view(values, axes, form.source_axes or axes, "its arrays"))
    typed = TypedArray(values, arrays[0].dtype) if same else TypedArray.of(values)
    return fresh_array(typed, container, _held(trace, kind, names[0]))


def _held(trace: StoredTrace, kind: str, name: str) -> object:
    """What held an array in the source: ``torch``, or None for numpy."""
    return trace.attrs(f"{kind}/{name}").get("container")


def _one_array(trace: StoredTrace, kind: str, name: str) -> TypedArray:
    found = trace.typed_layer(kind, name)
    if isinstance(found, list):
        message = f"{trace.place}/{kind}/{name}: holds generation steps, which are not one array"
        raise CorruptArchiveError(message)
    return found
