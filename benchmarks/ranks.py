"""What ranks cost on this machine: starting many, counting them, and sharing a conversion.

    python benchmarks/ranks.py many [--ranks 1000] [--items 1000]
    python benchmarks/ranks.py overhead [--batches 12] [--samples 3] [--rounds 5]

`many` starts so many ranks without work on one folder, one after the other in one process, and
reads the status of the run. `overhead` converts batches of the shape of Llama-2-7B, once with two
workers and once with two ranks of one worker, started together; in turn, as fresh processes, with
the processor time of all of them and the time until the last has ended.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from h5traces.ranks.plan import RunPlan
from h5traces.ranks.rank import Rank
from h5traces.ranks.run import RankRun
from h5traces.ranks.status import status

_MAKER = Path(__file__).resolve().parent.parent / "tools" / "make_synthetic.py"


def many(num_ranks: int, num_items: int) -> None:
    """Print how long starts and a status take."""
    sources = tuple((f"/traces/batch_{n:06d}.pkl", 10**9, n) for n in range(num_items))
    plan = RunPlan(
        command="convert",
        world_size=num_ranks,
        options={"dtype": "float16"},
        sources=sources,
        costs=(10**9,) * num_items,
    )
    with tempfile.TemporaryDirectory() as name:
        folder, seconds = Path(name), []
        for number in range(num_ranks):
            started = time.perf_counter()
            with RankRun(folder, Rank(number, num_ranks), plan) as run:
                seconds.append(time.perf_counter() - started)
                for item in run.share:
                    run._note("item", item=item, status="converted", num_samples=1, nbytes=1)
        started = time.perf_counter()
        found = status(folder)
        took = time.perf_counter() - started
        assert found.ok
        assert len(found.done) == num_ranks
    tenth = max(1, num_ranks // 10)
    print(
        f"{num_ranks} ranks, {num_items} files: start {statistics.median(seconds):.3f} s (median), "
        f"{max(seconds):.3f} s (slowest), first tenth {statistics.median(seconds[:tenth]):.3f} s, "
        f"last tenth {statistics.median(seconds[-tenth:]):.3f} s; status {took:.2f} s"
    )


def overhead(num_batches: int, num_samples: int, rounds: int) -> None:
    """Print the time of two ranks relative to that of two workers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        for number in range(num_batches):
            batch = folder / "in" / f"b{number:03d}.pkl"
            wanted = ["--num-samples", str(num_samples), "--seed", str(number)]
            subprocess.run(
                [sys.executable, _MAKER, "-o", batch, *wanted],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        found: dict[str, list[tuple[float, float]]] = {"workers": [], "ranks": []}
        for turn in range(rounds):
            for kind in sorted(found, reverse=bool(turn % 2)):
                found[kind].append(_converted(folder, kind))
    for place, what in enumerate(("elapsed", "processor")):
        ratios = [
            ranks[place] / workers[place]
            for ranks, workers in zip(found["ranks"], found["workers"], strict=True)
        ]
        seconds = {kind: statistics.median(each[place] for each in found[kind]) for kind in found}
        print(
            f"{what}: --workers 2 {seconds['workers']:.2f} s, two ranks {seconds['ranks']:.2f} s; "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


def _converted(folder: Path, kind: str) -> tuple[float, float]:
    """Seconds until all is converted, and of processors."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "h5traces", "convert", str(folder / "in"), "-o", f"{out}/"]
    options = [["--workers", "2"]]
    if kind == "ranks":
        options = [["--workers", "1", "--rank", str(n), "--world-size", "2"] for n in range(2)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ}
    running = [subprocess.Popen([*command, *each], **quiet) for each in options]
    for each in running:
        assert each.wait() == 0
    elapsed = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["many", "overhead"])
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.what == "many":
        many(chosen.ranks, chosen.items)
    else:
        overhead(chosen.batches, chosen.samples, chosen.rounds)


if __name__ == "__main__":
    main()
