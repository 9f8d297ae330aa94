"""Tries requests again that failed for a reason that may pass."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Final, TypeVar

from h5traces.errors import RemoteError
from h5traces.storage.remote.transport import TemporaryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.storage.remote.paths import RemotePath

Result = TypeVar("Result")

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0


def persistently(path: RemotePath, attempts: int, request: Callable[[], Result]) -> Result:
    """What `request` returns, at the latest the last time; pauses grow from 0.1 to 5 seconds.

    Raises
    ------
    RemoteError
        Every attempt failed.
    """
    for attempt in range(attempts):
        try:
            return request()
        except TemporaryError as error:
            if attempt + 1 == attempts:
                message = f"{path}: the server cannot be reached, or fails: {error} "
                msg = f"{message}(tried {attempts} times); check the address and the network"
                raise RemoteError(msg) from error
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt)
        # Many readers that failed together must not come back together.
        time.sleep(pause * random.uniform(0.5, 1.0))
    message = f"{path}: attempts is {attempts}, expected at least 1"
    raise RemoteError(message)
