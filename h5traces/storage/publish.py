"""Files that appear under their final name only when they are whole.

A writer works on a unique ``<name>.<8 hex digits>.part`` beside its target and holds a lock on
it. Publishing is one atomic step that never replaces a file unless asked to. A ``.part`` whose lock
is free has lost its owner and may be deleted.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import io
import os
import re
import shutil
import uuid
from typing import TYPE_CHECKING, Final, Self

from h5traces.errors import ArchiveExistsError
from h5traces.format.text import and_more

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typing_extensions import Buffer


_PART_NAME = re.compile(r"\.[0-9a-f]{8}\.part\Z")
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_RENAME_NOREPLACE: Final = 1
_AT_FDCWD: Final = -100
_SYNC_FILE_RANGE_WRITE: Final = 2
# Bytes handed to the disk at a time, while others are still being made.
_WRITE_BACK_NBYTES: Final = 4 << 20


class LatchedFile(io.RawIOBase):
    """A file for HDF5 to write to that keeps the first error for later instead of failing.

    HDF5 crashes the process when a write fails inside a flush or close. So a failed write goes to
    memory instead, and `raise_error` raises its error in the writer, which then stops. Until then
    memory grows by what HDF5 still has to flush.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._position = 0
        self._size = self._written_back = os.fstat(descriptor).st_size
        self._unwritten: list[tuple[int, bytes]] = []
        # Nothing was written since it was synced.
        self._is_durable = False
        self.error: OSError | None = None

    def raise_error(self) -> None:
        """Raise the first error that a write met, if there was one."""
        if self.error is not None:
            raise self.error

    def fileno(self) -> int:
        return self._descriptor

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def write(self, data: Buffer) -> int:
        """Write all of `data`; never raises OSError, see the class."""
        view = memoryview(data).cast("B")
        self._is_durable = False
        start, self._position = self._position, self._position + len(view)
        self._size = max(self._size, self._position)
        if self.error is None:
            try:
                written = 0
                while written < len(view):
                    written += os.pwrite(self._descriptor, view[written:], start + written)
            except OSError as error:
                self.error = error
            else:
                return len(view)
        self._unwritten.append((start, bytes(view)))
        return len(view)

    def sync(self) -> None:
        """Return when all that was written is durable."""
        self.raise_error()
        if not self._is_durable:
            os.fsync(self._descriptor)
            self._is_durable = True

    def start_write_back(self, least_nbytes: int = _WRITE_BACK_NBYTES) -> None:
        """Have the system begin to store what was written, where it can be asked to (Linux).

        It waits for nothing and promises nothing, but leaves `PartFile.sync` less to wait for. Less
        than `least_nbytes` are left for the next time.
        """
        start, nbytes = self._written_back, self._size - self._written_back
        if nbytes >= least_nbytes:
            self._written_back = self._size
            sync = getattr(ctypes.CDLL(None), "sync_file_range", None)
            if sync is not None:
                offset, length = ctypes.c_int64(start), ctypes.c_int64(nbytes)
                sync(self._descriptor, offset, length, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))

    def readinto(self, buffer: Buffer) -> int:
        """Read at the current position, unwritten bytes included."""
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._size - self._position))
        view[:length] = bytes(length)
        stored = os.pread(self._descriptor, length, self._position)
        view[: len(stored)] = stored
        for start, data in self._unwritten:
            first = max(start, self._position)
            last = min(start + len(data), self._position + length)
            if first < last:
                target = slice(first - self._position, last - self._position)
                view[target] = data[first - start : last - start]
        self._position += length
        return length

    @property
    def nbytes(self) -> int:
        return self._size

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` from `offset`, without a change of position."""
        return os.pread(self._descriptor, nbytes, offset)

    def truncate(self, size: int | None = None) -> int:
        self._size = self._position if size is None else size
        self._is_durable = False
        if self.error is None:
            try:
                os.ftruncate(self._descriptor, self._size)
            except OSError as error:
                self.error = error
        return self._size


class PartFile:
    """A locked ``.part`` file on its way to `target`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path, self._descriptor = _create_locked(target)
        self.file = LatchedFile(self._descriptor)

    def append(self, data: bytes) -> None:
        """Write `data` at the end of the file."""
        self.file.raise_error()
        self.file.seek(0, os.SEEK_END)
        self.file.write(data)
        self.file.raise_error()

    def sync(self) -> None:
        """Return when all that was written is durable."""
        self.file.sync()

    def publish(self, *, overwrite: bool = False) -> None:
        """Give the file its final name, durably."""
        self.sync()
        if overwrite:
            self.path.replace(self.target)
        else:
            try:
                _rename_without_replacing(self.path, self.target)
            except FileExistsError as error:
                self.discard()
                message = f"{self.target} exists; use overwrite=True to replace it, or another name"
                raise ArchiveExistsError(message) from error
        self._close()
        sync_folder(self.target.parent)

    def discard(self) -> None:
        """Delete the file; for writers that failed."""
        # Unlinked while it is locked, so that no cleaner takes it for a leftover.
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._close()

    def _close(self) -> None:
        # Once only: another thread's file may have the number by now.
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        if exception_type is not None:
            self.discard()


def _create_locked(target: Path) -> tuple[Path, int]:
    while True:
        path = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # A cleaner may have taken the file for a leftover before it was locked.
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)


def _rename_without_replacing(source: Path, target: Path) -> None:
    """Rename that fails with FileExistsError instead of replacing, also in a race."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        source.unlink()
        return
    # Linux's own, for file systems without hard links
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        message = f"cannot publish {target} safely: the file system has no hard links"
        raise OSError(errno.EOPNOTSUPP, f"{message}; pass overwrite=True")
    result = libc.renameat2(
        _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE
    )
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def sync_folder(folder: Path) -> None:
    """Make a new name in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, durably; one that exists is left alone."""
    if folder.is_dir():
        # Its maker may have been killed before it was durable.
        with contextlib.suppress(OSError):
            sync_folder(folder.parent)
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    # Otherwise a power failure could remove the folder with all that is published in it.
    sync_folder(folder.parent)


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder that gets its name when the block ends well, with all files in it.

    Files go into a folder that exists one after the other, as nothing replaces folders at once; of
    these, none has a name before all are written.
    """
    make_folder(path.parent)
    folder = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    folder.mkdir()
    try:
        yield folder
        sync_folder(folder)
        if path.is_dir() and any(path.iterdir()):
            _move_files(folder, path, overwrite=overwrite)
        else:
            # Fails where a folder with files has got the name meanwhile.
            folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _move_files(folder: Path, path: Path, *, overwrite: bool) -> None:
    files = sorted(folder.iterdir())
    existing = [each.name for each in files if os.path.lexists(path / each.name)]
    if existing and not overwrite:
        message = (
            f"{path} holds {and_more(existing, 3)} already; use overwrite=True to replace them"
        )
        raise ArchiveExistsError(message)
    for each in files:
        each.replace(path / each.name)
    sync_folder(path)
    folder.rmdir()


def remove_abandoned_parts(target: Path) -> list[Path]:
    """Delete ``.part`` files of `target` whose writer is gone; returns what was deleted."""
    return [
        path
        for path in target.parent.glob(f"{glob.escape(target.name)}.*.part")
        if _PART_NAME.fullmatch(path.name.removeprefix(target.name)) and remove_unlocked(path)
    ]


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether the lock of a file is ours; with `wait`, it is as soon as others give it back."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


def remove_unlocked(path: Path) -> bool:
    """Delete a ``.part`` file whose writer is gone; false if it is at work."""
    try:
        # No link may lead to a file of somebody's, and nothing is waited for.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)
