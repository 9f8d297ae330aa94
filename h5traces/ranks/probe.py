"""Whether a file system has what a shared run needs: locks, names given once, durable writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import uuid
from typing import TYPE_CHECKING

from h5traces.errors import ArchiveExistsError, TargetError
from h5traces.ranks.plan import RANKS
from h5traces.storage.publish import PartFile, make_folder, sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def check_file_system(folder: Path) -> None:
    """Try what a run relies on; TargetError names what is missing.

    Nothing shows whether locks reach other nodes (Lustre with ``localflock``, NFS with
    ``local_lock``); what is published is safe without, since a name is given only once.
    """
    place = folder / RANKS
    make_folder(place)
    probe = place / f"probe-{uuid.uuid4().hex[:8]}"
    found = []
    try:
        for what, attempt, remedy in _NEEDED:
            try:
                attempt(probe)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                    raise
                found.append(f"{what} ({error.strerror or error}): {remedy}")
    finally:
        probe.unlink(missing_ok=True)
    if found:
        message = (
            f"{folder}: its file system lacks what a shared run needs: {'; '.join(found)}; "
            "or choose a folder on another file system"
        )
        raise TargetError(message)


def _check_locks(probe: Path) -> None:
    """A lock must hold off a second one."""
    first, second = (os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666) for _ in "12")
    try:
        fcntl.flock(first, fcntl.LOCK_EX)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise OSError(errno.ENOLCK, "a second lock was granted")
    finally:
        os.close(first)
        os.close(second)


def _check_names(probe: Path) -> None:
    """A name that is taken must not be given again."""
    probe.touch()
    part = PartFile(probe)
    try:
        part.publish()
    except ArchiveExistsError:
        return
    raise OSError(errno.EEXIST, "a name that exists was given again")


def _check_sync(probe: Path) -> None:
    descriptor = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(probe.parent)


_NEEDED: tuple[tuple[str, Callable[[Path], None], str], ...] = (
    ("locks", _check_locks, "mount Lustre with -o flock, NFS with its lock service"),
    ("names that are given once", _check_names, "hard links or renameat2 are needed"),
    ("fsync", _check_sync, "mount it so that files and folders can be synced"),
)
