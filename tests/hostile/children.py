"""Runs cases in child processes, so that one that crashes or hangs ends only its child."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BATCH = 50
SECONDS_PER_CASE = 5
ADDRESS_SPACE = 2 << 30


def outcomes(
    judge: Callable[[int], str], numbers: Sequence[int], *, seconds: int = SECONDS_PER_CASE
) -> Iterator[tuple[int, str | None, str]]:
    """Judge every number; the process is forked once for many.

    Parameters
    ----------
    judge
        Called in a child; what it says must not be empty.
    numbers
        What to judge.
    seconds
        A case that takes longer is ended.

    Yields
    ------
    number, str or None, str
        What was said; None and how the child ended where it did not come to say anything.
    """
    done = 0
    while done < len(numbers):
        batch = numbers[done : done + BATCH]
        said, status = _batch(judge, batch, seconds)
        for number, words in zip(batch, said, strict=False):
            yield number, words, ""
        done += len(said)
        if len(said) < len(batch):
            how = signal.Signals(status & 127).name if status & 127 else f"status {status >> 8}"
            yield numbers[done], None, how
            done += 1


def _batch(
    judge: Callable[[int], str], numbers: Sequence[int], seconds: int
) -> tuple[list[str], int]:
    inlet, outlet = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(inlet)
        code = 1
        try:
            _confine()
            for number in numbers:
                signal.alarm(seconds)
                said = judge(number)
                signal.alarm(0)
                os.write(outlet, said.replace("\n", " ").encode() + b"\n")
            code = 0
        finally:
            os._exit(code)
    os.close(outlet)
    with os.fdopen(inlet) as lines:
        said = [line.rstrip("\n") for line in lines]
    _, status = os.waitpid(child, 0)
    return said, status


def _confine() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Beyond what the test run has loaded: torch alone takes more, and a thread that gets no memory
    # for its start leaves its starter waiting.
    most = _used_nbytes() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    # The default action ends the process in the middle of C code, too.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _used_nbytes() -> int:
    """Address space of this process; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
