"""From what a user names to the samples behind it: archives, or legacy pickles."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from h5traces.archive.archive import Archive
from h5traces.archive.opening import expand_paths, open_archive
from h5traces.errors import DatasetError
from h5traces.graph.archive_source import ArchiveSource
from h5traces.graph.pickle_source import PickleSource
from h5traces.sources.pickle.layouts import SOURCE_SUFFIXES

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
    averages: bool,
) -> GraphSource:
    """The samples behind archives or legacy batches; `averages` where heads become their mean.

    Raises
    ------
    FileNotFoundError
        Nothing matches.
    DatasetError
        There are no samples, or archives and pickles are mixed.
    """
    if not isinstance(pattern, Archive):
        legacy = _legacy_batches(pattern)
        if legacy:
            return PickleSource(legacy, layers, non_finite, cached_files)
        pattern = open_archive(pattern)
    return ArchiveSource(pattern, layers, non_finite, averages=averages)


def _legacy_batches(pattern: PathLike | Iterable[PathLike]) -> list[Path]:
    """The pickles that were named, by their suffixes or in folders without archives."""
    named = [pattern] if isinstance(pattern, (str, os.PathLike)) else list(pattern)
    found = [each for each in named if _names_pickles(each)]
    if found and len(found) < len(named):
        message = (
            f"{os.fspath(found[0])}: a legacy batch among archives; one dataset reads either; "
            "convert it with 'h5traces convert'"
        )
        raise DatasetError(message)
    paths: list[Path] = []
    for each in found:
        paths += _expanded(os.fspath(each))
    return list(dict.fromkeys(paths))


def _names_pickles(named: PathLike) -> bool:
    if not isinstance(named, (str, os.PathLike)):
        return False
    path = os.fspath(named)
    if not os.path.isdir(path):  # noqa: PTH112  # may be an address on a server
        return path.endswith(SOURCE_SUFFIXES)
    try:
        expand_paths(path)
    except FileNotFoundError:
        return bool(expand_paths(path, SOURCE_SUFFIXES))
    return False


def _expanded(named: str) -> list[Path]:
    """The files behind a name; of ``*.pkl`` also those in gzip, as the legacy class has it."""
    if "*" not in named or not named.endswith(".pkl"):
        return expand_paths(named, SOURCE_SUFFIXES)
    found: list[Path] = []
    for each in (named, f"{named}.gz"):
        with contextlib.suppress(FileNotFoundError):
            found += expand_paths(each)
    return sorted(found) if found else expand_paths(named)
