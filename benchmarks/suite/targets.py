"""What h5traces set out to reach, and what was predicted before the first run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from h5traces.format.native import NATIVE

if TYPE_CHECKING:
    from suite.measure import Spread


@dataclass(frozen=True, slots=True)
class Target:
    """A goal for one figure.

    Attributes
    ----------
    text
        What is wanted.
    figure
        Name in `suite.figures.figures`.
    limit
        The goal.
    unit
        Behind the numbers.
    at_most
        Whether the goal is an upper bound.
    digits
        Digits after the point, where the usual three in all do not tell enough.
    """

    text: str
    figure: str
    limit: float
    unit: str = "x"
    at_most: bool = False
    digits: int | None = None

    @property
    def goal(self) -> str:
        """The bound as text."""
        return f"{'<=' if self.at_most else '>='} {self.limit:g}{_unit(self.unit)}"

    def verdict(self, spread: Spread | None) -> str:
        """Whether the median reaches the goal."""
        if spread is None:
            return "not run"
        reached = spread.median <= self.limit if self.at_most else spread.median >= self.limit
        return "yes" if reached else "**no**"


TARGETS: Final = (
    Target("write, all cores, against pickle + gzip 6", "write_wall_vs_legacy", 15),
    Target("file smaller than pickle + gzip 6", "smaller_than_legacy", 6.5, "%"),
    Target(
        "full read, all cores, against gzip + pickle.load"
        + (" (compiled kernels)" if NATIVE else " (no compiled kernels)"),
        "scan_wall_vs_legacy",
        9 if NATIVE else 5,
    ),
    Target(
        "the same, of inflating its chunks on all cores and nothing else",
        "read_all_of_inflate",
        60,
        "%",
    ),
    Target(
        "full read of the shipped tiny model's batch, all cores, against gzip + pickle.load",
        "real_scan_wall_vs_legacy",
        1.5,
    ),
    Target(
        "full read, all cores, against stock h5py on its own gzip 4 + shuffle file",
        "scan_wall_vs_stock",
        6,
    ),
    Target("the same where the stock file has one chunk per array", "scan_wall_vs_stock_whole", 4),
    Target("one random (sample, layer), file open, against stock h5py", "random_vs_stock_1", 2),
    Target("the same where the stock file has one chunk per array", "random_vs_stock_whole_1", 2),
    Target(
        "full read, all cores, with a plugin codec at most 3 % larger, against the default codec",
        "plugin_scan",
        1.5,
    ),
    Target("the same with 1 thread", "plugin_scan_1", 1.5),
    Target("open and count 1000 samples", "open_ms", 10, "ms", at_most=True),
    Target(
        "convert .pkl.gz --no-verify against igzip inflating it", "convert_gz", 1.5, at_most=True
    ),
    Target(
        "convert .pkl.gz --verify against igzip inflating it", "convert_gz_verify", 2, at_most=True
    ),
    Target(
        "hidden states against the entropy of their byte planes",
        "hidden_states_vs_entropy",
        1.01,
        at_most=True,
        digits=4,
    ),
    Target(
        "peak RSS of convert above the interpreter, worst of four, "
        "against 200 MB + 2 x the largest sample",
        "convert_peak_share",
        1,
        at_most=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A range written down before the first run of this suite at full scale.

    Attributes
    ----------
    text
        What is predicted.
    figure
        Name in `suite.figures.figures`.
    low, high
        The range.
    unit, digits
        As of a target.
    """

    text: str
    figure: str
    low: float
    high: float
    unit: str = "x"
    digits: int | None = None

    @property
    def range(self) -> str:
        """The range as text."""
        return f"{self.low:g} to {self.high:g}{_unit(self.unit)}"

    def outcome(self, spread: Spread | None) -> str:
        """Where the median lies."""
        if spread is None:
            return "not run"
        if spread.median < self.low:
            return "lower"
        return "higher" if spread.median > self.high else "as predicted"


# Written before the first run at full scale; those of compiled kernels before their first run. Do
# not touch them after it: a prediction that is corrected is none.
PREDICTIONS: Final = (
    Prediction("write, all cores, against pickle + gzip 6", "write_wall_vs_legacy", 8, 15),
    Prediction("write, 1 thread, against pickle + gzip 6", "write_wall_vs_legacy_1", 6, 10),
    Prediction("write, all cores, against stock h5py", "write_wall_vs_stock", 4, 10),
    Prediction("file smaller than pickle + gzip 6", "smaller_than_legacy", 7, 9, "%"),
    Prediction("full read, all cores, against gzip + pickle.load", "scan_wall_vs_legacy", 6, 11),
    Prediction("full read, all cores, against stock h5py", "scan_wall_vs_stock", 4, 9),
    Prediction("full read, 1 thread, against stock h5py", "scan_wall_vs_stock_1", 2.5, 5),
    Prediction(
        "full read, all cores, against safetensors (uncompressed)",
        "scan_wall_vs_safetensors",
        0.25,
        0.6,
    ),
    Prediction("one random (sample, layer) against stock h5py", "random_vs_stock_1", 2, 5),
    Prediction("open and count 1000 samples", "open_ms", 1, 8, "ms"),
    Prediction("convert .pkl.gz --no-verify against igzip", "convert_gz", 1.2, 2),
    Prediction(
        "convert .pkl.gz --verify against igzip inflating it", "convert_gz_verify", 1.6, 2.6
    ),
    Prediction(
        "hidden states against their entropy", "hidden_states_vs_entropy", 1.002, 1.008, digits=4
    ),
    Prediction("peak RSS of convert above the interpreter", "convert_peak_mb", 150, 300, "MB"),
    Prediction("opening 10,000 samples against 10", "growth_open", 1, 5),
    Prediction("random access among 10,000 samples against 10", "growth_random", 0.9, 1.5),
    Prediction("one layer of all samples against loading the batch", "one_layer", 60, 300),
    Prediction(
        "reading with 1 thread, of what bare inflate allows", "read_1_of_inflate", 60, 85, "%"
    ),
    Prediction(
        "full read with plans, compiled kernels, all cores, against gzip + pickle.load",
        "scan_wall_vs_legacy_native",
        7,
        10,
    ),
    Prediction("the same without compiled kernels", "scan_wall_vs_legacy_python", 4, 5.5),
    Prediction(
        "full read with plans, all cores, of inflating the chunks on all cores",
        "read_all_of_inflate",
        60,
        80,
        "%",
    ),
    Prediction(
        "the shipped tiny model's batch, all cores, compiled kernels, against gzip + pickle.load",
        "real_scan_wall_vs_legacy_native",
        1.2,
        2,
    ),
)


def _unit(unit: str) -> str:
    return unit if unit == "x" else f" {unit}"


def measured(spread: Spread | None, unit: str = "x", digits: int | None = None) -> str:
    """A figure with its unit."""
    return "" if spread is None else f"{spread.text(digits)}{_unit(unit)}"
