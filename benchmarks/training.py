#!/usr/bin/env python3
"""Training from archives against training from legacy pickles, on Llama-2-7B-shaped samples.

    pip install '.[bench]'
    python benchmarks/training.py                 # 10 minutes, 2 GB; updates docs/training.md
    python benchmarks/training.py --scale small   # a look, one minute; prints the table

The data are synthetic (tools/make_synthetic.py) and say nothing of Llama-2. The 1000 samples are 40
different ones: two files of 20, each under 25 names (hard links), so that 14 GB of pickles need not
be written; both sides read every name as a separate file. All reads come from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from suite.folder import made_folder
from suite.machine import describe_machine, versions
from suite.measure import Series
from suite.synthetic import LLAMA_2_7B, REPOSITORY, Generator, Shape, write_batch
from training_cases import CASES, Data
from training_report import report

import h5traces
from h5traces.writing.options import TargetOptions

DOCUMENT: Final = REPOSITORY / "docs" / "training.md"
_BEGIN, _END = "<!-- benchmark -->", "<!-- end of benchmark -->"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured.

    Attributes
    ----------
    shape
        Sizes of the imitated model.
    num_files, samples_per_file, num_links
        Different files, samples in each, and names of each.
    num_rounds, num_graphs, num_slow
        Rounds, random graphs per round from archives, and from pickles.
    """

    shape: Shape
    num_files: int
    samples_per_file: int
    num_links: int
    num_rounds: int
    num_graphs: int
    num_slow: int

    @property
    def num_samples(self) -> int:
        """Samples of all names."""
        return self.num_files * self.samples_per_file * self.num_links


SCALES: Final = {
    "full": Scale(LLAMA_2_7B, 2, 20, 25, 3, 400, 3),
    "small": Scale(LLAMA_2_7B, 2, 4, 5, 2, 100, 4),
    "tiny": Scale(Shape(2, 16, 2), 2, 3, 2, 1, 8, 4),
}


def prepare(folder: Path, scale: Scale) -> Data:
    """Write the batches and their archives, unless the folder has them, and link their names."""
    pickles, archives = folder / "pickles", folder / "archives"
    if not archives.exists():
        for part in (pickles, archives):
            part.mkdir(parents=True)
        samples = Generator(scale.shape).samples(scale.num_files * scale.samples_per_file)
        for number in range(scale.num_files):
            name = f"synthetic_none_batch_{number:04d}"
            batch = [next(samples) for _ in range(scale.samples_per_file)]
            write_batch(batch, pickles / f"{name}.pkl.gz")
            converted = h5traces.convert(
                pickles / f"{name}.pkl.gz",
                archives / f"{name}.h5",
                target=TargetOptions(verify=False),
            )
            if not converted.ok:
                raise SystemExit(converted.files[0].error)
            _link(pickles / f"{name}.pkl.gz", scale.num_links)
            _link(archives / f"{name}.h5", scale.num_links)
    return Data(pickles, archives, scale)


def _link(path: Path, num_names: int) -> None:
    for number in range(1, num_names):
        os.link(path, path.with_name(f"copy{number:02d}_{path.name}"))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument(
        "--work", type=made_folder, help="folder for the data; kept, and used again"
    )
    parser.add_argument("-o", "--output", type=Path, help="also write the raw figures there")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        help="measure nothing, report what runs with -o have saved",
    )
    parser.add_argument(
        "--write", action="store_true", help="put the table into docs/training.md (default at full)"
    )
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the cases asked for."""
    scale = SCALES[options.scale]
    folder = options.work or Path(tempfile.mkdtemp(prefix="h5traces-training-"))
    warnings.simplefilter("ignore", DeprecationWarning)
    # As in the workers of every DataLoader; several threads only disturb such small operations.
    torch.set_num_threads(1)
    try:
        data = prepare(folder, scale)
        series, notes = Series(), {}
        for name in options.only:
            print(f"{name} …", file=sys.stderr, flush=True)
            notes |= CASES[name](data, series) or {}
        return {
            "scale": options.scale,
            "num_samples": scale.num_samples,
            "machine": describe_machine(folder),
            "versions": versions(),
            "figures": series.values,
            "notes": notes,
        }
    finally:
        if options.work is None:
            shutil.rmtree(folder)


def merged(paths: list[Path]) -> dict[str, Any]:
    """Runs of different cases as one."""
    first, *rest = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    for each in rest:
        first["figures"] |= each["figures"]
        first["notes"] |= each["notes"]
    return first


def main() -> None:
    """Prepare, measure, report."""
    options = parse()
    results = merged(options.report) if options.report else measure(options)
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = report(results)
    print(text)
    if options.write or (results["scale"] == "full" and set(options.only) == set(CASES)):
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(_BEGIN)
        after = rest.partition(_END)[2]
        DOCUMENT.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
