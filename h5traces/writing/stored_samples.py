"""Stored samples as input of a writer: as records, or as chunks that are copied as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from h5traces.errors import CorruptArchiveError, RemoteError
from h5traces.format import layout, text
from h5traces.format.digests import chunk_checksum
from h5traces.format.document import to_attributes
from h5traces.format.dtypes import NO_COUNTS, CastCounts
from h5traces.format.entries import located
from h5traces.format.kinds import QUERIES
from h5traces.format.record import (
    Container,
    EarlierCast,
    LayerArray,
    LayeredArrays,
    SourceForm,
    StepArrays,
    TokensContainer,
    TraceRecord,
)
from h5traces.format.values import EncodedObject, decode_element
from h5traces.storage.arrays import EncodedArray, encode_array, read_chunk
from h5traces.storage.codecs import GZIP
from h5traces.writing.pictures import white_of_stored
from h5traces.writing.preparation import Observation, Prepared, codec_for, prepare_element

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from h5traces.archive.stored_trace import StoredTrace
    from h5traces.archive.trace import Trace
    from h5traces.format.document import Attrs
    from h5traces.format.dtypes import FloatType, TypedArray
    from h5traces.format.entries import ObjectEntry
    from h5traces.format.record import SourcePosition, TraceMetadata


def _is_table(trace: StoredTrace, entry: ObjectEntry, name: str) -> bool:
    kind, _, last = entry.path.partition("/")
    return kind in trace.kinds and last == name


def _paths(trace: StoredTrace) -> Iterator[str]:
    """All that is stored but layers that are not selected, and a label that was replaced."""
    # A label that is not a plain number is a field, or a group of them.
    label = f"{layout.EXTRA_GROUP}/{layout.LABEL}/"
    kinds, selected, has_new_label = trace.kinds, trace.selected, trace.has_new_label
    for path in trace.objects:
        if has_new_label and f"{path}/".startswith(label):
            continue
        kind, _, name = path.partition("/")
        is_layer = selected is not None and kind in kinds
        layer = layout.parse_layer_name(name) if is_layer else None
        if selected is None or layer is None or layer in selected:
            yield path


def _entries(trace: StoredTrace) -> Iterator[ObjectEntry]:
    return map(trace.entry, _paths(trace))


class StoredSample:
    """A stored trace that is copied whole, or from ``archive.select(layers=…)`` those layers.

    With a codec, layers are compressed again; else their chunks are copied. `first_source` is as in
    `to_record`.
    """

    def __init__(self, trace: Trace, *, codec: str | None = None, first_source: int = 0) -> None:
        self._trace, self._codec, self._first_source = trace._stored, codec, first_source

    @property
    def metadata(self) -> TraceMetadata:
        """The trace's metadata with all its fields."""
        metadata = self._trace.metadata
        source = _source(metadata, self._first_source)
        return metadata.model_copy(
            update={"fields": self._trace.fields, "digest": None, "source": source}
        )

    @property
    def texts(self) -> dict[str, str]:
        """Its question and answers by field."""
        return _texts(self._trace)

    def observation(self) -> Observation:
        """Layers and sizes of what is copied."""
        found, trace = Observation(), self._trace
        archive, kinds = trace.file.metadata, trace.kinds
        for path in _paths(trace):
            kind, _, name = path.partition("/")
            if kind not in kinds:
                continue
            if kind not in found.layers:
                found.layers[kind] = set()
                found.reductions[kind] = {trace.file.reduction(kind)}
                if kind not in layout.KINDS:
                    found.axes[kind] = trace.axes(kind)
                    found.definitions[kind] = trace.definition(kind)
            if name and name not in layout.TABLES:
                in_steps = f"{kind}/{layout.STEPS_TABLE}" in trace.objects
                found.add_array(kind, name, () if in_steps else trace.entry(path).shape)
        # Joined generation steps do not show their sizes.
        if not found.hidden_sizes and archive.hidden_size is not None:
            found.hidden_sizes.add(archive.hidden_size)
        if not found.head_counts and archive.num_heads is not None:
            found.head_counts.add(archive.num_heads)
        return found

    def objects(self) -> Iterator[EncodedObject | Prepared]:
        """Groups and datasets, parents first."""
        selected = self._trace.selected
        for entry in _entries(self._trace):
            if entry.is_group:
                attrs = dict(entry.attrs)
                if selected is not None and entry.path in self._trace.kinds:
                    form = SourceForm.model_fields
                    attrs = {key: each for key, each in attrs.items() if key not in form}
                    attrs |= to_attributes(self._trace.form(entry.path))
                yield EncodedObject(entry.path, attrs)
            elif selected is not None and _is_table(self._trace, entry, layout.STEPS_TABLE):
                yield self._selected_steps(entry, selected)
            elif selected is not None and _is_table(self._trace, entry, layout.EXCEPTIONS_TABLE):
                yield from self._selected_exceptions(entry, selected)
            else:
                yield self._copied(entry)

    def _selected_steps(self, entry: ObjectEntry, selected: Collection[int]) -> Prepared:
        """The table of generation steps, of the embedding and the selected layers only."""
        kind = entry.path.partition("/")[0]
        rows = [
            row
            for row, name in enumerate(self._trace.names_with_steps(kind))
            if name == layout.EMBEDDING or layout.parse_layer_name(name) in selected
        ]
        table = self._trace.values(entry.path)[rows]
        return prepare_element(EncodedObject(entry.path, {}, entry.dtype, table))

    def _selected_exceptions(
        self, entry: ObjectEntry, selected: Collection[int]
    ) -> Iterator[Prepared]:
        """The table of exceptions, selected layers only."""
        table = self._trace.values(entry.path)
        kept = np.isin(table[:, 0], [layout.EMBEDDING_LAYER, *selected])
        if kept.any():
            yield prepare_element(EncodedObject(entry.path, {}, entry.dtype, table[kept]))

    def _copied(self, entry: ObjectEntry) -> Prepared:
        kind, _, name = entry.path.partition("/")
        is_layer = kind in self._trace.kinds and name not in layout.TABLES
        encoded = self._encoded(entry, self._codec if is_layer else None)
        return Prepared(
            path=entry.path,
            dtype=entry.dtype,
            attrs=entry.attrs,
            encoded=encoded,
            raw_nbytes=entry.raw_nbytes,
            counts=NO_COUNTS,
            white=white_of_stored(entry.path, entry.dtype, encoded),
        )

    def _encoded(self, entry: ObjectEntry, codec: str | None) -> EncodedArray:
        """The stored chunks, checked; compressed again if their filters are not a known codec."""
        if codec is not None or entry.codec is None or entry.chunks is None:
            values = self._trace.values(entry.path)
            return encode_array(values, codec_for(values, codec or GZIP.name))
        file = self._trace.file.store.file
        try:
            chunks = tuple(
                read_chunk(file, entry, number) for number in range(len(entry.chunks.offsets))
            )
        except (CorruptArchiveError, RemoteError) as error:
            raise located(error, file.name, self._trace.sample.ordinal, entry.path) from error
        checksums = entry.chunks.checksums or tuple(chunk_checksum(each) for each in chunks)
        return EncodedArray(entry.shape, entry.chunk, entry.codec, chunks, checksums)


def _texts(stored: StoredTrace) -> dict[str, str]:
    return {name: stored.text(name) for name in layout.TEXT_FIELDS if name in stored.objects}


def to_record(trace: Trace, *, first_source: int = 0, lazy: bool = False) -> TraceRecord:
    """A stored trace, or its selected layers, as a record in the types of the source.

    `first_source` is the index in the new archive's ``sources`` of the first source of this one;
    `lazy` arrays are read when they are loaded.
    """
    stored = trace._stored
    with stored.read_ahead(() if lazy else stored.needed()):
        return _record(stored, first_source, lazy=lazy)


def _record(stored: StoredTrace, first_source: int, *, lazy: bool) -> TraceRecord:
    extra: dict[str, Any] = {}
    prefix = f"{layout.EXTRA_GROUP}/"
    for path in stored.objects:
        name = path.removeprefix(prefix)
        is_old = name == layout.LABEL and stored.has_new_label
        if path.startswith(prefix) and "/" not in name and not is_old:
            extra[layout.unescape_key(text.unescape(name))] = decode_element(stored, path)
    metadata = stored.metadata
    tokens = stored.tokens() if layout.TOKENS in stored.objects else None
    container = (
        stored.file.attrs(stored.sample, layout.TOKENS).get("container")
        if tokens is not None
        else None
    )
    return TraceRecord(
        sample_id=metadata.sample_id,
        generation_index=metadata.generation_index,
        prompt_len=metadata.prompt_len,
        label=metadata.label,
        scores=metadata.scores,
        source=_source(metadata, first_source),
        extraction=metadata.extraction,
        exact_digest=metadata.exact_digest or metadata.digest,
        fields=stored.fields,
        tokens=tokens,
        tokens_container=container if container in get_args(TokensContainer) else None,
        tokens_decoded=(
            tuple(stored.texts(layout.TOKENS_DECODED))
            if layout.TOKENS_DECODED in stored.objects
            else None
        ),
        attention_mask=stored.attention_mask(),
        texts=_texts(stored),
        layered={
            kind: LayeredArrays(
                tuple(_layer_array(stored, kind, name, lazy=lazy) for name in names),
                stored.form(kind),
                stored.file.reduction(kind),
                None if kind in layout.KINDS else stored.axes(kind),
                None if kind in layout.KINDS else stored.definition(kind),
            )
            for kind, names in _layer_names(stored).items()
        },
        extra=extra,
    )


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One layer's array of a stored trace, read when it is loaded."""

    trace: StoredTrace
    kind: str
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.trace.entry(f"{self.kind}/{self.name}").shape

    @property
    def dtype(self) -> FloatType:
        """Type of the array; it must be loaded for that."""
        return self.load().dtype

    def load(self) -> TypedArray:
        """The array in its source's type."""
        found = self.trace.typed_layer(self.kind, self.name)
        assert not isinstance(found, list)
        return found


def _source(metadata: TraceMetadata, first_source: int) -> SourcePosition | None:
    found = metadata.source
    return found and found.model_copy(update={"file": first_source + found.file})


def _layer_names(trace: StoredTrace) -> dict[str, list[str]]:
    """The datasets of every layered kind, in order of layer; none for a kind without arrays."""
    found: dict[str, list[str]] = {}
    kinds = trace.kinds
    for path in _paths(trace):
        kind, _, name = path.partition("/")
        if kind not in kinds or name in layout.TABLES:
            continue
        layers = found.setdefault(kind, [])
        if name:
            layers.append(name)
    return found


def _layer_array(trace: StoredTrace, kind: str, name: str, *, lazy: bool = False) -> LayerArray:
    attrs = trace.file.attrs(trace.sample, f"{kind}/{name}")
    in_steps = f"{kind}/{layout.STEPS_TABLE}" in trace.objects
    is_lazy = lazy and not in_steps
    value = StoredLayer(trace, kind, name) if is_lazy else trace.typed_layer(kind, name)
    sequence: Literal["list", "tuple"] = "list"
    if attrs.get("sequence") == "tuple":
        sequence = "tuple"
    array = StepArrays(tuple(value), sequence) if isinstance(value, list) else value
    site = attrs.get("site")
    return LayerArray(
        name=name,
        array=array,
        site=None if site is None else str(site),
        container=_container(attrs.get("container")),
        earlier=_earlier_cast(attrs),
        rule=trace.rule(name) if kind == QUERIES else None,
    )


def _container(held: Any) -> Container | None:
    return held if held in get_args(Container) else None


def _earlier_cast(attrs: Attrs) -> EarlierCast | None:
    """The earlier cast of a stored array; values that are not finite are counted again."""
    source: Any = attrs.get("cast_from")
    if source is None:
        return None
    names = ("num_overflow", "num_to_zero", "num_to_subnormal")
    counts = CastCounts(**{name: int(attrs.get(name, 0)) for name in names})  # type: ignore[arg-type]
    num_changed: Any = attrs.get("num_changed")
    return EarlierCast(source, counts, num_changed)
