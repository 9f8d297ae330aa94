#!/usr/bin/env python3
"""Fuzz the compiled kernels under AddressSanitizer and UBSan.

Random and mutated deflate streams are decoded alone and in turn with another, and compared with
zlib, and with libdeflate where it is installed: what is accepted, the bytes, and where they end.
Encoders, shuffles and plans that say anything run beside them. Every buffer has the size that is
promised. The first difference, and anything that a sanitizer finds, ends the run with an error;
the input is left in kernel-finding.bin.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [
    ROOT / "tests/kernels/fuzz_kernels.c",
    *(each for each in sorted((ROOT / "h5traces/_kernels").glob("*.c")) if each.stem != "module"),
]
FLAGS = "-std=gnu11 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -ffp-contract=off"


def compiler() -> str:
    """The C compiler to use."""
    return os.environ.get("CC", "cc")


def build(folder: Path) -> Path:
    """The fuzzer, compiled into a folder; CalledProcessError where that fails."""
    program = folder / "fuzz_kernels"
    command = [compiler(), *FLAGS.split(), f"-I{ROOT / 'h5traces/_kernels'}", *map(str, SOURCES)]
    command += ["-o", str(program), "-ldl", "-lm", "-pthread"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


def main() -> int:
    """Parse the command line and fuzz; the exit code of the fuzzer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--executions", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=int, default=24 * 3600, help="at most")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if shutil.which(compiler()) is None:
        parser.error(f"there is no C compiler {compiler()!r}; set CC")
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        numbers = (options.seed, options.executions, options.seconds)
        return subprocess.run([program, *map(str, numbers)]).returncode


if __name__ == "__main__":
    sys.exit(main())
