#!/usr/bin/env python3
"""Open every hostile archive and pickle of the tests in every way, and measure what it costs.

Each runs in a separate process. It must end in an error of h5traces, or give what the untouched
archive gives (from its HDF5 part, where only the footer is forged), within a second of processor
time (pickles: three) and 300 MB of memory beyond what the process has. Exit code 1 if one does not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "hostile")]

import probe  # noqa: E402  # found only now
import specimen  # noqa: E402
from prober import ATTACKS_BY_PLACE, Prober  # noqa: E402
from test_pickles import ATTACKS as PICKLES  # noqa: E402

MAX_SECONDS, MAX_NBYTES = 1.0, 300 << 20
# Floods run into limits that honest batches of many generation steps come near to.
MAX_SECONDS_OF_PICKLE = 3.0
ROUTES = [*probe.LIBRARY, *probe.COMMANDS]


@dataclass
class Row:
    """What the attacks of one place came to."""

    attacks: int = 0
    opened: int = 0
    refused: int = 0
    harmless: int = 0
    seconds: tuple[float, str] = (0.0, "")
    nbytes: tuple[int, str] = (0, "")
    bad: list[str] = field(default_factory=list)

    def add(self, name: str, results: dict[str, dict[str, Any]], expected: str) -> None:
        """Count one attack."""
        self.attacks += 1
        self.opened += len(results)
        for route, result in results.items():
            self.seconds = max(self.seconds, (result["seconds"], f"{name}, {route}"))
            self.nbytes = max(self.nbytes, (result["extra_nbytes"], f"{name}, {route}"))
            limit = MAX_SECONDS_OF_PICKLE if route in probe.BATCHES else MAX_SECONDS
            if problem := _problem(result, limit):
                self.bad.append(f"{name}, {route}: {problem}")
        read = results.get("read") or results["batch"]
        if read["outcome"] == "error":
            self.refused += 1
        elif read.get("value") == expected:
            self.harmless += 1
        else:
            self.bad.append(f"{name}: read as something else")


def _problem(result: dict[str, Any], most_seconds: float) -> str | None:
    if result["outcome"] in ("died", "escaped") or "Traceback" in result["message"]:
        return f"{result['outcome']}: {result['message'][-300:]}"
    if result.get("code", 0) not in (0, 1):
        return f"exit code {result['code']}"
    if result["seconds"] >= most_seconds:
        return f"{result['seconds']} s"
    if result["extra_nbytes"] >= MAX_NBYTES:
        return f"{result['extra_nbytes']} bytes"
    return None


def archives(folder: Path) -> dict[str, Row]:
    """Every attack by an archive, in all ways of opening one."""
    valid = folder / "valid.h5"
    specimen.write(valid)
    expected = probe.read(str(valid))
    shutil.copyfile(valid, folder / "warm.h5")
    prober, rows = Prober(folder / "warm.h5"), {}
    for place, attacks in ATTACKS_BY_PLACE.items():
        rows[place] = Row()
        for attack in attacks:
            with tempfile.TemporaryDirectory(dir=folder) as inner:
                path = Path(inner) / "archive.h5"
                shutil.copyfile(valid, path)
                attack.build(path)
                rows[place].add(attack.name, prober(path, ROUTES), expected)
    prober.close()
    return rows


def pickles(folder: Path) -> Row:
    """Every attack by a pickle."""
    prober, row = Prober(folder / "warm.h5"), Row()
    path = folder / "batch.pkl"
    for name, (build, _) in PICKLES.items():
        path.write_bytes(build())
        row.add(name, prober(path, list(probe.BATCHES)), expected="")
    prober.close()
    return row


def main() -> None:
    """Parse the command line, try all attacks and print what they came to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = {**archives(Path(folder)), "pickles": pickles(Path(folder))}
    print("| attacks by | attacks | openings | refused | harmless | most s | most MB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for place, row in rows.items():
        counts = f"{row.attacks} | {row.opened:,} | {row.refused} | {row.harmless}"
        print(f"| {place} | {counts} | {row.seconds[0]:.2f} | {row.nbytes[0] / 1e6:.0f} |")
    total = [
        sum(getattr(row, name) for row in rows.values())
        for name in ("attacks", "opened", "refused", "harmless")
    ]
    most_s = max(row.seconds for row in rows.values())
    most_nbytes = max(row.nbytes for row in rows.values())
    counts = " | ".join(f"{each:,}" for each in total)
    print(f"| **all** | {counts} | {most_s[0]:.2f} | {most_nbytes[0] / 1e6:.0f} |")
    print(f"\nslowest: {most_s[1]}; most memory: {most_nbytes[1]}", file=sys.stderr)
    bad = [f"{place}: {each}" for place, row in rows.items() for each in row.bad]
    print(f"{len(bad)} not dealt with, in {time.monotonic() - started:.0f} s", file=sys.stderr)
    for line in bad:
        print(line, file=sys.stderr)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
