#!/usr/bin/env python3
"""Damage archives by the thousand, and look whether any damage stays unnoticed.

Archives of several kinds get single flipped bits anywhere, missing ends, lost and misplaced
sectors, exchanged and unwritten chunks, and broken footers. Each must be reported by ``h5traces
verify``, or leave every value and attribute as it was, through the footer and through HDF5; reading
must never give another number, crash or hang. Exit code 1 if anything of this fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "hostile")]

from damage import ARCHIVES, KINDS, NOTED, REPORTED, UNCHANGED, Findings, run  # noqa: E402

EPILOG = """\
examples:
  the figures of docs/guarantees.md:
    python tools/damage_test.py --flips 460 --others 10

  a look, in a minute:
    python tools/damage_test.py --flips 20 --others 5
"""
OUTCOMES = (REPORTED, NOTED, UNCHANGED, "bad")


def counts(options: argparse.Namespace) -> dict[str, int]:
    """How many of each kind of damage every archive gets."""
    return {kind: options.flips if kind == "single bit" else options.others for kind in KINDS}


def print_tables(by_archive: dict[str, Findings]) -> None:
    """Markdown: outcomes by kind of damage, and by archive."""
    by_kind: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for found in by_archive.values():
        for (kind, outcome), count in found.outcomes.items():
            by_kind[kind][outcome] += count
    rows = {name: Counter({outcome: 0 for outcome in OUTCOMES}) for name in by_archive}
    for name, found in by_archive.items():
        for (_, outcome), count in found.outcomes.items():
            rows[name][outcome] += count
    for title, table in (("damage", by_kind), ("archive", rows)):
        print(f"| {title} | tried | {' | '.join(OUTCOMES)} |")
        print(f"|---|---:|{'---:|' * len(OUTCOMES)}")
        for name, row in table.items():
            print_row(name, row)
        print_row("**all**", sum(table.values(), Counter()))
        print()


def print_row(name: str, row: Counter[str]) -> None:
    """One row of a table."""
    cells = [f"{row[outcome]:,}" for outcome in OUTCOMES]
    print(f"| {name} | {row.total():,} | {' | '.join(cells)} |")


def main() -> None:
    """Parse the command line, damage all archives and print what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=1000, help="single bits per archive")
    parser.add_argument("--others", type=int, default=100, help="per archive and other damage")
    parser.add_argument("--only", action="append", choices=ARCHIVES, help="may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to work; /dev/shm saves time")
    options = parser.parse_args()
    tempfile.tempdir = options.folder
    started, names = time.monotonic(), options.only or list(ARCHIVES)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = {name: pool.submit(run, name, counts(options), seed=options.seed) for name in names}
        found = {}
        for name, job in jobs.items():
            found[name] = job.result()
            print(f"{name}: done", file=sys.stderr)
    print_tables(found)
    bad = [line for each in found.values() for line in each.bad]
    print(f"{len(bad)} not dealt with, in {time.monotonic() - started:.0f} s", file=sys.stderr)
    for line in bad:
        print(line, file=sys.stderr)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
