"""Runs of ranks whose results go to a bucket: what they write down there, and how it is read.

Objects cannot be appended to, so every piece of work has one of its own. Its name says what became
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
from h5traces.ranks.plan import RANKS, RUN, RunPlan, parse_plan, serialised
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemotePath

if TYPE_CHECKING:
    from h5traces.ranks.rank import Rank

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
    plan
        The plan in force.
    """

    def __init__(self, url: str, rank: Rank, plan: RunPlan) -> None:
        from h5traces.storage.remote.uploading import put_new, read_document_at

        self._url, self._rank, self.plan = url, rank, plan
        self._failed = False
        place = RemotePath(f"{url}{RUN}")
        if put_new(place, serialised(plan), DEFAULT_REMOTE):
            return
        before = parse_plan(read_document_at(place, DEFAULT_REMOTE), str(place))
        differences = plan.differences(before)
        if plan.world_size != before.world_size:
            differences.append(f"world_size is {plan.world_size}, and was {before.world_size}")
        if differences:
            message = (
                f"{url}: its run was planned otherwise: {'; '.join(differences)}. Run the "
                f"ranks alike, or name another folder; where no rank runs, deleting {place} allows "
                "another plan"
            )
            raise TargetError(message)

    def note(self, item: int, **facts: Any) -> None:
        """Write down what became of a piece of work, unless that was done before."""
        from h5traces.storage.remote.uploading import put_new

        self._failed |= facts.get("status") == "failed"
        line = {"event": "item", "time": utc_now(), "item": item, **facts}
        counts = f"{facts.get('num_samples', 0)}-{facts.get('nbytes', 0)}"
        name = f"{item:07d}-{facts['status']}-{counts}.json"
        # Where credentials have expired, the piece has failed by that, and its report says so.
        with contextlib.suppress(*((RemoteError,) if facts["status"] == "failed" else ())):
            put_new(self._place(name), _document(line), DEFAULT_REMOTE)

    def _place(self, name: str) -> RemotePath:
        return RemotePath(f"{self._url}{RANKS}/{self._rank.name}/{name}")

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
        if issubclass(exception_type or object, KeyboardInterrupt):
            status = "stopped"
        with contextlib.suppress(*(() if status == "done" else (RemoteError,))):
            self._put(f"end-{status}.json", "end", status=status)


def _document(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode("utf-8", "surrogatepass")


@dataclass(slots=True)
class BucketRoom:
    """What ranks have written down in a bucket; as `LocalRoom`."""

    url: str
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    # Of every rank, how long ago it gave a sign of life.
    _ages: dict[str, float] = field(default_factory=dict)

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
            elif end is not None:
                ends[rank] = max(ends.get(rank, (0.0, "")), (changed, end[1]))
        for rank, (changed, status) in ends.items():
            if now - changed <= self._ages.get(rank, now):
                self.lines[rank].append({"event": "end", "status": status})

    def __str__(self) -> str:
        return self.url

    def plan(self) -> RunPlan | None:
        """The plan of the run; None if there is none."""
        from h5traces.storage.remote.uploading import read_document_at

        place = RemotePath(f"{self.url}{RUN}")
        try:
            return parse_plan(read_document_at(place, DEFAULT_REMOTE), str(place))
        except FileNotFoundError:
            return None

    def is_alive(self, rank: str) -> bool:
        """Whether a rank gave a sign of life lately."""
        return self._ages.get(rank, _ALIVE_SECONDS) < _ALIVE_SECONDS

    def whole(self, lines: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Lines about pieces of work, with all that they say."""
        from h5traces.storage.remote.uploading import read_document_at

        def read(line: dict[str, Any]) -> dict[str, Any]:
            place = RemotePath(f"{self.url}{RANKS}/{line['object']}")
            found: dict[str, Any] = json.loads(read_document_at(place, DEFAULT_REMOTE))
            return found

        with ThreadPoolExecutor(_READERS) as pool:
            return dict(zip(lines, pool.map(read, lines.values()), strict=True))
