"""An iterator whose next item is made in a thread while the current one is in use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, Self, TypeVar

Item = TypeVar("Item")
_END = object()


class ReadAhead(Iterator[Item], Generic[Item]):
    """Runs an iterator one item ahead; a context manager.

    Never more than two items exist: the one in use and the one being made. So the caller must drop
    an item before it asks for the next.

    Parameters
    ----------
    make
        Called in the thread to make the iterator.
    """

    def __init__(self, make: Callable[[], Iterator[Item]]) -> None:
        self._make = make
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._wanted = threading.Semaphore(1)
        self._stopped = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="h5traces-read", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            items = self._make()
            while True:
                self._wanted.acquire()
                if self._stopped:
                    return
                # Not kept in a local: the caller must be able to free what it was handed.
                self._ready.put((None, next(items, _END)))
        except BaseException as error:  # handed to the caller's thread
            self._ready.put((error, None))

    def __next__(self) -> Item:
        if self._ended:
            raise StopIteration
        error, item = self._ready.get()
        if error is not None or item is _END:
            self._ended = True
            raise StopIteration if error is None else error
        self._wanted.release()
        return item  # type: ignore[no-any-return]  # the queue holds Item and _END only

    def close(self) -> None:
        """Stop the thread; an item in the making is dropped."""
        self._stopped = True
        self._wanted.release()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
