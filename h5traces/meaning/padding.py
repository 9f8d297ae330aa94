"""Padding: positions that an attention mask marks at the ends of a sequence are cut, or kept.

A mask is the field ``attention_mask`` of transformers: 1 (or True) for a token, 0 for a pad, of
shape ``(positions,)`` or ``(1, positions)``. Only zeros at the ends are padding. A mask of ones
says nothing; every other mask that cannot be used is kept as a further field, with a finding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.format import layout
from h5traces.format.dtypes import TypedArray, bfloat16_to_float32
from h5traces.format.record import StepArrays
from h5traces.format.values import TorchValue
from h5traces.meaning.axes import data_of
from h5traces.meaning.checks import Finding

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.format.record import LayerArray, LayeredArrays, TraceRecord
    from h5traces.meaning.options import ReadingOptions

    Mask = NDArray[np.bool_]

# Fields that transformers gives one value per position, beside the mask itself.
_ALONG_TOKENS: Final = ("input_ids", "token_type_ids", "position_ids", "special_tokens_mask")
_POSITIONS: Final = frozenset({"token", "query", "key"})
_MASK: Final = layout.ATTENTION_MASK


def with_padding_treated(record: TraceRecord, options: ReadingOptions) -> TraceRecord:
    """The record without padded positions, or with its mask as a field; findings say which.

    Parameters
    ----------
    record
        Its arrays are in memory; they are sliced, not copied.
    options
        ``keep_padding`` keeps the positions.
    """
    value = record.extra.get(_MASK)
    if value is None:
        return record
    mask = _mask_of(value, record)
    if isinstance(mask, str):
        return _found(record, "mask-unused", mask) if mask else record
    kept = np.flatnonzero(mask)
    if len(kept) == len(mask):
        return record
    ends = slice(int(kept[0]), int(kept[-1]) + 1)
    if not mask[ends].all():
        number = int((~mask[ends]).sum())
        stored = record.model_copy(update={"attention_mask": mask.astype(np.uint8)})
        message = "{number position} masked between others"
        return _found(stored, "mask-with-holes", message, number)
    number = len(mask) - len(kept)
    if options.keep_padding:
        stored = record.model_copy(update={"attention_mask": mask.astype(np.uint8)})
        return _found(stored, "padding-kept", "{number padded position} kept", number)
    cut = _cut(record, mask, ends)
    message = f"{{number padded position}} cut {_where(ends, len(mask))}"
    if cut.prompt_len != record.prompt_len:
        message += "; prompt_length counts without them"
    if whole := _left_whole(cut, len(mask)):
        message += f"; further fields of that length are left whole: {', '.join(whole)}"
    return _found(cut, "padding-cut", message, number)


def num_cut(record: TraceRecord) -> int:
    """How many padded positions were cut from a record when it was read."""
    return sum(each.number for each in record.findings if each.check == "padding-cut")


def _found(record: TraceRecord, check: str, message: str, number: int = 0) -> TraceRecord:
    finding = Finding(check, _MASK, message, number)
    return record.model_copy(update={"findings": (*record.findings, finding)})


def _where(ends: slice, length: int) -> str:
    left, right = ends.start > 0, ends.stop < length
    return "at both ends" if left and right else "on the left" if left else "on the right"


def _mask_of(value: Any, record: TraceRecord) -> Mask | str:
    """The mask by position; why it is none for this record, empty if that needs no word."""
    array = value.data if isinstance(value, TorchValue) else value
    if isinstance(value, TorchValue) and value.dtype == "bfloat16":
        array = bfloat16_to_float32(value.data)
    if isinstance(array, (list, tuple)):
        array = _array_of(array)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        return f"a {type(value).__name__} is not a mask of 0 and 1"
    if array.ndim != 1 and array.shape[:-1] != (1,):
        is_causal = array.ndim > 1 and array.shape[-1] == array.shape[-2] and _is_causal(array)
        return "" if is_causal else f"its shape has {array.ndim} axes, expected (positions,)"
    flat = array.reshape(-1)
    if not ((flat == 0) | (flat == 1)).all():
        return "it holds other values than 0 and 1"
    mask: Mask = flat.astype(bool)
    length = _num_positions(record)
    if len(mask) != length and len(mask) == record.prompt_len:
        # generate() continues the mask of its prompt with ones.
        mask = np.concatenate([mask, np.ones(max(0, length - len(mask)), dtype=bool)])
    if len(mask) != length or not _fits(record, length):
        return "" if mask.all() else "its length is not the number of stored positions"
    if not mask.any():
        return "it masks every position"
    return mask


def _array_of(value: list[Any] | tuple[Any, ...]) -> NDArray[Any] | None:
    try:
        return np.asarray(value)
    except (ValueError, TypeError):
        return None


def _is_causal(array: NDArray[Any]) -> bool:
    """Whether a mask of one row per position lets every position see all before it and itself."""
    first = array.reshape(-1, *array.shape[-2:])[0]
    # Masks that are added to scores have 0 where keys are seen.
    seen = first == 0 if first.min(initial=0) < 0 else first != 0
    return bool(np.array_equal(seen, np.tri(len(first), dtype=bool)))


def _num_positions(record: TraceRecord) -> int:
    """Length of the sequence: of its tokens, else of the longest axis of positions."""
    if record.tokens is not None:
        return len(record.tokens)
    return max((length for _, length in _lengths(record)), default=0)


def _fits(record: TraceRecord, length: int) -> bool:
    """Whether every axis has a length of which the mask says which positions are padding.

    Arrays may lack the last position, or hold the last one alone.
    """
    return all(each in (length, length - 1, 1) for _, each in _lengths(record))


def _lengths(record: TraceRecord) -> list[tuple[str, int]]:
    """Names and lengths of all axes of positions; -1 for generation steps, which no mask fits."""
    found: list[tuple[str, int]] = []
    for kind, layered in record.layered.items():
        for each in layered.arrays:
            if isinstance(each.array, StepArrays) or not isinstance(each.array, TypedArray):
                found.append(("steps", -1))
                continue
            shape, axes = each.array.shape, layered_axes(kind, layered)
            if len(shape) == len(axes):
                pairs = zip(axes, shape, strict=True)
                found += [(name, length) for name, length in pairs if name in _POSITIONS]
    return found


def layered_axes(kind: str, layered: LayeredArrays) -> tuple[str, ...]:
    """Axes of one layer's array; empty if unknown."""
    return layout.axes_of_kind(kind, layered.axes) or ()


def _cut(record: TraceRecord, mask: Mask, ends: slice) -> TraceRecord:
    length = len(mask)
    layered = {
        kind: replace(
            layers,
            arrays=tuple(
                _cut_layer(each, layered_axes(kind, layers), ends, length) for each in layers.arrays
            ),
        )
        for kind, layers in record.layered.items()
    }
    along = {*_ALONG_TOKENS, layout.TOKENS, layout.TOKENS_DECODED}
    extra = {
        key: _cut_value(value, ends, length) if key in along else value
        for key, value in record.extra.items()
    }
    # It may be the mask of the prompt alone.
    masked = _size(extra[_MASK])
    extra[_MASK] = _cut_value(extra[_MASK], slice(ends.start, min(ends.stop, masked)), masked)
    update: dict[str, Any] = {"layered": layered, "extra": extra}
    if record.tokens is not None:
        update["tokens"] = record.tokens[ends]
    if record.tokens_decoded is not None and len(record.tokens_decoded) == length:
        update["tokens_decoded"] = record.tokens_decoded[ends]
    if record.prompt_len is not None:
        update["prompt_len"] = prompt_without_pads(record.prompt_len, mask)
    prompt = extra.get(layout.PROMPT_LENGTH)
    if isinstance(prompt, (int, np.integer)) and not isinstance(prompt, bool) and prompt >= 0:
        extra[layout.PROMPT_LENGTH] = type(prompt)(prompt_without_pads(int(prompt), mask))
    return record.model_copy(update=update)


def prompt_without_pads(prompt_len: int, mask: Mask) -> int:
    """The length of the prompt without its pads; one that ends in padding counts tokens already."""
    left = int(mask[:prompt_len].sum())
    return left if left or not prompt_len else min(prompt_len, int(mask.sum()))


def _cut_layer(layer: LayerArray, axes: tuple[str, ...], ends: slice, length: int) -> LayerArray:
    array = layer.array
    if not isinstance(array, TypedArray) or len(array.shape) != len(axes):
        return layer
    cuts = tuple(
        _cut_of(size, ends, length) if name in _POSITIONS else slice(None)
        for name, size in zip(axes, array.shape, strict=True)
    )
    return replace(layer, array=TypedArray(array.values[cuts], array.dtype))


def _cut_of(size: int, ends: slice, length: int) -> slice:
    """The positions that stay of an axis: all of one that holds the last position alone."""
    if size == length:
        return ends
    return slice(ends.start, min(ends.stop, size)) if size == length - 1 > 1 else slice(None)


def _cut_value(value: Any, ends: slice, length: int) -> Any:
    """A field with one value per position, ``(positions,)`` or ``(1, positions)``, without pads."""
    if isinstance(value, TorchValue):
        return replace(value, data=_cut_value(value.data, ends, length))
    if isinstance(value, np.ndarray):
        return value[..., ends] if value.shape in ((length,), (1, length)) else value
    if isinstance(value, (list, tuple)):
        if len(value) == length:
            return value[ends]
        if len(value) == 1 and isinstance(value[0], (list, tuple)) and len(value[0]) == length:
            inner = value[0][ends]
            return [inner] if isinstance(value, list) else (inner,)
    return value


def _size(value: Any) -> int:
    """Number of values of a mask."""
    return int(np.size(value.data if isinstance(value, TorchValue) else value))


def _left_whole(record: TraceRecord, length: int) -> list[str]:
    """Further fields that are as long as the sequence was, or hold arrays that are."""

    def is_long(value: Any) -> bool:
        is_array = isinstance(value, (np.ndarray, TorchValue))
        return is_array and length in data_of(value).shape

    def is_whole(value: Any) -> bool:
        items = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(items, (list, tuple)):
            return is_long(value)
        return len(items) == length or any(map(is_long, items))

    return [key for key, value in record.extra.items() if is_whole(value)]
