"""Tries in a forked child what a library of C may crash on, never end with, or fill memory with."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Final

from h5traces.errors import ConversionError

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_EXTRA_NBYTES: Final = 192 << 20
_MIN_SECONDS: Final = 1
# Of a file of many small objects, each of which is looked at, on a slow machine.
_BYTES_PER_SECOND: Final = 200_000
_STATM: Final = Path("/proc/self/statm")


def attempt(
    work: Callable[[], dict[str, str]], path: Path, library: str = "HDF5"
) -> dict[str, str]:
    """What `work` returns, done in a forked child with limits on its memory and processor time.

    The child must use nothing that another thread may hold when it is forked. Errors of `work` are
    not told, since the caller will meet them, too.

    Parameters
    ----------
    work
        Looks at the file; returns texts by name.
    path
        The file, for messages; larger ones may take more memory and time.
    library
        What reads it, for messages.

    Raises
    ------
    ConversionError
        The child was ended by a signal.
    """
    nbytes = path.stat().st_size
    inlet, outlet = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads, which the child does not have.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            _confine(nbytes)
            os.close(inlet)
            with os.fdopen(outlet, "wb") as file:
                file.write(json.dumps(work()).encode("utf-8", "surrogatepass"))
        finally:
            os._exit(0)
    os.close(outlet)
    with os.fdopen(inlet, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        how = signal.Signals(os.WTERMSIG(status)).name
        message = (
            f"{path}: {library} does not survive reading it ({how}): it is damaged or forged; "
            "copy the file again from where it was written"
        )
        raise ConversionError(message)
    found: dict[str, str] = json.loads(said or b"{}")
    return found


def _confine(nbytes: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    for number in (signal.SIGXCPU, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    seconds = _MIN_SECONDS + nbytes // _BYTES_PER_SECOND
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, seconds)]
    if _STATM.exists():
        used = int(_STATM.read_text().split()[0]) * resource.getpagesize()
        limits.append((resource.RLIMIT_AS, used + _MAX_EXTRA_NBYTES + 2 * nbytes))
    for kind, most in limits:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
