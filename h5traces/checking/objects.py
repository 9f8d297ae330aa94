"""What the objects of a sample, and those below ``/scales``, say that SPEC does not allow.

All is judged by types, shapes and attributes; no array is read.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, get_args

from h5traces.archive.scales import layers_with_scales
from h5traces.errors import SchemaError, UnsupportedEncodingError
from h5traces.format import layout
from h5traces.format.attention import RULE_ATTRS, AttentionRule
from h5traces.format.document import from_attributes
from h5traces.format.dtypes import FloatType
from h5traces.format.kinds import MODEL_KINDS
from h5traces.format.record import (
    ArrayDescription,
    SourceForm,
    TraceDescription,
    TraceMetadata,
    coverage_of,
)
from h5traces.precision.decoding import (
    EXCEPTION_COLUMNS,
    attribute_problems,
    is_encoded,
    is_stated,
    num_exceptions,
    restored_type,
)
from h5traces.precision.scales import OFFSET, SIGMA, STEP

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from h5traces.format.archive import ArchiveMetadata, KindMetadata
    from h5traces.format.document import Attrs
    from h5traces.format.entries import ObjectEntry, SampleEntry

    # Path below the group that is checked, message and kind.
    Contradiction = tuple[str, str, str]

_NUMBERS: Final = {layout.TOKENS: "int64", layout.ATTENTION_MASK: "uint8"}
_SAMPLE_DATASETS: Final = frozenset({*_NUMBERS, layout.TOKENS_DECODED, *layout.TEXT_FIELDS})
_SITES: Final = frozenset({layout.SITE_EMBEDDING, layout.SITE_BLOCK_OUTPUT, layout.SITE_FINAL_NORM})
_FLOAT_TYPES: Final[tuple[FloatType, ...]] = get_args(FloatType)


def sample_problems(
    sample: SampleEntry, metadata: TraceMetadata | None, kinds: dict[str, KindMetadata]
) -> Iterator[Contradiction]:
    """Problems inside a sample."""
    arrays: list[ArrayDescription] = []
    for path, entry in sample.objects.items():
        first, _, rest = path.partition("/")
        if first == layout.EXTRA_GROUP:
            if rest and "encoding" not in entry.attrs:
                yield path, "the attribute 'encoding' is missing", "missing_attribute"
        elif first in kinds:
            if rest:
                yield from _layer_problems(entry, rest, kinds[first])
            else:
                yield from _form_problems(sample, entry)
            known = rest == layout.EMBEDDING or layout.parse_layer_name(rest) is not None
            in_steps = f"{first}/{layout.STEPS_TABLE}" in sample.objects
            dtype = float_type(entry)
            if known and not in_steps and dtype is not None:
                arrays.append(
                    ArrayDescription(kind=first, name=rest, dtype=dtype, shape=entry.shape)
                )
        elif path not in _SAMPLE_DATASETS:
            yield path, "no such object belongs in a sample", "unknown_object"
        elif path in _NUMBERS and entry.dtype != _NUMBERS[path]:
            yield path, f"stored type is {entry.dtype}, expected {_NUMBERS[path]}", "wrong_type"
        elif path not in _NUMBERS and not entry.dtype.startswith("text:"):
            yield path, f"stored type is {entry.dtype}, expected fixed-length UTF-8", "wrong_type"
        if not entry.is_group and entry.codec is None:
            yield (
                path,
                "is not stored in gzip-filtered chunks, so damage would go unnoticed",
                "filter",
            )
    if metadata is not None:
        axes = {name: kind.axes for name, kind in kinds.items() if name not in layout.KINDS}
        yield from _consistency_problems(sample, metadata, arrays, axes)


def _form_problems(sample: SampleEntry, group: ObjectEntry) -> Iterator[Contradiction]:
    """Problems of the attributes that say how the legacy dict held a kind."""
    try:
        form = from_attributes(SourceForm, group.attrs)
    except SchemaError as error:
        yield from ((group.path, str(each), "wrong_form") for each in error.problems)
        return
    named = [name for _, name in form.keys or ()]
    if form.lists_embedding:
        named.append(layout.EMBEDDING)
    absent = set(form.absent or ())
    stored = [name for name in absent if f"{group.path}/{name}" in sample.objects]
    if stored:
        yield group.path, f"says that {min(stored)} is absent, which is stored", "stored_absent"
    missing = [
        name
        for name in named
        if name not in absent and f"{group.path}/{name}" not in sample.objects
    ]
    if missing:
        yield group.path, f"lists {missing[0]}, which is not stored", "missing_layer"


def _layer_problems(entry: ObjectEntry, name: str, kind: KindMetadata) -> Iterator[Contradiction]:
    if name in layout.TABLES:
        return
    number = layout.parse_layer_name(name)
    if number is None and name != layout.EMBEDDING:
        yield entry.path, "expected a name such as layer_000, or 'embedding'", "unknown_object"
        return
    listed, what = kind.layers, "layer"
    if layout.is_position(name):
        listed, what = kind.positions or (), "position"
    if number is not None and number not in listed:
        yield entry.path, f"{what} {number} is not among the kind's {what}s", "unlisted_layer"
    if float_type(entry) is None:
        message = f"stored type is {entry.dtype}, expected a float type, or an encoding of one"
        yield entry.path, message, "wrong_type"
    site = entry.attrs.get("site")
    if site is not None and site not in _SITES:
        yield entry.path, f"site {site!r} is none of {', '.join(sorted(_SITES))}", "wrong_site"
    if RULE_ATTRS & entry.attrs.keys():
        try:
            from_attributes(AttentionRule, entry.attrs)
        except SchemaError as error:
            yield from ((entry.path, str(each), "wrong_rule") for each in error.problems)
    if "digest" not in entry.attrs:
        yield entry.path, "the attribute 'digest' is missing", "missing_attribute"
    for attribute in entry.attrs:
        if attribute not in layout.LAYER_ATTRS and not attribute.startswith(layout.USER_PREFIX):
            yield entry.path, f"attribute {attribute!r} is not of the format", "unknown_attribute"


def _consistency_problems(
    sample: SampleEntry,
    metadata: TraceMetadata,
    arrays: list[ArrayDescription],
    axes: dict[str, tuple[str, ...]],
) -> Iterator[Contradiction]:
    tokens = sample.objects.get(layout.TOKENS)
    decoded = sample.objects.get(layout.TOKENS_DECODED)
    num_tokens = tokens.shape[0] if tokens and tokens.shape else None
    description = TraceDescription(
        metadata=metadata,
        num_tokens=num_tokens,
        num_tokens_decoded=decoded.shape[0] if decoded and decoded.shape else None,
        arrays=tuple(arrays),
        axes=axes or None,
    )
    for each in description.problems():
        yield each.loc, each.message, each.kind
    mask = sample.objects.get(layout.ATTENTION_MASK)
    if mask is not None and mask.shape != (metadata.seq_len,):
        message = f"shape is {mask.shape}, expected one value for each of {metadata.seq_len} tokens"
        yield layout.ATTENTION_MASK, message, "length_mismatch"
    if metadata.coverage in ("steps", "empty") or not arrays:
        return
    found = coverage_of({each.kind: each.shape for each in reversed(arrays)}, num_tokens)
    if found != metadata.coverage:
        message = f"coverage is {metadata.coverage!r}, but the shapes say {found!r}"
        yield "", message, "wrong_coverage"
    if num_tokens is not None and metadata.seq_len != num_tokens:
        yield "", f"seq_len is {metadata.seq_len} for {num_tokens} tokens", "length_mismatch"


def float_type(entry: ObjectEntry) -> FloatType | None:
    """The type of a layer when it is read; None unless a float type."""
    try:
        found = restored_type(entry.dtype, entry.attrs)
    except UnsupportedEncodingError:
        return None
    return next((each for each in _FLOAT_TYPES if each == found), None)


def scale_problems(objects: Mapping[str, ObjectEntry]) -> Iterator[Contradiction]:
    """Problems below ``/scales``."""
    for path, entry in objects.items():
        parts = path.split("/")[1:]
        if entry.is_group:
            if len(parts) > 2:
                yield path, "no such object belongs among scales", "unknown_object"
            continue
        if len(parts) != 3 or parts[2] not in (STEP, OFFSET, SIGMA):
            yield path, "no such object belongs among scales", "unknown_object"
        elif entry.dtype != "float32" or len(entry.shape) != 1:
            yield path, f"is {entry.dtype} {entry.shape}, expected float32 (hidden)", "wrong_type"
        if "digest" not in entry.attrs:
            yield path, "the attribute 'digest' is missing", "missing_attribute"
    for layer in layers_with_scales(objects):
        place = f"{layout.SCALES_GROUP}/{layer}"
        for name in (STEP, OFFSET, SIGMA):
            if f"{place}/{name}" not in objects:
                yield f"{place}/{name}", "is missing; encoded layers need it", "missing_scale"
        widths = _widths(objects, layer)
        if len(set(widths)) > 1:
            message = f"step, offset and sigma have {', '.join(map(str, widths))} channels"
            yield place, message, "scale_width"


def scale_widths(objects: Mapping[str, ObjectEntry]) -> dict[str, int]:
    """Channels of the scale of each layer, by path of the layer."""
    return {layer: min(_widths(objects, layer), default=0) for layer in layers_with_scales(objects)}


def _widths(objects: Mapping[str, ObjectEntry], layer: str) -> list[int]:
    paths = (f"{layout.SCALES_GROUP}/{layer}/{name}" for name in (STEP, OFFSET, SIGMA))
    return [math.prod(objects[path].shape) for path in paths if path in objects]


def encoding_problems(
    objects: Mapping[str, ObjectEntry], widths: Mapping[str, int], metadata: ArchiveMetadata | None
) -> Iterator[Contradiction]:
    """Problems of a sample's encoded layers.

    `widths` has the channels of the scales by path of their layer; `metadata`, the archive's, is
    None if it cannot be read.
    """
    for path, entry in objects.items():
        kind, _, name = path.partition("/")
        if kind not in (*layout.KINDS, *MODEL_KINDS) or not name:
            continue
        if name == layout.EXCEPTIONS_TABLE:
            layers = (objects[each].attrs for each in objects if each.startswith(f"{kind}/"))
            yield from _table_problems(entry, num_exceptions(layers))
            continue
        try:
            encoded = is_encoded(entry.attrs)
        except UnsupportedEncodingError as error:
            yield path, str(error), "unsupported_encoding"
            continue
        if "encoding" in entry.attrs and metadata is not None:
            yield from _unmarked(path, kind, entry.attrs, metadata, encoded=encoded)
        if not encoded:
            continue
        for message in attribute_problems(entry.dtype, entry.attrs):
            yield path, message, "wrong_encoding"
        link = entry.attrs.get("scales")
        width = widths.get(str(link).removeprefix(f"/{layout.SCALES_GROUP}/"))
        if link is not None and width is None:
            yield path, f"its scale {link} is missing", "missing_scale"
        elif link is not None and entry.shape[1:] != (width,):
            yield path, f"is {entry.shape}, its scale {link} for {width} channels", "scale_width"
        table = f"{kind}/{layout.EXCEPTIONS_TABLE}"
        if entry.attrs.get("num_exceptions") and table not in objects:
            yield path, f"its exceptions are missing; expected {table}", "missing_exceptions"


def _table_problems(entry: ObjectEntry, count: int) -> Iterator[Contradiction]:
    if entry.dtype != "float64" or entry.shape[1:] != (EXCEPTION_COLUMNS,):
        message = f"is {entry.dtype} {entry.shape}, expected float64 (n, {EXCEPTION_COLUMNS})"
        yield entry.path, message, "wrong_type"
    elif entry.shape[0] != count:
        message = f"has {entry.shape[0]} rows, layers list {count} exceptions"
        yield entry.path, message, "count_mismatch"


def _unmarked(
    path: str, kind: str, attrs: Attrs, metadata: ArchiveMetadata, *, encoded: bool
) -> Iterator[Contradiction]:
    """Encodings that the archive uses and its metadata does not state."""
    if metadata.precision is None:
        message = "is encoded, but the root attribute 'precision' is missing"
        yield path, message, "unmarked_loss"
    elif not is_stated(kind, attrs, metadata.precision):
        message = f"is not encoded as 'precision' on the root says: {metadata.precision}"
        yield path, message, "unmarked_loss"
    if encoded and layout.PRECISION_FEATURE not in metadata.required_features:
        message = f"is encoded, but 'required_features' does not name {layout.PRECISION_FEATURE!r}"
        yield path, message, "missing_feature"
