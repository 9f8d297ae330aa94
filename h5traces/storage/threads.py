"""Threads that also work while the interpreter ends, and one that reads items ahead."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_Value = TypeVar("_Value")
Item = TypeVar("Item")
_END = object()


class ThreadPool(ThreadPoolExecutor):
    """Threads; once the interpreter ends, the caller does their work.

    Python stops all pools before it calls ``atexit`` functions, which may close a writer.
    """

    def submit(self, fn: Callable[..., _Value], /, *args: Any, **kwargs: Any) -> Future[_Value]:
        """Start a call, as in the standard library."""
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError as error:
            if "cannot schedule new futures" not in str(error):
                raise
        done: Future[_Value] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as error:  # raised where the result is asked for
            done.set_exception(error)
        return done


def shared_pool(workers: int) -> ThreadPool:
    """Threads that stay, since starting them takes as long as reading a small sample.

    What runs in them must not wait for others of them.
    """
    return _pool(workers, os.getpid())


@cache
def _pool(workers: int, _process: int) -> ThreadPool:
    return ThreadPool(workers, thread_name_prefix="h5traces-read")


class _OneBlasThread:
    """Inside the block, a matrix product of numpy takes one thread: the one that asks for it.

    For products in several threads at once, which otherwise start as many threads each. The number
    is the process's; the last of several blocks restores it, and matrix products of other threads
    are slower meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_blocks = 0
        self._limits: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_blocks:
                self._limits = _libraries().limit(limits=1, user_api="blas")
            self._num_blocks += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_blocks -= 1
            if not self._num_blocks:
                self._limits.restore_original_limits()


@cache
def _libraries() -> Any:
    """The library of matrix products that numpy loaded."""
    from threadpoolctl import ThreadpoolController  # rarely needed

    return ThreadpoolController()


one_blas_thread = _OneBlasThread()


class ReadAhead(Iterator[Item], Generic[Item]):
    """Runs an iterator ahead, in a thread; a context manager.

    Two items exist, the one in use and the one being made, or more as long as those that wait to be
    used take little. So the caller must drop an item before it asks for the next.

    Parameters
    ----------
    make
        Called in the thread to make the iterator.
    nbytes
        How much memory an item takes.
    most_nbytes
        Of the items that wait, with another one as large as the last.
    """

    def __init__(
        self,
        make: Callable[[], Iterator[Item]],
        *,
        nbytes: Callable[[Item], int] = lambda _: 0,
        most_nbytes: int = -1,
    ) -> None:
        self._make, self._nbytes, self._most_nbytes = make, nbytes, most_nbytes
        # Size and error of what waits, and the item.
        self._ready: deque[tuple[int, BaseException | None, Any]] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="h5traces-read", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            items = self._make()
            # Not kept in a local: the caller must be able to free what it was handed.
            while self._is_wanted() and self._put(next(items, _END)):
                pass
        except BaseException as error:  # handed to the caller's thread
            self._put(_END, error)

    def _is_wanted(self) -> bool:
        """Wait until there is room for another item; False once there is no use for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._has_room())
            return not self._stopped

    def _has_room(self) -> bool:
        sizes = [nbytes for nbytes, *_ in self._ready]
        return not sizes or sum(sizes) + sizes[-1] <= self._most_nbytes

    def _put(self, item: Any, error: BaseException | None = None) -> bool:
        """Hand over an item, or the end; whether others may follow."""
        nbytes = 0 if item is _END else self._nbytes(item)
        with self._changed:
            self._ready.append((nbytes, error, item))
            self._changed.notify_all()
        return item is not _END

    def __next__(self) -> Item:
        if self._ended:
            raise StopIteration
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            _, error, item = self._ready.popleft()
            self._changed.notify_all()
        if error is not None or item is _END:
            self._ended = True
            raise StopIteration if error is None else error
        return item  # type: ignore[no-any-return]  # the deque holds Item and _END only

    def close(self) -> None:
        """Stop the thread; items that nobody asked for are dropped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._ready.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
