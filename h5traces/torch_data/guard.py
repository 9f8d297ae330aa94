"""Notices that a shard was replaced or edited between two reads of one training run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from h5traces.errors import DatasetError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from h5traces.storage.remote.paths import RemotePath

# The trailer of a footer, with its checksum over the whole footer, lies in these last bytes.
_END_NBYTES = 64


@dataclass(slots=True)
class _Seen:
    """What a file was when the dataset was made."""

    status: tuple[int, int, int, int]
    nbytes: int
    end: bytes


class ShardGuard:
    """Remembers what local files are, and refuses to go on with others in their place.

    One `os.stat` per check. An archive that is open stays readable after it was renamed over, so
    without this a worker that opened it early would train on the old file and one that opened it
    late on the new one. Files that only moved or were touched (same size, same footer) pass.

    Parameters
    ----------
    paths
        The shards; those that are no local files are not watched.
    """

    def __init__(self, paths: Iterable[Path | RemotePath]) -> None:
        self._seen = {str(path): _look(str(path)) for path in paths if isinstance(path, Path)}

    def check(self, path: Path | RemotePath) -> None:
        """Raise DatasetError unless the shard is the one that the dataset was made of."""
        name = str(path)
        seen = self._seen.get(name)
        if seen is None:
            return
        try:
            if _status(name) == seen.status:
                return
            found = _look(name)
        except OSError as error:
            message = (
                f"{name}: the shard cannot be read any more ({error.strerror}); it was moved or "
                "deleted during training; put it back, or make the dataset again"
            )
            raise DatasetError(message) from error
        if (found.nbytes, found.end) != (seen.nbytes, seen.end):
            message = (
                f"{name}: the shard was replaced or edited during training ({seen.nbytes} bytes "
                f"when the dataset was made, {found.nbytes} now); an epoch over both would mix "
                "two versions; make the dataset again and start from a checkpoint"
            )
            raise DatasetError(message)
        self._seen[name] = found


def _status(path: str) -> tuple[int, int, int, int]:
    status = os.stat(path)  # noqa: PTH116  # once per item: Path.stat costs twice as much
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _look(path: str) -> _Seen:
    with open(path, "rb") as file:  # noqa: PTH123  # as above
        status = os.fstat(file.fileno())
        end = os.pread(file.fileno(), _END_NBYTES, max(0, status.st_size - _END_NBYTES))
    key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return _Seen(key, status.st_size, end)
