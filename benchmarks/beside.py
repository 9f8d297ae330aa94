"""What everyday work costs in this checkout, beside another one: for finding regressions.

    git worktree add ../before COMMIT
    python benchmarks/beside.py ../before [--rounds 9] [--samples 12] [--only convert open]

Every round runs each checkout once, in turn, as a fresh process; the order alternates. A process
prepares its case, warms it up, and repeats it; its figure is the least processor time (user and
system, threads and child processes) of the repetitions. Ratios are of one round. Each checkout
reads archives that it has written itself, of the same batches: one of Llama-2-7B's shape, in
float16, and one of 250 tiny samples.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
NUM_TINY = 250
STATES = ("last_token", "mean")
WEIGHTS = ("attention_entropy", "sink_mass")


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@dataclass
class Files:
    """The folder of one checkout; batches lie beside it."""

    folder: Path

    @property
    def large(self) -> Path:
        """The batch of Llama-2-7B's shape."""
        return self.folder.parent / "large.pkl"

    @property
    def tiny(self) -> Path:
        """The batch of many tiny samples."""
        return self.folder.parent / "tiny.pkl"

    def archive(self, name: str) -> Path:
        """The archive of a batch."""
        return self.folder / f"{name}.h5"


# --- cases: each prepares, and gives what is timed and how many things that is of -----------------


def _convert(files: Files, batch: Path, number: int) -> tuple[Callable[[], Any], int]:
    import h5traces

    target = files.folder / "again.h5"

    def work() -> None:
        target.unlink(missing_ok=True)
        h5traces.convert(batch, target)

    return work, number


def _records(files: Files, batch: Path) -> tuple[Callable[[], Any], int]:
    """Reading a pickle into records, without writing."""
    from h5traces.sources.opening import open_source

    def work() -> int:
        with open_source(batch) as source:
            return sum(1 for _ in source.records())

    return work, work()


def _open(path: Path) -> tuple[Callable[[], Any], int]:
    import h5traces

    def work() -> None:
        for _ in range(20):
            with h5traces.open(path) as archive:
                archive.labels  # noqa: B018

    return work, 20


def _load(path: Path, times: int = 1) -> tuple[Callable[[], Any], int]:
    import h5traces

    return lambda: [h5traces.load(path) for _ in range(times)], len(h5traces.load(path)) * times


def _items(path: Path, count: int, **options: Any) -> tuple[Callable[[], Any], int]:
    from h5traces.torch_data import TraceDataset

    dataset = TraceDataset(path, **options)
    indices = [int(each) for each in np.random.default_rng(0).integers(0, len(dataset), count)]
    return lambda: [dataset[index] for index in indices], count


def _features(path: Path, names: tuple[str, ...]) -> tuple[Callable[[], Any], int]:
    import h5traces
    from h5traces.features import iterate_features

    with h5traces.open(path) as archive:
        number = len(archive)

    def work() -> None:
        with h5traces.open(path) as archive:
            for _ in iterate_features(archive, names, workers=1):
                pass

    return work, number


def _graphs(path: Path, count: int) -> tuple[Callable[[], Any], int]:
    from h5traces.graph import TraceGraphDataset

    dataset = TraceGraphDataset(path)
    indices = [int(each) for each in np.random.default_rng(0).integers(0, len(dataset), count)]
    return lambda: [dataset[index] for index in indices], count


CASES: dict[str, Callable[[Files, int], tuple[Callable[[], Any], int]]] = {
    "convert, large": lambda files, samples: _convert(files, files.large, samples),
    "convert, tiny": lambda files, _: _convert(files, files.tiny, NUM_TINY),
    "records, large": lambda files, _: _records(files, files.large),
    "records, tiny": lambda files, _: _records(files, files.tiny),
    "open, sidecar": lambda files, _: _open(files.archive("tiny")),
    "open": lambda files, _: _open(files.archive("large")),
    "load, large": lambda files, _: _load(files.archive("large")),
    "load, tiny": lambda files, _: _load(files.archive("tiny")),
    "item, large, 1 layer": lambda files, _: _items(files.archive("large"), 200, layers=15),
    "item, tiny, all layers": lambda files, _: _items(files.archive("tiny"), 500),
    "item, tiny, last token": lambda files, _: _items(
        files.archive("tiny"), 500, layers=1, tokens="last"
    ),
    "item, tiny, attentions": lambda files, _: _items(
        files.archive("tiny"), 500, layers=1, kinds="attentions"
    ),
    "graph, tiny": lambda files, _: _graphs(files.archive("tiny"), 300),
    "features of states, large": lambda files, _: _features(files.archive("large"), STATES),
    "features of states, tiny": lambda files, _: _features(files.archive("tiny"), STATES),
    "features of weights, large": lambda files, _: _features(files.archive("large"), WEIGHTS),
    "features of weights, tiny": lambda files, _: _features(files.archive("tiny"), WEIGHTS),
}


# --- the process that is measured -----------------------------------------------------------------


def work_on(name: str, files: Files, samples: int, repeats: int) -> None:
    """Prepare archives, or run a case and print its figure."""
    warnings.simplefilter("ignore")
    if name == "prepare":
        prepare(files)
        return
    work, number = CASES[name](files, samples)
    work()
    figures = []
    for _ in range(repeats):
        start = processor_seconds()
        work()
        figures.append(processor_seconds() - start)
    sys.stdout.write(json.dumps(min(figures) / number) + "\n")


def prepare(files: Files) -> None:
    """Archives as this checkout writes them; the tiny one has a sidecar of labels."""
    import h5traces

    h5traces.convert(files.large, files.archive("large"))
    h5traces.convert(files.tiny, files.archive("tiny"))
    h5traces.label(files.archive("tiny"), files.folder.parent / "scores.csv")


# --- the comparison -------------------------------------------------------------------------------


def make_batches(folder: Path, samples: int) -> None:
    """The batches, and a table of scores."""
    sys.path.insert(0, str(ROOT / "tools"))
    from make_synthetic import Generator, Shape, write_batch

    write_batch(list(Generator().samples(samples)), folder / "large.pkl")
    batch = list(Generator(Shape(4, 128, 4)).samples(NUM_TINY))
    write_batch(batch, folder / "tiny.pkl")
    rng = np.random.default_rng(0)
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["question_id", "bleurt_score"])
        table.writerows((each["question_id"], round(rng.random(), 4)) for each in batch)


def run(checkout: Path, folder: Path, case: str, options: argparse.Namespace) -> float:
    """Run a case in a process that imports h5traces from a checkout."""
    command = [sys.executable, __file__, "--worker", case, "--folder", str(folder)]
    command += ["--samples", str(options.samples), "--repeats", str(options.repeats)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(found.stdout)) if found.stdout else 0.0


def compare(options: argparse.Namespace, base: Path) -> None:
    """Run every case in both checkouts, and print."""
    checkouts = {"before": options.before.resolve(), "here": ROOT}
    make_batches(base, options.samples)
    for name, checkout in checkouts.items():
        (base / name).mkdir()
        run(checkout, base / name, "prepare", options)
    chosen = [case for case in CASES if any(each in case for each in options.only or [""])]
    print(f"{'processor time':28}{'before, ms':>12}{'here, ms':>12}   here / before, by round")
    for case in chosen:
        rounds = []
        for number in range(options.rounds):
            order = list(checkouts) if number % 2 == 0 else list(checkouts)[::-1]
            rounds.append(
                {name: run(checkouts[name], base / name, case, options) for name in order}
            )
        ratios = [each["here"] / each["before"] for each in rounds]
        least = {name: min(each[name] for each in rounds) * 1000 for name in checkouts}
        print(
            f"{case:28}{least['before']:12.3f}{least['here']:12.3f}   "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), "
            f"least of each {least['here'] / least['before']:.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, nargs="?", help="the other checkout")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=3, help="in each process")
    parser.add_argument("--samples", type=int, default=12, help="of Llama-2-7B's shape")
    parser.add_argument("--only", nargs="+", help="cases whose names contain one of these")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work_on(options.worker, Files(options.folder), options.samples, options.repeats)
        return
    if options.before is None:
        parser.error("name the other checkout")
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


if __name__ == "__main__":
    main()
