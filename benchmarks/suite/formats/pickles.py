"""What the old pipeline wrote: a pickled list of dicts, gzipped or not."""

from __future__ import annotations

import contextlib
import gzip
import pickle
from typing import TYPE_CHECKING, Any, ClassVar, Final

from suite.formats.base import Format, Sample, same, sync
from suite.synthetic import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

GZIP_PICKLE: Final = "pickle + gzip 6"


class PlainPickle(Format):
    """One pickle, protocol 4. There is no access to a part: everything is loaded."""

    name = "pickle"
    suffix: ClassVar[str] = ".pkl"

    def _open(self, path: Path, mode: str) -> Any:
        return path.open(mode)

    def load(self, path: Path) -> list[Sample]:
        """The whole batch."""
        with self._open(path, "rb") as file:
            batch: list[Sample] = pickle.load(file)
        return batch

    def write(self, samples: Iterable[Sample], path: Path) -> None:
        with self._open(path, "xb") as file:
            pickle.dump(list(samples), file, protocol=4)
        sync(path)

    def scan(self, path: Path) -> None:
        self.load(path)

    @contextlib.contextmanager
    def reader(self, path: Path) -> Iterator[Any]:
        def read(index: int, layer: int) -> list[Any]:
            sample = self.load(path)[index]
            return [sample[kind][layer] for kind in KINDS]

        yield read

    def wrong_layers(self, samples: list[Sample], path: Path) -> int:
        batch = self.load(path)
        return sum(
            not same(expected, found)
            for sample, stored in zip(samples, batch, strict=True)
            for kind in KINDS
            for expected, found in zip(sample[kind], stored[kind], strict=True)
        )

    def count(self, path: Path) -> int:
        return len(self.load(path))


class GzipPickle(PlainPickle):
    """The same through Python's gzip at level 6."""

    name = GZIP_PICKLE
    suffix: ClassVar[str] = ".pkl.gz"

    def _open(self, path: Path, mode: str) -> Any:
        return gzip.open(path, mode, compresslevel=6)
