"""Says what a file is that is not an archive, and which call reads it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from h5traces.errors import ArchiveError, H5TracesError, HostileFileError, NotAnArchiveError
from h5traces.format import layout
from h5traces.storage.files import open_regular

if TYPE_CHECKING:
    from pathlib import Path

# Where an archive names its format: in the attributes of its root, and in the index at its end.
_SEARCHED_NBYTES: Final = 1 << 20


def error_for(path: Path, error: ArchiveError) -> ArchiveError:
    """The error that says what a file is, by its content; the given one where it is an archive."""
    # Loaded on first use: archives are read without it.
    from h5traces.sources.opening import recognise

    try:
        found = recognise(path)
        if found.is_ours or found.kind.id == "unknown" or _names_us(path):
            return error
    except (H5TracesError, OSError):
        return error
    what, remedy = f"{found.kind}, not an archive", found.kind.remedy
    if found.kind.id == "hdf5":
        # A damaged file may have been an archive.
        if not isinstance(error, (NotAnArchiveError, HostileFileError)):
            return error
        what = str(found.kind)
    elif found.is_readable:
        remedy = "h5traces.load reads it, and h5traces.convert makes an archive of it"
    return NotAnArchiveError(f"{path}: is {what}; {remedy}")


def _names_us(path: Path) -> bool:
    """Whether a file may be a damaged archive: it holds the name of the format."""
    with os.fdopen(open_regular(path), "rb") as file:
        head = file.read(_SEARCHED_NBYTES)
        file.seek(max(0, file.seek(0, os.SEEK_END) - _SEARCHED_NBYTES))
        return layout.FORMAT_NAME.encode() in head + file.read()
