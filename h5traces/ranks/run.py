"""A rank at work: its share, its lock, and a durable line for all that it has done."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from h5traces.errors import OptionError, RankBusyError, TargetError
from h5traces.format.text import utc_now
from h5traces.ranks.bucket import BucketRun
from h5traces.ranks.plan import (
    RANKS,
    RunPlan,
    deal,
    fix_plan,
    read_plan,
    replace_plan,
    warn_of_size,
)
from h5traces.ranks.probe import check_file_system
from h5traces.ranks.status import running_ranks
from h5traces.storage.publish import locked, make_folder, sync_folder
from h5traces.storage.remote.paths import RemotePath

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from h5traces.paths import Target
    from h5traces.ranks.rank import Rank

_BEAT_SECONDS: Final = 10.0


class TargetChoice(Protocol):
    """What of `TargetOptions` does not go with ranks."""

    @property
    def overwrite(self) -> bool: ...


def check_shared(target: Target, options: TargetChoice, *, merge: bool = False) -> None:
    """Reject options that do not go with ranks."""
    if merge:
        message = (
            "merge=True does not go with rank: where a batch begins in an archive is known only "
            "when all before it are read; convert into a folder, then merge its archives"
        )
        raise OptionError(message)
    if not target.is_folder:
        message = f"{target.path} is one file, which ranks cannot share; name a folder/"
        raise TargetError(message)
    check_no_overwrite(overwrite=options.overwrite)


def check_no_overwrite(*, overwrite: bool) -> None:
    """Reject replacing the results of other ranks."""
    if overwrite:
        message = (
            "overwrite=True does not go with rank: a rank that is started again would undo its "
            "work; name another folder, or delete this one"
        )
        raise OptionError(message)


class RankRun:
    """The share of one rank; a context manager that says how it ended.

    Attributes
    ----------
    share
        The pieces of work of this rank, ascending.
    """

    def __init__(self, folder: Path, rank: Rank, plan: RunPlan) -> None:
        self.folder, self.rank = folder, rank
        with _explained(folder):
            check_file_system(folder)
            in_force = fix_plan(folder, plan)
            if in_force.world_size != rank.size:
                in_force = _dealt_anew(folder, in_force, rank)
            self._lines = _Lines(folder / RANKS / f"{rank.name}.jsonl", rank)
        self.plan = in_force
        self.share = deal(plan.costs, rank.size)[rank.number]
        self._started = time.monotonic()
        self._failed = self._is_stopped = False

    def note(self, item: int, **facts: Any) -> None:
        """Add a durable line about a piece of work; ``status`` says what became of it."""
        self._failed |= facts.get("status") == "failed"
        self._note("item", item=item, **facts)

    def stopped(self) -> None:
        """Record at the end that the rank was stopped."""
        self._is_stopped = True

    def _note(self, event: str, **facts: Any) -> None:
        seconds = round(time.monotonic() - self._started, 3)
        with _explained(self.folder):
            self._lines.append({"event": event, "time": utc_now(), "elapsed": seconds, **facts})

    def __enter__(self) -> Self:
        try:
            self._note(
                "start",
                host=socket.gethostname(),
                process=os.getpid(),
                items=len(self.share),
                cost=sum(self.plan.costs[each] for each in self.share),
            )
        except BaseException:
            self._lines.close()
            raise
        return self

    def __exit__(self, exception_type: type[BaseException] | None, error: Any, _: object) -> None:
        try:
            if self._is_stopped or issubclass(exception_type or object, KeyboardInterrupt):
                self._note("end", status="stopped")
            elif exception_type is None:
                self._note("end", status="failed" if self._failed else "done")
            else:
                self._note("end", status="failed", error=str(error) or exception_type.__name__)
        except OSError:
            # The first failure counts.
            if exception_type is None:
                raise
        finally:
            self._lines.close()


def run_at(folder: Path | RemotePath, rank: Rank, plan: RunPlan) -> RankRun | BucketRun:
    """The share of a rank whose results go to a folder on disk, or to one of a bucket."""
    if isinstance(folder, RemotePath):
        return BucketRun(folder.url, rank, plan)
    return RankRun(folder, rank, plan)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Name the full disk, and say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = (
            f"{error.strerror} in {folder}; make room there, then start the rank again: what is "
            "finished stays"
        )
        raise OSError(error.errno, message) from error


def _dealt_anew(folder: Path, plan: RunPlan, rank: Rank) -> RunPlan:
    """The plan with another world size, if no rank of the old one is at work."""
    make_folder(folder / RANKS)
    with locked(folder / RANKS / "lock", wait=True):
        plan = read_plan(folder) or plan
        if plan.world_size == rank.size:
            return plan
        running = running_ranks(folder, plan.world_size)
        if running:
            message = (
                f"{folder}: {rank} comes into a run of {plan.world_size} ranks, of which rank "
                f"{running[0]} is at work; wait until all of them have ended, or stop them, then "
                "change world_size"
            )
            raise TargetError(message)
        changed = plan.model_copy(update={"world_size": rank.size, "first_task": rank.first})
        warn_of_size(changed, plan, folder)
        replace_plan(folder, changed)
        return changed


class _Lines:
    """The file of a rank: locked while it works, its time of change a sign of life."""

    def __init__(self, path: Path, rank: Rank) -> None:
        make_folder(path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o666)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        try:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"{path}: {rank} is at work already; stop it, or run another rank"
                raise RankBusyError(message) from None
            size = os.fstat(self._descriptor).st_size
            # A writer that was killed, or a full disk, may have left half a line.
            if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
                os.write(self._descriptor, b"\n")
            sync_folder(path.parent)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._thread = threading.Thread(target=self._beat, name="h5traces-beat", daemon=True)
        self._thread.start()

    def append(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, ensure_ascii=True, default=str).encode() + b"\n"
        with self._lock:
            written = os.write(self._descriptor, data)
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
            os.fsync(self._descriptor)

    def _beat(self) -> None:
        """Touch the file now and then; its server's clock counts, not that of this node."""
        while not self._closed.wait(_BEAT_SECONDS):
            os.utime(self._descriptor)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        os.close(self._descriptor)
