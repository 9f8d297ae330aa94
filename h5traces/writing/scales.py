"""Writes the scales of hidden states, in archives and in files of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from h5traces.format import layout
from h5traces.format.attributes import Attrs, to_attributes
from h5traces.format.entries import ChunkTable, ObjectEntry
from h5traces.format.values import EncodedObject
from h5traces.precision.scales import ScaleSet
from h5traces.writing.preparation import prepare_element

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from h5traces.format.precision import CalibrationRecord
    from h5traces.storage.hdf5.writing import Hdf5Writer


def write_scales(
    hdf5: Hdf5Writer,
    arrays: Iterable[tuple[str, NDArray[np.float32]]],
    record: CalibrationRecord | None,
) -> list[ObjectEntry]:
    """The group ``/scales``.

    Parameters
    ----------
    hdf5
        Where to.
    arrays
        Paths below the root, and values ``(hidden,)``.
    record
        What they were made from.

    Returns
    -------
    list of ObjectEntry
        Groups and datasets with their paths below the root, in order of path.
    """
    attrs: Attrs = {} if record is None else to_attributes(record)
    entries = {layout.SCALES_GROUP: ObjectEntry(layout.SCALES_GROUP, attrs)}
    hdf5.create_group(f"/{layout.SCALES_GROUP}", attrs)
    for path, values in arrays:
        parent = path.rpartition("/")[0]
        while parent not in entries:
            hdf5.create_group(f"/{parent}", {})
            entries[parent] = ObjectEntry(parent)
            parent = parent.rpartition("/")[0]
        prepared = prepare_element(EncodedObject(path, {}, "float32", values))
        encoded = prepared.encoded
        offsets, sizes = hdf5.write_dataset(
            f"/{path}",
            dtype=prepared.dtype,
            shape=encoded.shape,
            chunk=encoded.chunk,
            codec=encoded.codec,
            chunks=encoded.chunks,
            attrs=prepared.attrs,
        )
        table = ChunkTable(tuple(offsets), tuple(sizes), encoded.checksums)
        entries[path] = ObjectEntry(
            path, prepared.attrs, "float32", encoded.shape, encoded.chunk, encoded.codec, table
        )
    return [entries[path] for path in sorted(entries)]


def scales_of(scales: ScaleSet, stored: Mapping[str, Collection[int]]) -> ScaleSet:
    """The scales of stored layers only.

    Parameters
    ----------
    scales
        Of these layers and others.
    stored
        Layer numbers by kind; the embedding of a kind goes along.
    """
    layers = {path: each for path, each in scales.layers.items() if _is_stored(path, stored)}
    return ScaleSet(layers, scales.record)


def _is_stored(path: str, stored: Mapping[str, Collection[int]]) -> bool:
    kind, _, name = path.partition("/")
    layer = layout.parse_layer_name(name)
    return kind in stored and (layer is None or layer in stored[kind])
