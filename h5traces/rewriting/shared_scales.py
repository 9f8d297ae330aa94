"""Scales that one rank measures and all ranks use: others of their own would give other numbers."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import xxhash

from h5traces.ranks.plan import RANKS
from h5traces.ranks.run import RankRun
from h5traces.storage.publish import locked
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemotePath
from h5traces.writing.calibrate import load_calibration, save_calibration

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.precision.scales import Calibration
    from h5traces.ranks.bucket import BucketRun

_POLL_SECONDS: Final = 0.2


class SharedScales:
    """The scales of a run: those of the rank that had them first.

    In a folder, the others wait for it. A bucket has no locks: there, ranks that come before it is
    done measure, too, and take what was put first.
    """

    def __init__(self, run: RankRun | BucketRun) -> None:
        self._run = run

    def of(self, name: str, measure: Callable[[], Calibration]) -> Calibration:
        """The scales of a model, measured now if no rank has done it."""
        # Not an .h5: whoever reads the folder of archives would find it.
        file = f"{xxhash.xxh3_64_hexdigest(name.encode())}.scales"
        if isinstance(self._run, RankRun):
            path = self._run.folder / RANKS / file
            while not path.exists():
                # Not a lock that is waited for: it could not be interrupted.
                with locked(path.with_suffix(".lock")) as is_ours:
                    if is_ours and not path.exists():
                        save_calibration(measure(), path)
                if not is_ours:
                    time.sleep(_POLL_SECONDS)
            # Also by who measured: it holds what the others read.
            return load_calibration(path, may_be_empty=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, file)
            path.write_bytes(_put(RemotePath(f"{self._run.url}{RANKS}/{file}"), path, measure))
            return load_calibration(path, may_be_empty=True)


def _put(place: RemotePath, path: Path, measure: Callable[[], Calibration]) -> bytes:
    """The scales in a bucket, measured and put there if there are none."""
    from h5traces.storage.remote.uploading import put_new, read_document_at

    try:
        return read_document_at(place, DEFAULT_REMOTE)
    except FileNotFoundError:
        save_calibration(measure(), path)
    data = path.read_bytes()
    return data if put_new(place, data, DEFAULT_REMOTE) else read_document_at(place, DEFAULT_REMOTE)
