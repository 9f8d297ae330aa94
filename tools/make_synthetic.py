#!/usr/bin/env python3
"""Write a legacy batch of synthetic activations in a large model's shape, by default Llama-2-7B's.

The numbers come from a random generator, not from a model: they do not measure Llama-2 or any other
network, and nothing can be learnt from their values. They are made to weigh as much and to compress
as well as real ones, so that sizes and speeds can be measured at a size that cannot lie
in a repository. The generator's constants are calibrated to the real activations of the tiny model
in examples/legacy; --compare shows how well bits per value under gzip 6 and the entropies of the
two byte planes agree.

What is imitated: a residual stream that grows from layer to layer and keeps most of itself
(neighbouring layers correlate at about 0.93), channels and tokens of different scale, a few outlier
channels, one token that carries massive activations, a final norm in the last layer; causal
attention with sinks, previous-token heads, local heads and soft heads that sharpen with depth, and
exact zeros above the diagonal; a prompt prefix that all samples share bit for bit.
"""

from __future__ import annotations

import argparse
import gzip
import math
import pickle
import sys
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

EPILOG: Final = """\
examples:
  ten samples of Llama-2-7B's shape (about 140 MB):
    python tools/make_synthetic.py -o synthetic_llama2-7b-shape_batch_0000.pkl.gz

  how well they match the shipped real activations:
    python tools/make_synthetic.py --num-samples 10 --compare examples/legacy/*.pkl.gz
"""

KINDS: Final = ("hidden_states", "attentions")

# Root mean square of the residual stream behind the first and the last block but one, and of the
# final norm's output: as in the shipped activations, whatever the number of layers.
_FIRST_RMS, _LAST_RMS, _NORM_RMS = 1.85, 3.35, 2.33
# What a block leaves of its input, as correlation of neighbouring layers.
_KEPT = 0.93
# Standard deviations of the logarithms of the channels' and the tokens' scales.
_CHANNEL_SPREAD, _TOKEN_SPREAD = 0.25, 0.22
# Share of a channel's power that is its mean over all tokens.
_MEAN_SHARE = 0.14
_OUTLIER_SHARE, _OUTLIER_SCALE = 1 / 500, 3.0
_MASSIVE_CHANNELS, _MASSIVE_SCALE = 2, 12.0

_QUERY_SIZE = 16
# Spread of attention scores in the first and in the last block; a softmax over wider scores is
# sharper and its small weights spread over more powers of two.
_FIRST_SHARPNESS, _LAST_SHARPNESS = 0.65, 2.2
_SHARPNESS_SPREAD = 0.3

# Lengths are this plus a gamma variable: 43 tokens on average.
_MIN_TOKENS, _MAX_TOKENS, _GAMMA_SHAPE, _GAMMA_SCALE = 20, 100, 2.0, 11.6
_PREFIX_TOKENS: Final = 8
_NUM_TOKEN_IDS: Final = 32000
_WORDS: Final = (
    "the of Which city river king in was a first song film war team play New ? , er ing ly"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model whose activations are imitated."""

    num_layers: int = 32
    hidden_size: int = 4096
    num_heads: int = 32


LLAMA_2_7B: Final = Shape()


class Generator:
    """Makes samples of one imitated model: the same seed, shape and index give the same sample.

    Parameters
    ----------
    shape
        Sizes of the model.
    seed
        Chooses the model and its samples.
    """

    def __init__(self, shape: Shape = LLAMA_2_7B, seed: int = 0) -> None:
        self.shape, self.seed = shape, seed
        rng = np.random.default_rng([seed, 0])
        layers, hidden, heads = shape.num_layers, shape.hidden_size, shape.num_heads
        scale = np.exp(_CHANNEL_SPREAD * rng.standard_normal(hidden))
        outliers = rng.choice(hidden, max(1, round(hidden * _OUTLIER_SHARE)), replace=False)
        scale[outliers] *= _OUTLIER_SCALE
        self._channel_scale = _normalised(scale.astype(np.float32))
        self._channel_mean = rng.standard_normal(hidden, dtype=np.float32)
        self._massive = rng.choice(hidden, min(_MASSIVE_CHANNELS, hidden), replace=False)
        self._rms = np.geomspace(_FIRST_RMS, _LAST_RMS, layers).astype(np.float32)
        sharpness = np.linspace(_FIRST_SHARPNESS, _LAST_SHARPNESS, layers)[:, np.newaxis]
        spread = np.exp(_SHARPNESS_SPREAD * rng.standard_normal((layers, heads)))
        self._sharpness = (sharpness * spread).astype(np.float32)
        self._head_kind = rng.choice(4, (layers, heads), p=(0.3, 0.2, 0.2, 0.3))
        self._sink = np.abs(rng.normal(1.0, 0.7, (layers, heads))).astype(np.float32)

    def sample(self, index: int, seq_len: int) -> dict[str, Any]:
        """One legacy dict of float16 arrays."""
        rng = np.random.default_rng([self.seed, 1, index])
        hidden = self._hidden_states(rng, seq_len)
        attention = [self._attention(rng, layer, seq_len) for layer in range(len(self._rms))]
        shared = min(_PREFIX_TOKENS, seq_len)
        prefix_hidden, prefix_attention = self._prefix
        for layer in range(self.shape.num_layers):
            # Causal: what the first tokens see does not depend on the rest.
            hidden[layer][:shared] = prefix_hidden[layer][:shared]
            attention[layer][:, :shared, :shared] = prefix_attention[layer][:, :shared, :shared]
            attention[layer][:, :shared, shared:] = 0
        words = _WORDS.split()
        decoded = [words[number] for number in rng.integers(0, len(words), seq_len)]
        return {
            "hidden_states": hidden,
            "attentions": attention,
            "tokens": rng.integers(3, _NUM_TOKEN_IDS, seq_len),
            "tokens_decoded": decoded,
            "generated_answer_clean": " ".join(decoded[-seq_len // 3 :]),
            "question_id": f"synthetic_{index}",
        }

    def samples(self, num_samples: int) -> Iterator[dict[str, Any]]:
        """Samples with lengths of 20 to 100 tokens, 43 on average."""
        for index, seq_len in enumerate(sequence_lengths(num_samples, self.seed)):
            yield self.sample(index, seq_len)

    @cached_property
    def _prefix(self) -> tuple[list[NDArray[np.float16]], list[NDArray[np.float16]]]:
        rng = np.random.default_rng([self.seed, 2])
        hidden = self._hidden_states(rng, _PREFIX_TOKENS)
        for layer in hidden[:-1]:
            # The first token carries the massive activations.
            layer[0, self._massive] *= np.float16(_MASSIVE_SCALE)
        layers = range(self.shape.num_layers)
        return hidden, [self._attention(rng, layer, _PREFIX_TOKENS) for layer in layers]

    def _hidden_states(self, rng: np.random.Generator, seq_len: int) -> list[NDArray[np.float16]]:
        size = (seq_len, self.shape.hidden_size)
        tokens = np.exp(_TOKEN_SPREAD * rng.standard_normal((seq_len, 1), dtype=np.float32))
        scale = tokens * self._channel_scale * np.float32(np.sqrt(1 - _MEAN_SHARE))
        mean = self._channel_mean * self._channel_scale * np.float32(np.sqrt(_MEAN_SHARE))
        stream = rng.standard_normal(size, dtype=np.float32)
        layers = []
        for layer, rms in enumerate(self._rms):
            if layer:
                fresh = rng.standard_normal(size, dtype=np.float32)
                stream *= np.float32(_KEPT)
                stream += np.float32(np.sqrt(1 - _KEPT**2)) * fresh
            values = stream * scale
            values += mean
            if layer == len(self._rms) - 1:
                values /= np.sqrt((values * values).mean(axis=-1, keepdims=True))
                rms = _NORM_RMS  # the last layer stands behind the norm
            values *= np.float32(rms)
            layers.append(values.astype(np.float16))
        return layers

    def _attention(self, rng: np.random.Generator, layer: int, seq_len: int) -> NDArray[np.float16]:
        heads = self.shape.num_heads
        query, key = rng.standard_normal((2, heads, seq_len, _QUERY_SIZE), dtype=np.float32)
        scores = query @ key.swapaxes(1, 2) / np.float32(np.sqrt(_QUERY_SIZE))
        scores *= self._sharpness[layer][:, np.newaxis, np.newaxis]
        position = np.arange(seq_len)
        distance = (position[:, np.newaxis] - position).astype(np.float32)
        kind = self._head_kind[layer]
        depth = np.float32(layer / max(1, self.shape.num_layers - 1))
        scores[kind == 0, :, 0] += self._sink[layer, kind == 0, np.newaxis] * (1 + depth)
        scores[kind == 1] += 2.5 * (distance == 1)
        scores[kind == 2] -= np.float32(0.12) * distance
        scores[:, distance < 0] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores, out=scores)
        weights /= weights.sum(axis=-1, keepdims=True)
        return weights.astype(np.float16)


def _normalised(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return scale / np.sqrt((scale * scale).mean())


def sequence_lengths(num_samples: int, seed: int = 0) -> list[int]:
    """Lengths whose mean is that of the distribution however few there are, in random order."""
    rng = np.random.default_rng([seed, 3])
    drawn = np.sort(rng.gamma(_GAMMA_SHAPE, _GAMMA_SCALE, 1001 * num_samples))
    middles = drawn.reshape(num_samples, 1001).mean(axis=1)
    lengths = np.clip(np.rint(_MIN_TOKENS + middles), _MIN_TOKENS, _MAX_TOKENS).astype(int)
    return [int(each) for each in rng.permutation(lengths)]


@dataclass(frozen=True, slots=True)
class ByteStatistics:
    """How float16 arrays compress, in bits per value.

    Attributes
    ----------
    gzip_6
        All arrays one after the other, as bytes, through gzip at level 6.
    low_plane, high_plane
        Order-0 entropy of the low and of the high bytes, taken array by array and averaged by
        size.
    """

    gzip_6: float
    low_plane: float
    high_plane: float

    @property
    def floor(self) -> float:
        """Entropy of both planes."""
        return self.low_plane + self.high_plane


def byte_statistics(
    arrays: Iterable[NDArray[np.float16]], *, with_gzip: bool = True
) -> ByteStatistics:
    """The statistics of some arrays, of which none is kept; without gzip, its bits are NaN."""
    compressor = zlib.compressobj(6)
    num_values, num_bytes, planes = 0, 0, np.zeros(2)
    for array in arrays:
        if with_gzip:
            num_bytes += len(compressor.compress(np.ascontiguousarray(array).data.cast("B")))
        planes += array.size * np.array(plane_entropies(array))
        num_values += array.size
    num_bytes += len(compressor.flush())
    gzip_6 = 8 * num_bytes / num_values if with_gzip else math.nan
    low, high = planes / num_values
    return ByteStatistics(gzip_6, float(low), float(high))


def plane_entropies(array: NDArray[Any]) -> tuple[float, float]:
    """Order-0 entropy of the low and of the high bytes of a 2-byte type, in bits per value."""
    low, high = np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8).T
    return _entropy(low), _entropy(high)


def _entropy(data: NDArray[np.uint8]) -> float:
    counts = np.bincount(data, minlength=256)
    shares = counts[counts > 0] / data.size
    return float(-(shares * np.log2(shares)).sum())


def compare(
    synthetic: Sequence[dict[str, Any]], real: Sequence[dict[str, Any]]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Synthetic and real statistics of both kinds: pairs by kind and by name."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for kind in KINDS:
        ours, theirs = (
            byte_statistics(array for sample in samples for array in sample[kind])
            for samples in (synthetic, real)
        )
        found[kind] = {
            name: (getattr(ours, name), getattr(theirs, name))
            for name in ("gzip_6", "low_plane", "high_plane", "floor")
        }
    return found


def write_batch(samples: Sequence[dict[str, Any]], path: Path) -> None:
    """Pickle a batch as the old pipeline did: protocol 4, gzip 6 where the name ends in .gz."""
    opened = gzip.open(path, "xb", compresslevel=6) if path.suffix == ".gz" else path.open("xb")
    with opened as file:
        pickle.dump(samples, file, protocol=4)


def _print_comparison(samples: Sequence[dict[str, Any]], paths: Sequence[Path]) -> None:
    from h5traces import load  # only this option needs the library

    real = [trace for path in paths for trace in load(path)]
    for kind, figures in compare(samples, real).items():
        for name, (ours, theirs) in figures.items():
            print(
                f"{kind:14} {name:10} synthetic {ours:7.3f}  real {theirs:7.3f} bits per value "
                f"({100 * (ours / theirs - 1):+.1f} %)"
            )


def main() -> None:
    """Parse the command line and write, compare, or both."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, help="a new .pkl or .pkl.gz file")
    parser.add_argument("--num-samples", type=int, default=10)
    parser.add_argument("--layers", type=int, default=LLAMA_2_7B.num_layers)
    parser.add_argument("--hidden", type=int, default=LLAMA_2_7B.hidden_size)
    parser.add_argument("--heads", type=int, default=LLAMA_2_7B.num_heads)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", type=Path, nargs="+", help="real batches to compare with")
    options = parser.parse_args()
    if options.output is None and options.compare is None:
        parser.error("nothing to do: give --output, --compare, or both")
    shape = Shape(options.layers, options.hidden, options.heads)
    samples = list(Generator(shape, options.seed).samples(options.num_samples))
    if options.output is not None:
        write_batch(samples, options.output)
        print(
            f"{options.output}: {len(samples)} synthetic samples, "
            f"{options.output.stat().st_size:,} bytes",
            file=sys.stderr,
        )
    if options.compare is not None:
        _print_comparison(samples, options.compare)


if __name__ == "__main__":
    main()
