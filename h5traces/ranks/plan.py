"""What all ranks of a run agree on: ``run.json``, fixed by whoever comes first."""

from __future__ import annotations

import heapq
import json
import logging
import os
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from pydantic import ValidationError

from h5traces.arguments import shown
from h5traces.errors import ArchiveExistsError, CorruptArchiveError, TargetError, __version__
from h5traces.format.document import Document, with_tuples
from h5traces.format.text import and_more
from h5traces.storage.files import read_document
from h5traces.storage.publish import PartFile, make_folder
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemotePath

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

log: Final = logging.getLogger("h5traces.ranks")
RUN: Final = "run.json"
RANKS: Final = "ranks"
_BESIDE: Final = ".run"


class RunPlan(Document):
    """The plan of a run.

    Attributes
    ----------
    command, generator
        What is done, and by which version.
    world_size, first_task
        How many ranks there are, and what the scheduler calls rank 0.
    options
        Everything that the result depends on, but the sources.
    sources
        Name, bytes and time of the last change (ns) of every file that is read.
    costs
        Of every piece of work, what it costs: bytes, or tokens.
    ids
        Of an extraction, id and generation index of every sample, by its number in the run.
    """

    version: Literal[1] = 1
    command: str
    generator: str = f"h5traces {__version__}"
    world_size: int
    first_task: int = 0
    options: dict[str, Any]
    sources: tuple[tuple[str, int, int], ...] = ()
    costs: tuple[int, ...] = ()
    ids: tuple[tuple[str, int], ...] = ()

    def differences(self, before: RunPlan) -> list[str]:
        """Where a rank would differ from the ranks before it."""
        found = [
            f"{name} is {getattr(self, name)!r}, and was {getattr(before, name)!r}"
            for name in ("command", "generator")
            if getattr(self, name) != getattr(before, name)
        ]
        for name in sorted({*self.options, *before.options}):
            now, then = self.options.get(name), before.options.get(name)
            if now != then:
                found.append(f"{name} is {shown(now)}, and was {shown(then)}")
        return found + self._source_differences(before)

    def _source_differences(self, before: RunPlan) -> list[str]:
        now, then = ({each[0]: each for each in plan.sources} for plan in (self, before))
        new, gone = [each for each in now if each not in then], [e for e in then if e not in now]
        found = [f"{and_more(new)} came after the plan was made"] if new else []
        found += [f"{and_more(gone)} was planned, and is not there"] if gone else []
        changed = [each for each in now if each in then and now[each] != then[each]]
        if changed:
            (_, nbytes, _), (_, before_nbytes, _) = now[changed[0]], then[changed[0]]
            how = "at another time, with as many bytes"
            if nbytes != before_nbytes:
                how = f"{nbytes:,} bytes, was {before_nbytes:,}"
            found.append(f"{and_more(changed)} changed since the plan was made ({how})")
        if not found and self.sources != before.sources:
            found.append("the sources come in another order")
        if self.ids != before.ids:
            found.append("the questions are others")
        if not found and self.costs != before.costs:
            found.append("the work is divided otherwise")
        return found


def plan_path(folder: Path | RemotePath) -> Path | RemotePath:
    """The document of the plan of a run."""
    return RemotePath(f"{folder.url}{RUN}") if isinstance(folder, RemotePath) else folder / RUN


def run_folder(output: Path) -> Path:
    """Where the run of an output is: in the folder, or beside the file."""
    if output.is_dir() or output.name.endswith(_BESIDE):
        return output
    return output.with_name(f"{output.name}{_BESIDE}")


def read_plan(folder: Path | RemotePath) -> RunPlan | None:
    """The plan of the run in a folder or bucket, or None."""
    path = plan_path(folder)
    try:
        if isinstance(path, RemotePath):
            from h5traces.storage.remote.uploading import read_document_at

            data = read_document_at(path, DEFAULT_REMOTE)
        else:
            data = read_document(path, CorruptArchiveError, "the plan of a run")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        document = json.loads(data)
        document["options"] = dict(document["options"])
        plain = {
            key: each if key == "options" else with_tuples(each) for key, each in document.items()
        }
        return RunPlan.model_validate(plain)
    except (ValueError, TypeError, KeyError, RecursionError, ValidationError) as error:
        message = f"{path}: is not the plan of a run by h5traces; move it away"
        raise CorruptArchiveError(message) from error


def fix_plan(folder: Path, plan: RunPlan) -> RunPlan:
    """Write the plan, if this rank is the first; return the one that is in force.

    It may have another world size. TargetError if the plan in force differs in anything else.
    """
    make_folder(folder)
    before = read_plan(folder)
    if before is None:
        with PartFile(folder / RUN) as part:
            part.append(serialised(plan))
            try:
                part.publish()
            except ArchiveExistsError:
                before = read_plan(folder)
            else:
                return plan
    assert before is not None
    check_alike(plan, before, folder)
    return before


def check_alike(plan: RunPlan, before: RunPlan, folder: Path | RemotePath) -> None:
    """TargetError where a plan is another than the one in force, but for the number of ranks."""
    differences = plan.differences(before)
    if differences:
        message = (
            f"{folder}: its run was planned otherwise: {'; '.join(differences)}. Run the ranks "
            f"alike, or name another folder; where no rank runs, deleting {plan_path(folder)} "
            "allows another plan"
        )
        raise TargetError(message)


def warn_of_size(plan: RunPlan, before: RunPlan, folder: Path | RemotePath) -> None:
    """Say that a run goes on with another number of ranks."""
    log.warning(
        "%s: world_size was %d and is %d from now on; what is done stays, the rest is dealt anew",
        folder,
        before.world_size,
        plan.world_size,
    )


def replace_plan(folder: Path, plan: RunPlan) -> None:
    """Put a plan in place of the one in force, in one step."""
    with PartFile(folder / RUN) as part:
        part.append(serialised(plan))
        part.publish(overwrite=True)


def serialised(plan: RunPlan) -> bytes:
    """The document of a plan."""
    text = json.dumps(plan.model_dump(mode="json"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON gives them back."""
    found: dict[str, Any] = json.loads(json.dumps(options, default=str))
    return found


class ReadFile(Protocol):
    """An archive that is read, on disk or on a server."""

    @property
    def path(self) -> Path | RemotePath: ...
    @property
    def nbytes(self) -> int: ...


def planned_archives(files: Iterable[ReadFile]) -> tuple[tuple[str, int, int], ...]:
    """Name, bytes and time of the last change of every archive; no time of those on servers."""
    return tuple(
        (each.path.url, each.nbytes, 0)
        if isinstance(each.path, RemotePath)
        else planned_source(each.path)
        for each in files
    )


def planned_source(path: Path) -> tuple[str, int, int]:
    """Name, bytes and time of the last change of a file, or of all files of a folder."""
    name = os.path.abspath(path)  # noqa: PTH100  # resolve follows links, which differ by node
    paths = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    found = [each.stat() for each in paths]
    return name, sum(each.st_size for each in found), max((e.st_mtime_ns for e in found), default=0)


def rank_name(number: int, size: int) -> str:
    """The name of the files of a rank: ``00003-of-00008``."""
    return f"{number:05d}-of-{size:05d}"


def deal(costs: Sequence[int], size: int) -> list[list[int]]:
    """Divide pieces of work among ranks: the most costly first, each to the rank with the least.

    Ties go to the piece and the rank that come first, so that every rank finds the same shares.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [(0, 0, rank) for rank in range(size)]
    for item in sorted(range(len(costs)), key=lambda each: (-costs[each], each)):
        cost, count, rank = heapq.heappop(loads)
        shares[rank].append(item)
        heapq.heappush(loads, (cost + costs[item], count + 1, rank))
    return [sorted(share) for share in shares]
