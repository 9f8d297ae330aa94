"""From what a user names to the samples behind it: archives, or legacy pickles."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from h5traces.archive import Archive, open_archive
from h5traces.archive.opening import ARCHIVE_SUFFIXES, expand_paths
from h5traces.errors import DatasetError
from h5traces.graph.archive_source import ArchiveSource
from h5traces.graph.pickle_source import PickleSource
from h5traces.legacy.layouts import SOURCE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from h5traces.archive.opening import PathLike
    from h5traces.graph.samples import GraphSource
    from h5traces.torch_data.tensors import NonFinite


def open_source(
    pattern: Archive | PathLike | Iterable[PathLike],
    *,
    layers: Iterable[int] | None,
    non_finite: NonFinite,
    cached_files: int,
) -> GraphSource:
    """The samples behind archives or legacy batches.

    Raises
    ------
    FileNotFoundError
        Nothing matches.
    DatasetError
        There are no samples, or archives and pickles are mixed.
    """
    if not isinstance(pattern, Archive):
        paths = _expanded(pattern)
        legacy = [path for path in paths if not path.name.endswith(ARCHIVE_SUFFIXES)]
        if legacy and len(legacy) < len(paths):
            message = (
                f"{legacy[0]}: a legacy batch among archives; one dataset reads either; convert "
                "it with 'h5traces convert'"
            )
            raise DatasetError(message)
        if legacy:
            return PickleSource(legacy, layers, non_finite, cached_files)
        pattern = open_archive(paths)
    return ArchiveSource(pattern, layers, non_finite)


def _expanded(pattern: PathLike | Iterable[PathLike]) -> list[Path]:
    """The files of a pattern; of ``*.pkl`` also those in gzip, as the legacy class has it."""
    named = [pattern] if isinstance(pattern, (str, os.PathLike)) else list(pattern)
    if len(named) == 1 and str(named[0]).endswith(".pkl") and "*" in str(named[0]):
        found: list[Path] = []
        for each in (str(named[0]), f"{named[0]}.gz"):
            try:
                found += expand_paths(each)
            except FileNotFoundError:
                continue
        if found:
            return sorted(found)
    suffixes = ARCHIVE_SUFFIXES if _holds_archives(named) else SOURCE_SUFFIXES
    return expand_paths(named, suffixes)


def _holds_archives(named: list[PathLike]) -> bool:
    """Whether folders among what was named are to be read for archives."""
    folders = [path for path in named if os.path.isdir(path)]  # noqa: PTH112  # may be no Path
    try:
        return not folders or bool(expand_paths(folders))
    except FileNotFoundError:
        return False
