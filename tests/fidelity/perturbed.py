"""Small archives and copies of them that lost precision, written by the real writer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

import h5traces
from h5traces.format import layout
from h5traces.format.dtypes import TypedArray
from h5traces.format.record import LayerArray, LayeredArrays, TraceRecord
from h5traces.precision.attention import HeadMean, from_levels, to_levels
from h5traces.precision.channel_steps import StepFormat, from_steps, to_steps
from h5traces.precision.scales import ChannelAccumulator, channel_scale
from h5traces.writing.options import PrecisionOptions, TargetOptions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

HIDDEN, HEADS, LAYERS = 8, 2, (0, 1, 5)
LEVELS = 255


@dataclass(frozen=True)
class Sample:
    """A sample of arrays by dataset name."""

    sample_id: str | None
    states: dict[str, np.ndarray] = field(default_factory=dict)
    attentions: dict[str, np.ndarray] = field(default_factory=dict)
    means: dict[str, np.ndarray] = field(default_factory=dict)
    generation: int | None = None
    num_tokens: int | None = None

    def record(self) -> TraceRecord:
        kinds = {
            layout.HIDDEN_STATES: self.states,
            layout.ATTENTIONS: self.attentions,
            layout.ATTENTION_MEAN: self.means,
        }
        layered = {kind: _layered(arrays) for kind, arrays in kinds.items() if arrays}
        return TraceRecord(
            sample_id=self.sample_id,
            generation_index=self.generation,
            fields=(*layered, *(["question_id"] if self.sample_id else [])),
            layered=layered,
            tokens=None if self.num_tokens is None else np.arange(self.num_tokens),
        )


def _layered(arrays: dict[str, np.ndarray]) -> LayeredArrays:
    return LayeredArrays(
        tuple(LayerArray(name=name, array=TypedArray.of(each)) for name, each in arrays.items())
    )


def write(
    path: Path,
    samples: Sequence[Sample],
    *,
    shard_samples: int | None = None,
    **facts: Any,
) -> Path:
    """An archive of the samples, or a folder of shards."""
    target = TargetOptions(shard_samples=shard_samples)
    name = f"{path}/" if shard_samples is not None else path
    precision = PrecisionOptions(dtype="auto")
    with h5traces.create(name, spool=False, precision=precision, target=target, **facts) as writer:
        for each in samples:
            writer.append(each.record())
    return path


def make(num_samples: int = 4, seed: int = 0, **change: Any) -> list[Sample]:
    """Samples with a dead channel, a massive first token, repeated tokens and zeros."""
    rng = np.random.default_rng(seed)
    return [
        replace(_sample(rng, f"q{index}", 4 + int(rng.integers(0, 4))), **change)
        for index in range(num_samples)
    ]


def _sample(rng: np.random.Generator, sample_id: str, tokens: int) -> Sample:
    states, attentions = {}, {}
    values = rng.standard_normal((tokens, HIDDEN)) * np.geomspace(0.1, 10, HIDDEN)
    for layer in LAYERS:
        values = values + 0.3 * rng.standard_normal((tokens, HIDDEN))
        values[:, 2] = 0.75
        values[0, 3] = 900.0
        values[2, 5] = 0.0
        values[-1] = values[-2]
        weights = np.exp(2 * rng.standard_normal((HEADS, tokens, tokens))) * np.tri(tokens)
        weights /= weights.sum(-1, keepdims=True)
        states[layout.layer_name(layer)] = values.astype(np.float16)
        attentions[layout.layer_name(layer)] = weights.astype(np.float16)
    return Sample(sample_id, states, attentions)


def in_steps(samples: Sequence[Sample], step: float) -> list[Sample]:
    """The samples with states in steps of so many sigma, and weights on a square-root scale."""
    form = StepFormat.of(step)
    scales = {}
    for name in samples[0].states:
        accumulator = ChannelAccumulator()
        for each in samples:
            accumulator.add(each.states[name])
        scales[name] = channel_scale(accumulator.statistics(), step)

    def states(name: str, values: np.ndarray) -> np.ndarray:
        stored, beyond = to_steps(values, scales[name], step)
        restored = from_steps(stored, scales[name], form.zero_point, form.spacing, as_half=True)
        restored.reshape(-1)[beyond] = values.reshape(-1)[beyond]
        return restored

    return [
        replace(
            each,
            states={name: states(name, values) for name, values in each.states.items()},
            attentions={name: on_levels(values) for name, values in each.attentions.items()},
        )
        for each in samples
    ]


def on_levels(values: np.ndarray, *, as_half: bool = True) -> np.ndarray:
    """Weights on a square-root scale."""
    return from_levels(to_levels(values)[0], LEVELS, as_half=as_half)


def with_means_only(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the mean of their attentions over heads, on a square-root scale, instead."""
    return [
        replace(
            each,
            attentions={},
            means={
                name: on_levels(HeadMean(TypedArray.of(values)).load().values, as_half=False)
                for name, values in each.attentions.items()
            },
        )
        for each in samples
    ]
