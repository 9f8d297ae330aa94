"""From what a user names (files, globs, folders) to an archive or a list of dicts."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h5traces import layout
from h5traces.archive.archive import Archive
from h5traces.archive.tensors import materialised
from h5traces.legacy import open_batch
from h5traces.legacy.layouts import as_dict
from h5traces.limits import DEFAULT_LIMITS, ReadLimits
from h5traces.storage.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterable

ARCHIVE_SUFFIXES = (".h5", ".hdf5")
PathLike = str | os.PathLike[str]


def expand_paths(
    sources: PathLike | Iterable[PathLike], suffixes: tuple[str, ...] = ARCHIVE_SUFFIXES
) -> list[Path]:
    """The files behind paths, globs and folders, in the order given, sorted within each.

    Raises
    ------
    FileNotFoundError
        A path does not exist, a glob matches nothing, or a folder holds no such file.
    """
    named = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    found: list[Path] = []
    for source in named:
        path = Path(source)
        if path.is_dir():
            matches = sorted(each for each in path.rglob("*") if each.name.endswith(suffixes))
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(Path(each) for each in glob.glob(str(source), recursive=True))  # noqa: PTH207  # Path.glob takes no absolute pattern
        if not matches:
            message = f"{source}: no such file, and nothing that matches; expected a file, a glob "
            message += f"or a folder with {' or '.join(suffixes)} files"
            raise FileNotFoundError(message)
        found += matches
    return list(dict.fromkeys(found))


def open_archive(
    path: PathLike | Iterable[PathLike], *, limits: ReadLimits = DEFAULT_LIMITS
) -> Archive:
    """Open one archive, or several as one sequence.

    Reads a few kilobytes of each file; nothing is decompressed until a trace is asked for.

    Parameters
    ----------
    path
        A file, a glob, a folder (all ``.h5`` files below it), or a list of these.
    limits
        What a file may ask of its reader before it is refused.

    Raises
    ------
    FileNotFoundError
        Nothing matches.
    NotAnArchiveError, CorruptArchiveError, UnsupportedVersionError
        A file is no archive, is damaged, or is newer than this release.
    ArchiveError
        The files are of different models.
    """
    return Archive(expand_paths(path), limits)


def load(path: PathLike) -> list[dict[str, Any]]:
    """All traces of one file as plain dicts: what ``pickle.load`` gave, from any format.

    Parameters
    ----------
    path
        An ``.h5`` archive, or a legacy ``.pkl`` or ``.pkl.gz`` batch. Pickles are read by an
        interpreter of our own that executes nothing.

    Returns
    -------
    list of dict
        The whole file in memory.

    Raises
    ------
    UnsafePickleError, ConversionError
        The pickle asks for something outside the allow-list, or is no batch.
    """
    source = Path(path)
    if is_archive(source):
        with open_archive(source) as archive:
            return [trace.to_dict() for trace in archive]
    with open_batch(source) as batch:
        return [materialised(as_dict(item)) for item in batch]


def is_archive(path: Path) -> bool:
    """Whether a file is to be read as an archive: by its name, or as HDF5 by its first bytes.

    Raises
    ------
    OSError
        It cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        is_hdf5 = file.read(len(layout.HDF5_SIGNATURE)) == layout.HDF5_SIGNATURE
    return is_hdf5 or path.name.endswith(ARCHIVE_SUFFIXES)
