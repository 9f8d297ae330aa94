"""Turns records into datasets that are ready to be written: cast, digested and encoded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from h5traces.errors import ConversionError, CorruptArchiveError, PrecisionError, SchemaError
from h5traces.format import layout, text
from h5traces.format.digests import dataset_digest
from h5traces.format.document import to_attributes
from h5traces.format.dtypes import (
    NO_COUNTS,
    CastCounts,
    CastResult,
    TypedArray,
    cast_for_storage,
    cast_values,
)
from h5traces.format.entries import digest_type
from h5traces.format.record import LayerArray, StepArrays
from h5traces.format.values import EncodedObject, encode_element
from h5traces.precision.encoding import Encoder
from h5traces.storage.arrays import EncodedArray, Storing, store_arrays
from h5traces.storage.codecs import DEFLATE, GZIP
from h5traces.writing.pictures import Picture, whites_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from concurrent.futures import Executor

    from numpy.typing import NDArray

    from h5traces.format.document import Attrs
    from h5traces.format.record import TraceRecord
    from h5traces.precision.encoding import EncodedLayer
    from h5traces.storage.arrays import Stored
    from h5traces.writing.options import WriteOptions


class Prepared(NamedTuple):
    """A dataset that was cast, digested and encoded.

    ``raw_nbytes`` counts the array after the cast. ``exceptions`` go into that table, float64
    ``(n, 2)``; ``kept_exact`` says why a layer is stored more precisely than the tier asks;
    ``white`` is the value that viewers show white.
    """

    path: str
    dtype: str
    attrs: Attrs
    encoded: EncodedArray
    raw_nbytes: int
    counts: CastCounts
    exceptions: NDArray[np.float64] | None = None
    kept_exact: str | None = None
    white: float | None = None


def prepare_layers(
    kind: str,
    entries: Sequence[LayerArray],
    options: WriteOptions,
    encoder: Encoder,
    definition: str | None = None,
    *,
    looks_back: bool = False,
) -> list[Prepared]:
    """Cast, digest and encode the arrays of some layers of a kind; called in threads."""
    layers = _stored_layers(
        kind, entries, options, encoder, definition, options.codec, looks_back=looks_back
    )
    found = [
        Prepared(
            path=f"{kind}/{entry.name}",
            dtype=layer.dtype,
            attrs=attrs,
            encoded=encoded,
            raw_nbytes=layer.source_nbytes,
            counts=counts,
            exceptions=layer.exceptions,
            kept_exact=layer.kept_exact,
        )
        for entry, (layer, counts, attrs, encoded) in zip(entries, layers, strict=True)
        if encoded is not None
    ]
    if kind not in layout.KINDS or not layout.KINDS[kind].image:
        return found
    whites = whites_of(
        [
            Picture(each.path, each.dtype, layer.values, each.encoded.chunk)
            for each, (layer, *_) in zip(found, layers, strict=True)
        ]
    )
    return [each._replace(white=white) for each, white in zip(found, whites, strict=True)]


def codec_for(values: NDArray[Any], codec: str) -> str:
    """The codec, gzip without its shuffle for text and single bytes."""
    shuffles = values.dtype.kind in "iuf" and values.dtype.itemsize > 1
    return DEFLATE.name if codec == GZIP.name and not shuffles else codec


def _stored_layers(
    kind: str,
    entries: Sequence[LayerArray],
    options: WriteOptions,
    encoder: Encoder,
    definition: str | None = None,
    codec: str | None = None,
    *,
    looks_back: bool = False,
) -> list[tuple[EncodedLayer, CastCounts, Attrs, EncodedArray | None]]:
    """Some arrays as they will be stored, and their attributes with the digest.

    They are encoded where there is a `codec`.
    """
    casts = [_cast(kind, entry, options, encoder) for entry in entries]
    layers = [
        _encoded(kind, entry, cast, encoder, definition)
        for entry, (cast, _) in zip(entries, casts, strict=True)
    ]
    stored = store_arrays(
        [
            Storing(layer.values, layer.dtype, codec and codec_for(layer.values, codec), counted)
            for layer, (_, counted) in zip(layers, casts, strict=True)
        ],
        looks_back=looks_back,
    )
    found = []
    for entry, layer, (cast, _), each in zip(entries, layers, casts, stored, strict=True):
        check_comes_back(f"{kind}/{entry.name}", each)
        counts = cast.counts
        if each.num_nan or each.num_inf:
            counts += CastCounts(each.num_nan, each.num_inf)
        attrs = _layer_attributes(entry, cast, counts, layer)
        attrs["digest"] = each.digest
        found.append((layer, counts, attrs, each.encoded))
    return found


def check_comes_back(path: str, stored: Stored) -> None:
    """CorruptArchiveError if the stored bytes of a dataset were found to decode to other values."""
    if stored.comes_back is False:
        message = (
            f"{path} was encoded to bytes that decode to other values, or has a wrong digest: the "
            "memory or the encoder is at fault; run again, next with H5TRACES_KERNELS=0"
        )
        raise CorruptArchiveError(message)


def _cast(
    kind: str, entry: LayerArray, options: WriteOptions, encoder: Encoder
) -> tuple[CastResult, TypedArray | None]:
    """An array in its stored type, and itself where what is not finite is still to be counted."""
    array, policy = entry.array, options.dtype
    counted = None
    try:
        source = _flatten_steps(array) if isinstance(array, StepArrays) else array.load()
        if kind not in layout.KINDS:
            # Kept unchanged: the options are about the kinds that the format names.
            policy = "auto"
        elif encoder.takes_source(kind) and source.dtype in ("float16", "float32"):
            policy = source.dtype
        if source.dtype == policy or (source.dtype, policy) == ("float16", "auto"):
            counted = cast_values(source, source.dtype)
            cast = CastResult(counted, None, None, NO_COUNTS)
        else:
            cast = cast_for_storage(source, policy=policy, on_overflow=options.on_overflow)
    except ConversionError as error:
        message = f"{kind}/{entry.name}: {error}"
        raise ConversionError(message) from error
    if entry.earlier is None:
        return cast, counted
    before = entry.earlier.num_changed
    num_changed = None if before is None else before + (cast.num_changed or 0)
    counts = cast.counts + entry.earlier.counts
    changed = replace(
        cast, cast_from=entry.earlier.cast_from, counts=counts, num_changed=num_changed
    )
    return changed, counted


def _encoded(
    kind: str, entry: LayerArray, cast: CastResult, encoder: Encoder, definition: str | None
) -> EncodedLayer:
    in_steps = isinstance(entry.array, StepArrays)
    try:
        return encoder.encode(
            kind, entry.name, cast.array, in_steps=in_steps, definition=definition
        )
    except PrecisionError as error:
        message = f"{kind}/{entry.name}: {error}"
        raise PrecisionError(message) from error


def _layer_attributes(
    entry: LayerArray, cast: CastResult, counts: CastCounts, layer: EncodedLayer
) -> Attrs:
    array = entry.array
    attrs: Attrs = {}
    if entry.site is not None:
        attrs["site"] = entry.site
    if cast.source_dtype is not None:
        attrs["source_dtype"] = cast.source_dtype
    if cast.cast_from is not None:
        attrs["cast_from"] = cast.cast_from
        if cast.num_changed is not None:
            attrs["num_changed"] = cast.num_changed
    if entry.container is not None:
        attrs["container"] = entry.container
    if isinstance(array, StepArrays) and array.sequence == "tuple":
        attrs["sequence"] = "tuple"
    if entry.rule is not None:
        attrs.update(to_attributes(entry.rule))
    attrs.update(counts.nonzero())
    attrs.update(layer.attrs)
    return attrs


def prepare_elements(
    elements: Sequence[EncodedObject], *, looks_back: bool = False
) -> list[Prepared]:
    """Encode small datasets in the calling thread: handing them to another would cost more."""
    arrays = [
        Storing(each.values, each.dtype, codec_for(each.values, GZIP.name))
        for each in elements
        if each.values is not None
    ]
    all_stored = store_arrays(arrays, looks_back=looks_back)
    for element, stored in zip(elements, all_stored, strict=True):
        check_comes_back(element.path, stored)
    return [
        Prepared(
            path=element.path,
            dtype=element.dtype,
            attrs={**element.attrs, "digest": stored.digest},
            encoded=stored.encoded,
            raw_nbytes=array.values.nbytes,
            counts=NO_COUNTS,
        )
        for element, array, stored in zip(elements, arrays, all_stored, strict=True)
        if stored.encoded is not None
    ]


def prepare_element(element: EncodedObject, *, looks_back: bool = False) -> Prepared:
    """Encode one small dataset."""
    return prepare_elements([element], looks_back=looks_back)[0]


def _flatten_steps(steps: StepArrays) -> TypedArray:
    """Join generation steps: ``(beams, total)``, or ``(1, total)`` if numbers of beams differ."""
    arrays = steps.steps
    if not arrays:
        return TypedArray(np.empty((0, 0), dtype="<f2"), "float16")
    dtypes = {each.dtype for each in arrays}
    if len(dtypes) > 1:
        message = f"generation steps have several types: {', '.join(sorted(dtypes))}"
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
    if len(shapes) != len(arrays) or len({len(each) for each in shapes}) > 1:
        message = f"{kind}: layers have different numbers of generation steps"
        raise ConversionError(message)
    if len({len(shape) for each in shapes for shape in each}) > 1:
        message = f"{kind}: generation steps have different numbers of axes"
        raise ConversionError(message)
    num_axes = len(shapes[0][0]) if shapes[0] else 0
    table = np.array(shapes, dtype="<i8").reshape(len(shapes), len(shapes[0]), num_axes)
    return EncodedObject(f"{kind}/{layout.STEPS_TABLE}", {}, "int64", table)


def exceptions_table(kind: str, found: Mapping[str, NDArray[np.float64]]) -> EncodedObject:
    """Exceptions of all layers of a kind: float64 ``(n, 3)``, layer, flat index and value.

    `found` holds index and value ``(n, 2)`` by name; the embedding becomes layer -1.
    """
    parts = []
    for name, pairs in found.items():
        layer = layout.parse_layer_name(name)
        number = np.full((len(pairs), 1), layout.EMBEDDING_LAYER if layer is None else layer)
        parts.append(np.hstack((number, pairs)))
    return EncodedObject(
        f"{kind}/{layout.EXCEPTIONS_TABLE}", {}, "float64", np.concatenate(parts).astype("<f8")
    )


def record_elements(record: TraceRecord) -> Iterator[EncodedObject]:
    """Yield what a record stores besides layered arrays: tokens, texts and extra fields."""
    if record.tokens is not None:
        attrs: Attrs = {}
        tokens = record.tokens
        if tokens.dtype != np.int64:
            attrs["source_dtype"] = tokens.dtype.newbyteorder("=").name
        if record.tokens_container is not None:
            attrs["container"] = record.tokens_container
        yield EncodedObject(layout.TOKENS, attrs, "int64", tokens.astype("<i8"))
    if record.tokens_decoded is not None:
        yield text_element(layout.TOKENS_DECODED, record.tokens_decoded)
    if record.attention_mask is not None:
        yield EncodedObject(layout.ATTENTION_MASK, {}, "uint8", record.attention_mask)
    for name, value in record.texts.items():
        yield text_element(name, (value,))
    if record.extra:
        yield EncodedObject(layout.EXTRA_GROUP)
    for key, value in record.extra.items():
        path = f"{layout.EXTRA_GROUP}/{text.escape(layout.escape_key(key))}"
        try:
            yield from encode_element(path, value)
        except (ConversionError, MemoryError) as error:
            message = f"field {key!r}: {error}"
            raise ConversionError(message) from error


def text_element(path: str, texts: Sequence[str]) -> EncodedObject:
    """A dataset of texts."""
    values = text.encode_all(texts)
    return EncodedObject(path, {}, f"text:{values.dtype.itemsize}", values)


def record_attributes(
    record: TraceRecord, options: WriteOptions, pool: Executor
) -> dict[str, Attrs]:
    """The attributes, digests included, that every object of a record gets when written."""
    attrs: dict[str, Attrs] = {}
    encoder = Encoder(options.precision, options.scales)
    for kind, layered in record.layered.items():
        attrs[kind] = to_attributes(layered.form)
        elements = [steps_table(kind, layered.arrays)] if layered.in_steps else []
        attrs |= {each.path: element_attributes(each) for each in elements}
        one = partial(
            _stored_layers, kind, options=options, encoder=encoder, definition=layered.definition
        )
        stored = pool.map(one, ([each] for each in layered.arrays))
        found: dict[str, NDArray[np.float64]] = {}
        for entry, ((layer, _, layer_attrs, _),) in zip(layered.arrays, stored, strict=True):
            attrs[f"{kind}/{entry.name}"] = layer_attrs
            if layer.exceptions is not None:
                found[entry.name] = layer.exceptions
        if found:
            table = exceptions_table(kind, found)
            attrs[table.path] = element_attributes(table)
    attrs |= {each.path: element_attributes(each) for each in record_elements(record)}
    return attrs


def element_attributes(element: EncodedObject) -> Attrs:
    """Attributes of a small object as they are stored."""
    if element.values is None:
        return element.attrs
    digest = dataset_digest(digest_type(element.dtype), element.values)
    return {**element.attrs, "digest": digest}


@dataclass(slots=True)
class Observation:
    """Layers and sizes of one sample, or of all samples so far.

    Layers are numbers by kind; a kind that is stored without arrays has none. ``positions`` are the
    same where no decoder block is known, ``axes`` and ``definitions`` those of kinds that the
    format does not name, and ``reductions`` the ways in which heads were reduced, by kind; None if
    unknown.
    """

    layers: dict[str, set[int]] = field(default_factory=dict)
    positions: dict[str, set[int]] = field(default_factory=dict)
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    hidden_sizes: set[int] = field(default_factory=set)
    head_counts: set[int] = field(default_factory=set)
    reductions: dict[str, set[str | None]] = field(default_factory=dict)
    definitions: dict[str, str | None] = field(default_factory=dict)

    def add_array(self, kind: str, name: str, shape: tuple[int, ...]) -> None:
        """Add one layer's array, without a beam axis."""
        number = layout.parse_layer_name(name)
        if number is not None:
            numbers = self.positions if layout.is_position(name) else self.layers
            numbers.setdefault(kind, set()).add(number)
        # Empty arrays do not show the model's sizes.
        if 0 in shape:
            return
        if kind == layout.HIDDEN_STATES and len(shape) == 2:
            self.hidden_sizes.add(shape[1])
        if kind == layout.ATTENTIONS and len(shape) == 3:
            self.head_counts.add(shape[0])

    def add_sample(self, sample: Observation, ordinal: int) -> None:
        """Add one sample."""
        for kind, axes in sample.axes.items():
            if self.axes.setdefault(kind, axes) != axes:
                message = (
                    f"{kind} has the axes ({', '.join(axes)}), in samples before it "
                    f"({', '.join(self.axes[kind])}); expected the same in an archive"
                )
                raise SchemaError(message)
        for kind, definition in sample.definitions.items():
            # What is not said of every sample is not said of the kind.
            if self.definitions.setdefault(kind, definition) != definition:
                self.definitions[kind] = None
        for kind in dict.fromkeys([*sample.layers, *sample.positions]):
            self._add_numbers(sample, kind, ordinal)
        self.hidden_sizes |= sample.hidden_sizes
        self.head_counts |= sample.head_counts
        for kind, reductions in sample.reductions.items():
            self.reductions.setdefault(kind, set()).update(reductions)

    def _add_numbers(self, sample: Observation, kind: str, ordinal: int) -> None:
        def named(found: Observation) -> tuple[str, list[int]]:
            positions = found.positions.get(kind)
            what = "layers" if positions is None else "positions"
            return what, sorted(found.layers.get(kind, set()) if positions is None else positions)

        (what, numbers), (known_as, known) = named(sample), named(self)
        if numbers and known and (what, numbers) != (known_as, known):
            message = (
                f"{kind} has {what} {numbers}, the {ordinal} samples before it have {known_as} "
                f"{known}; expected one model and one set of layers in an archive"
            )
            if what != known_as:
                message += "; pass first_state, which says what the first entry is"
            raise SchemaError(message)
        for found, part in ((self.layers, sample.layers), (self.positions, sample.positions)):
            if kind in part:
                found.setdefault(kind, set()).update(part[kind])


def observe(record: TraceRecord) -> Observation:
    """The layers and sizes of one record."""
    found = Observation()
    for kind, layered in record.layered.items():
        found.layers.setdefault(kind, set())
        found.reductions[kind] = {layered.reduction}
        if layered.axes is not None:
            found.axes[kind] = layered.axes
            found.definitions[kind] = layered.definition
        for entry in layered.arrays:
            if isinstance(entry.array, StepArrays):
                found.add_array(kind, entry.name, ())
                for step in entry.array.steps:
                    found.add_array(kind, entry.name, step.shape[1:])
            else:
                found.add_array(kind, entry.name, entry.array.shape)
    return found
