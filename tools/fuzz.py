#!/usr/bin/env python3
"""Fuzz readers of sources and mappings, the chunk decoders or ``open``, guided by coverage.

Needs atheris (``pip install atheris``). Starts from honest inputs and known attacks, mutates what
reaches new code, and stops with exit code 77 at the first exception that is not of h5traces, at
other bytes than a stock library gives, at an import that a pickle asked for, at a crash, a hang, or
too much memory. The input is left in the folder of findings.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

import atheris

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "hostile")]

EPILOG = """\
examples:
  ten minutes of the unpickler, and a corpus to go on with:
    python tools/fuzz.py unpickler --seconds 600 --corpus corpus/

  what was found, once more:
    python tools/fuzz.py unpickler --input crash-0123
"""
# What reads files; all of h5traces takes seconds longer to start.
INSTRUMENTED = [
    f"h5traces.{name}" for name in ("archive", "format", "meaning", "sources", "storage")
]
TARGETS = (
    *("unpickler", "torch", "safetensors", "numpy", "tables", "mappings", "hdf5"),
    *("chunks", "open"),
)
MAX_RSS_MB = 1024
# On a busy machine a child process takes seconds to start. libFuzzer looks every half of this; once
# in some hundred runs its first alarm ended a process whose inputs took milliseconds.
SECONDS_PER_INPUT = 20
LARGEST_INPUT = 16384


def main() -> None:
    """Parse the command line and fuzz; libFuzzer ends the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="0 for another one every time")
    parser.add_argument("--corpus", type=Path, help="inputs to start from, and to add to")
    parser.add_argument("--findings", type=Path, default=Path(), help="folder for what is found")
    parser.add_argument("--input", type=Path, help="try this one only")
    options = parser.parse_args()
    with atheris.instrument_imports(include=INSTRUMENTED):
        import fuzz_targets
    target = fuzz_targets.TARGETS[options.target]
    found = fuzz_targets.SEEDS[options.target]()
    seeds = [each for each in found if len(each) <= fuzz_targets.LARGEST_SEED]
    # What is imported late is imported here, and no input's doing.
    for each in seeds:
        target(each)
    folder = tempfile.mkdtemp() if options.corpus is None else str(options.corpus)
    Path(folder).mkdir(exist_ok=True)
    for each in seeds:
        (Path(folder) / hashlib.sha256(each).hexdigest()[:16]).write_bytes(each)
    arguments = [
        sys.argv[0],
        f"-max_total_time={options.seconds}",
        f"-timeout={SECONDS_PER_INPUT}",
        f"-rss_limit_mb={MAX_RSS_MB}",
        f"-max_len={LARGEST_INPUT}",
        f"-seed={options.seed}",
        f"-artifact_prefix={options.findings}/",
        "-print_final_stats=1",
        str(options.input or folder),
    ]
    atheris.Setup(arguments, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
