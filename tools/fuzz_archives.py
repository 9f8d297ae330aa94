"""Opens randomly damaged archives by the thousand; the long run of ``tests/hostile``.

``python tools/fuzz_archives.py --count 20000 --seed 1 --keep found/`` exits with 1 if a file ended
in a hang, a foreign exception, wrong data, or a crash that ``validate --isolated`` does not report.
It names and keeps those, and all that crash HDF5.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "hostile"))

from children import BATCH
from fuzz_archives import Fuzzer, run


def main() -> int:
    """Run and print what came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="Number of the first file.")
    parser.add_argument("--keep", type=Path, help="Folder for files that ended badly.")
    options = parser.parse_args()
    start, fuzzer, bad = time.monotonic(), Fuzzer(options.seed), 0
    outcomes: dict[str, int] = {}
    for first in range(options.first, options.first + options.count, 10 * BATCH):
        count = min(10 * BATCH, options.first + options.count - first)
        found = run(fuzzer, count, first=first)
        for name, times in found.outcomes.items():
            outcomes[name] = outcomes.get(name, 0) + times
        bad += len(found.bad)
        for case, what in found.bad + found.crashes:
            sys.stdout.write(f"seed {case.seed} number {case.number} ({case.what}): {what}\n")
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                name = f"seed-{case.seed}-number-{case.number}.h5"
                (options.keep / name).write_bytes(case.data)
        sys.stdout.flush()
    for name, times in sorted(outcomes.items(), key=lambda item: -item[1]):
        sys.stdout.write(f"{times:8,} {name}\n")
    sys.stdout.write(f"{options.count:8,} files in {time.monotonic() - start:.0f} s, {bad} bad\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
