"""Scales that one rank measures and all ranks use: others of their own would give other numbers."""

from __future__ import annotations

import fcntl
import os
import time
from typing import TYPE_CHECKING, Final

import xxhash

from h5traces.ranks.plan import RANKS
from h5traces.writing.calibrate import load_calibration, save_calibration

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.precision.scales import Calibration
    from h5traces.ranks.run import RankRun

_POLL_SECONDS: Final = 0.2


class SharedScales:
    """The scales of a run; the first rank that needs them measures, the others wait."""

    def __init__(self, run: RankRun) -> None:
        self._folder = run.folder / RANKS

    def of(self, name: str, measure: Callable[[], Calibration]) -> Calibration:
        """The scales of a model, measured now if no rank has done it."""
        # Not an .h5: whoever reads the folder of archives would find it.
        path = self._folder / f"{xxhash.xxh3_64_hexdigest(name.encode())}.scales"
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while not path.exists():
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    # Not a lock that is waited for: it could not be interrupted.
                    time.sleep(_POLL_SECONDS)
                    continue
                if not path.exists():
                    found = measure()
                    save_calibration(found, path)
            # Also by who measured: it holds what the others read.
            found = load_calibration(path, may_be_empty=True)
        finally:
            os.close(lock)
        return found
