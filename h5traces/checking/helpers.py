"""Processes that look at samples of one archive while the caller checks its structure.

Small samples cost calls of Python, which threads would make one after the other.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections import deque
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Final

from h5traces.checking.meaning import BLOCK_SAMPLES, blocks_of, look_at_block, looking, num_workers
from h5traces.storage.processes import blocked_signals, child_environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from h5traces.checking.meaning import Looked
    from h5traces.format.limits import ReadLimits

# Archives of fewer samples take less time than starting processes.
MANY_SAMPLES: Final = 4_000
# Stands for the answers of a process that ended.
_NOTHING: Final[list[Looked | None]] = [None] * BLOCK_SAMPLES
_CHILD: Final = f"import sys; from {__name__} import serve; serve(int(sys.argv[1]))"


class Helpers:
    """Processes that share the blocks of samples; each sends what it saw, in order."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._waiting: list[_Mailbox] = []
        self._block: Iterator[Looked | None] = iter(())
        self._number = self._count = 0

    def start(self, path: Path, limits: ReadLimits, count: int) -> None:
        """Start this many processes; OSError where the system cannot."""
        self._count = count
        for number in range(count):
            ours, theirs = Pipe()
            with theirs, blocked_signals():
                self._waiting.append(_Mailbox(ours))
                # Not multiprocessing: it would run the program's main module again.
                process = subprocess.Popen(
                    [sys.executable, "-c", _CHILD, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env=child_environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
            self._processes.append(process)
            ours.send((path, limits, number, count))

    def next(self) -> Looked | None:
        """What a helper saw of the next sample; None if it ended, and the caller has to look."""
        found = next(self._block, self)
        if found is self:
            place = self._number % self._count
            block = self._waiting[place].next() if place < len(self._waiting) else _NOTHING
            self._block, self._number = iter(block), self._number + 1
            found = next(self._block, None)
        assert not isinstance(found, Helpers)
        return found

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.wait()
        for box in self._waiting:
            box.close()


class _Mailbox:
    """Keeps what a process sends until it is asked for, so that the process never waits."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._messages: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = self._connection.recv_bytes()
                with self._changed:
                    self._messages.append(message)
                    self._changed.notify()
        with self._changed:
            self._ended = True
            self._changed.notify()

    def next(self) -> list[Looked | None]:
        """The next block; `_NOTHING` if the process ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._messages or self._ended)
            if not self._messages:
                return _NOTHING
            message = self._messages.popleft()
        found: list[Looked | None] = ForkingPickler.loads(message)
        return found

    def close(self) -> None:
        """Let the connection go once its other end is closed."""
        self._thread.join()
        self._connection.close()


@contextlib.contextmanager
def helping(
    path: Path, limits: ReadLimits, num_samples: object, workers: int | None
) -> Iterator[Helpers | None]:
    """Helpers, if the archive claims many samples and this machine has several cores."""
    count = workers or num_workers()
    if not isinstance(num_samples, int) or num_samples < MANY_SAMPLES or count < 2:
        yield None
        return
    helpers = Helpers()
    try:
        # Without memory for processes, the caller looks at all samples.
        with contextlib.suppress(OSError):
            helpers.start(path, limits, count)
        yield helpers
    finally:
        helpers.close()


def serve(descriptor: int) -> None:
    """Look at this process's share of the blocks of samples; its main function."""
    # It ends with its caller, whose end of the pipe closes.
    with Connection(descriptor) as connection, contextlib.suppress(BrokenPipeError):
        path, limits, number, count = connection.recv()
        with looking(path, limits, 1) as (archive, look):
            for block in blocks_of(len(archive), number, count):
                connection.send(list(look_at_block(archive, look, block)))
    os._exit(0)
