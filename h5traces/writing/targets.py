"""The archives of a run: their names, and what they hold already."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from h5traces.archive.opening import open_archive
from h5traces.writing.observation import Observation
from h5traces.writing.shards import sample_digests

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_SUFFIX = ".h5"
_NAME_IN_FOLDER = "traces"
# Of a run into a folder; half an hour to some hours of generating with a 7B model.
DEFAULT_SHARD_SAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Target:
    """Where the archives of a run go.

    Attributes
    ----------
    path
        As the caller named it: a name ending in ``.h5``, or a folder.
    shard_samples
        Samples per shard; None where all go into one archive.
    """

    path: Path
    shard_samples: int | None

    @classmethod
    def of(cls, path: Path, shard_samples: int | None) -> Target:
        """A folder gets shards in any case, an ``.h5`` name only if asked for."""
        if cls.is_folder(path):
            return cls(path, shard_samples or DEFAULT_SHARD_SAMPLES)
        return cls(path, shard_samples)

    @staticmethod
    def is_folder(path: Path) -> bool:
        """Whether a name stands for a folder."""
        return path.suffix != _SUFFIX or path.is_dir()

    @property
    def spool_path(self) -> Path:
        """The folder of samples that are in no archive yet."""
        return self.path.with_name(f"{self.path.name}.spool")

    @property
    def folder(self) -> Path:
        """The folder of the archives."""
        return self.path if self.is_folder(self.path) else self.path.parent

    def shard(self, number: int) -> Path:
        """The name of one archive."""
        if self.shard_samples is None:
            return self.path
        stem = _NAME_IN_FOLDER if self.is_folder(self.path) else self.path.stem
        return self.folder / f"{stem}-{number:05d}{_SUFFIX}"

    def shard_of(self, sample: int) -> int:
        """The number of the archive that a sample goes to."""
        return 0 if self.shard_samples is None else sample // self.shard_samples

    def first_sample(self, shard: int) -> int:
        """The number of the first sample of an archive."""
        return shard * (self.shard_samples or 0)

    def existing(self) -> list[Path]:
        """The archives that are there, in order."""
        found: list[Path] = []
        while (path := self.shard(len(found))).exists():
            found.append(path)
            if self.shard_samples is None:
                break
        return found


@dataclass(slots=True)
class Contents:
    """What archives or spooled samples hold.

    Attributes
    ----------
    digests
        Of every sample, in order, as they were before precision was given up.
    done
        How many samples there are of each sample id.
    observed
        The layers that all have.
    """

    digests: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    observed: Observation = field(default_factory=Observation)

    @classmethod
    def of(cls, path: Path) -> Contents:
        """The contents of one archive file, of which no array is read.

        Raises
        ------
        ArchiveError
            It is no archive, or damaged.
        """
        found = cls()
        with open_archive(path) as archive:
            (file,) = archive.files
            found.digests = sample_digests(file, as_exact=True)
            found.done.update(each for each in archive.ids if each is not None)
            for kind, attrs in file.store.kinds.items():
                layers = attrs.get("layers", ())
                found.observed.layers[kind] = set(layers if isinstance(layers, tuple) else ())
        return found


def joined(contents: Iterable[Contents]) -> Contents:
    """The contents of several files.

    Raises
    ------
    SchemaError
        They have different layers.
    """
    found = Contents()
    for each in contents:
        found.observed.add_sample(each.observed, len(found.digests))
        found.digests += each.digests
        found.done += each.done
    return found
