"""Attention averaged over heads: what graphs are built of, at a thirtieth of the size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from h5traces.format import layout
from h5traces.format.dtypes import TypedArray, cast_values
from h5traces.format.record import LayerArray, LayeredArrays, StepArrays
from h5traces.format.scratch import Scratch

if TYPE_CHECKING:
    from h5traces.format.dtypes import FloatType
    from h5traces.format.precision import Precision
    from h5traces.format.record import ArraySource, TraceRecord

# Reduction of the kind that holds it, and what it was made by.
MEAN: Final = "mean"
DERIVATION: Final = "head-mean 1"
_HEAD_AXES: Final = 3

_WEIGHTS: Final = Scratch()


@dataclass(frozen=True, slots=True)
class HeadMean:
    """The mean of attention weights ``(heads, query, key)`` over heads, computed when asked for."""

    attention: ArraySource

    @property
    def shape(self) -> tuple[int, ...]:
        """Queries and keys."""
        return self.attention.shape[1:]

    @property
    def dtype(self) -> FloatType:
        """Always float32."""
        return "float32"

    def load(self) -> TypedArray:
        """The mean of the weights as float16 holds them, so that it is the same of an archive."""
        stored = cast_values(self.attention.load(), "float16").values
        weights = _WEIGHTS.take(4 * stored.size).view(np.float32).reshape(stored.shape)
        np.copyto(weights, stored)
        mean = weights.sum(axis=0)
        mean /= np.float32(max(1, len(stored)))
        return TypedArray(mean, "float32")


def with_head_mean(record: TraceRecord, precision: Precision) -> TraceRecord:
    """The record with the mean of its attentions beside them, or in their place.

    Attentions in generation steps, and those without an axis of heads, stay as they are.
    """
    attentions = record.layered.get(layout.ATTENTIONS)
    if precision.head_mean == "none" or attentions is None or not _has_heads(attentions):
        return record
    means = tuple(
        LayerArray(name=each.name, array=HeadMean(each.array))
        for each in attentions.arrays
        if not isinstance(each.array, StepArrays)
    )
    layered = dict(record.layered)
    fields = record.fields
    known = layered.get(layout.ATTENTION_MEAN)
    # Of heads that lost precision before, the mean that was stored beside them is the better one.
    mean = known if known is not None and known.reduction == MEAN else None
    if precision.head_mean == "only":
        del layered[layout.ATTENTIONS]
        renamed = {layout.ATTENTIONS: layout.ATTENTION_MEAN}
        fields = tuple(renamed.get(each, each) for each in fields)
    layered[layout.ATTENTION_MEAN] = mean or LayeredArrays(means, attentions.sequence, MEAN)
    return record.model_copy(update={"layered": layered, "fields": fields})


def _has_heads(attentions: LayeredArrays) -> bool:
    return not attentions.in_steps and all(
        len(each.array.shape) == _HEAD_AXES
        for each in attentions.arrays
        if not isinstance(each.array, StepArrays)
    )
