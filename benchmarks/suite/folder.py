"""The argument of all benchmarks that names a folder."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path


def made_folder(name: str) -> Path:
    """The folder, which is made where it is missing; of others, argparse says why in one line."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{name} is no folder and cannot become one: {error.strerror}"
        raise ArgumentTypeError(message) from error
    return folder
