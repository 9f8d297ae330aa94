"""Records to datasets that are ready to be written: cast, digested and encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from h5traces import layout
from h5traces.dtypes import CastCounts, TypedArray, cast_for_storage
from h5traces.encodings import EncodedObject
from h5traces.errors import ConversionError
from h5traces.schema import LayerArray, StepArrays
from h5traces.storage.arrays import EncodedArray, encode_array
from h5traces.storage.codecs import DEFLATE, GZIP
from h5traces.storage.digests import dataset_digest
from h5traces.storage.objects import digest_type

if TYPE_CHECKING:
    from h5traces.schema.attributes import Attrs
    from h5traces.writer.options import WriteOptions


@dataclass(frozen=True, slots=True)
class Prepared:
    """A dataset that was cast, digested and encoded."""

    path: str
    dtype: str
    attrs: Attrs
    image: bool
    encoded: EncodedArray
    raw_nbytes: int
    counts: CastCounts


def prepare_layer(kind: str, entry: LayerArray, options: WriteOptions) -> Prepared:
    """One layer's array, cast, digested and encoded; called in threads.

    Raises
    ------
    ConversionError
        The array overflows and ``on_overflow`` is ``error``, or its steps do not go together.
    """
    path = f"{kind}/{entry.name}"
    try:
        source = (
            flatten_steps(entry.array)
            if isinstance(entry.array, StepArrays)
            else (entry.array.load())
        )
        cast = cast_for_storage(source, policy=options.dtype, on_overflow=options.on_overflow)
    except ConversionError as error:
        message = f"{path}: {error}"
        raise ConversionError(message) from error
    attrs: Attrs = {}
    if entry.site is not None:
        attrs["site"] = entry.site
    if cast.source_dtype is not None:
        attrs["source_dtype"] = cast.source_dtype
    if cast.cast_from is not None:
        attrs["cast_from"] = cast.cast_from
    if entry.container is not None:
        attrs["container"] = entry.container
    attrs.update(cast.counts.nonzero())
    values = cast.array.values
    return Prepared(
        path=path,
        dtype=cast.array.dtype,
        attrs={**attrs, "digest": dataset_digest(cast.array.dtype, values)},
        image=kind in layout.KINDS and layout.KINDS[kind].image,
        encoded=encode_array(values, options.codec),
        raw_nbytes=values.nbytes,
        counts=cast.counts,
    )


def prepare_element(element: EncodedObject) -> Prepared:
    """A small dataset; encoded by the thread that writes, since handing it over costs more."""
    values = element.values
    assert values is not None
    shuffles = values.dtype.kind in "iuf" and values.dtype.itemsize > 1
    return Prepared(
        path=element.path,
        dtype=element.dtype,
        attrs={**element.attrs, "digest": dataset_digest(digest_type(element.dtype), values)},
        image=False,
        encoded=encode_array(values, (GZIP if shuffles else DEFLATE).name),
        raw_nbytes=values.nbytes,
        counts=CastCounts(),
    )


def flatten_steps(steps: StepArrays) -> TypedArray:
    """Generation steps side by side: ``(beams, total)``, or ``(1, total)`` where beams differ."""
    arrays = steps.steps
    if not arrays:
        return TypedArray(np.empty((0, 0), dtype="<f2"), "float16")
    dtypes = {each.dtype for each in arrays}
    if len(dtypes) > 1:
        message = f"generation steps are of several types: {', '.join(sorted(dtypes))}"
        raise ConversionError(message)
    beams = {each.shape[0] if each.shape else 0 for each in arrays}
    rows = next(iter(beams)) if len(beams) == 1 and 0 not in beams else 1
    flat = np.concatenate([each.values.reshape(rows, -1) for each in arrays], axis=1)
    return TypedArray(flat, arrays[0].dtype)


def steps_table(kind: str, arrays: tuple[LayerArray, ...]) -> EncodedObject:
    """Shapes of all steps of all layers: int64 ``(positions, steps, axes)``."""
    shapes = [
        [step.shape for step in entry.array.steps]
        for entry in arrays
        if isinstance(entry.array, StepArrays)
    ]
    if any(layout.parse_layer_name(entry.name) is None for entry in arrays):
        message = f"{kind}: generation steps of something else than a layer have no place"
        raise ConversionError(message)
    if len(shapes) != len(arrays) or len({len(each) for each in shapes}) > 1:
        message = f"{kind}: layers have different numbers of generation steps"
        raise ConversionError(message)
    if len({len(shape) for each in shapes for shape in each}) > 1:
        message = f"{kind}: generation steps have different numbers of axes"
        raise ConversionError(message)
    num_axes = len(shapes[0][0]) if shapes[0] else 0
    table = np.array(shapes, dtype="<i8").reshape(len(shapes), len(shapes[0]), num_axes)
    return EncodedObject(f"{kind}/{layout.STEPS_TABLE}", {}, "int64", table)
