"""What every format can do. Heavy imports stay inside methods: children measure one format each."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from suite.synthetic import KINDS

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterable, Iterator
    from pathlib import Path

Sample = dict[str, Any]


class Format(ABC):
    """One way of storing a batch of traces in a file or folder.

    Attributes
    ----------
    name
        As in the report.
    modules
        What it needs.
    written_by
        Name of the format whose file it reads; empty if it writes its own.
    """

    name: str
    modules: tuple[str, ...] = ()
    written_by: str = ""
    suffix: ClassVar[str] = ""

    @property
    def installed(self) -> bool:
        """Whether it can run here."""
        return all(find_spec(module) is not None for module in self.modules)

    def prepare(self) -> None:
        """Import what it needs, so that no clock sees it."""
        for module in self.modules:
            import_module(module)

    def path(self, folder: Path) -> Path:
        """Where it writes."""
        return folder / f"{(self.written_by or self.name).replace(' ', '_')}{self.suffix}"

    @abstractmethod
    def write(self, samples: Iterable[Sample], path: Path) -> None:
        """Write a new file with whole samples, durably."""

    @abstractmethod
    def scan(self, path: Path) -> None:
        """Read every array into its own memory."""

    @abstractmethod
    def reader(self, path: Path) -> contextlib.AbstractContextManager[Any]:
        """An open file: a function from sample and position to the arrays of one layer."""

    @abstractmethod
    def count(self, path: Path) -> int:
        """Open the file and count its samples."""

    def wrong_layers(self, samples: list[Sample], path: Path) -> int:
        """Arrays that do not come back equal."""
        wrong = 0
        with self.reader(path) as read:
            for index, sample in enumerate(samples):
                for layer in range(len(sample[KINDS[0]])):
                    expected = [sample[kind][layer] for kind in KINDS]
                    found = read(index, layer)
                    wrong += sum(not same(*pair) for pair in zip(expected, found, strict=True))
        return wrong


def same(expected: np.ndarray, found: np.ndarray) -> bool:
    """Whether two float16 arrays hold the same bits."""
    return expected.dtype == found.dtype and np.array_equal(
        expected.view(np.uint16), found.view(np.uint16)
    )


def sync(path: Path) -> None:
    """Make a file, or a folder with all that is in it, durable, and its name too."""
    inside = path.rglob("*") if path.is_dir() else ()
    for each in (*inside, path, path.parent):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def stored_nbytes(path: Path) -> tuple[int, int]:
    """Bytes and number of files."""
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files), len(files)


def array_names(samples: Iterable[Sample]) -> Iterator[tuple[str, np.ndarray]]:
    """Flat names for formats that know no groups: ``00000003/hidden_states/007``."""
    for index, sample in enumerate(samples):
        for kind in KINDS:
            for layer, array in enumerate(sample[kind]):
                yield array_name(index, kind, layer), array
        yield f"{index:08d}/tokens", sample["tokens"]


def array_name(index: int, kind: str, layer: int) -> str:
    """One flat name."""
    return f"{index:08d}/{kind}/{layer:03d}"


def texts(sample: Sample) -> dict[str, Any]:
    """What is not an array."""
    names = ("tokens_decoded", "generated_answer_clean", "question_id")
    return {name: sample[name] for name in names}
