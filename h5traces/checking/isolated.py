"""Validates in a child process with limits on memory and time.

HDF5 is a large C library, and damaged metadata still crashes it now and then. A crash, exhausted
memory or a hang ends only the child and becomes a problem in the report.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from h5traces.checking.reports import ValidationReport
from h5traces.errors import Problem
from h5traces.format.limits import DEFAULT_LIMITS, ReadLimits
from h5traces.meaning.checks import CheckOptions, FindingSummary
from h5traces.storage.processes import child_environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.paths import PathLike

DEFAULT_MEMORY_NBYTES: Final = 1 << 30
DEFAULT_TIMEOUT: Final = 60.0
# Bytes per second of an archive whose values are all inflated and looked at, on a slow machine.
_READ_RATE: Final = 20e6
_OUT_OF_MEMORY: Final = 86
_CHILD: Final = (
    "from h5traces.checking import isolated, validate; isolated.run_child(validate.validate_file)"
)
# The end of what the child wrote to stderr goes into the report.
_MAX_STDERR: Final = 400
# The child enforces its own timeout; the parent waits this much longer before it kills the child.
_GRACE_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class IsolationLimits:
    """What the child process may use.

    Attributes
    ----------
    memory_nbytes
        Address space beyond what Python and the libraries need.
    timeout
        Seconds of wall-clock time, and of processor time. None: 60, and one more for every 20 MB of
        which all values are read.
    """

    memory_nbytes: int = DEFAULT_MEMORY_NBYTES
    timeout: float | None = None

    def seconds(self, nbytes: int) -> float:
        """The time for reading this many bytes."""
        return DEFAULT_TIMEOUT + nbytes / _READ_RATE if self.timeout is None else self.timeout


DEFAULT_ISOLATION: Final = IsolationLimits()


def validate_isolated(
    path: PathLike,
    *,
    quick: bool = False,
    checks: CheckOptions = CheckOptions(),
    limits: ReadLimits = DEFAULT_LIMITS,
    isolation: IsolationLimits = DEFAULT_ISOLATION,
) -> ValidationReport:
    """Validate one archive in a child process that cannot crash this one.

    The problem is ``crashed``, ``out_of_memory`` or ``timed_out`` if the child did not finish.
    """
    file = Path(path)
    if not file.exists():
        message = f"{file}: no such file"
        raise FileNotFoundError(message)
    isolation = replace(isolation, timeout=isolation.seconds(0 if quick else file.stat().st_size))
    request = {
        "path": str(file),
        "quick": quick,
        "checks": asdict(checks),
        "limits": asdict(limits),
        "isolation": asdict(isolation),
    }
    # -P: never import from the current folder.
    command = [sys.executable, "-P", "-c", _CHILD]
    # Every thread of linear algebra reserves address space, which is limited.
    environment = child_environment(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
    ) as child:
        try:
            out, err = child.communicate(
                json.dumps(request).encode(), isolation.seconds(0) + _GRACE_SECONDS
            )
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return _timed_out(file, isolation)
    return _report(file, child.returncode, out, err, isolation)


def _report(
    file: Path, code: int, out: bytes, err: bytes, isolation: IsolationLimits
) -> ValidationReport:
    words = err.decode(errors="replace").strip()[-_MAX_STDERR:]
    said = f"; it printed: {words}" if words else ""
    if code == _OUT_OF_MEMORY:
        how = f"needed more than {isolation.memory_nbytes} bytes of memory"
        return _ended(file, "out_of_memory", how)
    if code in (-signal.SIGALRM, -signal.SIGXCPU):
        return _timed_out(file, isolation)
    if code < 0:
        return _ended(file, "crashed", f"was ended by {_signal_name(-code)}{said}")
    try:
        document = json.loads(out)
        document.pop("ok")
        document["problems"] = [Problem(**each) for each in document["problems"]]
        document["findings"] = [FindingSummary(**each) for each in document["findings"]]
        document["checks"] = CheckOptions(**document["checks"])
        return ValidationReport(**document)
    except (ValueError, TypeError, KeyError, AttributeError):
        return _ended(file, "crashed", f"ended with code {code} and without a report{said}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _timed_out(file: Path, isolation: IsolationLimits) -> ValidationReport:
    return _ended(file, "timed_out", f"did not end within {isolation.seconds(0):.4g} s")


def _ended(file: Path, kind: str, how: str) -> ValidationReport:
    message = f"the process that validated the file {how}; do not open it without isolation"
    return ValidationReport(str(file), problems=[Problem("/", message, kind)])


def run_child(validate_file: Callable[..., ValidationReport]) -> None:
    """Run the child: read a request from stdin, write the report to stdout."""
    request = json.loads(sys.stdin.buffer.read())
    limits, isolation = ReadLimits(**request["limits"]), IsolationLimits(**request["isolation"])
    # HDF5 prints failures to stdout, so the report gets a separate descriptor.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _confine(isolation)
    try:
        report = validate_file(
            request["path"],
            quick=request["quick"],
            checks=CheckOptions(**request["checks"]),
            limits=limits,
            # Threads take address space.
            workers=1,
        )
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    if any(_is_memory_error(each) for each in report.problems):
        os._exit(_OUT_OF_MEMORY)
    out.write(json.dumps(report.as_dict()).encode())
    out.flush()
    # Skips HDF5's exit handler, which would close what it could not read.
    os._exit(0)


def _is_memory_error(problem: Problem) -> bool:
    words = ("Unable to allocate", "memory allocation failed", "can't allocate", "out of memory")
    return any(each in problem.message for each in words)


def _confine(isolation: IsolationLimits) -> None:
    """Limit this process for the rest of its life."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        used = int(statistics.read_text().split()[0]) * resource.getpagesize()
        most = used + isolation.memory_nbytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    seconds = max(1, round(isolation.seconds(0)))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    # The default action of SIGALRM ends the process even inside C code.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, isolation.seconds(0))
