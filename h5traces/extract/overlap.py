"""Writes in a thread while the next samples are computed."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.schema import TraceRecord
    from h5traces.spooling import TraceWriter

_POLL_SECONDS: Final = 0.2


class WriterThread:
    """One thread that appends records to a writer, and a bounded queue in front of it.

    Parameters
    ----------
    writer
        Used by this thread alone until `close` returns.
    depth
        Records that may wait.
    written
        Called in the thread with each record that is durable.
    """

    def __init__(
        self, writer: TraceWriter, depth: int, written: Callable[[TraceRecord], None]
    ) -> None:
        self._writer, self._written = writer, written
        self._queue: queue.Queue[TraceRecord | None] = queue.Queue(maxsize=depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="h5traces-write", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (record := self._queue.get()) is not None:
            try:
                self._writer.append(record)
                self._written(record)
            except BaseException as error:
                self._error = error
                return
            # Free the arrays before waiting for the next ones.
            del record

    def put(self, record: TraceRecord) -> None:
        """Hand a record over; waits while too many are waiting.

        Raises
        ------
        Exception
            Whatever an earlier record ended in.
        """
        self._put(record)

    def _put(self, record: TraceRecord | None) -> None:
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._queue.put(record, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return

    def close(self) -> None:
        """Wait until all is written.

        Raises
        ------
        Exception
            Whatever a record ended in.
        """
        if self._thread.is_alive():
            self._put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
