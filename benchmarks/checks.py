"""What the quick checks of a conversion cost, and what their limits rest on.

    python benchmarks/checks.py [--rounds 5] [--samples 8]

The share is processor time of the checks (they run in the thread that writes) in processor time of
the whole conversion, and the same for wall-clock time; medians over rounds. The limit is 3 %.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import h5traces
from h5traces.meaning.sample_checks import SampleChecks

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from make_synthetic import Generator, write_batch  # noqa: E402


class Stopwatch:
    """Adds up the time that all calls of a method take."""

    def __init__(self) -> None:
        self.processor = self.wall = 0.0
        self._method: Any = SampleChecks.add

    def __enter__(self) -> Stopwatch:
        method = self._method

        def timed(*arguments: Any, **options: Any) -> None:
            processor, wall = time.thread_time(), time.perf_counter()
            method(*arguments, **options)
            self.processor += time.thread_time() - processor
            self.wall += time.perf_counter() - wall

        SampleChecks.add = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        SampleChecks.add = self._method  # type: ignore[method-assign]


def shares(source: Path, folder: Path, rounds: int) -> None:
    """Print the share of the checks in conversions of one file."""
    processor, wall, per_sample = [], [], []
    for number in range(rounds):
        start, start_wall = time.process_time(), time.perf_counter()
        with Stopwatch() as watch:
            report = h5traces.convert(source, folder / f"{number}.h5")
        processor.append(watch.processor / (time.process_time() - start))
        wall.append(watch.wall / (time.perf_counter() - start_wall))
        per_sample.append(1e3 * watch.wall / report.files[0].num_samples)
        (folder / f"{number}.h5").unlink()
    print(
        f"  {source.name}: {statistics.median(processor):.2%} of processor time "
        f"({min(processor):.2%} to {max(processor):.2%}), {statistics.median(wall):.2%} of wall-"
        f"clock time, {statistics.median(per_sample):.2f} ms per sample"
    )


def row_sums() -> None:
    """Print how far sums of a softmax in each type are from 1."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name in ("float16", "bfloat16", "float32"):
        worst = 0.0
        for keys in (16, 128, 1024, 8192):
            for spread in (0.5, 2.0, 8.0):
                scores = spread * torch.randn(16, 128, keys, generator=generator)
                rows = torch.softmax(scores.to(getattr(torch, name)), dim=-1)
                worst = max(worst, float((rows.float().sum(-1) - 1).abs().max()))
        print(f"  {name}: at most {worst:.2%}")


def norms() -> None:
    """Print by what factor the norm of a layer lies outside those of its neighbours, at most."""
    batches = sorted((ROOT / "examples" / "legacy").glob("*.pkl.gz"))
    for path in batches:
        layers: dict[int, list[float]] = {}
        for trace in h5traces.load(path):
            for number, states in enumerate(trace["hidden_states"][:-1]):
                length = np.linalg.norm(np.asarray(states, dtype=np.float32)[1:], axis=1)
                layers.setdefault(number, []).append(float(np.median(length)))
        factors = []
        for sample in zip(*layers.values(), strict=True):
            for index in range(1, len(sample) - 1):
                around = [*sample[max(0, index - 2) : index], *sample[index + 1 : index + 3]]
                factors.append(max(sample[index] / max(around), min(around) / sample[index]))
        print(f"  {path.name}: {max(factors):.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8, help="of Llama-2-7B's shape")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("share of a conversion:")
        large = folder / "llama-2-7b-shaped.pkl"
        write_batch(list(Generator().samples(options.samples)), large)
        shares(large, folder, options.rounds)
        for path in sorted((ROOT / "examples" / "legacy").glob("*.pkl.gz")):
            traces = h5traces.load(path)
            many = folder / f"{path.name.split('.')[0]}-x20.pkl"
            many.write_bytes(pickle.dumps([each for _ in range(20) for each in traces]))
            shares(many, folder, options.rounds)
    print("sums of rows of a softmax, away from 1:")
    row_sums()
    print("norm of a layer outside those of its neighbours, times:")
    norms()


if __name__ == "__main__":
    main()
