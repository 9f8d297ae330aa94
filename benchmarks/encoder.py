"""Size and speed of the ways to put one layer's float16 arrays into shuffle + gzip chunks.

Run ``python benchmarks/encoder.py`` (one minute); it prints a markdown table. Data are synthetic,
at Llama-2-7B's shape: hidden states (43, 4096) with Student-t noise, lognormal channel scales,
outlier channels and massive activations on the first token; causal attentions (32, 43, 43) with
sinks, previous-token heads and local heads. *bf16-born* values were rounded to bfloat16 before. In
every round all codecs see the same data one after the other, so ratios within a round hold on a
noisy machine and megabytes per second do not; medians, with the range of the rounds in brackets.

Prediction, written before the first run but after trials of single steps on other data:
float16-born hidden states at 13.6 bits per value, within 1 % of the entropy of the two byte planes,
encoded 15 times and decoded 5 times as fast as gzip 6 does it; bf16-born ones at 10.7 bits and 8
times; attentions as small as zlib 6 makes them or up to 2 % smaller, 4 times as fast; on one layer
of both at least 15 times gzip 6 with two threads.

Outcome, on two cores of an AMD EPYC shared with busier neighbours (gzip 6 with one thread is 1).
Sizes as predicted or better: float16-born 13.68 bits per value, 0.4 % above the entropy and 7.9 %
below gzip 6; bf16-born 10.71; attentions 7.35, 4.9 % below gzip 6; one layer of both 12.09, 7.5 %
below. Speeds by processor time, all codecs in turn, medians of 13 rounds of two runs, one thread:
encoding 17 and 20 times as fast on float16-born data (653 and 813 MB/s), 30 and 34 times on
bf16-born data, where gzip is slowest, only 3.6 times (232 and 255 MB/s) on attentions, whose zero
runs gzip takes quickly too, and so 11 times (445 and 491 MB/s) on both; decoding 3.4 (879 and 974
MB/s), 2.2, 1.4 and 2.7 times. By the clock, which is what this script reads, a run at a load of
four processes on the two cores gave 17, 24, 3.0 and 8.8 times, with a range of 0.5 to 2.3 times
these. How a second core scales could not be seen: isal's bare compressor gained nothing from a
second thread either. With 100 tokens attentions are 7.0 % below gzip 6.
"""

from __future__ import annotations

import argparse
import statistics
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from isal import isal_zlib
from zlib_ng import zlib_ng

from h5traces.storage import deflate
from h5traces.storage import deflate as planes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HIDDEN_SIZE, NUM_HEADS = 4096, 32


def hidden_states(rng: np.random.Generator, seq_len: int) -> np.ndarray:
    scales = np.exp(0.35 * rng.standard_normal(HIDDEN_SIZE))
    scales[rng.choice(HIDDEN_SIZE, 8, replace=False)] *= 8
    states = 0.4 * scales * rng.standard_t(4.5, (seq_len, HIDDEN_SIZE))
    states += 0.3 * rng.standard_normal((seq_len, 48)) @ rng.standard_normal((48, HIDDEN_SIZE)) / 7
    states[0, rng.choice(HIDDEN_SIZE, 3, replace=False)] = 40 * HIDDEN_SIZE**0.5
    return states


def attentions(rng: np.random.Generator, seq_len: int) -> np.ndarray:
    query, key = rng.standard_normal((2, NUM_HEADS, seq_len, 16))
    scores = query @ key.swapaxes(1, 2) / 4 * rng.uniform(0.2, 2, (NUM_HEADS, 1, 1))
    distance = np.arange(seq_len)[:, np.newaxis] - np.arange(seq_len)
    kind = rng.integers(0, 4, NUM_HEADS)
    scores[kind == 1] += 5 * (distance == 1)
    scores[kind == 2] -= 0.6 * distance
    scores[:, :, 0] += rng.normal(4, 1.5, (NUM_HEADS, 1))
    scores[:, distance < 0] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def from_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def data_sets(num_layers: int, seq_len: int) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    hidden = [hidden_states(rng, seq_len) for _ in range(num_layers)]
    attention = [attentions(rng, seq_len) for _ in range(num_layers)]
    return {
        "hidden, float16": [x.astype(np.float16) for x in hidden],
        "hidden, bf16-born": [from_bfloat16(x).astype(np.float16) for x in hidden],
        "attentions": [x.astype(np.float16) for x in attention],
        "hidden + attentions": [
            x.astype(np.float16) for pair in zip(hidden, attention, strict=True) for x in pair
        ],
    }


@dataclass(frozen=True)
class Codec:
    name: str
    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, np.ndarray], None]


def shuffled(compress: Callable, decompress: Callable, name: str) -> Codec:
    def encode(values: np.ndarray) -> bytes:
        return compress(planes.shuffle(values.view(np.uint8).ravel(), 2))

    def decode(stored: bytes, out: np.ndarray) -> None:
        data = np.frombuffer(decompress(stored, 15, out.nbytes), np.uint8)
        planes.unshuffle(data, out.view(np.uint8).reshape(-1), 2)

    return Codec(name, encode, decode)


def plain_decode(stored: bytes, out: np.ndarray) -> None:
    out.reshape(-1)[:] = np.frombuffer(zlib.decompress(stored, 15, out.nbytes), np.float16)


CODECS = (
    Codec("gzip 6, no shuffle", lambda values: zlib.compress(values, 6), plain_decode),
    shuffled(lambda data: zlib.compress(data, 6), zlib.decompress, "shuffle + zlib 6"),
    shuffled(lambda data: isal_zlib.compress(data, 1), isal_zlib.decompress, "shuffle + isal 1"),
    shuffled(lambda data: zlib_ng.compress(data, 6), zlib_ng.decompress, "shuffle + zlib-ng 6"),
    Codec(
        "plane-wise (h5traces)",
        lambda values: deflate.encode(values, itemsize=2),
        lambda stored, out: deflate.decode(stored, out, itemsize=2),
    ),
)


def entropy_bits(values: np.ndarray) -> float:
    """Order-0 entropy of the two byte planes, in bits per value."""
    bits = 0.0
    for plane in values.view(np.uint8).reshape(-1, 2).T:
        counts = np.bincount(plane, minlength=256)
        shares = counts[counts > 0] / plane.size
        bits -= (shares * np.log2(shares)).sum()
    return bits


def megabytes_per_second(jobs: Sequence[Callable[[], object]], nbytes: int, threads: int) -> float:
    """Speed of a pool that takes chunk after chunk, as the writer's does."""
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        for future in [pool.submit(job) for job in jobs]:
            future.result()
        return nbytes / (time.perf_counter() - start) / 1e6


def one_round(codec: Codec, arrays: list[np.ndarray]) -> list[float]:
    """Megabytes per second: encode with one and two threads, decode with one and two."""
    nbytes = sum(values.nbytes for values in arrays)
    encoding = [lambda values=values: codec.encode(values) for values in arrays]
    stored = [job() for job in encoding]
    decoding = [
        lambda chunk=chunk, values=values: codec.decode(chunk, np.empty_like(values))
        for chunk, values in zip(stored, arrays, strict=True)
    ]
    return [
        megabytes_per_second(jobs, nbytes, threads)
        for jobs in (encoding, decoding)
        for threads in (1, 2)
    ]


def cell(values: Sequence[float], digits: int) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def report(name: str, arrays: list[np.ndarray], num_rounds: int) -> None:
    count = sum(values.size for values in arrays)
    rounds = [[one_round(codec, arrays) for codec in CODECS] for _ in range(num_rounds)]
    sizes = [sum(len(codec.encode(values)) for values in arrays) for codec in CODECS]
    for index, codec in enumerate(CODECS):
        ratios, speeds = [], []
        for column in range(4):
            # One-threaded gzip is the yardstick of both columns.
            yardstick = column - column % 2
            values = [each[index][column] / each[0][yardstick] for each in rounds]
            ratios.append(cell(values, 1))
            speeds.append(f"{statistics.median(each[index][column] for each in rounds):.0f}")
        size = f"{sizes[index] / sizes[0]:.3f}", f"{8 * sizes[index] / count:.2f}"
        print(f"| {name} | {codec.name} | {' | '.join((size[0], *ratios, size[1], *speeds))} |")
    floor = sum(entropy_bits(values) * values.size for values in arrays) / count
    of_gzip = floor * count / 8 / sizes[0]
    print(f"| {name} | order-0 entropy of planes | {of_gzip:.3f} | | | | | {floor:.2f} | | | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=43)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(
        "| data | codec | size / gzip 6 | encode, 1 thread / gzip 6 | 2 threads |"
        " decode, 1 thread / gzip 6 | 2 threads | bits/value | encode MB/s, 1 | 2 | decode, 1 | 2 |"
    )
    print("|---|---" + "|---:" * 10 + "|")
    for name, arrays in data_sets(options.layers, options.seq_len).items():
        report(name, arrays, options.rounds)


if __name__ == "__main__":
    main()
