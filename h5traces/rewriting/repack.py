"""Rewrites archives: merges, splits and subsets them, by copying chunks where possible."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from h5traces.archive.agreement import ComparedTraces
from h5traces.archive.archive import Archive
from h5traces.archive.labels import sidecar_path
from h5traces.archive.opening import open as open_archive
from h5traces.archive.selection import choose_samples
from h5traces.archive.shards import inherited_scales, shared_metadata
from h5traces.arguments import checked
from h5traces.errors import LossyArchiveError, LossyWarning, OptionError, PrecisionError, warn
from h5traces.format.precision import EXACT, Precision
from h5traces.paths import Target, check_not_a_source, check_not_among
from h5traces.precision.scales import ScaleSet
from h5traces.ranks.plan import RunPlan, plain_options, planned_archives
from h5traces.ranks.rank import find_rank
from h5traces.ranks.run import RankRun, check_shared
from h5traces.rewriting.named_states import check_nameable
from h5traces.rewriting.ordering import ordered
from h5traces.rewriting.repeated import repeated_samples
from h5traces.rewriting.rewrite import RepackReport, Rewrite
from h5traces.writing.calibrate import check_model, load_given, measured
from h5traces.writing.options import (
    PrecisionOptions,
    TargetOptions,
    WriteOptions,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from h5traces.archive.selection import LayerChoice, SampleChoice
    from h5traces.format.archive import ArchiveMetadata
    from h5traces.format.precision import Tier
    from h5traces.meaning.options import FirstState
    from h5traces.paths import PathLike, Source
    from h5traces.precision.scales import Calibration
    from h5traces.ranks.rank import Rank
    from h5traces.rewriting.ordering import Order
    from h5traces.storage.remote.paths import RemotePath
    from h5traces.writing.options import Foreign


@checked
def repack(
    sources: PathLike | Iterable[PathLike] | Archive,
    dest: PathLike,
    *,
    layers: LayerChoice = None,
    samples: SampleChoice = None,
    precision: PrecisionOptions | Precision | Tier | None = None,
    first_state: FirstState | None = None,
    foreign: Foreign = "keep",
    target: TargetOptions = TargetOptions(),
    progress: Callable[[int, int], None] | None = None,
    rank: int | Literal["auto"] | None = None,
    world_size: int | None = None,
) -> RepackReport:
    """Rewrite archives into one, or into shards, with all layers and samples or some of them.

    Without `precision`, chunks are copied byte for byte: nothing is decompressed but for
    verification. Sources are never changed.

    Parameters
    ----------
    sources
        Archives, globs and folders; of one model and one set of layers. Or an archive that is open,
        with its labels.
    dest
        A name ending in ``.h5``, or a folder, where the archive is named after its source; with
        ``shard_samples``, ``-00000`` and so on go before the suffix.
    layers
        The model's own layer numbers to keep, or text such as ``0,5,10-12,last``.
    samples
        Indices to keep, counted over all sources, in the order given; a slice, or text such as
        ``0,3`` or ``0:100``.
    precision
        A tier, a `Precision` or `PrecisionOptions`, as in `h5traces.convert`; what is None stays
        as it is in the sources.
    first_state
        What the first hidden state is, of archives that store them by position: ``embedding``, or
        the output of ``block`` 0. They become blocks; `layers` and `precision` need a second call.
    foreign
        ``keep`` or ``drop`` objects and attributes that other programs put into the sources; those
        with names that begin with ``x_`` are always kept. They are copied as they are, also where
        layers or samples are left out.
    target
        Shards, existing targets, verification and workers.
    progress
        Called with the number of samples written and their total.
    rank, world_size
        Write the share of one of `world_size` processes on one folder; they share shards, so
        `target` needs ``shard_samples``. Shards that are there are kept; see `docs/cluster.md`.

    Returns
    -------
    RepackReport
        What was written; of a rank, its shards. There is one result, so whatever prevents it
        raises; ``report.ok`` is true if it came.

    Raises
    ------
    ArchiveError
        The sources do not go together.
    OptionError
        One archive is named twice, `target` has an option that only ``convert`` follows, or
        `first_state` comes with hidden states that are blocks, or with other changes.
    TargetError
        `dest` is neither a folder nor an ``.h5`` name, is a source, or lies where a folder or glob
        of `sources` would find it.
    LayerIndexError, SampleIndexError
        A layer or sample is not there.
    CorruptArchiveError
        A source is damaged, or its footer and its HDF5 part say different things of a sample.
    ArchiveExistsError
        A target exists.
    LossyArchiveError
        The tier is ``exact``, and the sources are not.
    PrecisionError
        The precision does not go with the other options, or the scales are of another model.

    Warns
    -----
    LossyWarning
        The sources lost precision before, and lose more: the errors add up.
    """
    target.check_unused("skip_existing", "compare")
    given = PrecisionOptions.of(precision)
    if first_state is not None and (
        layers is not None or precision not in (None, PrecisionOptions())
    ):
        message = "first_state comes without layers and precision; repack the result with these"
        raise OptionError(message)
    named: list[PathLike] = []
    if not isinstance(sources, Archive):
        sources = named = _named_once(sources)
    with contextlib.ExitStack() as until_done:
        archive = (
            sources
            if isinstance(sources, Archive)
            else until_done.enter_context(open_archive(sources))
        )
        _check_different(archive)
        if first_state is not None:
            check_nameable(archive)
        named_target = Target.of(dest, shard_samples=target.shard_samples)
        chosen = find_rank(rank, world_size, named_target.folder)
        if chosen is not None:
            _check_shared(named_target, target)
        place = named_target.for_sources(archive.paths)
        check_not_a_source(place, read_files(archive, given.scales))
        check_not_among(place, named)
        selected = archive if layers is None else archive.select(layers=layers)
        indices = choose_samples(samples, len(archive))
        before = shared_metadata(archive._files)
        current = before.precision or EXACT
        wanted = _wanted(before, given, archive)
        encodes = given.dtype is not None or wanted != current
        # Scales for a precision without steps have their own message.
        calibration = load_given(given.scales, wanted)
        _check_scales(archive, given.scales, wanted, encodes=encodes)
        if calibration is not None:
            check_model(calibration, archive.metadata.model_id)
        if current.is_lossy and wanted.is_exact:
            _warn_of_recast(archive, place, before)
        report = RepackReport(
            sources=[str(path) for path in archive.paths],
            copied=not encodes and given.codec in (None, archive.metadata.codec),
            source_nbytes=sum(file.nbytes for file in archive._files),
            precision=str(wanted) if wanted.is_lossy else None,
        )
        report.warnings += repeated_samples(archive, indices)
        found = ScaleSet()
        if not target.dry_run and wanted.step is not None:
            found = _scales(
                selected, wanted.step, calibration, given.calibration_samples, encodes=encodes
            )
        options = WriteOptions.of(
            replace(
                given,
                tier=wanted,
                dtype=given.dtype or (None if encodes else archive.metadata.dtype_policy),
                codec=given.codec or archive.metadata.codec,
            ),
            target,
            scales=found,
            earlier_precisions=before.losses if encodes else before.earlier_precisions or (),
            foreign=foreign,
        )
        if target.dry_run:
            report.targets = [str(place.shard(0))]
            report.num_samples = len(indices)
            return report
        compared = until_done.enter_context(ComparedTraces())
        rewrite = Rewrite(
            selected, report, options, compared, encodes=encodes, first_state=first_state
        )
        if chosen is None:
            rewrite.run(place, indices, progress)
        else:
            plan = _plan(selected, indices, place, options, calibration, chosen)
            if first_state is not None:
                plan.options["first_state"] = first_state
            with RankRun(place.folder, chosen, plan) as run:
                rewrite.run_share(run, place, indices, progress)
        report.warnings += compared.warnings
        return report


@checked
def merge(
    sources: PathLike | Iterable[PathLike],
    dest: PathLike,
    *,
    order: Order | None = None,
    foreign: Foreign = "keep",
    target: TargetOptions = TargetOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> RepackReport:
    """Put several archives of one model into one, by copying chunks.

    Parameters
    ----------
    order
        Of the samples: by ``id`` (numbers in ids count as numbers) and generation index; by
        ``source``, the name of the file that they were converted from and the position in it; or by
        ``index``, the row of the data set that they were extracted from. By default as they lie, in
        the archives in the order given. None of the three depends on how samples were divided.
    sources, dest, foreign, target, progress
        As in `repack`. Of objects with one name in the roots of several archives, the first is
        kept, and those that differ from it are named in a warning.

    Returns
    -------
    RepackReport
        As `repack`.

    Raises
    ------
    ArchiveError, OptionError, ArchiveExistsError
        As in `repack`; or a sample does not record what `order` needs.
    """
    samples = None
    if order is not None:
        sources = _named_once(sources)
        with open_archive(sources) as archive:
            samples = ordered(archive, order)
    return repack(sources, dest, samples=samples, foreign=foreign, target=target, progress=progress)


@checked
def split(
    sources: PathLike | Iterable[PathLike],
    dest: PathLike,
    num_samples: int,
    *,
    foreign: Foreign = "keep",
    target: TargetOptions = TargetOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> RepackReport:
    """Cut archives into shards, by copying chunks.

    Parameters
    ----------
    sources, dest, foreign, target, progress
        As in `repack`.
    num_samples
        Largest number of samples in a shard.

    Returns
    -------
    RepackReport
        As `repack`.

    Raises
    ------
    ArchiveError, OptionError, ArchiveExistsError
        As in `repack`.
    """
    target = replace(target, shard_samples=num_samples)
    return repack(sources, dest, foreign=foreign, target=target, progress=progress)


def _check_shared(place: Target, target: TargetOptions) -> None:
    check_shared(place, target)
    if target.shard_samples is None:
        message = "ranks share the shards of a result; pass shard_samples, too"
        raise OptionError(message)


def _plan(
    archive: Archive,
    indices: Sequence[int],
    place: Target,
    options: WriteOptions,
    calibration: Calibration | None,
    rank: Rank,
) -> RunPlan:
    """What all ranks must agree on; a piece of work is a shard."""
    files = archive._files
    chosen = {
        "layers": archive.layers,
        "samples": None if indices == range(len(archive)) else list(indices),
        "precision": str(options.precision),
        "dtype": options.dtype,
        "on_overflow": options.on_overflow,
        "codec": options.codec,
        "scales": None if calibration is None else calibration.digest,
        "foreign": options.foreign,
        "shard_samples": place.shard_samples,
    }
    each = sum(file.nbytes for file in files) // max(1, len(archive))
    return RunPlan(
        command="repack",
        world_size=rank.size,
        first_task=rank.first,
        options=plain_options(chosen),
        sources=planned_archives(files),
        costs=tuple(each * len(some) for some in Rewrite.cut(place, indices)),
    )


def _named_once(sources: PathLike | Iterable[PathLike]) -> list[PathLike]:
    """The sources; one that is named twice is an error, though reading it once would do."""
    named = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    found: set[str] = set()
    for each in named:
        is_local = not isinstance(each, str) or "://" not in each
        place = str(Path(each).absolute()) if is_local else os.fspath(each)
        if place in found:
            message = f"{each} is named twice, which would store its samples twice; name it once"
            raise OptionError(message)
        found.add(place)
    return named


def read_files(archive: Archive, *others: Source | None) -> list[Source]:
    """Everything that is read with an archive, its labels included."""
    sidecars = [sidecar_path(path, None) for path in archive.paths]
    return [each for each in (*archive.paths, *sidecars, *others) if each is not None]


def _check_different(archive: Archive) -> None:
    """Reject an archive that is named twice, or with its copy."""
    found: dict[str, Path | RemotePath] = {}
    for file in archive._files:
        archive_id = file.metadata.archive_id
        first = found.setdefault(archive_id, file.path)
        if first is not file.path:
            message = (
                f"{first} and {file.path} are the same archive (archive_id {archive_id}), which "
                "would store its samples twice; name one of them"
            )
            raise OptionError(message)


def _warn_of_recast(archive: Archive, place: Target, before: ArchiveMetadata) -> None:
    message = (
        f"{place.path}: holds what {archive.paths[0]} gives back, less than its source held "
        f"({', '.join(map(str, before.losses))}); 'earlier_precisions' says so"
    )
    warn(message, LossyWarning)


def _check_scales(
    archive: Archive, scales: PathLike | None, wanted: Precision, *, encodes: bool
) -> None:
    """Reject scales that would not be used."""
    if scales is not None and not encodes:
        message = (
            f"{archive.paths[0]}: has precision {wanted} already, and its own scales, which "
            "others could replace only with more loss; leave scales out, or take the archive "
            "that it was made from"
        )
        raise PrecisionError(message)


def _wanted(before: ArchiveMetadata, given: PrecisionOptions, archive: Archive) -> Precision:
    """The precision of the targets."""
    if given.tier is None:
        return (before.precision or EXACT) if given.dtype is None else EXACT
    wanted = Precision.of(given.tier)
    losses = ", ".join(str(each) for each in before.losses)
    if wanted.is_exact and before.losses:
        message = (
            f"{archive.paths[0]}: holds {losses}; what is lost cannot be restored, so take "
            "the archive that it was made from"
        )
        raise LossyArchiveError(message)
    if before.losses and wanted != before.precision:
        message = (
            f"{archive.paths[0]}: holds {losses} already, and becomes {wanted}: the errors add "
            "up; take the archive that it was made from"
        )
        warn(message, LossyWarning)
    return wanted


def _scales(
    archive: Archive,
    step: float,
    calibration: Calibration | None,
    num_samples: int,
    *,
    encodes: bool,
) -> ScaleSet:
    """The scales of the targets: those of the sources, of a file, or of the first samples."""
    if not encodes:
        return inherited_scales(archive._files) or ScaleSet()
    return (calibration or measured(archive, num_samples)).scales(step)
