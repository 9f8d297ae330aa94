"""A writer that runs in another process, so that extraction does not wait for it.

Compression releases Python's global lock, but the work around it does not: with a small model, a
thread that writes samples delays the loop that generates the next ones by as long as it works. A
process leaves the loop's interpreter free. It costs one copy of each sample through a pipe.
The thread that sends waits for that lock, too, so some samples are sent before the answers come.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any, Final, Self

from h5traces.errors import ArchiveError
from h5traces.format.dtypes import TypedArray
from h5traces.meaning.checks import Findings
from h5traces.storage.processes import blocked_signals, child_environment
from h5traces.writing.create import create
from h5traces.writing.shared_writer import SharedWriter

if TYPE_CHECKING:
    from h5traces.format.dtypes import CastCounts
    from h5traces.format.record import TraceRecord
    from h5traces.paths import PathLike
    from h5traces.writing.shared_writer import Share

_CHILD: Final = f"import sys; from {__name__} import serve; serve(*map(int, sys.argv[1:]))"
_POLL_SECONDS: Final = 0.1
# Samples that may be sent before the first of them is durable, and their bytes.
_MOST_AHEAD: Final = 4
_MOST_AHEAD_NBYTES: Final = 32 << 20


def record_nbytes(record: TraceRecord) -> int:
    """Bytes of a record's arrays in memory."""
    return sum(
        entry.array.values.nbytes
        for layered in record.layered.values()
        for entry in layered.arrays
        if isinstance(entry.array, TypedArray)
    )


class ProcessWriter:
    """A `TraceWriter` in another process, for a caller that must not wait for Python's global lock.

    It takes the arguments of `h5traces.create`, of a rank also its share, and offers the part of
    `TraceWriter` that extraction uses; records go through a pipe. ``warnings`` are complete after
    `close`.
    """

    def __init__(self, path: PathLike, *, share: Share | None = None, **options: Any) -> None:
        self._path = path
        self._connection, theirs = Pipe()
        with theirs, blocked_signals():
            # Not multiprocessing: it would run the program's main module again.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self.done: Counter[str] = Counter()
        self.later: set[tuple[str, int]] = set()
        self.num_samples = 0
        self.is_finished = False
        self.nbytes = 0
        self.counts: dict[str, CastCounts] = {}
        self.warnings: list[str] = []
        self.findings = Findings()
        self._ahead: deque[TraceRecord] = deque()
        try:
            found = self._ask("create", path, share, options)
            self.done, self.later, self.num_samples, self.is_finished = found
        except BaseException:
            self._end()
            raise

    @property
    def process_id(self) -> int:
        """The id of the process that writes."""
        return self._process.pid

    def append(self, record: TraceRecord) -> list[TraceRecord]:
        """Write one sample. Returns those that became durable, this one or earlier ones."""
        self._send("append", record)
        self._ahead.append(record)
        is_small = sum(map(record_nbytes, self._ahead)) <= _MOST_AHEAD_NBYTES
        return self._durable(_MOST_AHEAD - 1 if is_small else 0)

    def drain(self) -> list[TraceRecord]:
        """Wait until all samples are durable. Returns those that were not before."""
        return self._durable(0)

    def _durable(self, most_ahead: int) -> list[TraceRecord]:
        """Take in answers until so few samples wait for theirs, and those that are there."""
        found = []
        while len(self._ahead) > most_ahead or (self._ahead and self._connection.poll()):
            record = self._ahead.popleft()
            self.nbytes, self.counts = self._answer()
            self.num_samples += 1
            found.append(record)
        return found

    def close(self) -> None:
        """Make archives of all samples and end the run."""
        if self._connection.closed:
            return
        self.drain()
        self.warnings, self.findings = self._ask("close")
        self._end()

    def suspend(self) -> None:
        """Stop without packing the rest."""
        if self._connection.closed:
            return
        while self._ahead and not self._connection.closed:
            # The first error was raised before; what is written is found again.
            with contextlib.suppress(Exception):
                self.drain()
        # If the process has ended, so has its lock.
        with contextlib.suppress(ArchiveError):
            self.warnings, self.findings = self._ask("suspend")
        self._end()

    def _ask(self, request: str, *arguments: Any) -> Any:
        """Send a request and wait for its answer."""
        self._send(request, *arguments)
        return self._answer()

    def _send(self, request: str, *arguments: Any) -> None:
        try:
            self._connection.send((request, arguments))
        except OSError as error:
            raise self._ended() from error

    def _ended(self) -> ArchiveError:
        """The error of a process that is no longer there."""
        self._end()
        code = self._process.returncode
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed (signal {-code}), as the system does when memory runs out"
        return ArchiveError(
            f"{self._path}: the process that writes it {how}; what was written is safe, start "
            "again to resume"
        )

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _end(self) -> None:
        self._connection.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        if exception_type is None:
            self.close()
        else:
            self.suspend()


def serve(descriptor: int, parent: int) -> None:
    """Answer requests until the pipe closes; the main function of the process."""
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    writer: Any = None
    with Connection(descriptor) as connection:
        while True:
            try:
                request, arguments = connection.recv()
            except (EOFError, OSError):
                break
            answer: Any = None
            try:
                if request == "create":
                    path, share, options = arguments
                    writer = create(path, **options) if share is None else _shared(*arguments)
                    answer = (writer.done, writer.later, writer.num_samples, writer.is_finished)
                elif request == "append":
                    writer.append(*arguments)
                    answer = (writer.nbytes, writer.counts)
                else:
                    getattr(writer, request)()
                    answer = (writer.warnings, writer.findings)
            except BaseException as error:  # sent to the caller, whatever it is
                answer = error
            # Free the arrays before waiting for the next ones.
            del arguments
            connection.send(answer)


def _shared(path: PathLike, share: Share, options: dict[str, Any]) -> SharedWriter:
    return SharedWriter(path, share, **options)


def _end_with_parent(parent: int) -> None:
    """End with the program, even if it was killed: a new start may write the same target."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)
