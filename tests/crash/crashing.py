"""Stops scenarios in child processes and checks what they leave; the engine of all crash tests.

The process that runs this forks its children, so it must have no threads: `__main__` makes it one
of its own, and prints what it found as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faults import CALLS, Fault, System
from power_loss import after_power_loss
from scenarios import SCENARIOS, Scenario, long_scenario, problems_done, problems_left

from h5traces.errors import H5TracesError
from h5traces.storage import processes as signals
from h5traces.storage import publish as part_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

LONG_RUN = "long run"
# Exit codes of children.
DONE, FAILED_CLEANLY, STOPPED, BROKE = 0, 3, 130, 4
ERRORS = {
    "disk full": Fault(0, "ENOSPC", ("pwrite", "open", "mkdir"), lasting=True),
    "write fails once": Fault(0, "EIO", ("pwrite",)),
    "sync fails once": Fault(0, "EIO", ("fsync",)),
    "no permission once": Fault(0, "EACCES", ("open", "link", "unlink", "replace", "mkdir")),
    "read-only from then on": Fault(
        0, "EROFS", ("open", "link", "unlink", "replace", "mkdir", "pwrite"), lasting=True
    ),
}


@dataclass
class Tally:
    """What a series of stops showed.

    Attributes
    ----------
    stops
        How often a process was stopped, or its disk's power.
    acked, lost
        Samples acknowledged before a stop, over all stops, and how many of them were gone.
    unfinished
        Stops after which running the same again did not finish the job.
    parts
        Stops by a signal or an error that left an unfinished ``.part`` file.
    problems
        What was wrong, in words.
    """

    stops: int = 0
    acked: int = 0
    lost: int = 0
    unfinished: int = 0
    parts: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, problems: list[str], place: str) -> None:
        """Note problems of one stop."""
        self.lost += sum("is lost" in each for each in problems)
        self.problems += [f"{place}: {each}" for each in problems]


class Bench:
    """A scenario with its inputs, and a folder that every run of it finds empty."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario = scenario
        self.inputs, self.out = folder / "inputs", folder / "out"
        self._acks = folder / "acks"
        self.inputs.mkdir()
        self._in_child(lambda: scenario.prepare(self.inputs))

    def clear(self) -> None:
        """Start with nothing."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        self._acks.unlink(missing_ok=True)

    def record(self) -> System:
        """An undisturbed run with a log of its calls; it must do what it should."""
        self.clear()
        system = System(self.out, log=True)
        log = self.out.parent / "log"

        def body() -> None:
            system.install()
            self.scenario.run(self.inputs, self.out, system.ack)
            log.write_bytes(pickle.dumps((system.events, system.calls)))

        status = self._in_child(body)
        if status or (problems := problems_done(self.out, self.scenario)):
            message = f"the undisturbed run fails: {status or problems}"
            raise AssertionError(message)
        system.events, system.calls = pickle.loads(log.read_bytes())
        return system

    def start(self, fault: Fault | None = None, limit: int | None = None) -> int:
        """Fork a child that runs the scenario; its process id."""
        return self._fork(lambda: self._run(fault, limit))

    def stopped(self, fault: Fault | None = None, limit: int | None = None) -> int:
        """Run the scenario in a child to its end; its status, negative for a signal."""
        return _status(self.start(fault, limit))

    def acked(self) -> Counter[int]:
        """The samples that children acknowledged since `clear`."""
        data = self._acks.read_bytes() if self._acks.exists() else b""
        return Counter(data)

    def note_acked(self, numbers: Iterable[int]) -> None:
        """Take these samples for acknowledged."""
        self._acks.write_bytes(bytes(numbers))

    def check(self, tally: Tally, place: str) -> None:
        """Look at what is left, run the scenario again, and look at the end."""
        tally.stops += 1
        acked = self.acked()
        tally.acked += acked.total()
        problems = problems_left(self.out, acked)
        status = self.stopped()
        if status != DONE:
            problems.append(f"the next run ended with {status}")
        else:
            problems += problems_done(self.out, self.scenario)
        tally.unfinished += bool(problems)
        tally.add(problems, place)

    def _run(self, fault: Fault | None, limit: int | None) -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        descriptor = os.open(self._acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if fault is not None:
            System(self.out, fault).install()
        # One byte per sample: a kill cannot tear it.
        self.scenario.run(
            self.inputs, self.out, lambda *numbers: os.write(descriptor, bytes(numbers))
        )

    def _in_child(self, body: Callable[[], None]) -> int:
        return _status(self._fork(body))

    def _fork(self, body: Callable[[], None]) -> int:
        sys.stdout.flush()
        process = os.fork()
        if process:
            return process
        gc.disable()
        code = BROKE
        try:
            # Whoever started this may ignore Ctrl-C, as nohup and shells do in the background.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
            body()
            code = DONE
        except (H5TracesError, OSError):
            code = FAILED_CLEANLY
        except KeyboardInterrupt:
            code = STOPPED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def _status(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _points(calls: list[str], options: argparse.Namespace) -> list[int]:
    """Some of the calls, half of them writes, since these are many and alike; all for count 0."""
    rng, numbers = random.Random(options.seed), range(len(calls))
    if not 0 < options.count < len(calls):
        return list(numbers)
    writes = [number for number in numbers if calls[number] == "pwrite"]
    others = [number for number in numbers if calls[number] != "pwrite"]
    num_others = min(len(others), max(options.count // 2, options.count - len(writes)))
    num_writes = min(len(writes), options.count - num_others)
    return sorted(rng.sample(writes, num_writes) + rng.sample(others, num_others))


def kill_sweep(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[Tally, str]]:
    """SIGKILL at calls, and in the middle of writes."""
    tally, calls = Tally(), bench.record().calls
    for number in _points(calls, options):
        for action in ("kill", "tear") if calls[number] == "pwrite" else ("kill",):
            bench.clear()
            status = bench.stopped(Fault(number, action))
            place = f"{action} at call {number} ({calls[number]})"
            if status != -signal.SIGKILL:
                tally.add([f"ended with {status}"], place)
            bench.check(tally, place)
    yield tally, "SIGKILL at a call"


def power_sweep(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[Tally, str]]:
    """The power fails at random calls; half of what was not synced is lost."""
    rng = random.Random(options.seed)
    events, tally = bench.record().events, Tally()
    for number in range(options.count or len(events)):
        stop = rng.randrange(len(events) + 1) if options.count else number
        bench.clear()
        after_power_loss(events[:stop], rng, bench.out)
        bench.note_acked(each for event in events[:stop] for each in event.acked)
        bench.check(tally, f"power loss {number} behind call {stop}")
    yield tally, "loss of power"


def signal_sweep(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[Tally, str]]:
    """SIGINT and SIGTERM at calls."""
    calls = bench.record().calls
    for action in ("int", "term"):
        tally = Tally()
        for number in _points(calls, options):
            bench.clear()
            status = bench.stopped(Fault(number, action))
            place = f"{action} at call {number} ({calls[number]})"
            # The last calls are behind everything that can be stopped.
            if status not in (STOPPED, DONE):
                tally.add([f"ended with {status}"], place)
            tally.parts += any(bench.out.rglob("*.part"))
            bench.check(tally, place)
        yield tally, f"SIG{action.upper()} at a call"


def error_sweep(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[Tally, str]]:
    """Calls fail: the disk is full, or fails, or may not be written."""
    calls = bench.record().calls
    for name, fault in ERRORS.items():
        tally = Tally()
        hit = [call for call in calls if call in fault.calls]
        for number in _points(hit, options):
            bench.clear()
            status = bench.stopped(replace(fault, at=number))
            place = f"{name} at call {number} ({hit[number]})"
            if status not in (FAILED_CLEANLY, DONE):
                tally.add([f"ended with {status}"], place)
            bench.check(tally, place)
        yield tally, name


def limit_sweep(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[Tally, str]]:
    """Files cannot grow beyond a limit of the system (EFBIG)."""
    bench.record()
    count = options.count or 100
    largest = max(path.stat().st_size for path in bench.out.rglob("*") if path.is_file())
    tally = Tally()
    for number in range(count):
        bench.clear()
        limit = largest * number // count
        status = bench.stopped(limit=limit)
        if status != FAILED_CLEANLY:
            tally.add([f"ended with {status}"], f"files of at most {limit} bytes")
        bench.check(tally, f"files of at most {limit} bytes")
    yield tally, "file-size limit"


def random_kills(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[Tally, str]]:
    """SIGKILL at random moments, again and again until the job is done; so runs resume often."""
    rng, tally = random.Random(options.seed), Tally()
    bench.clear()
    started = time.monotonic()
    if status := bench.stopped():
        tally.add([f"the undisturbed run ended with {status}"], "random kills")
    duration = time.monotonic() - started
    bench.clear()
    while tally.stops < (options.count or 100):
        process = bench.start()
        time.sleep(rng.uniform(0, duration))
        os.kill(process, signal.SIGKILL)
        status = _status(process)
        place = f"random kill {tally.stops}"
        if status == DONE:
            tally.add(problems_done(bench.out, bench.scenario), place)
            bench.clear()
            continue
        tally.stops += 1
        acked = bench.acked()
        tally.acked += acked.total()
        tally.add(problems_left(bench.out, acked), place)
    tally.stops -= 1
    bench.check(tally, "after the last random kill")
    yield tally, "SIGKILL at random moments"


SWEEPS = {
    "kill": kill_sweep,
    "signal": signal_sweep,
    "error": error_sweep,
    "power": power_sweep,
    "limit": limit_sweep,
    "random": random_kills,
}


def break_writer(without: str) -> None:
    """Take a promise away that writers rely on, to see that these tests would notice."""
    if without == "file sync":
        part_file.PartFile.sync = lambda _self: None  # type: ignore[method-assign]
    elif without == "folder sync":
        part_file.sync_folder = lambda _folder: None
    elif without == "deferred signals":
        signals._STOPPING = ()  # type: ignore[misc]


def results(name: str, stops: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the wanted stops of one scenario showed."""
    scenario = long_scenario(options.samples) if name == LONG_RUN else SCENARIOS[name]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(scenario, Path(folder))
        for stop in stops:
            kind, _, count = stop.partition("=")
            options.count = int(count or 0)
            for tally, label in SWEEPS[kind](bench, options):
                yield {"scenario": name, "kind": kind, "stop": label, **asdict(tally)}


def main() -> None:
    """Parse the command line and print one JSON document per result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=[*SCENARIOS, LONG_RUN])
    parser.add_argument(
        "stops", nargs="+", help=f"{', '.join(SWEEPS)}; =N for how many, else at all calls"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=100, help="samples of the long run")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--without", help="break the writer; see break_writer")
    options = parser.parse_args()
    break_writer(options.without)
    for found in results(options.scenario, options.stops, options):
        print(json.dumps(found), flush=True)


assert set(CALLS) >= {call for fault in ERRORS.values() for call in fault.calls}

if __name__ == "__main__":
    main()
