"""How far a run is, by the records of its ranks."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from h5traces.arguments import checked
from h5traces.errors import TargetError
from h5traces.format.html import Report
from h5traces.paths import local_path
from h5traces.ranks.bucket import BucketRoom
from h5traces.ranks.plan import RANKS, RUN, rank_name, read_plan, run_folder
from h5traces.storage.remote.paths import RemotePath, is_url

if TYPE_CHECKING:
    from pathlib import Path

    from h5traces.paths import PathLike
    from h5traces.ranks.plan import RunPlan

# Six heartbeats: a node may be busy, or its mount slow.
_ALIVE_SECONDS: Final = 60.0
# A later attempt that finds the work done says less than these.
_FINISHED: Final = ("converted", "written", "skipped")


@dataclass(slots=True)
class RunStatus(Report):
    """How far a run is.

    Attributes
    ----------
    folder, command, world_size
        Which run.
    done, running, failed, missing
        Numbers of ranks: that ended well, that are at work, that ended with a failure, and all
        others: never started, stopped or killed.
    num_items, num_done, num_failed
        Pieces of work (files or samples): all, finished, and failed.
    num_samples, nbytes
        Samples written, and bytes of the archives.
    total_cost, done_cost
        What the work costs, in bytes of sources or tokens, and what is done of it.
    rate
        Cost done per second by the ranks at work, together; 0 if none is.
    seconds_left
        Estimate for the ranks at work; None if it is unknown.
    first_task
        What the scheduler calls rank 0.
    errors
        Messages of what failed.
    """

    folder: str
    command: str
    world_size: int
    done: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    num_items: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_samples: int = 0
    nbytes: int = 0
    total_cost: int = 0
    done_cost: int = 0
    rate: float = 0.0
    seconds_left: float | None = None
    first_task: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all the work is done."""
        return self.num_done == self.num_items

    @property
    def unit(self) -> str:
        """The unit of costs."""
        return "tokens" if self.command == "extract" else "bytes"

    @property
    def array(self) -> str:
        """The ranks to start again, as ``sbatch --array=`` takes them; empty if there are none."""
        return "" if self.ok else as_ranges(self.first_task + each for each in self.to_run)

    @property
    def to_run(self) -> list[int]:
        """Ranks that neither run nor ended well."""
        return sorted([*self.missing, *self.failed])


def as_ranges(numbers: Any) -> str:
    """Numbers as SLURM writes them: ``0,3-7``."""
    parts: list[list[int]] = []
    for each in sorted(numbers):
        if parts and parts[-1][1] == each - 1:
            parts[-1][1] = each
        else:
            parts.append([each, each])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


@checked
def status(folder: PathLike) -> RunStatus:
    """How far the run in a folder is: its ranks, samples, bytes, rate and time left.

    Parameters
    ----------
    folder
        The output of a command that was started with ``rank``, also ``s3://bucket/run/``; of one
        that makes a file, the run is beside it, in ``<output>.run``.

    Raises
    ------
    TargetError
        There is no run in the folder.
    """
    room = room_of(folder)
    plan = planned(room)
    found = RunStatus(str(room), plan.command, plan.world_size, first_task=plan.first_task)
    found.num_items, found.total_cost = len(plan.costs), sum(plan.costs)
    left: list[float] = []
    for rank in range(plan.world_size):
        name = rank_name(rank, plan.world_size)
        lines = room.lines.get(name, [])
        ends = [each for each in lines if each["event"] in ("start", "end")]
        last = ends[-1] if ends else {}
        if last.get("event") == "end" and last["status"] in ("done", "failed"):
            (found.done if last["status"] == "done" else found.failed).append(rank)
            if last.get("error"):
                found.errors.append(f"rank {rank}: {last['error']}")
        elif last.get("event") == "start" and room.is_alive(name):
            found.running.append(rank)
            _add_rate(found, plan.costs, lines, left)
        else:
            found.missing.append(rank)
    for item, line in last_lines(room).items():
        if line["status"] in _FINISHED:
            found.num_done += 1
            found.num_samples += line.get("num_samples", 0)
            found.nbytes += line.get("nbytes", 0)
            found.done_cost += plan.costs[item] if item < len(plan.costs) else 0
        elif line["status"] == "failed":
            found.num_failed += 1
            found.errors.append(str(line.get("error") or f"piece {item} of the work failed"))
    # Until every rank left is at work, nobody knows when it will be done.
    found.seconds_left = max(left) if left and not found.to_run else None
    return found


class Room(Protocol):
    """The records of the ranks of a run.

    Attributes
    ----------
    lines
        By name of a rank (``00003-of-00008``), its lines, of any world size.
    """

    lines: dict[str, list[dict[str, Any]]]

    def plan(self) -> RunPlan | None:
        """The plan of the run, or None."""

    def is_alive(self, rank: str) -> bool:
        """Whether a rank is at work."""

    def whole(self, lines: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Lines about pieces of work, with all that they say."""

    def reports(self) -> list[dict[str, Any]]:
        """What the ranks of an extraction have reported."""


@dataclass(slots=True)
class LocalRoom:
    """The records of ranks in a folder; as `Room`."""

    folder: Path
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _now: float = 0.0

    def __post_init__(self) -> None:
        """Read the lines of all ranks."""
        paths = sorted((self.folder / RANKS).glob("*-of-*.jsonl"))
        self.lines = {path.stem: _read_lines(path) for path in paths}
        self._now = _now(self.folder / RANKS) if paths else 0.0

    def __str__(self) -> str:
        return str(self.folder)

    def plan(self) -> RunPlan | None:
        """The plan of the run, or None."""
        return read_plan(self.folder)

    def is_alive(self, rank: str) -> bool:
        """Whether a rank is at work."""
        return _is_alive(self.folder / RANKS / f"{rank}.jsonl", self._now)

    def whole(self, lines: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The raw lines."""
        return lines

    def reports(self) -> list[dict[str, Any]]:
        """What the ranks of an extraction have reported."""
        paths = sorted((self.folder / RANKS).glob("*.report.json"))
        return [json.loads(each.read_bytes().decode("utf-8", "surrogatepass")) for each in paths]


def room_of(folder: PathLike) -> LocalRoom | BucketRoom:
    """Where the ranks of a run write down what they do."""
    if is_url(folder) and RemotePath(str(folder)).protocol in ("s3", "s3a"):
        return BucketRoom(f"{str(folder).rstrip('/')}/")
    return LocalRoom(run_folder(local_path(folder)))


def planned(room: Room) -> RunPlan:
    """The plan of a run; TargetError without one."""
    plan = room.plan()
    if plan is None:
        message = f"{room}: holds no {RUN}; expected the output of a command that was given ranks"
        raise TargetError(message)
    return plan


def _add_rate(
    found: RunStatus, costs: tuple[int, ...], lines: list[dict[str, Any]], left: list[float]
) -> None:
    start = max(n for n, each in enumerate(lines) if each["event"] == "start")
    done = [each for each in lines[start:] if each["event"] == "item"]
    seconds = done[-1].get("elapsed", 0) if done else 0
    if seconds:
        rate = sum(costs[each["item"]] for each in done if each["status"] != "skipped") / seconds
        rest = lines[start]["cost"] - sum(costs[each["item"]] for each in done)
        found.rate += rate
        if rate:
            left.append(rest / rate)


def finished_items(folder: Path) -> dict[int, dict[str, Any]]:
    """The last line about every piece of work of the run in a folder on disk."""
    return last_lines(LocalRoom(folder))


def last_lines(room: Room) -> dict[int, dict[str, Any]]:
    """The last line about every piece of work, of any rank and any world size.

    A line that only found the work done does not replace the one of who did it.
    """
    found: dict[int, dict[str, Any]] = {}
    for lines in room.lines.values():
        for line in lines:
            if line["event"] == "item":
                before = found.get(line["item"], {}).get("status")
                if before is None or (line["status"], before) not in _SAYS_LESS:
                    found[line["item"]] = line
    return found


_SAYS_LESS: Final = frozenset(
    (now, before) for before in ("converted", "written") for now in ("skipped", "failed")
)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a rank; half a line is left by a writer that was killed."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for line in data.splitlines():
        try:
            document = json.loads(line)
        except ValueError:
            continue
        if isinstance(document, dict) and "event" in document:
            found.append(document)
    return found


def _now(folder: Path) -> float:
    """The time by the clock that stamps the files of a folder, which may be a server's."""
    probe = folder / f"probe-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        # In a read-only folder, only the newest sign of life is left to compare with.
        return max((each.stat().st_mtime for each in folder.glob("*.jsonl")), default=0.0)
    finally:
        if probe.exists():
            probe.unlink()


def _is_alive(path: Path, now: float) -> bool:
    """Whether a rank is at work: it holds its lock, and gave a sign of life lately."""
    if now - path.stat().st_mtime > _ALIVE_SECONDS:
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def running_ranks(folder: Path, world_size: int) -> list[int]:
    """Ranks of a world size that are at work."""
    paths = (folder / RANKS / f"{rank_name(n, world_size)}.jsonl" for n in range(world_size))
    now = _now(folder / RANKS)
    return [n for n, path in enumerate(paths) if path.exists() and _is_alive(path, now)]
