"""A sink of Ray Data: rows are samples, and each write task makes an archive."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from ray.data import Datasink
from ray.data.block import BlockAccessor

from h5traces.archive.opening import open as open_archive
from h5traces.errors import ArchiveExistsError, TargetError
from h5traces.format.layout import ATTENTIONS, HIDDEN_STATES
from h5traces.paths import local_path
from h5traces.writing.create import create

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from h5traces.paths import PathLike

_STACKED: Final = (HIDDEN_STATES, ATTENTIONS)


class ArchiveSink(Datasink[str]):
    """Writes rows, each the dict of a sample, to archives ``traces-00000.h5`` and so on.

    Ray stacks lists of arrays: hidden states ``(layer, token, hidden)`` and attentions
    ``(layer, head, query, key)`` begin with their layers.

    An archive has its name when all of it is written and verified. A task that Ray starts again
    keeps the archive of its first attempt, if that was finished.

    Parameters
    ----------
    folder
        A folder that all nodes know, without archives.
    min_samples
        The fewest rows that a task writes, if there are enough; Ray decides by default.
    options
        As for `h5traces.create`: ``precision``, ``model_id`` and others. A tier needs scales that
        `h5traces.calibrate` made.

    Attributes
    ----------
    archives
        Paths of the archives, when all are written.
    """

    def __init__(self, folder: PathLike, *, min_samples: int | None = None, **options: Any) -> None:
        self._folder = Path(os.path.abspath(local_path(folder)))  # noqa: PTH100  # keeps links
        self._min_samples, self._options = min_samples, options
        self.archives: list[str] = []

    def on_write_start(self, schema: Any = None) -> None:
        """Reject a folder that holds archives, which are of another run."""
        existing = sorted(self._folder.glob("*.h5")) if self._folder.exists() else []
        if existing:
            message = f"{existing[0]} exists; name a folder without archives"
            raise ArchiveExistsError(message)
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, blocks: Iterable[Any], ctx: Any) -> str:
        """Write the archive of one task; its path, empty if there were no rows."""
        path = self._folder / f"traces-{ctx.task_idx:05d}.h5"
        rows, count = _rows(blocks), 0
        try:
            with create(path, spool=False, **self._options) as writer:
                for row in rows:
                    writer.append(row)
                    count += 1
        except ArchiveExistsError:
            # Of an earlier attempt of this task, whose answer was lost.
            count += sum(1 for _ in rows)
            with open_archive(path) as archive:
                if len(archive) != count:
                    message = (
                        f"{path}: another run wrote it, with {len(archive)} samples instead of "
                        f"{count}; name another folder"
                    )
                    raise TargetError(message) from None
        return str(path) if count else ""

    def on_write_complete(self, write_result: Any) -> None:
        """Note the archives."""
        self.archives = sorted(filter(None, write_result.write_returns))

    @property
    def min_rows_per_write(self) -> int | None:
        """What Ray asks for."""
        return self._min_samples


def _rows(blocks: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for block in blocks:
        accessor: Any = BlockAccessor.for_block(block)
        for row in accessor.iter_rows(public_row_format=True):
            yield {name: _layers(each) if name in _STACKED else each for name, each in row.items()}


def _layers(value: Any) -> Any:
    return list(value) if isinstance(value, np.ndarray) else value
