"""Clocks, rounds and spreads; imports nothing heavy, since memory is measured from here too."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_real_fsync = os.fsync
_in_fsync = 0.0


def _counted_fsync(descriptor: Any) -> None:
    global _in_fsync
    start = time.perf_counter()
    try:
        _real_fsync(descriptor)
    finally:
        _in_fsync += time.perf_counter() - start


# Every writer here makes its files durable through this function, h5traces included, so that the
# report can tell the disk's share from the format's.
os.fsync = _counted_fsync  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that one run took.

    Attributes
    ----------
    wall
        From start to end.
    cpu
        Of all threads, user and system.
    fsync
        Of `wall`: waiting for the disk.
    """

    wall: float
    cpu: float
    fsync: float


def timed(work: Callable[[], object]) -> Timing:
    """Run `work` once; what it returns is freed after the clock has stopped."""
    gc.collect()
    fsync, cpu, wall = _in_fsync, time.process_time(), time.perf_counter()
    result = work()
    timing = Timing(
        time.perf_counter() - wall, time.process_time() - cpu, max(0.0, _in_fsync - fsync)
    )
    del result
    return timing


class Series:
    """Figures of all rounds, by case and by name."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list[float]]] = {}

    def add(self, case: str, **figures: float) -> None:
        """Note one round's figures of a case."""
        for name, value in figures.items():
            self.values.setdefault(case, {}).setdefault(name, []).append(value)

    def add_timing(self, case: str, what: str, timing: Timing) -> None:
        """Note one round's seconds as ``what_wall``, ``what_cpu`` and ``what_fsync``."""
        self.add(
            case,
            **{
                f"{what}_wall": timing.wall,
                f"{what}_cpu": timing.cpu,
                f"{what}_fsync": timing.fsync,
            },
        )


def rounds(num_rounds: int, cases: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Cases in an order that begins elsewhere in every round, so that none always comes first."""
    for number in range(num_rounds):
        start = number * max(1, len(cases) // max(1, num_rounds)) % max(1, len(cases))
        for case in (*cases[start:], *cases[:start]):
            yield number, case


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some figures."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int | None = None, scale: float = 1.0) -> str:
        """``median (low-high)``, or only the median where there was one round."""
        figures = [each * scale for each in (self.median, self.low, self.high)]
        places = _places(figures[0]) if digits is None else digits
        middle, low, high = (f"{each:.{places}f}" for each in figures)
        return middle if low == high else f"{middle} ({low}-{high})"


def _places(value: float) -> int:
    """Digits after the point that leave about three in all."""
    size = abs(value)
    return 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 3


def ratio(
    above: Mapping[str, list[float]], below: Mapping[str, list[float]], name: str
) -> Spread | None:
    """Ratios within the rounds: what a noisy machine does to both cancels out."""
    if name not in above or name not in below:
        return None
    # Not strict: what is slow to open is measured in the first rounds only.
    pairs = zip(above[name], below[name], strict=False)
    return Spread.of([first / second for first, second in pairs])


def above_imports(memory: Mapping[str, float]) -> float:
    """Megabytes that a child's peak lies above what it had when all was imported."""
    return (memory["peak"] - memory["imported"]) / 1e6


def rss_nbytes(field: str = "VmRSS") -> int:
    """Resident memory of this process; ``VmHWM`` is the highest so far.

    Not through `resource`: there a child starts with its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
