"""The spool: a locked folder with small archives of the samples that are in no shard yet.

``run.json`` holds the options of the run, ``lock`` who is writing, ``00000042.sample`` the sample
of that number, and those after it that were written together with it. These are complete archives
but not named ``.h5``: a program that collects ``*.h5`` while a shard is being packed would find
samples twice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import weakref
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import ValidationError

from h5traces.arguments import shown
from h5traces.errors import ArchiveError, CorruptArchiveError
from h5traces.format.archive import ExtractionMetadata, PositiveCount
from h5traces.format.document import Document
from h5traces.format.dtypes import DtypePolicy, OverflowPolicy
from h5traces.format.precision import EXACT, Precision
from h5traces.format.text import utc_now
from h5traces.storage.files import read_document
from h5traces.storage.publish import PartFile, make_folder, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from h5traces.paths import Target

_SAMPLE: Final = re.compile(r"([0-9]{8,})\.sample\Z")
_LOCK, _RUN = "lock", "run.json"
_OWNER_NBYTES: Final = 500


class RunState(Document):
    """The options of a run; resuming it needs the same."""

    version: Literal[1] = 1
    shard_samples: PositiveCount | None = None
    dtype: DtypePolicy
    on_overflow: OverflowPolicy
    codec: str
    # Of the archives; the spool holds samples without loss.
    precision: Precision = EXACT
    # Digest of the given scales.
    calibration: str | None = None
    model_id: str | None = None
    model_revision: str | None = None
    dataset: str | None = None
    num_layers: PositiveCount | None = None
    extraction: ExtractionMetadata | None = None
    # Whether no samples follow those in the spool.
    closing: bool = False

    def facts(self) -> dict[str, Any]:
        """The fields that are recorded in every archive."""
        facts = ("model_id", "model_revision", "dataset", "num_layers", "extraction")
        return {name: getattr(self, name) for name in facts}

    def differences(self, other: RunState) -> list[str]:
        """The options that differ between two runs."""
        ours, theirs = self.model_dump(exclude={"closing", "extraction"}), other.model_dump()
        found = [
            f"{name}={shown(value)} (was {shown(theirs[name])})"
            for name, value in ours.items()
            if value != theirs[name]
        ]
        if self.extraction is not None:
            found += self.extraction.differences(other.extraction)
        elif other.extraction is not None:
            found.append("extraction=None (was recorded)")
        return found


def spool_path(target: Target) -> Path:
    """The folder of samples that are in no archive yet."""
    path = target.path
    path = path.resolve() if path.name in ("", "..") else path
    return path.with_name(f"{path.name}.spool")


def left_out_path(folder: Path, number: int) -> Path:
    """The file of a spool that says that a sample was left out."""
    return folder / f"{number:08d}.skipped"


class SpoolFolder:
    """The spool of one target, locked for this process; the folder is made if it is missing.

    With `is_shared`, for this process and others that share it: the ranks of a run.
    """

    def __init__(self, path: Path, *, is_shared: bool = False) -> None:
        self.path = path
        self._descriptor = _locked(path, is_shared=is_shared)
        _open_locks.add(self)
        try:
            for part in path.glob("*.part") if not is_shared else ():
                part.unlink()
            # A sample counts as done from now on, so its name must be durable even if its writer
            # was killed before the sync.
            sync_folder(path)
        except BaseException:
            self.release()
            raise

    def state(self) -> RunState | None:
        """The options of the run; None if there is no run."""
        path = self.path / _RUN
        try:
            return RunState.model_validate_json(read_document(path, CorruptArchiveError))
        except FileNotFoundError:
            if not self.samples():
                return None
            message = f"{path} is missing although there are samples; move {self.path} away"
            raise CorruptArchiveError(message) from None
        except ValidationError as error:
            message = f"{path} is damaged ({error.error_count()} problems); move {self.path} away"
            raise CorruptArchiveError(message) from error

    def save(self, state: RunState) -> None:
        """Store the options of the run, durably and in one step."""
        with PartFile(self.path / _RUN) as part:
            part.append(state.model_dump_json(indent=2).encode())
            part.publish(overwrite=True)

    def sample_path(self, number: int) -> Path:
        """The file of a sample and those stored with it, by the number of the first."""
        return self.path / f"{number:08d}.sample"

    def samples(self) -> list[int]:
        """Numbers of the stored files, ascending: of the first sample in each."""
        names = (_SAMPLE.match(each.name) for each in self.path.iterdir())
        return sorted(int(found[1]) for found in names if found)

    def left_out(self) -> list[int]:
        """Numbers of the samples that were left out."""
        return [int(each.stem) for each in self.path.glob("*.skipped")]

    def claim(self) -> bool:
        """Take a shared folder for this process alone; false if others use it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def remove(self, numbers: Iterable[int]) -> None:
        """Delete files of samples."""
        for number in numbers:
            self.sample_path(number).unlink(missing_ok=True)

    def remove_all(self) -> None:
        """Delete the spool, which must hold no samples, and release it."""
        # Samples without run.json would look like damage.
        sync_folder(self.path)
        for each in (*self.path.glob("*.skipped"), *self.path.glob("pack-*.lock")):
            each.unlink(missing_ok=True)
        (self.path / _RUN).unlink(missing_ok=True)
        (self.path / _LOCK).unlink(missing_ok=True)
        # Not empty if a user put a file there.
        with contextlib.suppress(OSError):
            self.path.rmdir()
        self.release()

    def release(self) -> None:
        """Release the lock."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


_open_locks: weakref.WeakSet[SpoolFolder] = weakref.WeakSet()


def _release_in_child() -> None:
    """A forked child (of a DataLoader, say) must not hold the lock after its parent ends."""
    for each in list(_open_locks):
        each.release()


os.register_at_fork(after_in_child=_release_in_child)


def _locked(path: Path, *, is_shared: bool = False) -> int:
    while True:
        if path.is_symlink():
            raise _no_lock(path)
        make_folder(path)
        try:
            # It is truncated, so no link may lead to a file of somebody's.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(path / _LOCK, flags, 0o666)
        except FileNotFoundError:
            # A writer that finishes removes the folder.
            continue
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise _no_lock(path) from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise _no_lock(path)
            fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                _write_owner(descriptor)
                return descriptor
        except BlockingIOError:
            owner = os.pread(descriptor, _OWNER_NBYTES, 0).decode(errors="replace")
            os.close(descriptor)
            message = (
                f"{path.with_suffix('')}: {owner or 'another process'} is writing it; "
                "wait until it ends, or stop it"
            )
            raise ArchiveError(message) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _no_lock(path: Path) -> CorruptArchiveError:
    message = f"{path / _LOCK} is not a lock that h5traces made; move {path} away"
    return CorruptArchiveError(message)


def _write_owner(descriptor: int) -> None:
    owner = f"process {os.getpid()} on {socket.gethostname()} (since {utc_now()})".encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, owner[:_OWNER_NBYTES], 0)
