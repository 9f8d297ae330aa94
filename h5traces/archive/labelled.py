"""Traces and archives as data sets of xarray: named axes, coordinates of tokens, read lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from h5traces.errors import OptionError
from h5traces.format import layout
from h5traces.format.dtypes import read_type
from h5traces.format.text import as_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from h5traces.archive.rows import Row
    from h5traces.format.document import Attrs

_LAYER: Final = "layer"
_SAMPLE: Final = "sample"
# Axes along a sequence: token texts name their positions.
_SEQUENCE_AXES: Final = ("token", "query", "key")


def trace_dataset(trace: Row, kinds: str | Iterable[str] | None) -> xr.Dataset:
    """See `Trace.to_xarray`."""
    names = _kinds_of(trace, kinds)
    layers = _layers_of([trace], names)
    variables = {
        kind: _variable((_LAYER, *trace._stored.axes(kind)), _Layers(trace, kind, layers))
        for kind in names
    }
    sizes = {name: size for each in variables.values() for name, size in each.sizes.items()}
    metadata = trace.metadata.model_dump(mode="json", exclude_none=True)
    plain = {key: value for key, value in metadata.items() if isinstance(value, (str, int, float))}
    return xr.Dataset(variables, {_LAYER: layers, **_token_coordinates(trace, sizes)}, plain)


def archive_dataset(archive: Iterable[Row], kinds: str | Iterable[str] | None) -> xr.Dataset:
    """See `Archive.to_xarray`."""
    traces = list(archive)
    if not traces:
        return xr.Dataset()
    names = _kinds_of(traces[0], kinds)
    layers = _layers_of(traces, names)
    variables = {
        kind: _variable(
            (_SAMPLE, _LAYER, *traces[0]._stored.axes(kind)),
            _Padded([_Layers(trace, kind, layers) for trace in traces]),
        )
        for kind in names
    }
    return xr.Dataset(variables, {_LAYER: layers, **_sample_coordinates(traces)})


class _Layers(BackendArray):
    """One kind of one trace as one array, read when it is asked for.

    Layers that the trace does not have of the kind are NaN.
    """

    def __init__(self, trace: Row, kind: str, layers: Sequence[int]) -> None:
        stored, place = trace._stored, f"{trace._stored.place}/{kind}"
        if f"{kind}/{layout.STEPS_TABLE}" in stored.objects:
            message = f"{place}: holds generation steps, which do not fit one array; select others"
            raise OptionError(message)
        self._sequence = trace._value(kind, "numpy") if kind in stored.objects else None
        numbers = _numbers(self._sequence)
        self._positions = [numbers.index(each) if each in numbers else None for each in layers]
        names = () if self._sequence is None else self._sequence._stored_names
        entries = [stored.entry(f"{kind}/{name}") for name in names]
        shapes = sorted({tuple(each.shape) for each in entries})
        if len(shapes) > 1:
            message = f"{place}: layers have the shapes {shapes}, expected one"
            raise OptionError(message)
        inner = shapes[0] if shapes else (0,) * len(stored.axes(kind))
        self.shape = (len(layers), *inner)
        self.dtype = _type_of(entries[0].attrs, entries[0].dtype) if entries else np.dtype("f4")

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return _by_axis(key, self.shape, self._outer)

    def _outer(self, key: tuple[Any, ...]) -> NDArray[Any]:
        return _stacked(
            lambda number, rest: _orthogonal(self.layer(number), rest), key, self.shape, self.dtype
        )

    def layer(self, number: int) -> NDArray[Any]:
        """The array at a position of the axis of layers."""
        position = self._positions[number]
        if self._sequence is None or position is None:
            return np.full(self.shape[1:], np.nan, self.dtype)
        value: NDArray[Any] | None = self._sequence[position]
        return np.full(self.shape[1:], np.nan, self.dtype) if value is None else value


class _Padded(BackendArray):
    """The arrays of many traces, padded with NaN at the end of every axis to the longest."""

    def __init__(self, arrays: Sequence[_Layers]) -> None:
        self._arrays = arrays
        sizes = zip(*(each.shape for each in arrays), strict=True)
        self.shape = (len(arrays), *map(max, sizes))
        self.dtype = np.result_type(*(each.dtype for each in arrays))

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return _by_axis(key, self.shape, self._outer)

    def _outer(self, key: tuple[Any, ...]) -> NDArray[Any]:
        return _stacked(self._sample, key, self.shape, self.dtype)

    def _sample(self, sample: int, key: tuple[Any, ...]) -> NDArray[Any]:
        def layer(number: int, rest: tuple[Any, ...]) -> NDArray[Any]:
            value = self._arrays[sample].layer(number)
            padded = np.full(self.shape[2:], np.nan, self.dtype)
            padded[tuple(map(slice, value.shape))] = value
            return _orthogonal(padded, rest)

        return _stacked(layer, key, self.shape[1:], self.dtype)


def _by_axis(
    key: indexing.ExplicitIndexer,
    shape: tuple[int, ...],
    outer: Callable[[tuple[Any, ...]], NDArray[Any]],
) -> Any:
    return indexing.explicit_indexing_adapter(key, shape, indexing.IndexingSupport.OUTER, outer)


def _stacked(
    read: Callable[[int, tuple[Any, ...]], NDArray[Any]],
    key: tuple[Any, ...],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> NDArray[Any]:
    """What `read` gives for the chosen numbers of the first axis and the keys of the others."""
    chosen = np.arange(shape[0])[key[0]]
    if chosen.ndim == 0:
        return read(int(chosen), key[1:])
    if len(chosen):
        return np.stack([read(int(each), key[1:]) for each in chosen])
    nothing = np.broadcast_to(np.empty((), dtype), shape[1:])
    return np.empty((0, *_orthogonal(nothing, key[1:]).shape), dtype)


def _orthogonal(array: NDArray[Any], key: tuple[Any, ...]) -> NDArray[Any]:
    """Each axis indexed by itself; numbers take their axis away."""
    axis = 0
    for each in key:
        array = array[(slice(None),) * axis + (each,)]
        axis += np.ndim(each) != 0 or isinstance(each, slice)
    return array


def _variable(names: tuple[str, ...], array: BackendArray) -> xr.Variable:
    return xr.Variable(names, indexing.LazilyIndexedArray(array))


def _type_of(attrs: Attrs, stored: str) -> np.dtype[Any]:
    """Type of the values as they are read in numpy, where bfloat16 comes as float32."""
    name = read_type(attrs, stored)
    return np.dtype("float32" if name == "bfloat16" else name)


def _kinds_of(trace: Row, kinds: str | Iterable[str] | None) -> tuple[str, ...]:
    stored = trace._stored
    if kinds is None:
        return tuple(each for each in stored.default_kinds if each in stored.kinds)
    names = as_names(kinds)
    for kind in names:
        stored.check_kind(kind)
    return names


def _numbers(sequence: Any) -> list[int]:
    """Numbers of the layers, or positions; -1 for the embedding."""
    layers = () if sequence is None else sequence.layers
    return [layout.EMBEDDING_LAYER if each is None else each for each in layers]


def _layers_of(traces: Iterable[Row], kinds: Iterable[str]) -> list[int]:
    """All layers that any of the kinds has, ascending."""
    return sorted(
        {
            number
            for trace in traces
            for kind in kinds
            if kind in trace._stored.objects
            for number in _numbers(trace._value(kind, "numpy"))
        }
    )


def _token_coordinates(trace: Row, sizes: Mapping[Any, int]) -> dict[str, Any]:
    coordinates: dict[str, Any] = {}
    for axis in _SEQUENCE_AXES:
        if axis not in sizes:
            continue
        length, whole = sizes[axis], slice(None, sizes[axis])
        if (texts := trace.get(layout.TOKENS_DECODED)) is not None and len(texts) >= length:
            coordinates[f"{axis}_text"] = (axis, np.array(texts[whole], dtype=object))
        if axis == "token":
            ids = trace._value(layout.TOKENS, "numpy") if layout.TOKENS in trace else None
            if ids is not None and len(ids) >= length:
                coordinates["token_id"] = (axis, np.asarray(ids)[whole])
            prompt_len = trace.metadata.prompt_len
            if prompt_len is not None and trace.metadata.coverage == "full":
                coordinates["is_prompt"] = (axis, np.arange(length) < prompt_len)
    return coordinates


def _sample_coordinates(traces: Sequence[Row]) -> dict[str, Any]:
    metadata = [trace.metadata for trace in traces]
    labels = [each.label for each in metadata]
    coordinates = {
        "sample_id": (_SAMPLE, np.array([each.sample_id for each in metadata], dtype=object)),
        "seq_len": (_SAMPLE, np.array([each.seq_len for each in metadata])),
    }
    if any(each is not None for each in labels):
        known = [np.nan if each is None else each for each in labels]
        coordinates["label"] = (_SAMPLE, np.array(known, dtype="f8"))
    return coordinates
