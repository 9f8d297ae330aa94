"""Hands records to the process that writes, while the next ones are computed."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from h5traces.format.dtypes import TypedArray

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.format.record import TraceRecord
    from h5traces.writing.process_writer import ProcessWriter

# Enough to go on computing while a shard is being packed.
MAX_WAITING_NBYTES: Final = 512 * 2**20


def record_nbytes(record: TraceRecord) -> int:
    """Bytes of a record's arrays in memory."""
    return sum(
        entry.array.values.nbytes
        for layered in record.layered.values()
        for entry in layered.arrays
        if isinstance(entry.array, TypedArray)
    )


class WriterThread:
    """A thread that waits for the writer in place of the one that computes, and a bounded queue.

    Parameters
    ----------
    writer
        Used by this thread alone until `close` returns.
    written
        Called in the thread with each record that is durable.
    max_waiting_nbytes
        Bytes of records that may wait; one record may always.
    """

    def __init__(
        self,
        writer: ProcessWriter,
        written: Callable[[TraceRecord], None],
        *,
        max_waiting_nbytes: int = MAX_WAITING_NBYTES,
    ) -> None:
        self._writer, self._written = writer, written
        self._max_waiting_nbytes = max_waiting_nbytes
        self._waiting: deque[TraceRecord] = deque()
        self._waiting_nbytes = 0
        self._is_closing = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="h5traces-write", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while (record := self._next()) is not None:
                self._writer.append(record)
                self._written(record)
                # Free the arrays before waiting for the next ones.
                del record
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> TraceRecord | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            if not self._waiting:
                return None
            record = self._waiting.popleft()
            self._waiting_nbytes -= record_nbytes(record)
            self._changed.notify_all()
            return record

    def put(self, record: TraceRecord) -> None:
        """Hand a record over; waits while too many are waiting.

        Raises
        ------
        Exception
            Whatever an earlier record ended in.
        """
        nbytes = record_nbytes(record)

        def has_room() -> bool:
            fits = self._waiting_nbytes + nbytes <= self._max_waiting_nbytes
            return self._error is not None or not self._waiting or fits

        with self._changed:
            self._changed.wait_for(has_room)
            if self._error is not None:
                raise self._error
            self._waiting.append(record)
            self._waiting_nbytes += nbytes
            self._changed.notify_all()

    def close(self) -> None:
        """Wait until all is written.

        Raises
        ------
        Exception
            Whatever a record ended in.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error
