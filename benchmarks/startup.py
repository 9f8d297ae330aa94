"""How long it takes to start: ``import h5traces`` and ``h5traces --help`` beside ``import numpy``.

    python benchmarks/startup.py [--runs 21]

Each round runs every command once, in turn, as a separate process with warm files; ratios are of
one round, so that a busy machine slows both sides. Targets: importing at most twice as long as
numpy takes, ``--help`` at most 250 ms on an idle core.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import numpy": ["-c", "import numpy"],
    "import h5traces": ["-c", "import h5traces"],
    "h5traces.open, loaded": ["-c", "import h5traces; h5traces.open"],
    "h5traces --help": ["-m", "h5traces", "--help"],
    "h5traces convert --help": ["-m", "h5traces", "convert", "--help"],
}
BASELINE = "import numpy"


def seconds(arguments: list[str]) -> float:
    """The time that one process takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=21, help="rounds (default: 21)")
    runs = parser.parse_args().runs
    for arguments in COMMANDS.values():
        seconds(arguments)  # compiles, and reads from disk
    rounds = [{name: seconds(each) for name, each in COMMANDS.items()} for _ in range(runs)]
    print(f"{'':26}{'median ms':>10}{'fastest':>9}   times as long as {BASELINE} (range)")
    for name in COMMANDS:
        times = [each[name] for each in rounds]
        ratios = [each[name] / each[BASELINE] for each in rounds]
        print(
            f"{name:26}{statistics.median(times) * 1000:10.0f}{min(times) * 1000:9.0f}   "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
