"""How long it takes to start: ``import h5traces`` and ``h5traces --help`` beside ``import numpy``.

    python benchmarks/startup.py [--runs 21]
    python benchmarks/startup.py --extract --runs 5

Each round runs every command once, in turn, as a separate process with warm files; ratios are of
one round, so that a busy machine slows both sides. Targets: importing at most twice as long as
numpy takes, ``--help`` at most 250 ms on an idle core.

``--extract`` runs ``h5traces extract`` with the trained model of this repository instead, beside
importing torch and the models of transformers: one question with an answer of one token, which is
at most 6 s, and 20 questions, which are at most 8 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import numpy": ["-c", "import numpy"],
    "import h5traces": ["-c", "import h5traces"],
    "h5traces.open, loaded": ["-c", "import h5traces; h5traces.open"],
    "h5traces --help": ["-m", "h5traces", "--help"],
    "h5traces convert --help": ["-m", "h5traces", "convert", "--help"],
}
EXTRACT = [
    *("-m", "h5traces", "extract", "--model-id", str(EXAMPLES / "tiny-llama-pydocs")),
    *("--dataset", str(EXAMPLES / "questions.jsonl"), "-o", "OUTPUT"),
]
EXTRACTIONS = {
    "import torch, transformers": ["-c", "import torch, transformers.modeling_utils"],
    "extract, first token": [*EXTRACT, "--num-samples", "1", "--max-new-tokens", "1"],
    "extract, 20 questions": [*EXTRACT, "--num-samples", "20"],
}


def seconds(arguments: list[str]) -> float:
    """The time that one process takes."""
    with tempfile.TemporaryDirectory() as folder:
        named = [f"{folder}/out.h5" if each == "OUTPUT" else each for each in arguments]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *named],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=21, help="rounds (default: 21)")
    parser.add_argument("--extract", action="store_true", help="measure h5traces extract")
    arguments = parser.parse_args()
    commands = EXTRACTIONS if arguments.extract else COMMANDS
    baseline = next(iter(EXTRACTIONS)) if arguments.extract else "import numpy"
    for each in commands.values():
        seconds(each)  # compiles, and reads from disk
    rounds = [
        {name: seconds(each) for name, each in commands.items()} for _ in range(arguments.runs)
    ]
    print(f"{'':26}{'median ms':>10}{'fastest':>9}   times as long as {baseline} (range)")
    for name in commands:
        times = [each[name] for each in rounds]
        ratios = [each[name] / each[baseline] for each in rounds]
        print(
            f"{name:26}{statistics.median(times) * 1000:10.0f}{min(times) * 1000:9.0f}   "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
