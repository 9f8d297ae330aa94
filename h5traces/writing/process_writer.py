"""A writer that runs in another process, so that extraction does not wait for it.

Compression releases Python's global lock, but the work around it does not: with a small model, a
thread that writes samples delays the loop that generates the next ones by as long as it works. A
process leaves the loop's interpreter free. It costs one copy of each sample through a pipe.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any, Final, Self

from h5traces.errors import ArchiveError
from h5traces.meaning.checks import Findings
from h5traces.storage.processes import blocked_signals, child_environment
from h5traces.writing.create import create
from h5traces.writing.shared_writer import SharedWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from h5traces.format.dtypes import CastCounts
    from h5traces.format.record import TraceRecord
    from h5traces.paths import PathLike
    from h5traces.writing.shared_writer import Share

_CHILD: Final = f"import sys; from {__name__} import serve; serve(*map(int, sys.argv[1:]))"
_POLL_SECONDS: Final = 0.1


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

    def append(self, record: TraceRecord) -> None:
        """Write one sample; it is durable when this returns."""
        self.append_records([record])

    def append_records(self, records: Sequence[TraceRecord]) -> None:
        """Write samples together; they are durable when this returns."""
        self.nbytes, self.counts = self._ask("append_records", records)
        self.num_samples += len(records)

    def close(self) -> None:
        """Make archives of all samples and end the run."""
        if self._connection.closed:
            return
        self.warnings, self.findings = self._ask("close")
        self._end()

    def suspend(self) -> None:
        """Stop without packing the rest."""
        if self._connection.closed:
            return
        # If the process has ended, so has its lock.
        with contextlib.suppress(ArchiveError):
            self.warnings, self.findings = self._ask("suspend")
        self._end()

    def _ask(self, request: str, *arguments: Any) -> Any:
        """Send a request and wait for its answer."""
        try:
            self._connection.send((request, arguments))
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._end()
            code = self._process.returncode
            how = f"ended with exit code {code}"
            if code < 0:
                how = f"was killed (signal {-code}), as the system does when memory runs out"
            message = (
                f"{self._path}: the process that writes it {how}; what was written is safe, start "
                "again to resume"
            )
            raise ArchiveError(message) from error
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
                elif request == "append_records":
                    writer.append_records(*arguments)
                    answer = (writer.nbytes, writer.counts)
                else:
                    getattr(writer, request)()
                    answer = (writer.warnings, writer.findings)
            except BaseException as error:  # sent to the caller, whatever it is
                answer = error
            # Free the arrays before waiting for the next ones.
            del arguments
            connection.send(answer)
    # All is durable. Taking the interpreter apart would take a tenth of a second.
    os._exit(0)


def _shared(path: PathLike, share: Share, options: dict[str, Any]) -> SharedWriter:
    return SharedWriter(path, share, **options)


def _end_with_parent(parent: int) -> None:
    """End with the program, even if it was killed: a new start may write the same target."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)
