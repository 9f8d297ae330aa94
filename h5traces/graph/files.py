"""Which files a pattern of `TraceGraphDataset` stands for: archives, or those of other programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from h5traces.errors import DatasetError, StoredStateWarning, warn
from h5traces.format.text import and_more
from h5traces.meaning.options import ReadingOptions
from h5traces.paths import ARCHIVE_SUFFIXES, listed_sources, walk
from h5traces.sources.collecting import Collected, collect
from h5traces.sources.opening import recognise
from h5traces.storage.remote.paths import RemotePath, is_url

if TYPE_CHECKING:
    from collections.abc import Iterable

    from h5traces.paths import Source

_ARCHIVE = "an archive of h5traces"


def record_files(
    pattern: Source | Iterable[Source], reading: ReadingOptions = ReadingOptions()
) -> list[Path]:
    """The files that are not archives, sorted for each pattern; empty if archives are named.

    Raises
    ------
    FileNotFoundError
        Nothing matches.
    DatasetError
        There are archives among other files.
    """
    files: list[Path] = []
    archives: list[str] = []
    for named in listed_sources(pattern):
        if isinstance(named, RemotePath) or is_url(named) or _is_ours(named, reading):
            archives.append(str(named))
            continue
        found = _collected(os.fspath(named), reading)
        files += sorted({path for path, _ in found.sources})
        archives += [each.path for each in found.unrelated if each.kind == _ARCHIVE]
        if not found.sources and not archives:
            archives.append(str(named))  # opening it raises an error that says what it is
        elif found.left and found.sources:
            reasons = and_more([each.reason for each in found.left], separator="; ")
            warn(f"not all of {named} is read: {reasons}", StoredStateWarning)
    if files and archives:
        message = (
            f"{files[0]}: a legacy batch among archives ({archives[0]}); one dataset reads either: "
            "convert it with 'h5traces convert', or name one kind, such as '*.h5' or '*.pkl*'"
        )
        raise DatasetError(message)
    return list(dict.fromkeys(files))


def _is_ours(named: str | os.PathLike[str], reading: ReadingOptions) -> bool:
    """Whether a file is one that h5traces wrote, or a folder has archives."""
    path = Path(named)
    if reading.mapping is not None:
        # Which may be of HDF5 by others.
        return path.is_file() and recognise(path).is_ours
    if path.is_dir():
        return any(each.name.endswith(ARCHIVE_SUFFIXES) for each in walk(path).files)
    return path.name.endswith(ARCHIVE_SUFFIXES) or (path.exists() and recognise(path).is_ours)


def _collected(pattern: str, reading: ReadingOptions) -> Collected:
    """The sources that a pattern finds; as in the legacy class, of ``.pkl`` also in gzip."""
    found, missing = Collected(), None
    in_gzip = pattern if pattern.endswith(".gz") else pattern.replace(".pkl", ".pkl.gz")
    for each in dict.fromkeys((pattern, in_gzip)):
        try:
            found.add(collect(each, reading))
        except FileNotFoundError as error:
            missing = missing or error
    if missing is not None and not (found.sources or found.left or found.unrelated):
        raise missing
    return found
