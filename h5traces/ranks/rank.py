"""Which of how many processes this one is."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from h5traces.errors import OptionError
from h5traces.ranks.plan import deal, log, rank_name, read_plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from h5traces.ranks.plan import RunPlan
    from h5traces.storage.remote.paths import RemotePath

RankChoice = int | Literal["auto"] | None

# Pairs of variables: a rank, and how many ranks there are.
_OURS: Final = ("H5TRACES_RANK", "H5TRACES_WORLD_SIZE")
_TORCH: Final = ("RANK", "WORLD_SIZE")
# Only `srun` sets the second: a batch script with -n 2 has SLURM_PROCID=0 and SLURM_NTASKS=2, and
# would silently do half of the work.
_STEP: Final = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
# Numbers of steps that are not steps of `srun` are close to 2**32.
_MOST_STEPS: Final = 1 << 31


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of several that share a run.

    Attributes
    ----------
    number, size
        0-based number of this process, and how many there are.
    first
        What a scheduler calls process 0: the smallest id of a SLURM array.
    origin
        What the numbers were taken from.
    """

    number: int
    size: int
    first: int = 0
    origin: str = "as given"

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.number < self.size:
            message = (
                f"rank {self.number} of world_size {self.size} ({self.origin}); expected a rank "
                "from 0 to world_size - 1"
            )
            raise OptionError(message)

    @property
    def name(self) -> str:
        """The name of its files."""
        return rank_name(self.number, self.size)

    def __str__(self) -> str:
        return f"rank {self.number} of {self.size}"


def find_rank(
    rank: RankChoice,
    world_size: int | None,
    folder: Path | RemotePath | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Rank | None:
    """The rank that a caller chose; None if there are no ranks.

    ``auto`` looks at the environment, where the array of a scheduler may be a part of the one that
    started the run in `folder`. What was taken is logged.
    """
    if rank is None:
        if world_size is not None:
            message = f"world_size is {world_size} without a rank; pass rank=0 or rank='auto', too"
            raise OptionError(message)
        return None
    if rank == "auto":
        found = _automatic(world_size, None if folder is None else read_plan(folder), environment)
        log.info("%s, from %s", found, found.origin)
        return found
    if world_size is None:
        message = f"rank is {rank} without world_size; pass how many ranks there are, too"
        raise OptionError(message)
    return Rank(rank, world_size)


def _automatic(
    world_size: int | None, plan: RunPlan | None, environment: Mapping[str, str]
) -> Rank:
    found = _pair(_OURS, environment, world_size) or _array(environment, plan, world_size)
    found = found or _pair(_TORCH, environment, world_size)
    if found is None and 0 <= _number("SLURM_STEP_ID", environment, -1) < _MOST_STEPS:
        found = _pair(_STEP, environment, world_size)
    if found is None:
        message = (
            "rank is 'auto', but the environment has neither H5TRACES_RANK and "
            "H5TRACES_WORLD_SIZE, nor a SLURM array, nor RANK and WORLD_SIZE, nor is this a step "
            "of srun; pass rank and world_size"
        )
        raise OptionError(message)
    return found


def _number(name: str, environment: Mapping[str, str], default: int) -> int:
    text = environment.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        message = f"{name} is {text!r}, expected a number"
        raise OptionError(message) from None


def _pair(
    names: tuple[str, str], environment: Mapping[str, str], world_size: int | None
) -> Rank | None:
    rank, size = names
    if rank not in environment:
        return None
    found = world_size or _number(size, environment, 0)
    if not found:
        message = f"{rank} is set, but not {size}; set it, or pass world_size"
        raise OptionError(message)
    return Rank(_number(rank, environment, 0), found, origin=f"{rank} and {size}")


def _array(
    environment: Mapping[str, str], plan: RunPlan | None, world_size: int | None
) -> Rank | None:
    """The rank of a task of a SLURM array, which may hold some ranks of the plan only."""
    if not environment.get("SLURM_ARRAY_TASK_ID"):
        return None
    task = _number("SLURM_ARRAY_TASK_ID", environment, 0)
    first = _number("SLURM_ARRAY_TASK_MIN", environment, task)
    last = _number("SLURM_ARRAY_TASK_MAX", environment, task)
    count = _number("SLURM_ARRAY_TASK_COUNT", environment, last - first + 1)
    size = last - first + 1
    found = Rank(task - first, size, first, f"SLURM array {first}-{last}")
    known = world_size or (plan.world_size if plan else None)
    start = plan.first_task if plan else (0 if world_size and last < world_size else first)
    if known is not None and start <= first and last < start + known:
        # The ranks that were missing, or one that is run again alone.
        return Rank(task - start, known, start, f"{found.origin} in a run of {known} ranks")
    if world_size is not None:
        return replace(found, size=world_size)
    if count != size:
        log.warning(
            "the array has a hole: %d tasks for the ids %d to %d, so there are ranks that nobody "
            "runs; 'h5traces status' lists them",
            count,
            first,
            last,
        )
    return found


def share_of(paths: Sequence[Path], rank: RankChoice, world_size: int | None) -> list[Path]:
    """The files that a rank has to read, of all; divided by their sizes."""
    chosen = find_rank(rank, world_size)
    if chosen is None:
        return list(paths)
    shares = deal([path.stat().st_size for path in paths], chosen.size)
    return [paths[each] for each in shares[chosen.number]]
