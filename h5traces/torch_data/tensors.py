"""Stored arrays as tensors: chosen layers and tokens, in a chosen type, with few copies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from h5traces.archive.stored_sample import MOST_AHEAD_NBYTES
from h5traces.archive.token_axis import NoAnswerError, TokenAxis
from h5traces.archive.torch_values import to_tensor
from h5traces.arguments import checked_options
from h5traces.errors import DatasetError, LayerIndexError
from h5traces.format.entries import carrier_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from h5traces.archive.token_axis import Chosen
    from h5traces.archive.trace import Trace
    from h5traces.format.dtypes import TypedArray

TokenChoice = Literal["all", "answer", "last", "mean", "answer_mean"]
NonFinite = Literal["error", "keep"]

TOKEN_AXES = ("token", "query")
# These leave no token axis.
_REDUCED: frozenset[TokenChoice] = frozenset({"last", "mean", "answer_mean"})


@checked_options
@dataclass(frozen=True, slots=True)
class Tokens:
    """Which tokens of a sample are taken, or how they are pooled.

    Attributes
    ----------
    take
        ``all``; ``answer``, the tokens after the prompt; ``last``; ``mean``; ``answer_mean``.
    prompt_lens
        Tokens of the prompt by sample id, where archives do not have them.
    """

    take: TokenChoice = "all"
    prompt_lens: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Preparation:
    """Which parts of a sample become tensors; options as for `TraceDataset`."""

    layers: tuple[int, ...]
    # False for one layer given by its bare number.
    has_layer_axis: bool
    tokens: Tokens
    dtype: torch.dtype | None
    non_finite: NonFinite

    def axes(self, stored: tuple[str, ...]) -> tuple[str, ...]:
        """Names of a tensor's axes, from those of one layer's stored array."""
        reduced = TOKEN_AXES if self.tokens.take in _REDUCED else ()
        kept = [axis for axis in stored if axis not in reduced]
        return ("layer", *kept) if self.has_layer_axis else tuple(kept)


def named(trace: Trace) -> str:
    """Shard, place in it and sample id, for messages."""
    return f"{trace._stored.place} (sample id {trace.metadata.sample_id!r})"


def read_layer(trace: Trace, kind: str, layer: int) -> torch.Tensor:
    """One layer's array of a trace: reads its chunks and nothing else."""
    typed = _typed_layer(trace, kind, layer)
    return to_tensor(typed.values, typed.dtype)


def _typed_layer(trace: Trace, kind: str, layer: int) -> TypedArray:
    name = trace._stored.array_name(kind, layer)
    if layer not in trace._stored.stored_layers(kind):
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
    return typed


def read_tensor(
    trace: Trace, kind: str, axes: tuple[str, ...], preparation: Preparation
) -> torch.Tensor:
    """The layers and tokens of one kind of a trace as one tensor.

    `axes` are those of one layer's stored array; the result has those of `Preparation.axes`.
    """
    stored = trace._stored
    names = [stored.array_name(kind, layer) for layer in preparation.layers]
    paths = [path for path in stored.layer_paths(kind, names) if path in stored.objects]
    most = None if preparation.tokens.take == "all" else MOST_AHEAD_NBYTES
    with stored.read_ahead(paths, 1, together=True, most_nbytes=most):
        found = _tensor(trace, kind, axes, preparation)
    _check_finite(trace, kind, found, preparation)
    return found


def _tensor(
    trace: Trace, kind: str, axes: tuple[str, ...], preparation: Preparation
) -> torch.Tensor:
    layers, take = preparation.layers, preparation.tokens.take
    read = partial(_read_taken, trace, kind, axes, preparation=preparation)
    if not preparation.has_layer_axis:
        taken = read(layers[0])
        if take == "all" and preparation.dtype in (None, taken.dtype):
            return taken
        # A view of a few tokens would keep the whole array alive, and send it between processes:
        # cast and copy in one pass.
        return torch.empty(taken.shape, dtype=preparation.dtype or taken.dtype).copy_(taken)
    arrays: Iterable[torch.Tensor] = map(read, layers)
    if take == "all":
        typed = [_typed_layer(trace, kind, layer) for layer in layers]
        whole = _in_one_piece(typed)
        if whole is not None:
            return whole if preparation.dtype is None else whole.to(preparation.dtype)
        arrays = (to_tensor(each.values, each.dtype) for each in typed)
    stacked: torch.Tensor | None = None
    for position, (layer, taken) in enumerate(zip(layers, arrays, strict=True)):
        dtype = preparation.dtype or taken.dtype
        if stacked is None:
            stacked = torch.empty((len(layers), *taken.shape), dtype=dtype)
        if taken.shape != stacked.shape[1:] or dtype != stacked.dtype:
            message = (
                f"{named(trace)}: layer {layer} of {kind} is {tuple(taken.shape)} {taken.dtype}, "
                f"layer {layers[0]} is {tuple(stacked.shape[1:])} {stacked.dtype}; "
                "they cannot be stacked: choose layers= that are alike, and a dtype="
            )
            raise DatasetError(message)
        stacked[position] = taken
    assert stacked is not None  # `check_layers` rejects an empty choice of layers
    return stacked


def _in_one_piece(layers: list[TypedArray]) -> torch.Tensor | None:
    """All layers as one tensor that shares their memory; None unless they lie there in order."""
    first = layers[0].values
    start, nbytes = first.ctypes.data, first.nbytes
    for number, each in enumerate(layers):
        values = each.values
        is_alike = (values.shape, each.dtype) == (first.shape, layers[0].dtype)
        follows = values.ctypes.data == start + number * nbytes and values.flags.c_contiguous
        if not (is_alike and follows and values.base is first.base is not None):
            return None
    shape, strides = (len(layers), *first.shape), (nbytes, *first.strides)
    return to_tensor(as_strided(first, shape, strides), layers[0].dtype)


def _read_taken(
    trace: Trace, kind: str, axes: tuple[str, ...], layer: int, *, preparation: Preparation
) -> torch.Tensor:
    """One layer's array, cut to the chosen tokens; a view where possible."""
    take = preparation.tokens.take
    if take != "all" and trace._stored.recomputes(kind):
        return _recomputed(trace, kind, axes, layer, preparation)
    array = read_layer(trace, kind, layer)
    if take == "all":
        return array
    if array.ndim != len(axes):
        message = (
            f"{named(trace)}: layer {layer} of {kind} has {array.ndim} axes, expected {len(axes)}: "
            f"{', '.join(axes)}; run 'h5traces validate' on the shard"
        )
        raise DatasetError(message)
    tokens = TokenAxis.of(trace, axes, tuple(array.shape))
    if tokens is None:
        message = (
            f"{named(trace)}: {kind} has the axes {', '.join(axes)} and none of tokens; use "
            "tokens='all'"
        )
        raise DatasetError(message)
    axis = next(number for number, name in enumerate(axes) if name in TOKEN_AXES)
    if take in ("answer", "answer_mean"):
        array = _chosen(array, axis, answer_rows(trace, tokens, preparation.tokens))
    else:
        array = _chosen(array, axis, tokens.rows)
    if take == "answer":
        return array
    if not array.shape[axis]:
        raise DatasetError(_no_tokens(trace, kind, take))
    if take == "last":
        return array.select(axis, -1)
    # Sums of float16 numbers overflow in float16.
    wide = torch.float64 if array.dtype == torch.float64 else torch.float32
    return array.mean(axis, dtype=wide).to(preparation.dtype or array.dtype)


def _recomputed(
    trace: Trace, kind: str, axes: tuple[str, ...], layer: int, preparation: Preparation
) -> torch.Tensor:
    """The same of attention that follows from queries and keys: of these queries only."""
    stored, take = trace._stored, preparation.tokens.take
    name = stored.array_name(kind, layer)
    shape = stored.attention_shape(name)
    tokens = TokenAxis.of(trace, axes, shape)
    assert tokens is not None  # queries
    is_answer = take in ("answer", "answer_mean")
    chosen = answer_rows(trace, tokens, preparation.tokens) if is_answer else tokens.rows
    rows = np.arange(shape[1])[chosen]
    if take == "answer":
        return torch.from_numpy(stored.attention(name, rows=rows))
    if not len(rows):
        raise DatasetError(_no_tokens(trace, kind, take))
    if take == "last":
        return torch.from_numpy(stored.attention(name, rows=rows[-1:])[:, 0])
    total = sum(
        block.sum(axis=1, dtype=np.float64) for _, block in stored.attention_blocks(name, rows)
    )
    return torch.from_numpy((total / len(rows)).astype(np.float32))


def _no_tokens(trace: Trace, kind: str, take: TokenChoice) -> str:
    return (
        f"{named(trace)}: {kind} holds no tokens for tokens={take!r}; leave the sample out with "
        "indices="
    )


def _chosen(array: torch.Tensor, axis: int, chosen: Chosen) -> torch.Tensor:
    """The chosen entries of an axis; a view where they lie side by side."""
    if isinstance(chosen, slice):
        if chosen.start is None:
            return array
        start, stop, _ = chosen.indices(array.shape[axis])
        return array.narrow(axis, start, max(0, stop - start))
    return array.index_select(axis, torch.from_numpy(chosen))


def answer_rows(trace: Trace, tokens: TokenAxis, choice: Tokens) -> Chosen:
    """The rows of the answer of a trace, by the prompt's stored length or that of the user."""
    prompt_lens, sample_id = choice.prompt_lens, trace.metadata.sample_id
    stated = prompt_lens.get(sample_id) if prompt_lens is not None and sample_id else None
    try:
        return tokens.answer(trace, stated)
    except NoAnswerError as error:
        message = (
            f"{named(trace)}: {error}; pass tokens=Tokens('answer', prompt_lens={{sample_id: "
            "tokens}) with the prompt's length, or take tokens='all', 'last' or 'mean'"
        )
        raise DatasetError(message) from error


def token_axis(trace: Trace, kind: str, axes: tuple[str, ...], layer: int) -> TokenAxis | None:
    """The token axis of a kind's stored arrays; None if they have none."""
    path = f"{kind}/{trace._stored.array_name(kind, layer)}"
    stored = trace._stored
    shape = stored.entry(path).shape if path in stored.objects else ()
    if stored.recomputes(kind):
        shape = stored.attention_shape(stored.array_name(kind, layer))
    return TokenAxis.of(trace, axes, shape) if len(shape) == len(axes) else None


def _check_finite(trace: Trace, kind: str, values: torch.Tensor, preparation: Preparation) -> None:
    """Raise DatasetError for NaN and infinite values.

    The writer counted those of every array, so only arrays that have some, or that a cast or a mean
    may have given some, are looked at.
    """
    if preparation.non_finite == "keep":
        return
    suspects = [
        layer for layer in preparation.layers if may_be_not_finite(trace, kind, layer, values.dtype)
    ]
    if suspects and not bool(values.isfinite().all()):
        message = (
            f"{named(trace)}: {kind} of layers {suspects}: values are NaN or infinite; leave the "
            "sample out with indices=, or pass non_finite='keep'"
        )
        raise DatasetError(message)


def may_be_not_finite(trace: Trace, kind: str, layer: int, dtype: torch.dtype) -> bool:
    """Whether one layer's array had NaN or infinite values when written, or a cast may make some.

    A sample without those counts had none: the writer stores only counts above zero.
    """
    if trace._stored.recomputes(kind):
        return True
    entry = trace._stored.entry(f"{kind}/{trace._stored.array_name(kind, layer)}")
    counted = bool(entry.attrs.get("num_nan") or entry.attrs.get("num_inf"))
    return counted or carrier_dtype(entry.dtype).itemsize > dtype.itemsize
