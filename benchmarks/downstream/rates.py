"""Bits per value and errors of hidden states, and where the bits go."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from downstream.coding import chunk_nbytes, exceptions_nbytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from downstream.capturing import Trace
    from downstream.coding import Coder
    from h5traces.precision.scales import ChannelStatistics

# Bits of a Gaussian in steps of one sigma: log2(2 pi e) / 2, as the formula has it.
FORMULA_BITS: Final = 2.05
# A channel that varies by so much less than its sigma, which has a floor, is dead.
_DEAD: Final = 100
# Values of a chunk in an archive of Llama-2-7B's shape: 43 tokens, 4096 channels.
POOLED_VALUES: Final = 43 * 4096


def formula(step: float) -> float:
    """Bits per value that steps of so many sigma should take."""
    return FORMULA_BITS - math.log2(step)


def pooled(traces: Sequence[Trace]) -> list[NDArray[np.float16]]:
    """All tokens one behind the other, cut anew: ``(layers, tokens, hidden)`` each.

    A chunk has as many values as one of a large model, where Huffman tables weigh nothing. First
    tokens are left out: a sample has one, and many equal ones would compress to nothing.
    """
    everything = np.concatenate([each.states[:, 1:] for each in traces], axis=1)
    num_pieces = max(1, round(everything[0].size / POOLED_VALUES))
    return np.array_split(everything, num_pieces, axis=1)


@dataclass(slots=True)
class _Count:
    """What storing some samples took, layer by layer."""

    nbytes: NDArray[np.int64]
    values: NDArray[np.int64]
    exceptions: int = 0
    exceptions_nbytes: int = 0
    kept_exact: int = 0
    numbers: list[list[NDArray[Any]]] = field(default_factory=list)

    @property
    def bits(self) -> float:
        total = int(self.nbytes.sum()) + self.exceptions_nbytes
        return 8 * total / int(self.values.sum())


def _count(coder: Coder, samples: Sequence[NDArray[np.float16]]) -> _Count:
    num_layers = len(samples[0])
    found = _Count(np.zeros(num_layers, np.int64), np.zeros(num_layers, np.int64))
    for states in samples:
        layers = [coder.encode(layer, each) for layer, each in enumerate(states)]
        number, nbytes = exceptions_nbytes(layers)
        found.exceptions += number
        found.exceptions_nbytes += nbytes
        found.kept_exact += sum(each.kept_exact is not None for each in layers)
        found.nbytes += [chunk_nbytes(each.values) for each in layers]
        found.values += [each.values.size for each in layers]
        found.numbers.append([each.values for each in layers])
    return found


def measure_rate(coder: Coder, traces: Sequence[Trace]) -> dict[str, Any]:
    """Bits per value, sample by sample and in chunks of a large model's size.

    Parameters
    ----------
    coder
        The encoding.
    traces
        What calibration has not seen.
    """
    by_sample = _count(coder, [each.states for each in traces])
    in_large = _count(coder, pooled(traces))
    found: dict[str, Any] = {
        "bits_per_sample": by_sample.bits,
        "bits_pooled": in_large.bits,
        "bits_pooled_by_layer": (8 * in_large.nbytes / in_large.values).tolist(),
        "kept_exact": by_sample.kept_exact,
        "exceptions_per_million": 1e6 * by_sample.exceptions / int(by_sample.values.sum()),
    }
    step = coder.precision.step
    if step is not None:
        found["formula"] = formula(step)
        for name in ("bits_per_sample", "bits_pooled"):
            found[f"{name}_deviation"] = found[name] / found["formula"] - 1
        found["parts"] = _parts(coder, traces, in_large)
    return found


def _parts(coder: Coder, traces: Sequence[Trace], count: _Count) -> dict[str, float]:
    """What the bits consist of; the parts add up to the bits of pooled chunks.

    ``finer`` is what steps cost that are finer than asked for, ``spread`` what it costs that
    channels vary more here than in calibration (both without dead channels), ``shape`` what other
    distributions than a Gaussian cost, ``coder`` what the stored chunks have beyond the entropy of
    their numbers, and ``exceptions`` is their table.
    """
    step = coder.precision.step
    assert step is not None
    columns = []
    for layer in range(len(traces[0].states)):
        scale = coder.scale(layer)
        assert scale is not None
        rows = np.concatenate([each.states[layer, 1:] for each in traces]).astype(np.float64)
        deviation = rows.std(axis=0)
        varies = deviation > scale.sigma / _DEAD
        finer = np.log2(step * scale.sigma.astype(np.float64) / scale.step)[varies].mean()
        spread = np.log2(deviation[varies] / scale.sigma[varies]).mean()
        numbers = np.concatenate([each[layer].reshape(-1) for each in count.numbers])
        bits = 8 * count.nbytes[layer] / count.values[layer]
        columns.append((finer, spread, entropy(numbers), bits))
    finer, spread, order0, bits = np.mean(columns, axis=0)
    return {
        "formula": formula(step),
        "finer": float(finer),
        "spread": float(spread),
        "shape": float(order0 - formula(step) - finer - spread),
        "coder": float(bits - order0),
        "exceptions": 8 * count.exceptions_nbytes / int(count.values.sum()),
    }


def entropy(numbers: NDArray[Any]) -> float:
    """Order-0 entropy in bits."""
    counts = np.unique(numbers, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def measure_errors(
    coder: Coder, traces: Sequence[Trace], differences: Sequence[ChannelStatistics]
) -> dict[str, Any]:
    """Errors against float16, in sigma of each channel.

    Parameters
    ----------
    coder
        The encoding.
    traces
        What calibration has not seen.
    differences
        Statistics of the differences of neighbouring layers, of calibration.
    """
    num_layers = len(traces[0].states)
    sigmas = [coder.sigma(layer) for layer in range(num_layers)]
    squares, largest = np.zeros(num_layers), 0.0
    between = np.zeros(len(differences))
    for trace in traces:
        errors = coder.restore_all(trace.states).astype(np.float64) - trace.states
        for layer, error in enumerate(errors):
            relative = error / sigmas[layer]
            squares[layer] += np.square(relative).mean(axis=1).sum()
            largest = max(largest, float(np.abs(relative).max()))
        for layer, each in enumerate(differences):
            relative = (errors[layer + 1] - errors[layer]) / each.sigma
            between[layer] += np.square(relative).mean(axis=1).sum()
    num_tokens = sum(len(each.tokens) for each in traces)
    step = coder.precision.step
    return {
        "nrmse": float(np.sqrt(squares.mean() / num_tokens)),
        "nrmse_by_layer": np.sqrt(squares / num_tokens).tolist(),
        "max_error_sigma": largest,
        "bound_sigma": None if step is None else step / 2,
        "nrmse_of_differences": np.sqrt(between / num_tokens).tolist(),
    }
