"""Datasets of an HDF5 file that is not an archive, such as a file of features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import h5py

if TYPE_CHECKING:
    from pathlib import Path


def open_datasets(path: Path) -> tuple[h5py.File, dict[str, h5py.Dataset]]:
    """A file, which the caller closes, and its datasets by path; links are not followed.

    OSError where it is not an HDF5 file.
    """
    file = h5py.File(path, "r")
    found: dict[str, h5py.Dataset] = {}

    def note(name: str, each: object) -> None:
        if isinstance(each, h5py.Dataset):
            found[name] = each

    file.visititems(note)
    return file, found
