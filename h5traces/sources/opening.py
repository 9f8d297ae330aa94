"""Opens files that others wrote, by their content, and reads what their names say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import os

    from h5traces.meaning.options import ReadingOptions
    from h5traces.sources.source import TraceSource

SOURCE_SUFFIXES: Final = (".pkl.gz", ".pickle.gz", ".pkl", ".pickle")
_BATCH_NAME: Final = re.compile(
    r"(?P<model_id>.+)_(?P<dataset>triviaqa|trivia_qa|truthfulqa|truthful_qa|[A-Za-z0-9-]+)"
    r"_batch_\d+(_sub\d+)?\Z"
)


def open_source(path: str | os.PathLike[str], options: ReadingOptions | None = None) -> TraceSource:
    """Open a source, a context manager: it yields dicts, its `records` yields records."""
    # Loaded on first use: archives are read without it.
    from h5traces.meaning.options import ReadingOptions
    from h5traces.sources.pickle.stream import BatchStream

    return BatchStream(path, options=options or ReadingOptions())


def source_stem(name: str) -> str:
    """A source's file name without its suffix."""
    suffix = next((each for each in SOURCE_SUFFIXES if name.endswith(each)), "")
    return name.removesuffix(suffix)


def facts_in_name(path: str | os.PathLike[str]) -> dict[str, str]:
    """``model_id`` and ``dataset`` of ``{model}_{dataset}_batch_0000.pkl.gz``; else nothing."""
    found = _BATCH_NAME.match(source_stem(Path(path).name))
    return {} if found is None else found.groupdict()
