"""Stored arrays as tensors: which layers and tokens, in which type; nothing copied needlessly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from h5traces.archive.torch_values import to_tensor
from h5traces.errors import DatasetError, LayerIndexError
from h5traces.format import layout
from h5traces.format.entries import carrier_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from h5traces.archive.trace import Trace

Tokens = Literal["all", "answer", "last", "mean", "answer_mean"]
NonFinite = Literal["error", "keep"]

TOKENS_CHOICES: tuple[Tokens, ...] = get_args(Tokens)
_TOKEN_AXES = ("token", "query")
# Of these, nothing is left of the token axis.
REDUCED: frozenset[Tokens] = frozenset({"last", "mean", "answer_mean"})


@dataclass(frozen=True, slots=True)
class Selection:
    """What of every trace becomes tensors.

    Attributes
    ----------
    layers
        The model's own layer numbers, in the order of the layer axis.
    has_layer_axis
        False where one layer was asked for by its bare number.
    tokens
        Which tokens, or how they are pooled.
    dtype
        Type of the tensors; None keeps what is stored, bfloat16 included.
    non_finite
        What to do with NaN and infinite values.
    prompt_lens
        Tokens of the prompt by sample id, where archives do not know.
    """

    layers: tuple[int, ...]
    has_layer_axis: bool
    tokens: Tokens
    dtype: torch.dtype | None
    non_finite: NonFinite
    prompt_lens: Mapping[str, int] | None

    def axes(self, stored: tuple[str, ...]) -> tuple[str, ...]:
        """Names of a tensor's axes, from those of one layer's stored array."""
        kept = [axis for axis in stored if axis not in _TOKEN_AXES or self.tokens not in REDUCED]
        return ("layer", *kept) if self.has_layer_axis else tuple(kept)


def named(trace: Trace) -> str:
    """Shard, place in it and sample id, for messages."""
    return f"{trace._stored.place} (sample id {trace.metadata.sample_id!r})"


def read_layer(trace: Trace, kind: str, layer: int) -> torch.Tensor:
    """One layer's array of a trace: reads its chunks and nothing else.

    Raises
    ------
    LayerIndexError
        The trace does not store that layer.
    DatasetError
        It stores generation steps in place of one array.
    """
    name = layout.layer_name(layer)
    if f"{kind}/{name}" not in trace._stored.objects:
        stored = list(trace._stored.stored_layers(kind))
        message = (
            f"{named(trace)}: layer {layer} of {kind} is not stored; stored: {stored or 'none'}; "
            "choose other layers=, or leave the sample out with indices="
        )
        raise LayerIndexError(message)
    typed = trace._stored.typed_layer(kind, name)
    if isinstance(typed, list):
        message = (
            f"{named(trace)}: {kind} are generation steps, as an old extractor kept them, not one "
            "array per layer; extract again, or leave the sample out with indices="
        )
        raise DatasetError(message)
    return to_tensor(typed.values, typed.dtype)


def read_tensor(
    trace: Trace, kind: str, axes: tuple[str, ...], selection: Selection
) -> torch.Tensor:
    """The layers and tokens of one kind of a trace as one tensor.

    Parameters
    ----------
    trace
        The sample.
    kind
        For instance ``hidden_states``.
    axes
        Names of the axes of one layer's stored array.
    selection
        What to take.

    Returns
    -------
    torch.Tensor
        As `Selection.axes` names its axes.

    Raises
    ------
    LayerIndexError, DatasetError
        A layer is missing, layers differ in shape, values are not finite, or tokens cannot be
        told apart.
    """
    span = _span(trace, selection)
    if not selection.has_layer_axis:
        (layer,) = selection.layers
        taken = _read_taken(trace, kind, axes, layer, selection, span)
        whole = selection.tokens == "all" and selection.dtype in (None, taken.dtype)
        # A view of a few tokens would keep the whole array alive, and send it between processes.
        found = taken if whole else _cast(taken, selection.dtype)
        _check_finite(trace, kind, selection.layers, found, selection)
        return found
    stacked: torch.Tensor | None = None
    for position, layer in enumerate(selection.layers):
        taken = _read_taken(trace, kind, axes, layer, selection, span)
        if stacked is None:
            dtype = selection.dtype or taken.dtype
            stacked = torch.empty((len(selection.layers), *taken.shape), dtype=dtype)
        if taken.shape != stacked.shape[1:] or (selection.dtype or taken.dtype) != stacked.dtype:
            message = (
                f"{named(trace)}: layer {layer} of {kind} is {tuple(taken.shape)} {taken.dtype}, "
                f"layer {selection.layers[0]} is {tuple(stacked.shape[1:])} {stacked.dtype}; they "
                "cannot be stacked: choose layers= that are alike, and a dtype="
            )
            raise DatasetError(message)
        stacked[position] = taken
    assert stacked is not None  # `TraceDataset` refuses an empty selection of layers
    _check_finite(trace, kind, selection.layers, stacked, selection)
    return stacked


def _cast(taken: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor of its own memory, cast and copied in one pass."""
    return torch.empty(taken.shape, dtype=dtype or taken.dtype).copy_(taken)


def _read_taken(
    trace: Trace,
    kind: str,
    axes: tuple[str, ...],
    layer: int,
    selection: Selection,
    span: tuple[int, int] | None,
) -> torch.Tensor:
    """One layer's array, cut to the tokens asked for; a view of what was read where it can be."""
    array = read_layer(trace, kind, layer)
    if selection.tokens == "all":
        return array
    if array.ndim != len(axes):
        message = (
            f"{named(trace)}: layer {layer} of {kind} has {array.ndim} axes, expected {len(axes)}: "
            f"{', '.join(axes)}; run 'h5traces validate' on the shard"
        )
        raise DatasetError(message)
    axis = next((number for number, name in enumerate(axes) if name in _TOKEN_AXES), None)
    if axis is None:
        message = (
            f"{named(trace)}: {kind} has the axes {', '.join(axes)} and none of tokens; use "
            "tokens='all'"
        )
        raise DatasetError(message)
    if span is not None:
        array = array.narrow(axis, span[0], span[1] - span[0])
    if selection.tokens == "answer":
        return array
    if not array.shape[axis]:
        message = (
            f"{named(trace)}: {kind} holds no tokens to take tokens={selection.tokens!r} of; leave "
            "the sample out with indices="
        )
        raise DatasetError(message)
    if selection.tokens == "last":
        return array.select(axis, -1)
    # Sums of float16 numbers overflow in float16.
    wide = torch.float64 if array.dtype == torch.float64 else torch.float32
    return array.mean(axis, dtype=wide).to(selection.dtype or array.dtype)


def _span(trace: Trace, selection: Selection) -> tuple[int, int] | None:
    """First and last (exclusive) token of the answer; None where all tokens count."""
    if selection.tokens not in ("answer", "answer_mean"):
        return None
    return answer_span(trace, selection.prompt_lens)


def answer_span(trace: Trace, prompt_lens: Mapping[str, int] | None) -> tuple[int, int]:
    """First and last (exclusive) token of the answer of a trace.

    Raises
    ------
    DatasetError
        The prompt's length is not known, or does not fit.
    """
    metadata = trace.metadata
    prompt_len = metadata.prompt_len
    if prompt_lens is not None and metadata.sample_id is not None:
        prompt_len = prompt_lens.get(metadata.sample_id, prompt_len)
    if prompt_len is None:
        message = (
            f"{named(trace)}: how long the prompt is, is not stored, so its answer cannot be told "
            "apart; pass prompt_lens={sample_id: tokens}, or choose tokens='all', 'last' or 'mean'"
        )
        raise DatasetError(message)
    if metadata.coverage != "full":
        message = (
            f"{named(trace)}: the arrays do not cover exactly the stored tokens (coverage "
            f"{metadata.coverage!r}), so its answer cannot be cut out; use tokens='all'"
        )
        raise DatasetError(message)
    if not 0 <= prompt_len <= metadata.seq_len:
        message = (
            f"{named(trace)}: a prompt of {prompt_len} tokens does not fit a sequence of "
            f"{metadata.seq_len}; correct prompt_lens"
        )
        raise DatasetError(message)
    return prompt_len, metadata.seq_len


def _check_finite(
    trace: Trace,
    kind: str,
    layers: tuple[int, ...],
    values: torch.Tensor,
    selection: Selection,
) -> None:
    """Refuse NaN and infinite values.

    The writer counted those of every array, so only arrays that have some, or values that a cast
    or a mean made, are looked at.
    """
    if selection.non_finite == "keep":
        return
    suspects = [layer for layer in layers if may_be_not_finite(trace, kind, layer, values.dtype)]
    if suspects and not bool(values.isfinite().all()):
        message = (
            f"{named(trace)}: {kind} of layers {suspects}: values are NaN or infinite; leave the "
            "sample out with indices=, or pass non_finite='keep'"
        )
        raise DatasetError(message)


def may_be_not_finite(trace: Trace, kind: str, layer: int, dtype: torch.dtype) -> bool:
    """Whether one layer's array had NaN or infinite values when written, or a cast may make some.

    A sample without those counts had none: the writer notes what is not zero.
    """
    entry = trace._stored.entry(f"{kind}/{layout.layer_name(layer)}")
    counted = bool(entry.attrs.get("num_nan") or entry.attrs.get("num_inf"))
    return counted or carrier_dtype(entry.dtype).itemsize > dtype.itemsize
