"""What a file is that was opened as an archive and is none, and which call reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from h5traces.errors import ArchiveError, H5TracesError, NotAnArchiveError

if TYPE_CHECKING:
    from pathlib import Path


def error_for(path: Path, error: ArchiveError) -> ArchiveError:
    """The error that says what a file is, by its content; the given one where it is an archive."""
    # Loaded on first use: archives are read without it.
    from h5traces.sources.opening import recognise

    try:
        found = recognise(path)
    except (H5TracesError, OSError):
        return error
    if found.is_ours or found.kind.id == "unknown":
        return error
    remedy = found.kind.remedy
    if found.is_readable:
        remedy = "h5traces.load reads it, and h5traces.convert makes an archive of it"
    what = str(found.kind) if found.kind.id == "hdf5" else f"{found.kind}, not an archive"
    return NotAnArchiveError(f"{path}: is {what}; {remedy}")
