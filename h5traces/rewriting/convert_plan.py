"""Which batch files become which archives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from h5traces.errors import ConversionError
from h5traces.paths import expand_paths
from h5traces.sources.opening import SOURCE_SUFFIXES, source_stem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from h5traces.paths import PathLike

_TARGET_SUFFIX = ".h5"
_MERGED_NAME = "traces.h5"


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
        Name of the archive; shards insert a number before the suffix.
    sharded
        Whether there are shards.
    """

    sources: tuple[Path, ...]
    target: Path
    sharded: bool

    def shard(self, number: int) -> Path:
        """The name of one shard, or of the only archive."""
        if not self.sharded:
            return self.target
        return self.target.with_name(f"{self.target.stem}-{number:05d}{self.target.suffix}")

    @property
    def first_target(self) -> Path:
        """The file whose existence shows that the job was finished: it is published last."""
        return self.shard(0)

    def existing_targets(self) -> list[Path]:
        """The targets that are there, in order."""
        found: list[Path] = []
        while (path := self.shard(len(found))).exists():
            found.append(path)
            if not self.sharded:
                break
        return found


def plan_jobs(
    sources: PathLike | Sequence[PathLike],
    dest: Path,
    *,
    merge: bool = False,
    shard_samples: int | None = None,
) -> tuple[list[Job], list[Leftover]]:
    """The jobs of a conversion, and the files that are passed over.

    Raises
    ------
    ConversionError
        There is nothing to convert, two batches would get one target, or `dest` does not fit.
    FileNotFoundError
        A source does not exist.
    """
    if shard_samples is not None and shard_samples < 1:
        message = f"shard_samples is {shard_samples}, expected at least 1"
        raise ConversionError(message)
    named: list[tuple[Path, Path]] = []
    leftovers: list[Leftover] = []
    single = (
        [sources]
        if isinstance(sources, (str, Path)) or hasattr(sources, "__fspath__")
        else (list(sources))
    )
    for source in single:
        _collect(Path(source), named, leftovers)
    named = list(dict.fromkeys(named))
    if not named and not leftovers:
        message = "there is nothing to convert; expected .pkl or .pkl.gz batches"
        raise ConversionError(message)
    if not named:
        return [], leftovers
    sharded = shard_samples is not None
    to_file = dest.suffix == _TARGET_SUFFIX and not dest.is_dir()
    if merge:
        target = dest if to_file else dest / _MERGED_NAME
        return [Job(tuple(path for path, _ in named), target, sharded)], leftovers
    if to_file:
        if len(named) > 1:
            message = (
                f"{len(named)} batches cannot all become {dest}; name a folder with -o, or use "
                "--merge"
            )
            raise ConversionError(message)
        return [Job((named[0][0],), dest, sharded)], leftovers
    return _one_target_each(named, dest, sharded=sharded), leftovers


def _one_target_each(named: list[tuple[Path, Path]], dest: Path, *, sharded: bool) -> list[Job]:
    targets: dict[Path, Path] = {}
    for path, relative in named:
        target = dest / relative.with_name(f"{source_stem(relative.name)}{_TARGET_SUFFIX}")
        if target in targets:
            message = (
                f"{path} and {targets[target]} would both become {target}; convert them into "
                "different folders, or use --merge"
            )
            raise ConversionError(message)
        targets[target] = path
    return [Job((path,), target, sharded) for target, path in targets.items()]


def _collect(source: Path, named: list[tuple[Path, Path]], leftovers: list[Leftover]) -> None:
    """Add the batches behind one argument, each with its path relative to a named folder."""
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file())
        batches = [path for path in files if path.name.endswith(SOURCE_SUFFIXES)]
        parts = [path for path in files if _is_part(path)]
        if not batches and not parts:
            message = f"{source}: the folder holds no batch; expected files ending in "
            msg = f"{message}{', '.join(SOURCE_SUFFIXES)}"
            raise ConversionError(msg)
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
