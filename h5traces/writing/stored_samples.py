"""Stored samples as input of a writer: chunks are copied without recompression."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from h5traces.format import layout
from h5traces.format.digests import chunk_checksum
from h5traces.format.dtypes import CastCounts
from h5traces.format.values import EncodedObject
from h5traces.storage.arrays import EncodedArray, encode_array, read_chunk
from h5traces.storage.codecs import DEFLATE, GZIP
from h5traces.writing.preparation import Observation, Prepared, codec_for, prepare_element

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h5traces.archive.trace import Trace
    from h5traces.format.entries import ObjectEntry
    from h5traces.format.trace import TraceMetadata


def _is_table(entry: ObjectEntry, name: str) -> bool:
    kind, _, last = entry.path.partition("/")
    return kind in layout.KINDS and last == name


def is_label(path: str) -> bool:
    """Whether a path is of a label that is not a plain number, or below it."""
    return f"{path}/".startswith(f"{layout.EXTRA_GROUP}/{layout.LABEL}/")


class StoredSample:
    """A stored trace that is copied whole or with selected layers only.

    Parameters
    ----------
    trace
        The trace; from ``archive.select(layers=…)``, only the selected layers are copied.
    codec
        Codec to compress layers with again; None to copy their chunks.
    """

    def __init__(self, trace: Trace, *, codec: str | None = None) -> None:
        self._trace, self._codec = trace._stored, codec

    @property
    def metadata(self) -> TraceMetadata:
        """The trace's metadata with all its fields."""
        return self._trace.metadata.model_copy(
            update={"fields": self._trace.fields, "digest": None}
        )

    def observation(self) -> Observation:
        """Layers and sizes of what is copied."""
        found, archive = Observation(), self._trace.file.metadata
        for entry in self._entries():
            kind, _, name = entry.path.partition("/")
            if kind not in layout.KINDS:
                continue
            found.layers.setdefault(kind, set())
            found.reductions[kind] = {self._trace.file.reduction(kind)}
            if not name or name in layout.TABLES:
                continue
            in_steps = f"{kind}/{layout.STEPS_TABLE}" in self._trace.objects
            found.add_array(kind, name, () if in_steps else entry.shape)
        # Joined generation steps do not show their sizes.
        if not found.hidden_sizes and archive.hidden_size is not None:
            found.hidden_sizes.add(archive.hidden_size)
        if not found.head_counts and archive.num_heads is not None:
            found.head_counts.add(archive.num_heads)
        return found

    def objects(self) -> Iterator[EncodedObject | Prepared]:
        """Groups and datasets, parents first."""
        for entry in self._entries():
            if entry.is_group:
                yield EncodedObject(entry.path, entry.attrs)
            elif self._trace.selected is not None and _is_table(entry, layout.STEPS_TABLE):
                yield self._selected_steps(entry)
            elif self._trace.selected is not None and _is_table(entry, layout.EXCEPTIONS_TABLE):
                yield from self._selected_exceptions(entry)
            else:
                yield self._copied(entry)

    def _entries(self) -> Iterator[ObjectEntry]:
        selected = self._trace.selected
        for path in self._trace.objects:
            if self._trace.has_new_label and is_label(path):
                continue
            kind, _, name = path.partition("/")
            layer = layout.parse_layer_name(name) if kind in layout.KINDS else None
            if selected is None or layer is None or layer in selected:
                yield self._trace.entry(path)

    def _selected_steps(self, entry: ObjectEntry) -> Prepared:
        """The table of generation steps, selected layers only."""
        kind = entry.path.partition("/")[0]
        rows = [
            row
            for row, layer in enumerate(self._trace.stored_layers(kind))
            if self._trace.selected is None or layer in self._trace.selected
        ]
        table = self._trace.values(entry.path)[rows]
        return prepare_element(EncodedObject(entry.path, {}, entry.dtype, table))

    def _selected_exceptions(self, entry: ObjectEntry) -> Iterator[Prepared]:
        """The table of exceptions, selected layers only."""
        table = self._trace.values(entry.path)
        kept = np.isin(table[:, 0], [layout.EMBEDDING_LAYER, *(self._trace.selected or ())])
        if kept.any():
            yield prepare_element(EncodedObject(entry.path, {}, entry.dtype, table[kept]))

    def _copied(self, entry: ObjectEntry) -> Prepared:
        kind, _, name = entry.path.partition("/")
        is_layer = kind in layout.KINDS and name not in layout.TABLES
        codec = self._codec if is_layer else None
        return Prepared(
            path=entry.path,
            dtype=entry.dtype,
            attrs=entry.attrs,
            image=is_layer and layout.KINDS[kind].image,
            encoded=self._encoded(entry) if codec is None else self._compressed(entry, codec),
            raw_nbytes=entry.raw_nbytes,
            counts=CastCounts(),
        )

    def _compressed(self, entry: ObjectEntry, codec: str) -> EncodedArray:
        """The stored values, compressed with another codec."""
        values = self._trace.values(entry.path)
        return encode_array(values, codec_for(values, codec))

    def _encoded(self, entry: ObjectEntry) -> EncodedArray:
        """The stored chunks, checked; compressed again only if their filters are no known codec."""
        if entry.codec is None or entry.chunks is None:
            values = self._trace.values(entry.path)
            shuffles = values.dtype.kind in "iuf" and values.dtype.itemsize > 1
            return encode_array(values, (GZIP if shuffles else DEFLATE).name)
        file = self._trace.byte_file
        chunks = tuple(
            read_chunk(file, entry, number) for number in range(len(entry.chunks.offsets))
        )
        checksums = entry.chunks.checksums or tuple(chunk_checksum(each) for each in chunks)
        return EncodedArray(entry.shape, entry.chunk, entry.codec, chunks, checksums)
