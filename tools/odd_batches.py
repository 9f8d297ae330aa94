"""Converts random odd batches by the thousand; the long run of ``tests/meaning``.

``python tools/odd_batches.py --count 3000 --first 300`` exits with 1 at the first batch whose
archive is not the truth, or that is rejected without a reason; it names the batch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "meaning"))

from odd_items import odd_batch
from test_random_items import check


def main() -> int:
    """Run and print how many batches were read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="Seed of the first batch.")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    num_read = 0
    for seed in range(options.first, options.first + options.count):
        with tempfile.TemporaryDirectory() as folder:
            try:
                num_read += check(odd_batch(seed), Path(folder))
            except AssertionError as error:
                sys.stdout.write(f"{error}\n")
                return 1
    sys.stdout.write(f"{options.count:,} batches: {num_read:,} read, the others rejected\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
