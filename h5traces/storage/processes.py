"""Handling of signals that stop a program, and the environment of processes that it starts."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

# Keeps Python from looking for modules in the current folder first, where it runs a command.
_SAFE_PATH: Final = "PYTHONSAFEPATH"
_STOPPING: Final = (signal.SIGINT, signal.SIGTERM)


def child_environment(**more: str) -> dict[str, str]:
    """The environment for a Python process that must find the same modules as this one.

    Of the current folder it imports nothing, which may be that of a stranger's data.
    """
    path = os.pathsep.join(each for each in sys.path if each)
    return {**os.environ, "PYTHONPATH": path, _SAFE_PATH: "1", **more}


@contextlib.contextmanager
def safe_children() -> Iterator[None]:
    """Processes that multiprocessing starts inside the block import nothing of this folder."""
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before


@contextlib.contextmanager
def blocked_signals(numbers: Iterable[signal.Signals] = _STOPPING) -> Iterator[None]:
    """Processes started inside the block never get these signals, not even while they import.

    Ctrl-C reaches a whole group of processes; only the parent handles it, and stops the others.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def handled_signals(
    handler: Callable[[int, FrameType | None, Any], None],
    numbers: Iterable[signal.Signals] = _STOPPING,
) -> Iterator[None]:
    """A handler runs for these signals inside the block; it also gets the handler from before.

    Signals that are ignored (nohup, background jobs of a shell) stay ignored. Outside the main
    thread, where no handler ever runs, this does nothing.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in numbers}
        before = {n: each for n, each in found.items() if each not in (signal.SIG_IGN, None)}
    try:
        for number, each in before.items():
            signal.signal(number, functools.partial(_call, handler, each))
        yield
    finally:
        for number, each in before.items():
            signal.signal(number, each)


def _call(handler: Any, before: Any, number: int, frame: FrameType | None) -> None:
    handler(number, frame, before)


# Whether an outer block defers already: arming handlers takes 150 µs, as long as a small dataset.
_is_deferring = False


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Python handlers of SIGINT and SIGTERM run after the block, or the function so decorated.

    Signals without a Python handler act as usual. Outside the main thread, where no handler ever
    runs, and inside another such block, this does nothing. Costs 20 µs.
    """
    global _is_deferring  # handlers are the process's
    if _is_deferring or threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in _STOPPING}
    handlers: dict[int, Any] = {
        number: handler for number, handler in found.items() if callable(handler)
    }
    caught: list[tuple[int, FrameType | None]] = []
    inside = True

    def note(number: int, frame: FrameType | None) -> None:
        # Also where a second signal came between the lines below and this is still installed.
        if inside:
            caught.append((number, frame))
        else:
            handlers[number](number, frame)

    try:
        for number in handlers:
            signal.signal(number, note)
        _is_deferring = True
        yield
    finally:
        _is_deferring = inside = False
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in caught:
            handlers[number](number, frame)
