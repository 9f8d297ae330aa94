"""Structure checks of one sample: its objects, their types, and how they go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from h5traces.checking.encoding_checks import float_type
from h5traces.format import layout
from h5traces.format.record import ArrayDescription, TraceDescription, coverage_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h5traces.format.archive import KindMetadata
    from h5traces.format.entries import ObjectEntry, SampleEntry
    from h5traces.format.trace import TraceMetadata

_SAMPLE_DATASETS = frozenset({layout.TOKENS, layout.TOKENS_DECODED, *layout.TEXT_FIELDS})
_SITES = frozenset({layout.SITE_EMBEDDING, layout.SITE_BLOCK_OUTPUT, layout.SITE_FINAL_NORM})
_INTEGERS = frozenset({"int64"})


def sample_problems(
    sample: SampleEntry, metadata: TraceMetadata | None, kinds: dict[str, KindMetadata]
) -> Iterator[tuple[str, str, str]]:
    """What is wrong inside a sample, as path below its group, message and kind."""
    arrays: list[ArrayDescription] = []
    for path, entry in sample.objects.items():
        first, _, rest = path.partition("/")
        if first == layout.EXTRA_GROUP:
            if rest and "encoding" not in entry.attrs:
                yield path, "the attribute 'encoding' is missing", "missing_attribute"
        elif first in kinds:
            if rest:
                yield from _layer_problems(entry, rest, kinds[first])
            known = rest == layout.EMBEDDING or layout.parse_layer_name(rest) is not None
            in_steps = f"{first}/{layout.STEPS_TABLE}" in sample.objects
            dtype = float_type(entry)
            if known and not in_steps and dtype is not None:
                arrays.append(
                    ArrayDescription(kind=first, name=rest, dtype=dtype, shape=entry.shape)
                )
        elif path not in _SAMPLE_DATASETS:
            yield path, "no such object belongs in a sample", "unknown_object"
        elif path == layout.TOKENS and entry.dtype not in _INTEGERS:
            yield path, f"stored type is {entry.dtype}, expected int64", "wrong_type"
        elif path != layout.TOKENS and not entry.dtype.startswith("text:"):
            yield path, f"stored type is {entry.dtype}, expected fixed-length UTF-8", "wrong_type"
        if not entry.is_group and entry.codec is None:
            yield path, "is not stored in gzip-filtered chunks, so damage would go unseen", "filter"
    if metadata is not None:
        yield from _consistency_problems(sample, metadata, arrays)


def _layer_problems(
    entry: ObjectEntry, name: str, kind: KindMetadata
) -> Iterator[tuple[str, str, str]]:
    if name in layout.TABLES:
        return
    number = layout.parse_layer_name(name)
    if number is None and name != layout.EMBEDDING:
        yield entry.path, "expected a name such as layer_000, or 'embedding'", "unknown_object"
        return
    if number is not None and number not in kind.layers:
        yield entry.path, f"layer {number} is not among the kind's layers", "unlisted_layer"
    if float_type(entry) is None:
        message = f"stored type is {entry.dtype}, expected a float type, or an encoding of one"
        yield entry.path, message, "wrong_type"
    site = entry.attrs.get("site")
    if site is not None and site not in _SITES:
        yield entry.path, f"site {site!r} is none of {', '.join(sorted(_SITES))}", "wrong_site"
    if "digest" not in entry.attrs:
        yield entry.path, "the attribute 'digest' is missing", "missing_attribute"
    for attribute in entry.attrs:
        if attribute not in layout.LAYER_ATTRS and not attribute.startswith(
            layout.USER_ATTR_PREFIX
        ):
            yield entry.path, f"attribute {attribute!r} is not of the format", "unknown_attribute"


def _consistency_problems(
    sample: SampleEntry, metadata: TraceMetadata, arrays: list[ArrayDescription]
) -> Iterator[tuple[str, str, str]]:
    tokens = sample.objects.get(layout.TOKENS)
    decoded = sample.objects.get(layout.TOKENS_DECODED)
    num_tokens = tokens.shape[0] if tokens and tokens.shape else None
    description = TraceDescription(
        metadata=metadata,
        num_tokens=num_tokens,
        num_tokens_decoded=decoded.shape[0] if decoded and decoded.shape else None,
        arrays=tuple(arrays),
    )
    for each in description.problems():
        yield each.loc, each.message, each.kind
    if metadata.coverage in ("steps", "empty") or not arrays:
        return
    found = coverage_of({each.kind: each.shape for each in reversed(arrays)}, num_tokens)
    if found != metadata.coverage:
        message = f"coverage is {metadata.coverage!r}, but the shapes say {found!r}"
        yield "", message, "wrong_coverage"
    if num_tokens is not None and metadata.seq_len != num_tokens:
        yield "", f"seq_len is {metadata.seq_len} for {num_tokens} tokens", "length_mismatch"
