"""Threads that also work while the interpreter ends, and one that reads an item ahead."""

from __future__ import annotations

import os
import queue
import threading
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
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
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
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
