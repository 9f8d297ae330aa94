#!/usr/bin/env python3
"""What grows with the number of samples: seconds and memory of everyday work on archives of many.

Run ``python benchmarks/growth.py`` for archives of 1,000, 10,000 and 50,000 samples of tiny arrays,
and one of 10,000 samples with the 64 arrays that Llama-2-7B has, each of them tiny as well: the
number of samples and objects is what matters here, and such archives take a minute to make. Every
line is a separate process; seconds are those inside it after the imports, *MB* its peak of memory
above imports.

Predictions and outcomes are in README.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from suite.folder import made_folder

from h5traces.format.record import IndexRow, SourcePosition
from h5traces.format.values import EncodedObject
from h5traces.meaning.records import to_record
from h5traces.writing.archive_writer import ArchiveWriter
from h5traces.writing.options import WriteOptions
from h5traces.writing.preparation import observe, prepare_element

ARCHIVES = {"1,000": (1_000, 2), "10,000": (10_000, 2), "50,000": (50_000, 2), "7B": (10_000, 32)}
WORK = {
    "open": "h5traces.open(path)",
    "1000 random arrays": "[read(random.randrange(len(archive))) for _ in range(1000)]",
    "by_id": "archive.by_id(f'sample_{len(archive) - 1}')",
    "labels": "archive.labels",
    "iterate": "sum(trace.metadata.seq_len for trace in archive)",
    "ls": "cli('ls', path)",
    "ls --json": "cli('ls', path, '--json')",
    "inspect": "h5traces.inspect(path)",
    "verify": "h5traces.verify(path)",
    "validate --quick": "h5traces.validate(path, quick=True)",
    "validate": "h5traces.validate(path)",
    "repack": "h5traces.repack(path, path + '.repacked.h5')",
    "features": "cli('features', path, '--last-token', '-o', path + '.features.h5')",
    "write": "make(path + '.written.h5', len(archive), len(archive.layers))",
}
# The same work on the small archive first, so that imports and caches are not counted.
PROGRAM = """
import contextlib, io, random, sys, time
from growth import make
import h5traces
from h5traces.cli.app import main

def memory(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) / 1024

def read(index):
    return archive[index]["hidden_states"][1]

def cli(*arguments):
    sys.argv = ["h5traces", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main()

for path in sys.argv[1:3]:
    archive = h5traces.open(path)
    open("/proc/self/clear_refs", "w").write("5")
    before, start = memory("VmRSS"), time.perf_counter()
    {work}
print(time.perf_counter() - start, memory("VmHWM") - before)
"""


def make(path: str | Path, num_samples: int, num_layers: int) -> None:
    """An archive of samples with tiny arrays of five lengths, encoded once for each length."""
    random = np.random.default_rng(0)
    with ArchiveWriter(Path(path), WriteOptions(overwrite=True)) as writer:
        kinds = []
        for length in range(4, 9):
            hidden = random.standard_normal((num_layers, length, 8)).astype("f2")
            heads = np.tril(random.random((num_layers, 2, length, length)))
            heads /= heads.sum(-1, keepdims=True)
            record = to_record(
                {
                    "question_id": "",
                    "hidden_states": list(hidden),
                    "attentions": list(heads.astype("f2")),
                    "tokens": np.arange(length),
                    "generated_answer_clean": "a" * length,
                },
                source=SourcePosition(file=0, position=0),
            )
            objects = list(writer._record_objects(record))
            kinds.append((record.describe().metadata, observe(record), objects))
        for number in range(num_samples):
            metadata, observation, objects = kinds[number % len(kinds)]
            metadata = metadata.model_copy(update={"sample_id": f"sample_{number}"})
            answer = np.array([f"answer {number}".encode()])
            own = prepare_element(
                EncodedObject("generated_answer_clean", {}, f"text:{answer.itemsize}", answer)
            )
            objects = [own if each.path == own.path else each for each in objects]
            row = IndexRow.of(metadata, {"generated_answer_clean": f"answer {number}"})
            writer._write_sample(metadata, row, observation, objects)


def measured(work: str, small: Path, path: Path) -> tuple[float, float] | None:
    """Seconds, and MB above those before the work, in a separate process."""
    program = PROGRAM.format(work=WORK[work])
    command = [sys.executable, "-c", program, str(small), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    seconds, memory = done.stdout.split()[-2:]
    return float(seconds), float(memory)


def main() -> None:
    """Make the archives and print a row for every kind of work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=WORK, default=list(WORK), help="kinds of work")
    parser.add_argument("--archives", nargs="+", choices=ARCHIVES, default=list(ARCHIVES))
    parser.add_argument(
        "--folder", type=made_folder, help="keep the archives here, and use those there"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        paths = {name: folder / f"{name.replace(',', '')}.h5" for name in given.archives}
        small = folder / "small.h5"
        for path, sizes in [(small, (20, 2)), *((paths[each], ARCHIVES[each]) for each in paths)]:
            if not path.exists():
                make(path, *sizes)
        print("| work |", " | ".join(f"{name} s | MB" for name in paths), "|", flush=True)
        print("|---|", "---:|" * 2 * len(paths), sep="", flush=True)
        for work in given.only:
            found = (measured(work, small, path) for path in paths.values())
            cells = (
                "failed | -" if each is None else f"{each[0]:.4f} | {each[1]:.1f}" for each in found
            )
            print(f"| {work} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
