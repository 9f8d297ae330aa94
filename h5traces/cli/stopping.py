"""Signals that let what is being computed come to its end."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any

from h5traces.cli.console import warn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


class Stop:
    """Whether a signal came. One before the first batch, and a second one, stop at once.

    Attributes
    ----------
    number
        The signal; 0 for none.
    before
        The handlers that were there before.
    """

    def __init__(self) -> None:
        self.number = 0
        self._is_computing = False
        self.before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Asked before every batch."""
        self._is_computing = True
        return self.number != 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if self.number or not self._is_computing:
            self.before[number](number, frame)
        self.number = number
        warn("finishing the current batch; again to stop at once")


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM let the batch that is being computed come to its end."""
    stop = Stop()
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # What is ignored (nohup, a shell's background job) stays ignored.
        stop.before = {number: each for number, each in found.items() if callable(each)}
    for number in stop.before:
        signal.signal(number, stop.note)
    try:
        yield stop
    finally:
        for number, handler in stop.before.items():
            signal.signal(number, handler)
