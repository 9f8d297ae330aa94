"""Turns stored traces into records, for commands that encode arrays again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from h5traces.format import layout, text
from h5traces.format.dtypes import CastCounts
from h5traces.format.record import (
    EarlierCast,
    LayerArray,
    LayeredArrays,
    StepArrays,
    TraceRecord,
)

if TYPE_CHECKING:
    from h5traces.archive.stored_trace import StoredTrace
    from h5traces.archive.trace import Trace
    from h5traces.format.document import Attrs
    from h5traces.format.entries import ObjectEntry


def to_record(trace: Trace, *, first_source: int = 0) -> TraceRecord:
    """A stored trace, or its selected layers, as a record in the types of the source.

    Parameters
    ----------
    trace
        The trace.
    first_source
        Index in the new archive's ``sources`` of the first source of this archive.
    """
    stored = trace._stored
    extra: dict[str, Any] = {}
    prefix = f"{layout.EXTRA_GROUP}/"
    for path in stored.objects:
        name = path.removeprefix(prefix)
        is_old = name == layout.LABEL and stored.has_new_label
        if path.startswith(prefix) and "/" not in name and not is_old:
            extra[layout.unescape_key(text.unescape(name))] = stored.extra(path)
    metadata = stored.metadata
    tokens = stored.tokens() if layout.TOKENS in stored.objects else None
    container = stored.attrs(layout.TOKENS).get("container") if tokens is not None else None
    return TraceRecord(
        sample_id=metadata.sample_id,
        generation_index=metadata.generation_index,
        prompt_len=metadata.prompt_len,
        label=metadata.label,
        scores=metadata.scores,
        source=(
            metadata.source.model_copy(update={"file": first_source + metadata.source.file})
            if metadata.source
            else None
        ),
        extraction=metadata.extraction,
        exact_digest=metadata.exact_digest or metadata.digest,
        fields=stored.fields,
        tokens=tokens,
        tokens_container="torch" if container == "torch" else None,
        tokens_decoded=(
            tuple(stored.texts(layout.TOKENS_DECODED))
            if layout.TOKENS_DECODED in stored.objects
            else None
        ),
        texts={name: stored.text(name) for name in layout.TEXT_FIELDS if name in stored.objects},
        layered={
            kind: LayeredArrays(
                tuple(_layer_array(stored, kind, entry) for entry in entries),
                "tuple" if stored.attrs(kind).get("sequence") == "tuple" else "list",
                stored.file.reduction(kind),
            )
            for kind, entries in _layered_entries(trace).items()
        },
        extra=extra,
    )


def _layered_entries(trace: Trace) -> dict[str, list[ObjectEntry]]:
    """The datasets of every layered kind of a trace, in order of layer; selected layers only."""
    stored = trace._stored
    found: dict[str, list[ObjectEntry]] = {}
    for path in stored.objects:
        kind, _, name = path.partition("/")
        if kind not in layout.KINDS or name in layout.TABLES:
            continue
        found.setdefault(kind, [])
        layer = layout.parse_layer_name(name)
        if name and (stored.selected is None or layer is None or layer in stored.selected):
            found[kind].append(stored.entry(path))
    return found


def _layer_array(trace: StoredTrace, kind: str, entry: ObjectEntry) -> LayerArray:
    name = entry.path.removeprefix(f"{kind}/")
    value = trace.typed_layer(kind, name)
    sequence: Literal["list", "tuple"] = "list"
    if entry.attrs.get("sequence") == "tuple":
        sequence = "tuple"
    array = StepArrays(tuple(value), sequence) if isinstance(value, list) else value
    return LayerArray(
        name=name,
        array=array,
        site=_text_or_none(entry.attrs.get("site")),
        container="torch" if entry.attrs.get("container") == "torch" else None,
        earlier=_earlier_cast(entry.attrs),
    )


def _earlier_cast(attrs: Attrs) -> EarlierCast | None:
    """The earlier cast of a stored array; values that are not finite are counted again."""
    source: Any = attrs.get("cast_from")
    if source is None:
        return None
    names = ("num_overflow", "num_to_zero", "num_to_subnormal")
    counts = CastCounts(**{name: int(attrs.get(name, 0)) for name in names})  # type: ignore[arg-type]
    num_changed: Any = attrs.get("num_changed")
    return EarlierCast(source, counts, num_changed)


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)
