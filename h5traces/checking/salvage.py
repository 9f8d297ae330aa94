"""Copies the intact samples of a damaged archive into a new one."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h5traces.archive.agreement import Agreement
from h5traces.archive.footer_store import FooterStore
from h5traces.archive.opening import open as open_archive
from h5traces.archive.shards import inherited_facts, inherited_scales
from h5traces.arguments import checked
from h5traces.checking.verify import sample_damage
from h5traces.errors import CorruptArchiveError, HostileFileError, Problem, StoredStateWarning
from h5traces.format import layout
from h5traces.format.html import Report
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.format.precision import EXACT
from h5traces.paths import Target, check_not_a_source
from h5traces.storage.publish import make_folder, remove_abandoned_parts
from h5traces.writing.archive_writer import ArchiveWriter
from h5traces.writing.options import WriteOptions
from h5traces.writing.reading_back import verify_written
from h5traces.writing.stored_samples import StoredSample

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.archive.archive import Archive
    from h5traces.format.limits import ReadLimits
    from h5traces.paths import PathLike
    from h5traces.writing.options import Foreign


@dataclass(slots=True)
class SalvageReport(Report):
    """What was saved and what was lost.

    Attributes
    ----------
    source, target
        The damaged archive and the new one.
    num_saved
        Samples in the new archive.
    lost
        The damage of the samples that were not copied.
    warnings
        What else was not copied: objects of other programs.
    """

    source: str
    target: str
    num_saved: int = 0
    lost: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def lost_samples(self) -> list[int]:
        """Ordinals of the samples that were not copied."""
        prefix = f"/{layout.SAMPLES_GROUP}/"
        names = (each.loc.removeprefix(prefix).partition("/")[0] for each in self.lost)
        return sorted({int(name) for name in names})

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "source": self.source,
            "target": self.target,
            "num_saved": self.num_saved,
            "lost_samples": self.lost_samples,
            "lost": [each.as_dict() for each in self.lost],
            "warnings": self.warnings,
        }


@checked
def salvage(
    source: PathLike,
    dest: PathLike,
    *,
    foreign: Foreign = "keep",
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    limits: ReadLimits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
) -> SalvageReport:
    """Copy every intact sample of a damaged archive, and list the others.

    A sample is intact if all its arrays inflate and match their digests, and the footer and HDF5
    say the same of it, where both can be read. The source is not changed.

    Parameters
    ----------
    source
        The damaged archive; its footer or its HDF5 part must still open.
    dest
        The new archive: a name ending in ``.h5``, or a folder.
    foreign
        ``keep`` or ``drop`` objects and attributes of other programs, as in `h5traces.repack`.
    overwrite
        Replace an existing archive; never the source.
    dry_run
        Write nothing.
    workers
        Threads; one per core by default.
    limits
        What the source may ask of its reader.
    progress
        Called with the samples checked and the samples there are.

    Raises
    ------
    NotAnArchiveError, CorruptArchiveError
        Neither footer nor HDF5 part says where the samples are.
    TargetError
        `dest` is not a name of an archive, or is the source, links included.
    ArchiveExistsError
        The new archive exists.
    """
    target = Target.of(dest).for_sources([source]).path
    check_not_a_source(target, source)
    report = SalvageReport(str(source), str(target))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoredStateWarning)
        with ExitStack() as until_done:
            archive = until_done.enter_context(open_archive(source, limits=limits))
            pool = until_done.enter_context(ThreadPoolExecutor(workers))
            intact = _intact(archive, _agreement(archive, until_done), pool, report, progress)
            if not dry_run:
                options = _options(archive, overwrite=overwrite, workers=workers, foreign=foreign)
                report.warnings += _copy(archive, intact, target, options)
    report.num_saved = len(intact)
    return report


def _intact(
    archive: Archive,
    agreement: Agreement | None,
    pool: ThreadPoolExecutor,
    report: SalvageReport,
    progress: Callable[[int, int], None] | None,
) -> list[int]:
    (file,) = archive._files
    intact = []
    for index in range(len(archive)):
        damage = [*sample_damage(file.store, index, pool), *_contradictions(agreement, index)]
        for loc, error in damage:
            message = str(error).removeprefix(f"{report.source}: ").removeprefix(f"{loc}: ")
            report.lost.append(Problem(loc, message, "damaged"))
        if not damage:
            intact.append(index)
        if progress is not None:
            progress(index + 1, len(archive))
    return intact


def _agreement(archive: Archive, until_done: ExitStack) -> Agreement | None:
    """Compares the footer with HDF5; None if only one of the two can be read."""
    (file,) = archive._files
    if not isinstance(file.store, FooterStore) or not isinstance(file.path, Path):
        return None
    try:
        found = Agreement(file.store, file.path, file.limits)
    except CorruptArchiveError:
        return None
    until_done.callback(found.close)
    return found


def _contradictions(agreement: Agreement | None, index: int) -> list[tuple[str, str]]:
    """Where footer and HDF5 say different things, so that one of them is wrong."""
    if agreement is None:
        return []
    try:
        return list(agreement.of_sample(index))
    except HostileFileError as error:
        return [(layout.sample_path(index), str(error))]
    except CorruptArchiveError:
        # HDF5's own structures are damaged, and its digests vouch for what the footer lists.
        return []


def _options(
    archive: Archive, *, overwrite: bool, workers: int | None, foreign: Foreign
) -> WriteOptions:
    metadata = archive.metadata
    return WriteOptions(
        dtype=metadata.dtype_policy or "float16",
        on_overflow=metadata.on_overflow or "float32",
        codec=metadata.codec,
        workers=workers,
        overwrite=overwrite,
        precision=metadata.precision or EXACT,
        scales=inherited_scales(archive._files),
        earlier_precisions=metadata.earlier_precisions or (),
        foreign=foreign,
    )


def _copy(archive: Archive, intact: list[int], target: Path, options: WriteOptions) -> list[str]:
    """Write the new archive; returns the objects of other programs that were not copied."""
    make_folder(target.parent)
    remove_abandoned_parts(target)
    (file,) = archive._files
    writer = ArchiveWriter(target, options, **inherited_facts(archive._files))
    with writer:
        writer.carry_foreign(file)
        for index in intact:
            writer.copy(StoredSample(archive[index]))
            writer.carry_foreign(file, index)
        writer.finish(sources=archive.metadata.sources)
        verify_written(writer.part_path, writer.digests, workers=options.workers)
    return [f"{each}: not copied" for each in writer.summary.left_foreign]
