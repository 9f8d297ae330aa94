"""One file that several ranks make: each writes parts of it, and who ends last joins them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from h5traces.errors import ArchiveExistsError
from h5traces.ranks.plan import RANKS, read_plan, replace_plan, run_folder
from h5traces.ranks.run import RankRun
from h5traces.ranks.status import finished_items
from h5traces.storage.publish import locked, make_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from h5traces.ranks.plan import RunPlan
    from h5traces.ranks.rank import Rank

_PART: Final = "part-{:06d}"


class PartsRun(RankRun):
    """The share of one rank of the parts of a file; its run is in the folder ``<output>.run``.

    The last piece of work is joining the parts. A run that is finished gives way to another plan.

    Attributes
    ----------
    output
        The file.
    """

    def __init__(
        self, output: Path, rank: Rank, plan: RunPlan, suffix: str, *, may_replace: bool = False
    ) -> None:
        self.output, self._suffix, self._may_replace = output, suffix, may_replace
        self._num_parts = len(plan.costs)
        plan = plan.model_copy(update={"costs": (*plan.costs, 0)})
        folder = run_folder(output)
        _give_way(folder, plan, output)
        super().__init__(folder, rank, plan)
        self.share = [each for each in self.share if each < self._num_parts]

    @property
    def is_joined(self) -> bool:
        """Whether the file is there, by this run; ArchiveExistsError if it is another."""
        done = self._num_parts in finished_items(self.folder)
        if self.output.exists() and not done and not self._may_replace:
            message = f"{self.output} exists, and is not of this run; name another output"
            raise ArchiveExistsError(message)
        return done and self.output.exists()

    def part(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"{_PART.format(number)}{self._suffix}"

    @property
    def parts(self) -> list[Path]:
        """The files of all parts, in order."""
        return [self.part(number) for number in range(self._num_parts)]

    def join(self, write: Callable[[], None]) -> bool:
        """Write the file if all parts are there and no other rank does it; whether it was done."""
        if self.is_joined or not all(each.exists() for each in self.parts):
            return False
        with _locked(self.folder, wait=False) as is_ours:
            if not is_ours or self.is_joined:
                return False
            write()
            self.note(self._num_parts, status="written", targets=[str(self.output)])
            for each in self.parts:
                each.unlink()
        return True


def _give_way(folder: Path, plan: RunPlan, output: Path) -> None:
    """Forget a finished run that had another plan, or whose file is gone."""
    with _locked(folder, wait=True):
        before = read_plan(folder)
        if before is None:
            return
        is_finished = len(before.costs) - 1 in finished_items(folder)
        is_alike = not plan.differences(before)
        if is_finished and not (is_alike and output.exists()):
            for each in (folder / RANKS).glob("*.jsonl"):
                each.unlink()
            for each in folder.glob("part-*"):
                each.unlink()
            replace_plan(folder, plan)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Whether the lock of a run is ours."""
    make_folder(folder / RANKS)
    with locked(folder / RANKS / "join.lock", wait=wait) as is_ours:
        yield is_ours
