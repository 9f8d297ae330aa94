"""Threads that also work while the interpreter ends."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_Value = TypeVar("_Value")


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
        except BaseException as error:  # for who asks for the result
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
