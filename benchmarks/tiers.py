"""What precision tiers take and cost: bytes per 1000 samples, speed of writing and of reading.

Run ``python benchmarks/tiers.py`` (five minutes, 4 GB of disk); it prints two markdown tables. Data
are synthetic, at Llama-2-7B's shape (32 layers, 43 tokens, 15.1 MB of float16 per sample), with the
massive activations of ``tools/make_synthetic.py``. They say nothing of the model itself.

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
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from make_synthetic import Generator, Shape

import h5traces
from h5traces.calibration import Measurement, record_states
from h5traces.legacy.layouts import to_record
from h5traces.precision import ScaleSet
from h5traces.repacking import repack
from h5traces.schema import TIERS, SourcePosition
from h5traces.writer import ArchiveWriter, WriteOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from h5traces.precision import Calibration
    from h5traces.schema import TraceRecord

SEQ_LEN: Final = 43
SEVEN_LAYERS: Final = (0, 5, 10, 15, 20, 25, 31)
THOUSAND: Final = 1000


@dataclass
class Figures:
    """Of one tier, a value for each round."""

    nbytes: int = 0
    seven_nbytes: int = 0
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
    return WriteOptions(precision=precision, scales=scales, overwrite=True)


def write(path: Path, found: Sequence[TraceRecord], options: WriteOptions) -> float:
    started = time.perf_counter()
    with ArchiveWriter(path, options) as writer:
        for number, record in enumerate(found):
            writer.append(record.model_copy(update={"sample_id": str(number)}))
    return time.perf_counter() - started


def read(path: Path) -> float:
    with h5traces.open(path) as archive:
        kinds = archive.files[0].metadata_kinds
        started = time.perf_counter()
        for index in range(len(archive)):
            archive.read([index], kinds=kinds)
        return time.perf_counter() - started


def float16_nbytes(path: Path) -> int:
    """Bytes of all layers as float16 has them."""
    with h5traces.open(path) as archive:
        return sum(
            2 * int(np.prod(trace.entry(name).shape))
            for trace in archive
            for name in trace.objects
            if "layer_" in name
        )


def cell(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def per_thousand(nbytes: int, once: int, num_samples: int) -> float:
    return once + (nbytes - once) / num_samples * THOUSAND


def size_table(figures: dict[str, Figures], once: dict[str, int], num_samples: int) -> str:
    lines = ["| tier | 32 layers, GB per 1000 | 7 layers | of exact |", "|---|---|---|---|"]
    exact = per_thousand(figures["exact"].nbytes, once["exact"], num_samples)
    for tier, each in figures.items():
        whole = per_thousand(each.nbytes, once[tier], num_samples)
        seven = per_thousand(each.seven_nbytes, once[tier] * 7 // 32, num_samples)
        lines.append(f"| {tier} | {whole / 1e9:.3f} | {seven / 1e9:.3f} | {whole / exact:.3f} |")
    return "\n".join(lines)


def speed_table(figures: dict[str, Figures], nbytes: int, read_nbytes: dict[str, int]) -> str:
    lines = [
        "| tier | writing, MB/s | / exact | reading, MB/s | / exact |",
        "|---|---|---|---|---|",
    ]
    exact = figures["exact"]
    for tier, each in figures.items():
        writing = [nbytes / 1e6 / seconds for seconds in each.writing]
        reading = [read_nbytes[tier] / 1e6 / seconds for seconds in each.reading]
        base = [read_nbytes["exact"] / 1e6 / seconds for seconds in exact.reading]
        row = [
            cell(writing, ".0f"),
            cell([a / b for a, b in zip(exact.writing, each.writing, strict=True)], ".2f"),
            cell(reading, ".0f"),
            cell([a / b for a, b in zip(reading, base, strict=True)], ".2f"),
        ]
        lines.append(f"| {tier} | {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=100, help="in the files whose size counts")
    parser.add_argument("--distinct", type=int, default=12, help="made, and written for speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--float32", action="store_true", help="the source has float32 arrays")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    options = parser.parse_args()
    generator = Generator(Shape(options.layers, options.hidden, options.heads))
    samples = [generator.sample(number, SEQ_LEN) for number in range(options.distinct)]
    if options.float32:
        for sample in samples:
            for kind in ("hidden_states", "attentions"):
                sample[kind] = [each.astype(np.float32) for each in sample[kind]]
    found = records(samples)
    calibration = calibrated(found)
    figures = {tier: Figures() for tier in TIERS}
    once: dict[str, int] = {}
    read_nbytes: dict[str, int] = {}
    layers = [each for each in SEVEN_LAYERS if each < options.layers]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = {tier: Path(folder) / f"{tier}.h5" for tier in TIERS}
        for _ in range(options.rounds):
            for tier, path in paths.items():
                wanted = options_of(tier, calibration)
                figures[tier].writing.append(write(path, found, wanted))
            for tier, path in paths.items():
                figures[tier].reading.append(read(path))
        for tier, path in paths.items():
            read_nbytes[tier] = float16_nbytes(path)
            repeated = [found[number % len(found)] for number in range(options.samples)]
            write(path, repeated, options_of(tier, calibration))
            figures[tier].nbytes = path.stat().st_size
            with h5traces.open(path) as archive:
                sizes = archive.files[0].sizes()
            once[tier] = sizes["scales"].stored_nbytes if "scales" in sizes else 0
            repack(path, Path(folder) / "seven.h5", layers=layers, overwrite=True, verify=False)
            figures[tier].seven_nbytes = (Path(folder) / "seven.h5").stat().st_size
            path.unlink()
    values = sum(
        int(np.prod(each.shape))
        for sample in samples
        for kind in ("hidden_states", "attentions")
        for each in sample[kind]
    )
    print(size_table(figures, once, options.samples))
    print()
    print(speed_table(figures, 2 * values, read_nbytes))


if __name__ == "__main__":
    main()
