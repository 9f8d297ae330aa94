"""Which batch files become which archives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from h5traces.errors import ConversionError
from h5traces.paths import DEFAULT_NAME, check_not_a_source, expand_paths, listed_sources
from h5traces.sources.opening import SOURCE_SUFFIXES, source_stem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from h5traces.paths import PathLike, Target

_SUFFIXES: Final = ", ".join(SOURCE_SUFFIXES)


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file that is passed over.

    Attributes
    ----------
    path
        The file.
    reason
        Why, and what to do.
    """

    path: str
    reason: str


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


def plan_jobs(
    sources: PathLike | Sequence[PathLike], target: Target, *, merge: bool = False
) -> tuple[list[Job], list[Leftover]]:
    """The jobs of a conversion, and the files that are passed over."""
    named: list[tuple[Path, Path]] = []
    leftovers: list[Leftover] = []
    for source in listed_sources(sources):
        _collect(Path(str(source)), named, leftovers)
    if not named and not leftovers:
        message = f"there is nothing to convert; expected files ending in {_SUFFIXES}"
        raise ConversionError(message)
    if merge:
        _check_different([path for path, _ in named])
        jobs = [Job(tuple(path for path, _ in named), target.named(DEFAULT_NAME))] if named else []
    else:
        jobs = _one_target_each(list(dict.fromkeys(named)), target)
    check_not_a_source([each.target for each in jobs], [path for path, _ in named])
    return jobs, leftovers


def _check_different(paths: list[Path]) -> None:
    """Reject a batch that is named twice, also by a link."""
    found: dict[tuple[int, int], Path] = {}
    for path in paths:
        status = path.stat()
        first = found.setdefault((status.st_dev, status.st_ino), path)
        if first is not path:
            message = f"{first} and {path} are one file; name each batch of a merge once"
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


def _collect(source: Path, named: list[tuple[Path, Path]], leftovers: list[Leftover]) -> None:
    """Add the batches of one argument, each with its path relative to the named folder."""
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file())
        batches = [path for path in files if path.name.endswith(SOURCE_SUFFIXES)]
        parts = [path for path in files if _is_part(path)]
        if not batches and not parts:
            message = f"{source}: the folder holds no batch; expected files ending in {_SUFFIXES}"
            raise ConversionError(message)
        named += [(path, path.relative_to(source)) for path in batches]
    else:
        files = expand_paths(source, SOURCE_SUFFIXES)
        parts = [path for path in files if _is_part(path)]
        named += [(path, Path(path.name)) for path in files if path not in parts and path.is_file()]
    leftovers += [
        Leftover(str(path), f"{path}: is an unfinished write; extract or copy the batch again")
        for path in parts
    ]


def _is_part(path: Path) -> bool:
    name = path.name
    return name.endswith(".part") and any(suffix in name for suffix in SOURCE_SUFFIXES)
