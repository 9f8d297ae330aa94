"""What precision tiers take and cost: bytes per 1000 samples, speed of writing and of reading.

Run ``python benchmarks/tiers.py`` (five minutes, 1 GB of disk); it prints two markdown tables and
writes ``tiers.json`` beside itself. ``--report`` prints them again, and puts the table of tiers
into ``docs/precision.md``, whose other columns come from ``docs/precision-study.md``.

Data are synthetic, at Llama-2-7B's shape (32 layers, 43 tokens, 15.1 MB of float16 per sample),
with the massive activations of ``tools/make_synthetic.py``. They say nothing of the model itself.

*Size* is that of whole files: scales, headers, tokens, texts, table and footer included. A file of
``--samples`` samples repeats the distinct ones; what a file holds once is not scaled up. The row of
seven layers is a file of these layers only, made by copying chunks.

*Writing* is `ArchiveWriter` from arrays in memory until the file has its name, without
verification, which is the same for all. *Reading* is ``archive.read`` of all layers and kinds. All
tiers are written and read one after the other in every round, so that ratios within a round hold on
a noisy machine; MB/s are of float16 values, medians, with the range of the rounds in brackets.

Prediction, written before the first run: 1000 samples take 11.5 GB exactly, 6.4 in fine, 4.75 in
analysis, 2.49 in compact and 7.4 in native, and 7/32 of that with seven layers. Writing goes at
0.45 (fine), 0.75 (analysis), 0.75 (compact) and 0.6 (native) of the exact speed; reading at 0.8,
1.0, 1.0 and 0.8.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from make_synthetic import Generator, Shape
from suite.folder import made_folder

import h5traces
from h5traces.format.precision import TIERS
from h5traces.format.record import SourcePosition
from h5traces.meaning.records import to_record
from h5traces.precision.scales import ScaleSet
from h5traces.rewriting.repack import repack
from h5traces.writing.archive_writer import ArchiveWriter
from h5traces.writing.calibrate import Measurement, record_states
from h5traces.writing.options import TargetOptions, WriteOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from h5traces.format.record import TraceRecord
    from h5traces.precision.scales import Calibration

SEQ_LEN: Final = 43
SEVEN_LAYERS: Final = (0, 5, 10, 15, 20, 25, 31)
THOUSAND: Final = 1000
ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "tiers.json"
# Columns of the study that the guide shows.
STUDIED: Final = (
    "largest error / sigma",
    "change of loss, mean of layers",
    "change of probe AUROC, worst layer",
    "edges that flip at 0.01",
)


@dataclass
class Figures:
    """Of one tier, a value for each round.

    Attributes
    ----------
    thousand_nbytes, seven_nbytes
        1000 samples of all layers, and of seven.
    written_nbytes, read_nbytes
        Bytes of float16 that were written and read in a round.
    writing, reading
        Seconds.
    """

    thousand_nbytes: float = 0
    seven_nbytes: float = 0
    written_nbytes: int = 0
    read_nbytes: int = 0
    writing: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)


def records(samples: Sequence[dict[str, Any]]) -> list[TraceRecord]:
    place = SourcePosition(file=0, position=0)
    return [to_record(sample, source=place) for sample in samples]


def calibrated(found: Sequence[TraceRecord]) -> Calibration:
    with Measurement() as measurement:
        for record in found:
            measurement.add("synthetic", record_states(record))
        return measurement.calibration(None)


def options_of(tier: str, calibration: Calibration) -> WriteOptions:
    precision = TIERS[tier]
    scales = ScaleSet() if precision.step is None else calibration.scales(precision.step)
    return WriteOptions(precision=precision, scales=scales, overwrite=True, verify=False)


def write(path: Path, found: Sequence[TraceRecord], options: WriteOptions) -> float:
    started = time.perf_counter()
    with ArchiveWriter(path, options) as writer:
        for number, record in enumerate(found):
            writer.append(record.model_copy(update={"sample_id": str(number)}))
    return time.perf_counter() - started


def read(path: Path) -> float:
    with h5traces.open(path) as archive:
        kinds = list(archive._files[0].store.kinds)
        started = time.perf_counter()
        for index in range(len(archive)):
            archive.read([index], kinds=kinds)
        return time.perf_counter() - started


def float16_nbytes(path: Path) -> int:
    """Bytes of all layers as float16 has them."""
    with h5traces.open(path) as archive:
        return sum(
            2 * int(np.prod(trace._stored.entry(name).shape))
            for trace in archive
            for name in trace._stored.objects
            if "layer_" in name
        )


def cell(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def per_thousand(path: Path, num_samples: int) -> float:
    """Bytes of 1000 such samples; what an archive holds once is counted once."""
    with h5traces.open(path) as archive:
        sizes = archive._files[0].sizes()
    once = sizes["scales"].stored_nbytes if "scales" in sizes else 0
    return once + (path.stat().st_size - once) / num_samples * THOUSAND


def size_table(figures: dict[str, Figures]) -> str:
    lines = ["| tier | 32 layers, GB per 1000 | 7 layers | of exact |", "|---|---:|---:|---:|"]
    exact = figures["exact"].thousand_nbytes
    for tier, each in figures.items():
        whole, seven = each.thousand_nbytes, each.seven_nbytes
        lines.append(f"| {tier} | {whole / 1e9:.2f} | {seven / 1e9:.2f} | {whole / exact:.3f} |")
    return "\n".join(lines)


def speed_table(figures: dict[str, Figures]) -> str:
    lines = [
        "| tier | writing, MB/s | / exact | reading, MB/s | / exact |",
        "|---|---:|---:|---:|---:|",
    ]
    exact = figures["exact"]
    base = [exact.read_nbytes / 1e6 / seconds for seconds in exact.reading]
    for tier, each in figures.items():
        writing = [each.written_nbytes / 1e6 / seconds for seconds in each.writing]
        reading = [each.read_nbytes / 1e6 / seconds for seconds in each.reading]
        row = [
            cell(writing, ".0f"),
            cell([a / b for a, b in zip(exact.writing, each.writing, strict=True)], ".2f"),
            cell(reading, ".0f"),
            cell([a / b for a, b in zip(reading, base, strict=True)], ".2f"),
        ]
        lines.append(f"| {tier} | {' | '.join(row)} |")
    return "\n".join(lines)


def guide_table(figures: dict[str, Figures]) -> str:
    """Sizes from here, beside what the study found of the shipped model."""
    study = (ROOT / "docs" / "precision-study.md").read_text(encoding="utf-8")
    found = re.search("<!-- study -->\n(.*?)\n<!-- end of study -->", study, re.DOTALL)
    assert found is not None
    header, _, *rows = [
        [each.strip() for each in line.strip("|").split("|")] for line in found[1].splitlines()
    ]
    lines = [
        f"| tier | GB per 1000 | 7 layers | {' | '.join(STUDIED)} |",
        f"|---|---:|---:|{'---|' * len(STUDIED)}",
    ]
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        each = figures[cells["tier"]]
        studied = " | ".join(cells[name].removeprefix("float16: ") for name in STUDIED)
        sizes = f"{each.thousand_nbytes / 1e9:.2f} | {each.seven_nbytes / 1e9:.2f}"
        lines.append(f"| `{cells['tier']}` | {sizes} | {studied} |")
    return "\n".join(lines)


def report(figures: dict[str, Figures]) -> None:
    guide = ROOT / "docs" / "precision.md"
    text = guide.read_text(encoding="utf-8")
    marked = re.compile("<!-- tiers -->\n.*?<!-- end of tiers -->", re.DOTALL)
    filled = f"<!-- tiers -->\n{guide_table(figures)}\n<!-- end of tiers -->"
    guide.write_text(marked.sub(lambda _: filled, text), encoding="utf-8")
    print(size_table(figures), speed_table(figures), sep="\n\n")


def measured(options: argparse.Namespace) -> dict[str, Figures]:
    generator = Generator(Shape(options.layers, options.hidden, options.heads))
    samples = [generator.sample(number, SEQ_LEN) for number in range(options.distinct)]
    if options.float32:
        for sample in samples:
            for kind in ("hidden_states", "attentions"):
                sample[kind] = [each.astype(np.float32) for each in sample[kind]]
    found = records(samples)
    calibration = calibrated(found)
    figures = {tier: Figures() for tier in TIERS}
    layers = [each for each in SEVEN_LAYERS if each < options.layers]
    repeated = [found[number % len(found)] for number in range(options.samples)]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = {tier: Path(folder) / f"{tier}.h5" for tier in TIERS}
        for _ in range(options.rounds):
            for tier, path in paths.items():
                seconds = write(path, found, options_of(tier, calibration))
                figures[tier].writing.append(seconds)
            for tier, path in paths.items():
                figures[tier].reading.append(read(path))
        written = float16_nbytes(paths["exact"])
        seven = Path(folder) / "seven.h5"
        for tier, path in paths.items():
            figures[tier].written_nbytes = written
            figures[tier].read_nbytes = float16_nbytes(path)
            write(path, repeated, options_of(tier, calibration))
            figures[tier].thousand_nbytes = per_thousand(path, options.samples)
            repack(path, seven, layers=layers, target=TargetOptions(overwrite=True, verify=False))
            figures[tier].seven_nbytes = per_thousand(seven, options.samples)
            path.unlink()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=60, help="in the files whose size counts")
    parser.add_argument("--distinct", type=int, default=12, help="made, and written for speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--float32", action="store_true", help="the source has float32 arrays")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--folder", type=made_folder, help="on the disk to measure")
    parser.add_argument("--report", action="store_true", help="measure nothing, use tiers.json")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="JSON")
    options = parser.parse_args()
    if options.report:
        stored = json.loads(options.output.read_text(encoding="utf-8"))
        report({tier: Figures(**each) for tier, each in stored.items()})
        return
    figures = measured(options)
    document = {tier: asdict(each) for tier, each in figures.items()}
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(size_table(figures), speed_table(figures), sep="\n\n")


if __name__ == "__main__":
    main()
