#!/usr/bin/env python3
"""A whole batch read back by h5traces, beside gzip and pickle.load, in turn.

``python tools/make_synthetic.py --num-samples 8 -o batch.pkl.gz`` makes a batch of Llama-2-7B's
shape; ``python benchmarks/reading.py batch.pkl.gz`` converts it and prints MB/s of raw arrays and
how many times as fast each way is as the legacy one, as medians of rounds with their range.
"""

from __future__ import annotations

import argparse
import gzip
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import h5traces

if TYPE_CHECKING:
    from collections.abc import Callable

# Samples of one call.
TOGETHER = 4


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes, its result let go of."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Convert a batch and print a row for every way of reading it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("batch", type=Path, help="a trusted .pkl.gz: it is unpickled")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()

    def legacy() -> None:
        with gzip.open(given.batch) as file:
            pickle.load(file)

    def read(workers: int | None) -> None:
        with h5traces.open(path) as archive:
            for start in range(0, len(archive), TOGETHER):
                archive.read(range(len(archive))[start : start + TOGETHER], workers=workers)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batch.h5"
        # Elsewhere: this process should allocate as one that only reads.
        command = [sys.executable, "-m", "h5traces", "convert", given.batch, "-o", path]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with h5traces.open(path) as archive:
            found = [sample for trace in archive for sample in archive.read([trace.ordinal])]
            nbytes = sum(each.nbytes for one in found for kind in one.values() for each in kind)
        del found
        ways = {"gzip + pickle.load": legacy, "read, all cores": lambda: read(None)}
        ways["read, 1 worker"] = lambda: read(1)
        times = [{name: seconds(work) for name, work in ways.items()} for _ in range(given.rounds)]
    print("| way | MB/s | times gzip + pickle.load |\n|---|---:|---:|")
    for name in ways:
        ratios = [each["gzip + pickle.load"] / each[name] for each in times]
        speed = nbytes / statistics.median(each[name] for each in times) / 1e6
        middle = statistics.median(ratios)
        print(f"| {name} | {speed:.0f} | {middle:.1f} ({min(ratios):.1f} to {max(ratios):.1f}) |")


if __name__ == "__main__":
    main()
