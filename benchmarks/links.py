"""Finding one sample among many through stock h5py, in a file of ours and in one of libhdf5's own.

Run ``python benchmarks/links.py`` (half a minute); it prints a markdown table. Both files
hold the same groups with one attribute each; they differ in how the links of ``/samples`` are
stored. *open, one* opens the file and looks up one sample; *open* does not look up; *100 more*
looks up a hundred others in the open file. The files take turns with the same names, so the ratio
of a pair holds on a noisy machine and microseconds do not; medians, with the 5th and 95th
percentile in brackets.

Prediction, written before links were stored in small blocks (then *open, one* took 8.2 times as
long as with libhdf5, and *100 more* 3.2 times): both take as long as with libhdf5, 0.8 to 1.3.

Outcome on two shared cores, 70,000 samples: 1.00 (0.65 to 1.52) and 0.93 (0.29 to 3.12). Whether
the smallest block has 512 bytes or 4 KiB, and a node 512 bytes or 4 KiB, is lost in the noise.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import h5py

from h5traces.storage.hdf5.writing import LIBVER, Hdf5Writer
from h5traces.storage.publish import PartFile

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = ("open", "open, one", "100 more")


def write_ours(path: Path, names: list[str]) -> None:
    with PartFile(path) as part:
        writer = Hdf5Writer(part.file)
        for number, name in enumerate(names):
            writer.create_group(f"/samples/{name}", {"number": number})
            writer.finish_group(f"/samples/{name}")
        writer.close()
        part.publish()


def write_by_libhdf5(path: Path, names: list[str]) -> None:
    with h5py.File(path, "w", libver=LIBVER) as file:
        samples = file.create_group("samples")
        for number, name in enumerate(names):
            samples.create_group(name).attrs["number"] = number


def seconds(path: Path, names: list[str]) -> dict[str, float]:
    """What opening the file and looking up `names` takes, by case."""
    start = time.perf_counter()
    with h5py.File(path) as file:
        opened = time.perf_counter()
        first = file[f"samples/{names[0]}"]
        found = time.perf_counter()
        for name in names[1:]:
            file[f"samples/{name}"]
        end = time.perf_counter()
        assert first.attrs["number"] == int(names[0])
    return dict(zip(CASES, (opened - start, found - start, end - found), strict=True))


def spread(values: list[float], form: str) -> str:
    ordered = sorted(values)
    low, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.05, 0.95))
    return f"{form} ({form}-{form})" % (statistics.median(ordered), low, high)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=70_000)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = [f"{number:08d}" for number in range(options.samples)]
    writers: dict[str, Callable[[Path, list[str]], None]] = {
        "h5traces": write_ours,
        "libhdf5": write_by_libhdf5,
    }
    chosen = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name, write in writers.items():
            paths[name] = Path(folder) / f"{name}.h5"
            start = time.perf_counter()
            write(paths[name], names)
            taken, nbytes = time.perf_counter() - start, paths[name].stat().st_size
            print(f"{name}: {nbytes:,} bytes, written in {taken:.1f} s", file=sys.stderr)
        taken = {name: {case: [] for case in CASES} for name in paths}
        for number in range(options.rounds + 2):
            wanted = chosen.sample(names, min(101, len(names)))
            order = list(paths) if number % 2 else list(reversed(paths))
            for name in order:
                for case, found in seconds(paths[name], wanted).items():
                    # The first rounds warm up.
                    taken[name][case] += [1e6 * found] if number > 1 else []
    print(
        f"{options.samples:,} groups, h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}\n"
    )
    print("| case | h5traces, µs | libhdf5, µs | ratio |")
    print("|---|---:|---:|---:|")
    for case in CASES:
        ours, theirs = (taken[name][case] for name in writers)
        ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
        cells = (case, spread(ours, "%.0f"), spread(theirs, "%.0f"), spread(ratios, "%.2f"))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
