#!/usr/bin/env python3
"""What features, fidelity and inspection of an archive take, beside reading and their arithmetic.

``python benchmarks/analysis.py`` makes two archives of Llama-2-7B-like samples, one
exact and one in the tier ``analysis``, of 1 GB of values each. It prints a row for every kind of
work: its seconds, those of reading what it needs with ``archive.read``, those of its arithmetic in
plain numpy on arrays in memory in as many threads as cores, and the work in terms of their sum. All
are done in turn in every round; medians, and the range of the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from reading import TOGETHER, seconds
from tiers import SEQ_LEN, Generator, Shape, calibrated, options_of, records

import h5traces
from h5traces.features import extract_features
from h5traces.fidelity import compare
from h5traces.writing.archive_writer import ArchiveWriter
from h5traces.writing.options import TargetOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KINDS: Final = ("hidden_states", "attentions")


def last_and_mean(states: np.ndarray, _weights: np.ndarray) -> None:
    """Features of hidden states."""
    states[-1].astype(np.float32)
    states.mean(axis=0, dtype=np.float64)


def entropies(_states: np.ndarray, weights: np.ndarray) -> None:
    """Features of attention."""
    rows = weights.astype(np.float32)
    rows /= rows.sum(axis=-1, keepdims=True)
    logs = np.log(rows, out=np.zeros_like(rows), where=rows > 0)
    np.einsum("hqk,hqk->hq", rows, logs, dtype=np.float64).mean(axis=1)


def described(states: np.ndarray, weights: np.ndarray) -> None:
    """Ranges, counts of NaN, norms of tokens, sums of rows and what lies above the diagonal."""
    for values in (states.astype(np.float32), weights.astype(np.float32)):
        _ = values.min(), values.max(), np.isnan(values).sum(), np.isinf(values).sum()
    numbers = states.astype(np.float32)
    np.sqrt(np.einsum("th,th->t", numbers, numbers))
    rows = weights.astype(np.float32)
    rows.sum(axis=2)
    np.einsum("hqk,qk->hq", rows, np.triu(np.ones(rows.shape[1:], np.float32), 1))


def compared(states: np.ndarray, weights: np.ndarray) -> None:
    """Errors of values and channels, nearest tokens, flipped edges and divergences of rows."""
    one, other = states.astype(np.float32), states[::-1].astype(np.float32)
    for _ in ("of layers", "of differences between layers"):
        error = np.abs(other - one)
        _ = error.max(), np.divide(error, one, out=np.zeros_like(one), where=one != 0).max()
        for each in (error, one):
            np.einsum("th,th->h", each, each)
    for each in (one, other):
        unit = each / np.sqrt(np.einsum("th,th->t", each, each))[:, None]
        _ = unit @ unit.T
    a, b = weights.astype(np.float64), weights[::-1].astype(np.float64)
    error = np.abs(b - a)
    _ = error.max(), np.divide(error, a, out=np.zeros_like(a), where=a != 0).max()
    for each in (a, b):
        np.count_nonzero(each.mean(axis=0) > 0.01)
    terms = np.divide(a, np.maximum(b, 2.0**-24), out=np.ones_like(a), where=a > 0)
    (np.log(terms) * a).sum(axis=-1)


def read(path: Path, kinds: Sequence[str] = KINDS) -> None:
    """All arrays of some kinds."""
    with h5traces.open(path) as archive:
        for start in range(0, len(archive), TOGETHER):
            archive.read(range(start, min(start + TOGETHER, len(archive))), kinds=kinds)


def write(path: Path, found: Sequence[Any], num_samples: int, tier: str, calibration: Any) -> None:
    """An archive that repeats some records."""
    with ArchiveWriter(path, options_of(tier, calibration)) as writer:
        for number in range(num_samples):
            record = found[number % len(found)]
            writer.append(record.model_copy(update={"sample_id": str(number)}))


def main() -> None:
    """Make the archives and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=66)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    samples = [Generator(Shape(32, 4096, 32)).sample(number, SEQ_LEN) for number in range(4)]
    found = records(samples)
    calibration = calibrated(found)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        exact, tier = Path(folder) / "exact.h5", Path(folder) / "analysis.h5"
        for path, name in ((exact, "exact"), (tier, "analysis")):
            write(path, found, given.samples, name, calibration)
        target = Path(folder) / "features.h5"

        def features(*names: str) -> None:
            options = TargetOptions(overwrite=True)
            extract_features(exact, target, names, target=options)

        def arithmetic(work: Callable[[np.ndarray, np.ndarray], None]) -> None:
            layers = [
                pair
                for number in range(given.samples)
                for pair in zip(
                    *(samples[number % len(samples)][kind] for kind in KINDS), strict=True
                )
            ]
            list(pool.map(lambda pair: work(*pair), layers))

        def both() -> None:
            read(exact)
            read(tier)

        works = {
            "features: last token, mean": (
                lambda: features("last_token", "mean"),
                lambda: read(exact, KINDS[:1]),
                last_and_mean,
            ),
            "features: entropy of attention": (
                lambda: features("attention_entropy"),
                lambda: read(exact, KINDS[1:]),
                entropies,
            ),
            "inspect, all samples": (
                lambda: h5traces.inspect(exact, samples="all"),
                lambda: read(exact),
                described,
            ),
            "fidelity": (lambda: compare(exact, tier), both, compared),
        }
        print("| work | s | reading, s | arithmetic, s | work / sum |\n|---|---:|---:|---:|---:|")
        for name, (work, reading, of_layers) in works.items():
            rounds = [
                (seconds(work), seconds(reading), seconds(lambda: arithmetic(of_layers)))  # noqa: B023
                for _ in range(given.rounds)
            ]
            columns = [f"{statistics.median(each):.2f}" for each in zip(*rounds, strict=True)]
            ratios = [whole / (first + second) for whole, first, second in rounds]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"| {name} | {' | '.join(columns)} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
