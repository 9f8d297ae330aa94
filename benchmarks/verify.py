"""How fast ``h5traces verify`` is, beside a plain read of the file and xxh3 of all of it.

Run ``python benchmarks/verify.py`` (a minute, 0.5 GB of disk); it prints a markdown table. Data are
synthetic, at Llama-2-7B's shape (32 layers, 43 tokens), from ``tools/make_synthetic.py``. In every
round all methods read the same archive from the page cache one after the other, so ratios within a
round hold on a noisy machine and GB/s do not; medians, with the range of the rounds in brackets.

*read* fetches the file with ``preadv`` into one buffer of 1 MiB; *xxh3* also hashes it, which is
the least that any check of every byte costs. Both use as many threads as verify, each its part of
the file.

Prediction, written before the first run: verify takes 1.3 times xxh3 with one thread and 1.5 times
with two, ``--deep`` 8 times.

Outcome of ``--samples 16`` on two shared cores: verify took 1.18 times xxh3 with one thread and
1.23 times with two, less than predicted; ``--deep`` 42 and 39 times, five times the prediction,
since most of it is HDF5, asked about every dataset in one thread. The first version read chunk by
chunk into new buffers and took 1.57 times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from make_synthetic import Generator, Shape
from suite.folder import made_folder

import h5traces

if TYPE_CHECKING:
    from collections.abc import Callable

BUFFER_NBYTES = 1 << 20
BASE = "xxh3"


def passed(path: Path, workers: int, use: Callable[[memoryview], object]) -> None:
    """Every byte of a file, a part per thread, through one buffer each."""
    nbytes = path.stat().st_size
    step = -(-nbytes // workers)

    def part(start: int) -> None:
        buffer = memoryview(bytearray(BUFFER_NBYTES))
        descriptor = os.open(path, os.O_RDONLY)
        position, stop = start, min(start + step, nbytes)
        while position < stop:
            count = os.preadv(descriptor, [buffer[: stop - position]], position)
            use(buffer[:count])
            position += count
        os.close(descriptor)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(part, range(0, nbytes, step)))


def read(path: Path, workers: int) -> None:
    passed(path, workers, len)


def hashed(path: Path, workers: int) -> None:
    passed(path, workers, xxhash.xxh3_64_intdigest)


def verified(path: Path, workers: int, *, deep: bool = False) -> None:
    if not h5traces.verify(path, workers=workers, deep=deep).ok:
        message = f"{path} is damaged"
        raise RuntimeError(message)


METHODS: dict[str, Callable[[Path, int], None]] = {
    "read": read,
    BASE: hashed,
    "verify": verified,
    "verify --deep": lambda path, workers: verified(path, workers, deep=True),
}


def seconds(path: Path, workers: int) -> dict[str, float]:
    """One round."""
    found = {}
    for name, method in METHODS.items():
        started = time.perf_counter()
        method(path, workers)
        found[name] = time.perf_counter() - started
    return found


def cell(values: list[float], form: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Speed of verify beside plain reading and hashing."
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=made_folder, help="on the disk to measure")
    options = parser.parse_args()
    generator = Generator(Shape(32, 4096, 32))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "archive.h5"
        target = h5traces.TargetOptions(verify=False)
        with h5traces.create(path, spool=False, target=target) as writer:
            for number in range(options.samples):
                writer.append(generator.sample(number, 43))
        nbytes = path.stat().st_size
        print(f"{nbytes / 1e6:.0f} MB\n")
        print("| threads | method | GB/s | time relative to xxh3 |")
        print("|---:|---|---:|---:|")
        for workers in options.workers:
            rounds = [seconds(path, workers) for _ in range(options.rounds)]
            for name in METHODS:
                speed = cell([nbytes / each[name] / 1e9 for each in rounds], ".2f")
                ratio = cell([each[name] / each[BASE] for each in rounds], ".2f")
                print(f"| {workers} | {name} | {speed} | {ratio} |")


if __name__ == "__main__":
    main()
