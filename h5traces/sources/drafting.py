"""Drafts of mappings: what a file holds, and which of it may be which field."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from h5traces.format import layout
from h5traces.format.text import counted
from h5traces.sources.array_files import KINDS, open_arrays
from h5traces.sources.opening import recognise

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from h5traces.sources.arrays import NamedArray

_NUMBER: Final = re.compile(r"(\d{1,6})(?=\D*\Z)")
_LAYER: Final = re.compile(r"layer|block|hidden|state|act|resid|\bl|\bh", re.IGNORECASE)
_MAX_LINES: Final = 30
_STATES: Final = re.compile(r"hidden|state|act|resid|layer|repr|emb|array|output", re.IGNORECASE)
_ATTENTIONS: Final = re.compile(r"attn|attention|pattern", re.IGNORECASE)
# Fields of one value or text per sample, by their usual names.
_OTHERS: Final = {
    layout.TOKENS: re.compile(r"(?:.*[/_.])?(?:tokens|token_ids|input_ids|ids)\Z", re.IGNORECASE),
    layout.ATTENTION_MASK: re.compile(r"(?:.*[/_.])?attention_mask\Z", re.IGNORECASE),
    layout.LABEL: re.compile(r"(?:.*[/_.])?(?:labels?|targets?|correct)\Z", re.IGNORECASE),
    layout.QUESTION_ID: re.compile(r"(?:q?id|uid|question_id)\Z", re.IGNORECASE),
    "generated_answer": re.compile(r"(?:.*[/_.])?(?:answer|response|completion)\Z", re.IGNORECASE),
}
_BY_TOKEN: Final = (layout.TOKENS, layout.ATTENTION_MASK)
_AXES: Final = {
    (layout.HIDDEN_STATES, True): {1: "hidden", 2: "token hidden", 3: "batch token hidden"},
    (layout.HIDDEN_STATES, False): {
        2: "layer hidden",
        3: "layer token hidden",
        4: "batch layer token hidden",
    },
    (layout.ATTENTIONS, True): {3: "head query key", 4: "batch head query key"},
    (layout.ATTENTIONS, False): {4: "layer head query key", 5: "batch layer head query key"},
}
_RAW: Final = """\
[array]
dtype = "float16"  # or float32, bfloat16, ...
shape = [32, -1, 4096]  # one length may be -1: what is left

[fields.hidden_states]
name = "array"
axes = "layer token hidden"
"""


@dataclass(frozen=True, slots=True)
class Draft:
    """What a file holds, and a mapping to begin with.

    Attributes
    ----------
    holdings
        A line for each name: with shape and type, and how many there are alike.
    text
        TOML, whose guesses the user must check.
    """

    holdings: tuple[str, ...]
    text: str


def drafted(path: str | os.PathLike[str]) -> Draft | None:
    """Describe a file for whoever writes a mapping for it; None if no mapping may fit."""
    path = Path(path)
    kind = recognise(path).kind
    if kind.id == "unknown":
        return Draft((f"{path.stat().st_size:,} bytes",), _RAW)
    if kind.id not in KINDS:
        return None
    arrays = open_arrays(path)
    try:
        group = next(arrays.groups(), {})
        found = _grouped(group)
        return Draft(_holdings(found, rows=arrays.has_rows), _text(found))
    finally:
        arrays.close()


def _grouped(group: Mapping[str, NamedArray]) -> dict[str, list[tuple[str, NamedArray]]]:
    """Names that differ only in their last number, merged into one with a place for it."""
    found: defaultdict[str, list[tuple[str, NamedArray]]] = defaultdict(list)
    for name, array in group.items():
        found[_template(name)].append((name, array))
    return {
        (template if len(each) > 1 else each[0][0]): each
        for template, each in found.items()
        if "{" not in each[0][0]
    }


def _template(name: str) -> str:
    """A name with a place for its number: of a layer, or in a part that is a sample's id."""
    template = _NUMBER.sub("{layer}", name)
    parts = template.split("/")
    number = next((at for at, part in enumerate(parts) if "{layer}" in part), None)
    if (
        number is None
        or number == len(parts) - 1
        or _LAYER.search(parts[number].replace("{layer}", ""))
    ):
        return template
    parts[number] = "{id}"
    return "/".join(parts)


def _holdings(found: dict[str, list[tuple[str, NamedArray]]], *, rows: bool) -> tuple[str, ...]:
    lines = []
    for template, each in found.items():
        name, array = each[0]
        line = f"{name}  {array.shape or ''} {array.dtype}".replace("  ()", " ")
        more = f"; {counted(len(each), 'name')} as {template}" if len(each) > 1 else ""
        lines.append(f"{line}{more}")
    if rows:
        lines.insert(0, "rows; the first one has")
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES:] = [f"and {len(lines) - _MAX_LINES} more"]
    return tuple(lines)


def _text(found: dict[str, list[tuple[str, NamedArray]]]) -> str:
    lines = ['# first_state = "block"  # or "embedding": what the first hidden state is', ""]
    tables: list[str] = []
    for kind, words in ((layout.ATTENTIONS, _ATTENTIONS), (layout.HIDDEN_STATES, _STATES)):
        name = next((each for each in found if words.search(each) and _axes(kind, found, each)), "")
        if name:
            axes = _axes(kind, found, name)
            tables = [
                f"[fields.{kind}]",
                f'name = "{_quoted(name)}"',
                f'axes = "{axes}"',
                "",
                *tables,
            ]
        elif kind == layout.HIDDEN_STATES:
            tables = [f"[fields.{kind}]", 'name = "?"', 'axes = "layer token hidden"', ""]
    rows = _rows_of_layers(found, tables)
    batch = next((each for each in tables if each.startswith('axes = "batch')), rows)
    others = [
        f"{field} = {_other(name, found, field, is_batch=batch is not None)}"
        for field, words in _OTHERS.items()
        for name in [next((each for each in found if words.match(each)), None)]
        if name is not None
    ]
    return "\n".join([*lines, *(["[fields]", *others, ""] if others else []), *tables])


def _rows_of_layers(
    found: dict[str, list[tuple[str, NamedArray]]], tables: list[str]
) -> str | None:
    """Says in `tables` that rows of layers are samples, if a label has a value for each."""
    axes = 'axes = "token hidden"'
    if axes not in tables:
        return None
    place = tables.index(axes)
    states = found[tables[place - 1].removeprefix('name = "').removesuffix('"')][0][1]
    labels = (each[0][1].shape for name, each in found.items() if _OTHERS[layout.LABEL].match(name))
    if (states.shape[0],) not in labels:
        return None
    tables[place] = 'axes = "batch hidden"  # as labels has a value per row; or "token hidden"'
    return tables[place]


def _other(name: str, found: dict[str, Any], field: str, *, is_batch: bool) -> str:
    """The value of a field that holds no layers: its name, with the axes where samples are rows."""
    text = f'"{_quoted(name)}"'
    rank = len(found[name][0][1].shape)
    if not is_batch or not rank:
        return text
    axes = " ".join(("batch", "token")[:rank]) if field in _BY_TOKEN else "batch"
    return f'{{ name = {text}, axes = "{axes}" }}' if rank == len(axes.split()) else text


def _axes(kind: str, found: dict[str, list[tuple[str, Any]]], name: str) -> str | None:
    array = found[name][0][1]
    if "float" not in array.dtype or (kind == layout.HIDDEN_STATES and _ATTENTIONS.search(name)):
        return None
    return _AXES[kind, "{layer}" in name].get(len(array.shape))


def _quoted(name: str) -> str:
    return name.replace("\\", "\\\\").replace('"', '\\"')
