"""What may be on a disk after its power failed: a model over a log of calls.

Data reach the disk in any order until the file is synced, and so do names until their folder is
synced. So of the writes since the last fsync of a file, and of the names made and removed since the
last fsync of a folder, each is lost or kept by chance. File systems keep more order than this; what
survives the model survives them.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    from faults import Event

_DATA = ("pwrite", "ftruncate")
_NAMES = ("create", "link", "replace", "unlink", "mkdir", "rmdir")


def after_power_loss(events: list[Event], rng: random.Random, folder: Path) -> None:
    """Make what is left of `events` in an empty folder.

    Parameters
    ----------
    events
        What was done until the power failed.
    rng
        Decides what of the unsynced is kept.
    folder
        Where to put it.
    """
    kept = [event for event in _with_durability(events) if event[1] or rng.random() < 0.5]
    make([event for event, _ in kept], folder)


def _with_durability(events: list[Event]) -> list[tuple[Event, bool]]:
    synced_files: set[int] = set()
    synced_folders: set[str] = set()
    found = []
    for event in reversed(events):
        if event.call == "fsync":
            synced_files.add(event.file)
        elif event.call == "sync_folder":
            synced_folders.add(event.path)
        elif event.call in _DATA:
            found.append((event, event.file in synced_files))
        elif event.call in _NAMES:
            found.append((event, str(PurePosixPath(event.path).parent) in synced_folders))
    return found[::-1]


def make(events: list[Event], folder: Path) -> None:
    """Do what `events` say, as far as what was lost between them lets it."""
    names: dict[str, int] = {}
    contents: dict[int, bytearray] = {}
    folders = {"."}
    for event in events:
        parent = str(PurePosixPath(event.path).parent)
        if event.call in _NAMES and parent not in folders:
            continue
        if event.call in ("create", "link", "replace"):
            names[event.path] = event.file
            if event.call == "replace":
                names.pop(event.old_path, None)
        elif event.call == "unlink":
            names.pop(event.path, None)
        elif event.call == "mkdir":
            folders.add(event.path)
        elif event.call == "rmdir":
            if not any(PurePosixPath(event.path) in PurePosixPath(each).parents for each in names):
                folders.discard(event.path)
        elif event.call == "pwrite":
            content = contents.setdefault(event.file, bytearray())
            content.extend(bytes(max(0, event.offset - len(content))))
            content[event.offset : event.offset + len(event.data)] = event.data
        elif event.call == "ftruncate":
            content = contents.setdefault(event.file, bytearray())
            del content[event.offset :]
            content.extend(bytes(event.offset - len(content)))
    for name in sorted(folders):
        (folder / name).mkdir(exist_ok=True)
    for name, file in names.items():
        (folder / name).write_bytes(contents.get(file, b""))
