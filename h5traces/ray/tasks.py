"""Ranks as tasks of Ray: one each, which Ray starts again where its node is lost."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import ray

from h5traces.arguments import checked
from h5traces.errors import OptionError, RankBusyError
from h5traces.rewriting.convert import convert as convert_batches
from h5traces.writing.options import TargetOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from h5traces.extract.options import DatasetChoice, ExtractOptions, ModelChoice
    from h5traces.extract.running import ExtractionReport
    from h5traces.paths import PathLike
    from h5traces.rewriting.reports import ConversionReport

# A process whose node is lost to Ray may live for a while, and hold the lock of its rank.
_BUSY_SECONDS: Final = 120.0


@checked
def convert(
    sources: PathLike | Sequence[PathLike],
    dest: PathLike,
    *,
    world_size: int | None = None,
    num_cpus: float = 1,
    target: TargetOptions = TargetOptions(),
    **options: Any,
) -> list[ConversionReport]:
    """Convert batches by tasks of Ray, one for each rank; see `h5traces.convert`.

    Parameters
    ----------
    sources, dest, target, options
        As for `h5traces.convert`, by names that all nodes know. Relative ones count from the
        current folder.
    world_size
        Number of tasks; as many as the cluster can run at a time by default.
    num_cpus
        Of each task, which works in as many threads.

    Returns
    -------
    list of ConversionReport
        One for each rank.

    Raises
    ------
    OptionError
        The cluster cannot run such a task.
    H5TracesError
        What the first rank raised that failed, when all have ended.
    """
    if target.workers is None:
        target = replace(target, workers=max(1, int(num_cpus)))
    arguments = {"target": target, **options}
    size = world_size or _room({"CPU": num_cpus})
    return _run_ranks(convert_batches, (sources, dest), arguments, size, {"num_cpus": num_cpus})


@checked
def extract(
    model: ModelChoice,
    dataset: DatasetChoice,
    dest: PathLike,
    options: ExtractOptions | None = None,
    *,
    world_size: int | None = None,
    num_gpus: float = 1,
    num_cpus: float = 1,
    **others: Any,
) -> list[ExtractionReport]:
    """Ask a model questions by tasks of Ray, one for each rank; see `h5traces.extract`.

    Parameters
    ----------
    model, dataset, dest, options, others
        As for `h5traces.extract.extract_dataset`, by names that all nodes know. Relative ones count
        from the current folder.
    world_size
        Number of tasks, each of which loads the model; as many as the cluster can run at a time by
        default.
    num_gpus, num_cpus
        Of each task.

    Returns
    -------
    list of ExtractionReport
        One for each rank.

    Raises
    ------
    OptionError, H5TracesError
        As by `convert`.
    """
    from h5traces.extract.extracting import extract_dataset

    needed = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    size = world_size or _room({"CPU": num_cpus, "GPU": num_gpus})
    return _run_ranks(extract_dataset, (model, dataset, dest, options), others, size, needed)


def _room(needed: dict[str, float]) -> int:
    """How many tasks the cluster can run at a time."""
    if not ray.is_initialized():
        ray.init()
    cluster: Any = ray  # has no type here
    there = cluster.cluster_resources()
    room = min(int(there.get(name, 0) / each) for name, each in needed.items() if each)
    if not room:
        message = f"a task needs {needed}, and the cluster has {there}; ask for less"
        raise OptionError(message)
    return room


def _run_ranks(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    world_size: int,
    needed: dict[str, float],
) -> list[Any]:
    """What every rank returns; a rank whose process or node is lost is started again."""
    task = ray.remote(_run_rank).options(max_retries=-1, scheduling_strategy="SPREAD", **needed)
    started = [
        task.remote(function, os.getcwd(), arguments, {**options, "rank": rank}, world_size)  # noqa: PTH109
        for rank in range(world_size)
    ]
    try:
        ray.wait(started, num_returns=world_size)
    except BaseException:
        for each in started:
            ray.cancel(each)
        raise
    return list(ray.get(started))


def _run_rank(
    function: Callable[..., Any],
    folder: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    world_size: int,
) -> Any:
    end = time.monotonic() + _BUSY_SECONDS
    with contextlib.chdir(folder):
        while True:
            try:
                return function(*arguments, **options, world_size=world_size)
            except RankBusyError:
                if time.monotonic() > end:
                    raise
                time.sleep(1)
