"""`finish`: packs what a run left in its spool, without the program that wrote it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from h5traces.arguments import checked
from h5traces.errors import PrecisionError
from h5traces.paths import ARCHIVE_SUFFIXES, Target
from h5traces.ranks.plan import read_plan
from h5traces.writing.calibrate import load_given
from h5traces.writing.options import PrecisionOptions, TargetOptions, WriteOptions
from h5traces.writing.shared_writer import Share, SharedWriter
from h5traces.writing.spool_folder import SpoolFolder, spool_path
from h5traces.writing.spool_writer import SpoolWriter

if TYPE_CHECKING:
    from pathlib import Path

    from h5traces.paths import PathLike
    from h5traces.precision.scales import Calibration
    from h5traces.ranks.plan import RunPlan
    from h5traces.writing.spool_folder import RunState

_SPOOL: Final = ".spool"


@checked
def finish(
    path: PathLike, *, scales: PathLike | None = None, target: TargetOptions = TargetOptions()
) -> list[Path]:
    """Make archives of the samples that a stopped or killed run left in its spool.

    Afterwards the run is finished, as if its program had closed it: it cannot be resumed. Options
    are those that the run recorded.

    Parameters
    ----------
    path
        The target of the run, as its program named it, or its spool ``<target>.spool``.
    scales
        The file of scales that the run was given, if it was given one and has packed no shard.
    target
        ``verify`` and ``workers``, as for `h5traces.create`.

    Returns
    -------
    list of Path
        The archives of the run, earlier shards included; empty if it stored no sample.

    Raises
    ------
    FileNotFoundError
        There is neither a spool nor an archive.
    ArchiveError
        A process is still writing the run; or several ranks wrote it with a lossy tier, and the
        samples of the first shard, on which scales are measured, are all missing.
    CorruptArchiveError
        The spool is damaged.
    PrecisionError
        The run was given scales, and `scales` are not these.
    TargetError
        `target` has another option than those two.
    """
    target.check_unused("shard_samples", "overwrite", "skip_existing", "dry_run")
    place = _place(path)
    spool = spool_path(place)
    plan = read_plan(place.path) if place.is_folder else None
    if plan is not None and plan.command == "extract" and spool.is_dir():
        take_over(place.path, plan, scales=scales, target=target, incomplete=True)
        # Shards of which no rank stored a sample are not there.
        return replace(place, shard_samples=1).taken()
    if not spool.is_dir():
        # Whether it had shards, only the spool knew.
        existing = place.existing() or replace(place, shard_samples=1).existing()
        if existing:
            return existing
        message = f"{path}: no such archive, and no spool {spool} of a run that was stopped"
        raise FileNotFoundError(message)
    folder = SpoolFolder(spool)
    try:
        state = folder.state()
        if state is None:
            # Killed before its first sample, or when everything was packed.
            folder.remove_all()
            return place.existing()
        place = _place(path, state.shard_samples)
        calibration = _calibration(place, state, scales)
        precision = PrecisionOptions(
            tier=state.precision,
            dtype=state.dtype,
            on_overflow=state.on_overflow,
            codec=state.codec,
        )
        options = WriteOptions.of(precision, target)
        with SpoolWriter(place, state, options, folder, calibration=calibration):
            pass
    finally:
        folder.release()
    return place.existing()


def take_over(
    folder: Path,
    plan: RunPlan,
    *,
    scales: PathLike | None = None,
    target: TargetOptions = TargetOptions(),
    incomplete: bool = False,
) -> list[Path]:
    """Pack what the ranks of an extraction left in their spool.

    Parameters
    ----------
    folder, plan
        The run.
    scales, target
        As for `finish`.
    incomplete
        Also pack shards of which samples are missing, and remove the spool; no rank may be at work.

    Returns
    -------
    list of Path
        The new archives.
    """
    place = Target.of(f"{folder}/", shard_samples=plan.options["shard_samples"])
    if not spool_path(place).is_dir():
        return []
    spool = SpoolFolder(spool_path(place), is_shared=not incomplete)
    try:
        state = spool.state()
        if state is None:
            spool.remove_all()
            return []
        given = None if _calibration(place, state, scales) is None else scales
    finally:
        spool.release()
    writer = SharedWriter(
        f"{folder}/",
        Share({}, len(plan.ids)),
        precision=PrecisionOptions(
            tier=state.precision,
            scales=given,
            dtype=state.dtype,
            on_overflow=state.on_overflow,
            codec=state.codec,
        ),
        target=replace(target, shard_samples=place.shard_samples),
        **state.facts(),
    )
    try:
        packed = writer.pack_complete(incomplete=incomplete)
        if incomplete:
            writer.remove_spool()
    finally:
        writer.close()
    return packed


def _place(path: PathLike, shard_samples: int | None = None) -> Target:
    """The target of a run, by its name or that of its spool."""
    text = os.fspath(path).rstrip("/") if os.fspath(path) != "/" else "/"
    text = text.removesuffix(_SPOOL)
    if not text.endswith(ARCHIVE_SUFFIXES[:1]):
        text += "/"
    return Target.of(text, shard_samples=shard_samples)


def _calibration(place: Target, state: RunState, scales: PathLike | None) -> Calibration | None:
    """The scales that a run was given; None if it measures them, or its first shard has them."""
    if state.calibration is None or place.existing():
        return None
    if scales is None:
        message = (
            f"{place.path}: the run was given a file of scales, and none of its shards is packed "
            "yet; pass that file as scales"
        )
        raise PrecisionError(message)
    found = load_given(scales, state.precision)
    if found is None or found.digest != state.calibration:
        message = f"{scales}: not the scales that the run of {place.path} was given; pass those"
        raise PrecisionError(message)
    return found
