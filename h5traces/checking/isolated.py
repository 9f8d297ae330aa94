"""Validation in a process of its own, with limits on memory and time.

HDF5 is a large C library, and damaged metadata still crashes it now and then. A crash, a full
memory or a hang ends only the child, and becomes a problem in the report.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

from h5traces.checking.validate import ValidationReport, validate
from h5traces.errors import Problem
from h5traces.format.limits import DEFAULT_LIMITS, ReadLimits

if TYPE_CHECKING:
    from h5traces.paths import PathLike

DEFAULT_MEMORY_NBYTES: Final = 1 << 30
DEFAULT_TIMEOUT: Final = 60.0
_OUT_OF_MEMORY: Final = 86
_CHILD: Final = f"from {__name__} import run_child; run_child()"
# Ends of libraries' complaints that are worth passing on.
_MAX_STDERR: Final = 400
# The loop that waits is woken by the child's end; this is for its last words.
_GRACE_SECONDS: Final = 5.0
_PAGE_NBYTES: Final = resource.getpagesize()


@dataclass(frozen=True, slots=True, kw_only=True)
class IsolationLimits:
    """What the child process may use.

    Attributes
    ----------
    memory_nbytes
        Address space beyond what Python and the libraries take.
    timeout
        Seconds, of the clock and of the processor.
    """

    memory_nbytes: int = DEFAULT_MEMORY_NBYTES
    timeout: float = DEFAULT_TIMEOUT


DEFAULT_ISOLATION: Final = IsolationLimits()


def validate_isolated(
    path: PathLike,
    *,
    limits: ReadLimits = DEFAULT_LIMITS,
    isolation: IsolationLimits = DEFAULT_ISOLATION,
) -> ValidationReport:
    """What `h5traces.validate` reports, from a child process that cannot hurt this one.

    Parameters
    ----------
    path
        The archive.
    limits
        What the file may ask of its reader.
    isolation
        What the child may use.

    Returns
    -------
    ValidationReport
        With a problem of the kind ``crashed``, ``out_of_memory`` or ``timed_out`` where the child
        did not come to its end.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    """
    file = Path(path)
    if not file.exists():
        message = f"{file}: no such file"
        raise FileNotFoundError(message)
    request = {
        "path": str(file),
        "limits": {each.name: getattr(limits, each.name) for each in fields(limits)},
        "isolation": asdict(isolation),
    }
    # -P: the folder it is started in is none to import from.
    command = [sys.executable, "-P", "-c", _CHILD]
    # One thread of linear algebra: each reserves address space, which is what is limited.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    # What is importable here shall be importable there, from wherever this was started.
    environment["PYTHONPATH"] = os.pathsep.join(each for each in sys.path if each)
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as child:
        try:
            out, err = child.communicate(
                json.dumps(request).encode(), isolation.timeout + _GRACE_SECONDS
            )
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return _ended(file, "timed_out", f"did not end within {isolation.timeout:g} s")
    return _report(file, child.returncode, out, err, isolation)


def _report(
    file: Path, code: int, out: bytes, err: bytes, isolation: IsolationLimits
) -> ValidationReport:
    words = err.decode(errors="replace").strip()[-_MAX_STDERR:]
    said = f"; it said: {words}" if words else ""
    if code == _OUT_OF_MEMORY:
        return _ended(
            file, "out_of_memory", f"needed more than {isolation.memory_nbytes} bytes of memory"
        )
    if code in (-signal.SIGALRM, -signal.SIGXCPU):
        return _ended(file, "timed_out", f"did not end within {isolation.timeout:g} s")
    if code < 0:
        return _ended(file, "crashed", f"was ended by {_signal_name(-code)}{said}")
    try:
        document = json.loads(out)
        problems = [Problem(**each) for each in document.pop("problems")]
        document.pop("ok")
        return ValidationReport(**document, problems=problems)
    except (ValueError, TypeError, KeyError, AttributeError):
        return _ended(file, "crashed", f"ended with code {code} and without a report{said}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _ended(file: Path, kind: str, how: str) -> ValidationReport:
    message = f"the process that validated the file {how}; do not open it without isolation"
    return ValidationReport(str(file), problems=[Problem("/", message, kind)])


def run_child() -> None:
    """The child: a request on stdin, the report on stdout."""
    request = json.loads(sys.stdin.buffer.read())
    limits, isolation = ReadLimits(**request["limits"]), IsolationLimits(**request["isolation"])
    # HDF5 prints to stdout when it is in trouble: the report goes another way.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _confine(isolation)
    try:
        report = validate(request["path"], limits=limits)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    if any(_is_memory_error(each) for each in report.problems):
        os._exit(_OUT_OF_MEMORY)
    out.write(json.dumps(report.as_dict()).encode())
    out.flush()
    # Not through HDF5's own exit: it would close what it could not read.
    os._exit(0)


def _is_memory_error(problem: Problem) -> bool:
    words = ("Unable to allocate", "memory allocation failed", "can't allocate", "out of memory")
    return any(each in problem.message for each in words)


def _confine(isolation: IsolationLimits) -> None:
    """Limit this process, for good."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE_NBYTES if _has_proc() else 0
    most = used + isolation.memory_nbytes
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    seconds = max(1, round(isolation.timeout))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    # The clock: the default action of SIGALRM ends the process, in the middle of C code too.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, isolation.timeout)


def _has_proc() -> bool:
    return Path("/proc/self/statm").exists()
