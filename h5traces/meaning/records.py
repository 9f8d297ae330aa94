"""Makes trace records of dicts, whatever their layout: the rules of what an index and an axis mean.

Index i of a legacy list is decoder block i: the embedding was never stored, and the last hidden
state was taken after the model's final norm. Fields without a place in the format go to ``extra``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.format.dtypes import FLOAT_TYPES, TypedArray
from h5traces.format.record import Container, LayerArray, LayeredArrays, StepArrays, TraceRecord
from h5traces.format.values import TorchValue
from h5traces.meaning.options import ReadingOptions
from h5traces.meaning.padding import with_padding_treated

if TYPE_CHECKING:
    from h5traces.format.record import SourcePosition


@dataclass(slots=True)
class _Fields:
    """The parts of a record."""

    named: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    layered: dict[str, LayeredArrays] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def to_record(
    item: dict[Any, Any],
    *,
    source: SourcePosition,
    layers: tuple[int, ...] | None = None,
    sites_known: bool = True,
    options: ReadingOptions = ReadingOptions(),
) -> TraceRecord:
    """One dict of a source, as a record of `layers` only, which ascend."""
    found = _Fields()
    if layout.HIDDEN_STATES not in item:
        message = (
            f"field 'hidden_states' is missing; found {', '.join(map(str, item)) or 'no fields'}; "
            "expected the dict of a trace"
        )
        raise ConversionError(message)
    for key, value in item.items():
        if not isinstance(key, str):
            message = f"field {key!r} is named by {type(key).__name__}, expected str"
            raise ConversionError(message)
        if key in layout.KINDS:
            found.layered[key] = _layered(key, value, layers, sites_known=sites_known)
    for key, value in item.items():
        if key not in found.layered:
            _place(key, value, item, found)
    record = TraceRecord(
        source=source,
        fields=tuple(item),
        texts=found.texts,
        layered=found.layered,
        extra=found.extra,
        **found.named,
    )
    return with_padding_treated(record, options)


def _place(key: str, value: Any, item: dict[str, Any], found: _Fields) -> None:
    """Put a field in its place if the format has one for exactly its type, else in ``extra``."""
    if key in layout.TEXT_FIELDS and type(value) is str:
        found.texts[key] = value
    elif key == layout.TOKENS and _is_token_array(value):
        is_tensor = isinstance(value, TorchValue)
        found.named["tokens"] = value.data if is_tensor else value
        found.named["tokens_container"] = "torch" if is_tensor else None
    elif key == layout.TOKENS_DECODED and _is_decoded(value, item.get(layout.TOKENS)):
        found.named["tokens_decoded"] = tuple(value)
    elif key == layout.QUESTION_ID and type(value) is str:
        found.named["sample_id"] = value
    elif key == layout.LABEL and type(value) is int and abs(value) < 2**63:
        found.named["label"] = value
    elif key == layout.PROMPT_LENGTH and _is_prompt_length(value, item, found):
        found.named["prompt_len"] = value
    else:
        found.extra[key] = value
        if key == layout.QUESTION_ID and isinstance(value, (int, np.integer, str)):
            # Kept with its type, and found by its text.
            found.named["sample_id"] = str(value)


def _is_token_array(value: Any) -> bool:
    array = value.data if isinstance(value, TorchValue) else value
    return (
        isinstance(array, np.ndarray)
        and array.ndim == 1
        and array.dtype.kind in "iu"
        and array.dtype.name != "uint64"
        and array.dtype.isnative
    )


def _is_decoded(value: Any, tokens: Any) -> bool:
    if type(value) is not list or not all(type(each) is str for each in value):
        return False
    return not _is_token_array(tokens) or len(value) == _length(tokens)


def _is_prompt_length(value: Any, item: dict[str, Any], found: _Fields) -> bool:
    if type(value) is not int or not 0 <= value < 2**63:
        return False
    tokens = item.get(layout.TOKENS)
    in_steps = any(kind.in_steps for kind in found.layered.values())
    # A prompt longer than the sequence is no prompt length; it is kept as an extra value.
    return in_steps or (_is_token_array(tokens) and value <= _length(tokens))


def _length(tokens: Any) -> int:
    return len(tokens.data if isinstance(tokens, TorchValue) else tokens)


def _layered(
    kind: str, value: Any, layers: tuple[int, ...] | None, *, sites_known: bool
) -> LayeredArrays:
    if not isinstance(value, (list, tuple)):
        message = (
            f"field {kind!r} is a {type(value).__name__}, expected a list with one array per layer"
        )
        if isinstance(value, (np.ndarray, TorchValue)):
            message += "; use list(array) for one array per layer"
        raise ConversionError(message)
    wanted = range(len(value)) if layers is None or not value else layers
    missing = [layer for layer in wanted if layer >= len(value)]
    if missing:
        message = (
            f"field {kind!r}: layer {missing[0]} was asked for, but there are {len(value)} layers "
            f"(0 to {len(value) - 1}); choose among these"
        )
        raise ConversionError(message)
    has_sites = sites_known and kind == layout.HIDDEN_STATES
    arrays = tuple(
        _layer(kind, layer, value[layer], _site(layer, len(value)) if has_sites else None)
        for layer in wanted
    )
    if len({isinstance(each.array, StepArrays) for each in arrays}) > 1:
        message = (
            f"field {kind!r} mixes arrays and lists of generation steps; expected one or the other "
            "for all layers"
        )
        raise ConversionError(message)
    sequence: Literal["list", "tuple"] = "list" if isinstance(value, list) else "tuple"
    return LayeredArrays(arrays, sequence)


def _site(layer: int, num_layers: int) -> str:
    """Where old extractors took a hidden state: transformers returns the last one normed."""
    return layout.SITE_FINAL_NORM if layer == num_layers - 1 else layout.SITE_BLOCK_OUTPUT


def _layer(kind: str, layer: int, value: Any, site: str | None) -> LayerArray:
    place = f"field {kind!r}, layer {layer}"
    name = layout.layer_name(layer)
    if isinstance(value, (list, tuple)):
        steps = [_typed(step, f"{place}, step {number}") for number, step in enumerate(value)]
        containers = {container for _, container in steps}
        if len(containers) > 1:
            message = f"{place}: steps mix torch tensors and numpy arrays"
            raise ConversionError(message)
        sequence: Literal["list", "tuple"] = "list" if isinstance(value, list) else "tuple"
        array = StepArrays(tuple(step for step, _ in steps), sequence)
        return LayerArray(name, array, site, next(iter(containers), None))
    typed, container = _typed(value, place)
    return LayerArray(name, typed, site, container)


def _typed(value: Any, place: str) -> tuple[TypedArray, Container | None]:
    if isinstance(value, TorchValue):
        if value.dtype not in FLOAT_TYPES:
            message = f"{place}: torch dtype is {value.dtype}, expected {', '.join(FLOAT_TYPES)}"
            raise ConversionError(message)
        return TypedArray(value.data, value.dtype), "torch"
    if not isinstance(value, np.ndarray):
        message = (
            f"{place}: found {type(value).__name__}, expected a numpy array, a torch tensor, or "
            "a list of them (generation steps)"
        )
        raise ConversionError(message)
    try:
        return TypedArray.of(value), None
    except ConversionError as error:
        message = f"{place}: {error}"
        raise ConversionError(message) from error
