"""Archives, traces and their layers as they show in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from h5traces.format import layout
from h5traces.format.dtypes import read_type
from h5traces.format.html import named, page, section, table
from h5traces.format.text import and_more, counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from h5traces.archive.rows import Row
    from h5traces.format.archive import ArchiveMetadata

_MOST_SAMPLES: Final = 10
_MOST_TOKENS: Final = 200


def archive_page(
    traces: Sequence[Row], metadata: ArchiveMetadata, layers: Sequence[int], paths: Sequence[Any]
) -> str:
    """The archive, with its first samples and its metadata to unfold."""
    facts = {
        "files": and_more(paths, 3),
        "model": metadata.model_id,
        "layers": ", ".join(map(str, layers)),
        "tier": None if metadata.precision is None else metadata.precision.tier,
    }
    parts = [named(facts)]
    if len(traces):
        parts.append(section("kinds of the first sample", _kinds(traces[0])))
    shown = [traces[number] for number in range(min(len(traces), _MOST_SAMPLES))]
    rows = [
        (number, each.metadata.sample_id, each.metadata.seq_len, each.metadata.label, _text(each))
        for number, each in enumerate(shown)
    ]
    header = ("", "sample_id", "seq_len", "label", "text")
    parts.append(section("samples", table(header, rows, more=len(traces) - len(shown))))
    described = metadata.model_dump(mode="json", exclude_none=True)
    parts.append(section("metadata", named(described)))
    return page(f"h5traces.Archive: {counted(len(traces), 'trace')}", *parts)


def trace_page(trace: Row) -> str:
    """The sample, with its arrays, tokens and metadata to unfold."""
    metadata = trace.metadata
    facts = {
        "sample_id": metadata.sample_id,
        "label": metadata.label,
        "coverage": metadata.coverage,
        "file": f"{trace.path}, sample {trace.position_in_file}",
    }
    texts = {name: trace.get(name) for name in layout.TEXT_FIELDS}
    parts = [named({**facts, **texts}), section("arrays", _kinds(trace), is_open=True)]
    tokens = trace.get(layout.TOKENS_DECODED)
    if tokens is not None:
        rows = list(enumerate(tokens[:_MOST_TOKENS]))
        body = table(("", "token"), rows, more=max(0, len(tokens) - len(rows)))
        parts.append(section(counted(len(tokens), "token"), body))
    described = metadata.model_dump(mode="json", exclude_none=True)
    parts.append(section("metadata", named(described)))
    title = f"h5traces.Trace {trace.ordinal}: {counted(metadata.seq_len, 'token')}"
    return page(title, *parts)


def layers_page(kind: str, layers: Sequence[Any], described: Sequence[Sequence[object]]) -> str:
    """The arrays of one kind; `described` are site, shape and type of each."""
    rows = [
        (position, "embedding" if layer is None else layer, *described[position])
        for position, layer in enumerate(layers)
    ]
    header = ("position", "layer", "site", "shape", "dtype")
    return page(f"{kind}: {counted(len(layers), 'array')}", table(header, rows))


def described_layer(attrs: Any, shape: tuple[int, ...], dtype: str) -> tuple[object, ...]:
    """Site, shape and type of a stored array when it is read."""
    return attrs.get("site", ""), shape, read_type(attrs, dtype)


def _kinds(trace: Row) -> str:
    """Each stored kind: its axes, its number of layers, shape and type of the first."""
    stored, rows = trace._stored, []
    for kind in stored.kinds:
        if kind not in stored.objects:
            continue
        absent = stored.form(kind).absent or ()
        listed = stored.listed_names(kind, stored.selected)
        names = [each for each in listed if each not in absent]
        if not names:
            continue
        entry = stored.entry(f"{kind}/{names[0]}")
        _, shape, dtype = described_layer(entry.attrs, tuple(entry.shape), entry.dtype or "")
        rows.append((kind, ", ".join(stored.axes(kind)), len(names), shape, dtype))
    return table(("kind", "axes", "layers", "shape", "dtype"), rows)


def _text(trace: Row) -> str:
    """The beginning of the first text that the sample has."""
    texts = (trace.get(name) for name in layout.TEXT_FIELDS)
    return next((each for each in texts if each), "")
