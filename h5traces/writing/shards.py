"""Writes the archives of one job and names them at the end; a stopped job can be run again."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from h5traces.archive.opening import open_archive
from h5traces.errors import (
    ArchiveExistsError,
    CorruptArchiveError,
    H5TracesError,
    StoredStateWarning,
)
from h5traces.format import layout
from h5traces.storage.processes import deferred_signals
from h5traces.storage.publish import (
    make_folder,
    remove_abandoned_parts,
    sync_folder,
)
from h5traces.writing.archive_writer import ArchiveWriter
from h5traces.writing.preparation import Observation
from h5traces.writing.read_back import verify_written

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from h5traces.archive.file import ArchiveFile
    from h5traces.format.archive import SourceFile
    from h5traces.writing.options import WriteOptions


class ShardSet:
    """The archives of one job. The first is published last: where it exists, all of them do.

    Parameters
    ----------
    options
        How to write.
        With ``verify``, every archive is read back before any gets its name.
    """

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self.writers: list[ArchiveWriter] = []
        self._generations: dict[str, set[int]] = {}
        # Shards that an earlier run of the same job published before it was stopped.
        self._published_before: set[int] = set()

    def new(self, target: Path, **metadata: Any) -> ArchiveWriter:
        """A writer for the next archive.

        Raises
        ------
        ArchiveExistsError
            The first target exists, and may not be replaced.
        """
        make_folder(target.parent)
        remove_abandoned_parts(target)
        options = self._options
        if self.writers and not options.overwrite and os.path.lexists(target):
            # Written all the same: only the digests tell whether it is the same shard.
            self._published_before.add(len(self.writers))
            options = replace(options, overwrite=True)
        self.writers.append(
            ArchiveWriter(target, options, generations=self._generations, **metadata)
        )
        return self.writers[-1]

    def finish(self, *, sources: tuple[SourceFile, ...] | None = None, **metadata: Any) -> None:
        """Finish and verify the newest archive.

        Raises
        ------
        ArchiveExistsError
            Its target exists and holds something else.
        CorruptArchiveError
            It reads back otherwise than it was written.
        """
        writer = self.writers[-1]
        writer.finish(sources=sources, **metadata)
        if self._options.verify:
            verify_written(writer.part_path, writer.digests, workers=self._options.workers)
        target = writer.summary.path
        if len(self.writers) - 1 in self._published_before and not holds(target, writer.digests):
            message = (
                f"{target} exists and holds other samples, so no stopped run of this command left "
                "it; move it, use overwrite=True, or another name"
            )
            raise ArchiveExistsError(message)

    def publish(self) -> None:
        """Name the archives, the first one last; signals wait for all of them."""
        with deferred_signals():
            for number, writer in reversed(list(enumerate(self.writers))):
                if number in self._published_before:
                    writer.discard()
                    sync_folder(writer.summary.path.parent)
                else:
                    writer.publish()

    def discard(self) -> None:
        """Delete what was not published."""
        for writer in self.writers:
            writer.discard()


def holds(path: Path, digests: Sequence[str], *, as_exact: bool = False) -> bool:
    """Whether a file is an archive of exactly these samples, by their digests.

    Parameters
    ----------
    path
        The file.
    digests
        Of the samples.
    as_exact
        Whether these are the digests that samples had before precision was given up.
    """
    try:
        with warnings.catch_warnings(), open_archive(path) as archive:
            warnings.simplefilter("ignore", StoredStateWarning)
            return list(digests) == sample_digests(archive._files[0], as_exact=as_exact)
    except (H5TracesError, OSError):
        return False


def sample_digests(file: ArchiveFile, *, as_exact: bool = False) -> list[str]:
    """The digest of every sample of an archive file, as it is stored.

    Parameters
    ----------
    file
        The archive.
    as_exact
        Whether to give those that samples had before precision was given up, where that is known.

    Raises
    ------
    CorruptArchiveError
        A sample has none.
    """
    samples = (file.sample_attrs(index) for index in range(file.num_samples))
    found = [
        attrs.get("exact_digest" if as_exact and "exact_digest" in attrs else "digest")
        for attrs in samples
    ]
    if None in found:
        message = f"{file.path}: {layout.sample_path(found.index(None))} has no digest"
        raise CorruptArchiveError(message)
    return [str(each) for each in found]


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
            (file,) = archive._files
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
