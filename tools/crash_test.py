#!/usr/bin/env python3
"""Stop writers in every way, and look whether a sample that was acknowledged is ever lost.

Long incremental runs, conversions, merges, repacks and splits of tiny batches are killed at every
call to the system that changes a file (and in the middle of every write), get SIGINT and SIGTERM at
these calls, meet full disks and failing calls there, and lose power behind them by a model that
drops half of what was not synced. A longer run is killed at random moments. After every stop all
files with final names must be whole, all acknowledged samples there bit for bit, and the same
command must finish the job. Exit code 1 if anything of this fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

CRASH_TESTS = Path(__file__).parents[1] / "tests" / "crash"
sys.path.insert(0, str(CRASH_TESTS))

from crashing import LONG_RUN  # noqa: E402  # found only now
from scenarios import SCENARIOS  # noqa: E402

EPILOG = """\
examples:
  everything, in ten minutes on two free cores:
    python tools/crash_test.py --kills 200

  a look, in two minutes:
    python tools/crash_test.py --kills 20 --calls 20

  one scenario at all of its calls:
    python tools/crash_test.py --only merge
"""


def run(scenario: str, stops: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of one scenario, from a separate process."""
    command = [sys.executable, str(CRASH_TESTS / "crashing.py"), scenario, *stops]
    command += ["--seed", str(options.seed)]
    if options.folder is not None:
        command += ["--folder", str(options.folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def print_table(found: list[dict[str, Any]]) -> None:
    """One line of markdown per kind of stops and scenario."""
    print("| stop | scenario | stops | acknowledged before | lost | not finished after |")
    print("|---|---|---:|---:|---:|---:|")
    totals: dict[str, int] = defaultdict(int)
    for each in sorted(found, key=lambda each: each["stop"]):
        numbers = [each[name] for name in ("stops", "acked", "lost", "unfinished")]
        for name, number in zip(("stops", "acked", "lost", "unfinished"), numbers, strict=True):
            totals[name] += number
        print(f"| {each['stop']} | {each['scenario']} | {' | '.join(map(str, numbers))} |")
    print(f"| **all** | | {' | '.join(map(str, totals.values()))} |")


def main() -> None:
    """Parse the command line, run all scenarios side by side and print what they showed."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="at random moments, of a long run")
    parser.add_argument("--calls", type=int, default=0, help="how many per scenario; 0 for all")
    parser.add_argument(
        "--only", action="append", choices=[LONG_RUN, *SCENARIOS], help="may be given several times"
    )
    parser.add_argument("--folder", type=Path, help="where to work; /dev/shm saves much time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    count = f"={options.calls}" if options.calls else ""
    limits = f"={min(options.calls or 50, 50)}"
    stops = [f"kill{count}", f"power{count}", f"signal{count}", f"error{count}", f"limit{limits}"]
    jobs = [(LONG_RUN, [f"random={options.kills}"])]
    jobs += [(scenario, [stop]) for scenario in SCENARIOS for stop in stops]
    jobs = [job for job in jobs if not options.only or job[0] in options.only]
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = [pool.submit(run, scenario, stops, options) for scenario, stops in jobs]
        for number, each in enumerate(as_completed(pending), 1):
            found += each.result()
            print(f"{number}/{len(jobs)}", end="\r", file=sys.stderr, flush=True)
    print_table(found)
    problems = [f"{each['scenario']}: {line}" for each in found for line in each["problems"]]
    print(f"\n{len(problems)} problems in {time.monotonic() - started:.0f} s", file=sys.stderr)
    for line in problems:
        print(line, file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
