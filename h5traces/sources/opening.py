"""Opens files that others wrote, by their content, and reads what their names say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from h5traces.format.record import TraceRecord

SOURCE_SUFFIXES: Final = (".pkl.gz", ".pickle.gz", ".pkl", ".pickle")
_BATCH_NAME: Final = re.compile(
    r"(?P<model_id>.+)_(?P<dataset>triviaqa|trivia_qa|truthfulqa|truthful_qa|[A-Za-z0-9-]+)"
    r"_batch_\d+(_sub\d+)?\Z"
)


class TraceSource(Protocol):
    """An open source; `records` or `dicts` read its samples once, in order.

    `num_samples` is None if the file does not say it; `num_layers` is the largest number of decoder
    blocks among the samples read so far; `progress` has the bytes read so far and the file's size.
    """

    num_samples: int | None
    num_layers: int

    @property
    def progress(self) -> tuple[int, int]: ...

    def records(
        self, *, file: int = 0, layers: tuple[int, ...] | None = None
    ) -> Iterator[TraceRecord]:
        """Every sample as a record: of `layers` only, with `file` as its source's number."""

    def dicts(self) -> Iterator[dict[str, Any]]:
        """Every sample as a dict; tensors are `TorchValue`."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def is_source(path: str | os.PathLike[str]) -> bool:
    """Whether the file starts like a pickle, plain or inside gzip; its name does not matter."""
    from h5traces.sources.pickle.stream import is_pickle

    return is_pickle(path)


def open_source(path: str | os.PathLike[str]) -> TraceSource:
    """Open a source; a context manager."""
    # Loaded on first use: archives are read without it.
    from h5traces.sources.pickle.stream import BatchStream

    return BatchStream(path)


def source_stem(name: str) -> str:
    """A source's file name without its suffix."""
    suffix = next((each for each in SOURCE_SUFFIXES if name.endswith(each)), "")
    return name.removesuffix(suffix)


def facts_in_name(path: str | os.PathLike[str]) -> dict[str, str]:
    """``model_id`` and ``dataset`` of ``{model}_{dataset}_batch_0000.pkl.gz``; else nothing."""
    found = _BATCH_NAME.match(source_stem(Path(path).name))
    return {} if found is None else found.groupdict()
