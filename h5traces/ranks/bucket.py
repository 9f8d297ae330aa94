"""Runs of ranks whose results go to a bucket: what they record there, and how it is read.

Objects cannot be appended to, so every piece of work has its own. Its name says what became
of it, for a status takes a listing then, and no further request.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from h5traces.errors import RemoteError, TargetError
from h5traces.format.text import utc_now
from h5traces.ranks.plan import (
    RANKS,
    RUN,
    RunPlan,
    check_alike,
    deal,
    rank_name,
    read_plan,
    serialised,
    warn_of_size,
)
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemotePath

if TYPE_CHECKING:
    from h5traces.ranks.rank import Rank

# The report of a rank of an extraction.
REPORT: Final = "report.json"
_BEAT_SECONDS: Final = 30.0
# Six heartbeats.
_ALIVE_SECONDS: Final = 180.0
_READERS: Final = 32
_ITEM: Final = re.compile(r"([0-9]+)-([a-z]+)-([0-9]+)-([0-9]+)\.json")
_END: Final = re.compile(r"end-([a-z]+)\.json")


class BucketRun:
    """A rank at work whose results go to a server; see `RankRun`.

    Attributes
    ----------
    url, rank
        Where the run is, and which of its ranks this is.
    share
        The pieces of work of this rank, ascending.
    """

    def __init__(self, url: str, rank: Rank, plan: RunPlan) -> None:
        self.url, self.rank = url, rank
        self.share = deal(plan.costs, rank.size)[rank.number]
        self._failed = self._is_stopped = False
        _fix_plan(RemotePath(url), plan)

    def note(self, item: int, **facts: Any) -> None:
        """Record the outcome of a piece of work, unless that was done before."""
        from h5traces.storage.remote.uploading import put_new

        self._failed |= facts.get("status") == "failed"
        line = {"event": "item", "time": utc_now(), "item": item, **facts}
        counts = f"{facts.get('num_samples', 0)}-{facts.get('nbytes', 0)}"
        name = f"{item:07d}-{facts['status']}-{counts}.json"
        # Where credentials have expired, the piece has failed by that, and its report says so.
        with contextlib.suppress(*((RemoteError,) if facts["status"] == "failed" else ())):
            put_new(self._place(name), _document(line), DEFAULT_REMOTE)

    def stopped(self) -> None:
        """Record at the end that the rank was stopped."""
        self._is_stopped = True

    def _place(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}{RANKS}/{self.rank.name}/{name}")

    def _put(self, name: str, event: str, **facts: Any) -> None:
        from h5traces.storage.remote.uploading import put

        line = {"event": event, "time": utc_now(), "host": socket.gethostname(), **facts}
        put(self._place(name), _document(line), DEFAULT_REMOTE)

    def __enter__(self) -> Self:
        self._put("alive.json", "start")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="h5traces-beat", daemon=True)
        self._thread.start()
        return self

    def _beat(self) -> None:
        """Write the object again now and then: the time that the server gives it counts."""
        while not self._closed.wait(_BEAT_SECONDS):
            with contextlib.suppress(RemoteError):
                self._put("alive.json", "start")

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        status = "failed" if self._failed or exception_type is not None else "done"
        if self._is_stopped or issubclass(exception_type or object, KeyboardInterrupt):
            status = "stopped"
        with contextlib.suppress(*(() if status == "done" else (RemoteError,))):
            self._put(f"end-{status}.json", "end", status=status)


def _fix_plan(folder: RemotePath, plan: RunPlan) -> None:
    """Write the plan, if this rank is the first, or comes with another number of ranks."""
    from h5traces.storage.remote.uploading import put_new, put_over, version_of

    place = RemotePath(f"{folder.url}{RUN}")
    while not put_new(place, serialised(plan), DEFAULT_REMOTE):
        version, before = version_of(place, DEFAULT_REMOTE), read_plan(folder)
        if before is None:
            continue
        check_alike(plan, before, folder)
        if before.world_size == plan.world_size:
            return
        room = BucketRoom(folder.url)
        running = [n for n in range(before.world_size) if room.is_at_work(n, before.world_size)]
        if running:
            message = (
                f"{folder}: a rank of {plan.world_size} comes into a run of {before.world_size} "
                f"ranks, of which rank {running[0]} gave a sign of life in the last "
                f"{_ALIVE_SECONDS:.0f} seconds; wait until all of them have ended, or stop them, "
                "then change world_size"
            )
            raise TargetError(message)
        warn_of_size(plan, before, folder)
        if put_over(place, serialised(plan), version, DEFAULT_REMOTE):
            return


def _document(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode("utf-8", "surrogatepass")


@dataclass(slots=True)
class BucketRoom:
    """The records of ranks in a bucket; as `LocalRoom`."""

    url: str
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    # How long ago every rank gave a sign of life.
    _ages: dict[str, float] = field(default_factory=dict)
    _reports: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """List the objects."""
        from h5traces.storage.remote.uploading import listed

        found, now = listed(RemotePath(f"{self.url}{RANKS}/"), DEFAULT_REMOTE)
        ends: dict[str, tuple[float, str]] = {}
        for name, changed in sorted(found.items()):
            rank, _, file = name.partition("/")
            lines = self.lines.setdefault(rank, [])
            item, end = _ITEM.fullmatch(file), _END.fullmatch(file)
            if item is not None:
                number, status, num_samples, nbytes = item.groups()
                counts = {"num_samples": int(num_samples), "nbytes": int(nbytes)}
                facts = {"item": int(number), "status": status, "object": name, **counts}
                lines.append({"event": "item", **facts})
            elif file == "alive.json":
                self._ages[rank] = now - changed
                lines.insert(0, {"event": "start"})
            elif file == REPORT:
                self._reports.append(name)
            elif end is not None:
                ends[rank] = max(ends.get(rank, (0.0, "")), (changed, end[1]))
        for rank, (changed, status) in ends.items():
            if now - changed <= self._ages.get(rank, now):
                self.lines[rank].append({"event": "end", "status": status})

    def __str__(self) -> str:
        return self.url

    def plan(self) -> RunPlan | None:
        """The plan of the run, or None."""
        return read_plan(RemotePath(self.url))

    def is_at_work(self, number: int, size: int) -> bool:
        """Whether a rank of this many has neither ended nor been silent for long."""
        name = rank_name(number, size)
        lines = self.lines.get(name, [])
        return bool(lines) and lines[-1]["event"] != "end" and self.is_alive(name)

    def is_alive(self, rank: str) -> bool:
        """Whether a rank gave a sign of life lately."""
        return self._ages.get(rank, _ALIVE_SECONDS) < _ALIVE_SECONDS

    def whole(self, lines: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Lines about pieces of work, with all that they say."""
        names = [line["object"] for line in lines.values()]
        return dict(zip(lines, self._documents(names), strict=True))

    def reports(self) -> list[dict[str, Any]]:
        """What the ranks of an extraction have reported."""
        return self._documents(self._reports)

    def _documents(self, names: list[str]) -> list[dict[str, Any]]:
        from h5traces.storage.remote.uploading import read_document_at

        def read(name: str) -> dict[str, Any]:
            data = read_document_at(RemotePath(f"{self.url}{RANKS}/{name}"), DEFAULT_REMOTE)
            found: dict[str, Any] = json.loads(data.decode("utf-8", "surrogatepass"))
            return found

        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(read, names))
