"""Which batch files become which archives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from h5traces.errors import ConversionError
from h5traces.meaning.options import ReadingOptions
from h5traces.paths import DEFAULT_NAME, check_not_a_source, listed_sources, local_path
from h5traces.rewriting.existing import source_file
from h5traces.sources.collecting import Collected, collect
from h5traces.sources.opening import source_stem

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from h5traces.paths import PathLike, Target

# Smaller batches hold no sample.
_MIN_COPY_NBYTES: Final = 256


@dataclass(frozen=True, slots=True)
class Job:
    """Batch files that go into one archive, or one set of shards.

    Attributes
    ----------
    sources
        Batch files, in order.
    target
        The archive, or its shards.
    """

    sources: tuple[Path, ...]
    target: Target

    @property
    def first_target(self) -> Path:
        """The file whose existence shows that the job was finished: it is published last."""
        return self.target.shard(0)

    @property
    def nbytes(self) -> int:
        """Size of the sources."""
        return sum(source.stat().st_size for source in self.sources)


def plan_jobs(
    sources: PathLike | Sequence[PathLike],
    target: Target,
    *,
    merge: bool = False,
    reading: ReadingOptions = ReadingOptions(),
) -> tuple[list[Job], Collected]:
    """The jobs of a conversion, and the files that were found."""
    found = Collected()
    for source in listed_sources(sources):
        found.add(collect(local_path(source), reading))
    if not found.sources and not found.left:
        message = "there is nothing to convert; expected files of traces, or a folder of them"
        raise ConversionError(message)
    named = [path for path, _ in found.sources]
    if merge:
        _check_different(named)
        jobs = [Job(tuple(named), target.named(DEFAULT_NAME))] if named else []
    else:
        jobs = _one_target_each(list(dict.fromkeys(found.sources)), target)
    check_not_a_source([each.target for each in jobs], named)
    return jobs, found


def _check_different(paths: list[Path]) -> None:
    """Reject a batch that is named twice, also by a link, and one that lies there with its copy."""
    found: dict[tuple[int, int], Path] = {}
    alike: dict[int, list[Path]] = {}
    for path in paths:
        status = path.stat()
        first = found.setdefault((status.st_dev, status.st_ino), path)
        if first is not path:
            message = f"{first} and {path} are one file; name each batch of a merge once"
            raise ConversionError(message)
        if status.st_size >= _MIN_COPY_NBYTES:
            alike.setdefault(status.st_size, []).append(path)
    for group in alike.values():
        _check_no_copies(group)


def _check_no_copies(paths: list[Path]) -> None:
    """Reject files of one size with the same bytes; only those that share their ends are read."""
    if len(paths) == 1:
        return
    by_ends: dict[str | None, list[Path]] = {}
    for path in paths:
        by_ends.setdefault(source_file(path).ends_digest, []).append(path)
    for group in by_ends.values():
        found: dict[str | None, Path] = {}
        for path in group if len(group) > 1 else ():
            first = found.setdefault(source_file(path, whole=True).digest, path)
            if first is not path:
                message = (
                    f"{first} and {path} hold the same bytes, which would store their samples "
                    "twice; name one of them"
                )
                raise ConversionError(message)


def _one_target_each(named: list[tuple[Path, Path]], target: Target) -> list[Job]:
    if len(named) > 1 and not target.is_folder:
        message = (
            f"{len(named)} batches cannot all become {target.path}; name a folder or merge=True"
        )
        raise ConversionError(message)
    found: dict[Path, Job] = {}
    for path, relative in named:
        job = Job((path,), target.named(str(relative.with_name(source_stem(relative.name)))))
        other = found.setdefault(job.target.path, job)
        if other is not job:
            message = (
                f"{path} and {other.sources[0]} would both become {job.target.path}; convert them "
                "into different folders, or use merge=True"
            )
            raise ConversionError(message)
    return list(found.values())
