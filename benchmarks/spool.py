"""What it costs to make every sample durable: spool mode, direct writing, and a pickle per sample.

Run ``python benchmarks/spool.py`` (a minute); it prints a markdown table. Data are synthetic, at
Llama-2-7B's shape (32 layers, 43 tokens, 15.6 MB per sample), from ``tools/make_synthetic.py``. In
every round all methods write the same samples one after the other, so ratios within a round hold on
a noisy machine and seconds do not; medians, with the range of the rounds in brackets.

*append* is the time until a sample is acknowledged, *in all* includes packing and closing, divided
by the samples. A pickle is compressed with gzip at level 6, as the old pipeline did, into a file of
its own that is synced. CPU counts all threads.

Prediction, written before the first run: an append in spool mode takes 1.5 times one of direct
writing (it reads the sample back, and syncs it); in all, spool mode takes 2 times direct writing,
since packing copies and verifies everything once more, and 0.4 times the pickles.

Outcome of ``--samples 12`` on two shared cores: an append took 1.8 times one of direct writing (1.4
to 2.8); in all 2.2 times direct writing by the medians, as predicted, but 0.57 times the pickles
(0.51 to 0.73), more than predicted; CPU 0.59 times theirs. Verification is the dearer half: without
it the append took 1.4 times and all of it 0.38 times the pickles. The first version also read
every spooled sample through stock HDF5, and took 3.1 times direct writing per append.
"""

from __future__ import annotations

import argparse
import gzip
import os
import pickle
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from make_synthetic import Generator, Shape
from suite.folder import made_folder

import h5traces

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Cost:
    """Seconds per sample.

    Attributes
    ----------
    append
        Until a sample is acknowledged.
    total, cpu
        Packing and closing included; cpu over all threads.
    """

    append: float
    total: float
    cpu: float


def measured(
    samples: Sequence[dict[str, Any]], append: Callable[[int], None], close: Callable[[], None]
) -> Cost:
    started, cpu, appends = time.perf_counter(), time.process_time(), []
    for number in range(len(samples)):
        before = time.perf_counter()
        append(number)
        appends.append(time.perf_counter() - before)
    close()
    count = len(samples)
    total, cpu = time.perf_counter() - started, time.process_time() - cpu
    return Cost(statistics.median(appends), total / count, cpu / count)


def archive(
    samples: Sequence[dict[str, Any]], folder: Path, *, spool: bool = True, verify: bool = True
) -> Cost:
    target = h5traces.TargetOptions(verify=verify)
    writer = h5traces.create(folder / "run.h5", spool=spool, target=target)
    return measured(samples, lambda number: writer.append(samples[number]), writer.close)


def pickles(samples: Sequence[dict[str, Any]], folder: Path) -> Cost:
    def append(number: int) -> None:
        with (folder / f"{number}.pkl.gz").open("xb") as file:
            with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=6) as zipped:
                pickle.dump(samples[number], zipped, protocol=4)
            os.fsync(file.fileno())

    return measured(samples, append, lambda: None)


METHODS: dict[str, Callable[[Sequence[dict[str, Any]], Path], Cost]] = {
    "pickle and gzip 6, synced": pickles,
    "direct": lambda samples, folder: archive(samples, folder, spool=False),
    "direct, not verified": lambda samples, folder: archive(
        samples, folder, spool=False, verify=False
    ),
    "spool": archive,
    "spool, not verified": lambda samples, folder: archive(samples, folder, verify=False),
}


def cell(values: Sequence[float], form: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost per sample of the ways to write a long run.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--folder", type=made_folder, help="on the disk to measure")
    options = parser.parse_args()
    generator = Generator(Shape(options.layers, options.hidden, options.heads))
    samples = [generator.sample(number, 43) for number in range(options.samples)]
    rounds: list[dict[str, Cost]] = []
    for _ in range(options.rounds):
        costs = {}
        for name, method in METHODS.items():
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                costs[name] = method(samples, Path(folder))
        rounds.append(costs)
    print("| method | append, s | in all, s | CPU, s | append / direct | in all / pickle |")
    print("|---|---|---|---|---|---|")
    for name in METHODS:
        row = [
            cell([each[name].append for each in rounds], ".3f"),
            cell([each[name].total for each in rounds], ".3f"),
            cell([each[name].cpu for each in rounds], ".2f"),
            cell([each[name].append / each["direct"].append for each in rounds], ".2f"),
            cell(
                [each[name].total / each["pickle and gzip 6, synced"].total for each in rounds],
                ".2f",
            ),
        ]
        print(f"| {name} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
