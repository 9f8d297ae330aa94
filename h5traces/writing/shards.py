"""A set of shards that is read back and published together, and what stored shards hold."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from h5traces.archive.opening import open as open_archive
from h5traces.errors import (
    ArchiveExistsError,
    CorruptArchiveError,
    H5TracesError,
    StoredStateWarning,
)
from h5traces.format import layout
from h5traces.format.text import and_more
from h5traces.storage.processes import deferred_signals
from h5traces.storage.publish import make_folder, remove_abandoned_parts, sync_folder
from h5traces.writing.archive_writer import ArchiveWriter
from h5traces.writing.preparation import Observation
from h5traces.writing.reading_back import verify_written

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from h5traces.archive.file import ArchiveFile
    from h5traces.format.archive import SourceFile
    from h5traces.paths import Target
    from h5traces.storage.remote.paths import RemotePath
    from h5traces.writing.options import WriteOptions


def stale_warnings(target: Target, written: Iterable[str]) -> list[str]:
    """Names shards of an earlier run that lie beside the new ones and would be opened with them."""
    kept = set(written)
    stale = [place for path in target.taken() if (place := str(path)) not in kept]
    if not stale:
        return []
    return [f"{and_more(stale)}: left by an earlier run, not replaced; delete what is obsolete"]


class ShardSet:
    """The archives of one job. The first is published last: if it exists, all of them do.

    A stopped job can be run again: shards that it published are compared with the new ones. With
    ``options.verify``, every archive is read back before any gets its name. `generations` are
    generation indices that samples before it have, by sample id.
    """

    def __init__(
        self, options: WriteOptions, generations: dict[str, set[int]] | None = None
    ) -> None:
        self._options = options
        self.writers: list[ArchiveWriter] = []
        self._generations = {} if generations is None else generations
        # Shards that an earlier run of the same job published before it was stopped.
        self._published_before: set[int] = set()

    def new(self, target: Path, **metadata: Any) -> ArchiveWriter:
        """A writer for the next archive."""
        make_folder(target.parent)
        remove_abandoned_parts(target)
        options = self._options
        if self.writers and not options.overwrite and os.path.lexists(target):
            # Written nevertheless: only digests show whether it is the same shard.
            self._published_before.add(len(self.writers))
            options = replace(options, overwrite=True)
        self.writers.append(
            ArchiveWriter(target, options, generations=self._generations, **metadata)
        )
        return self.writers[-1]

    def finish(self, *, sources: tuple[SourceFile, ...] | None = None, **metadata: Any) -> None:
        """Finish and verify the newest archive."""
        writer = self.writers[-1]
        writer.finish(sources=sources, **metadata)
        if self._options.verify:
            verify_written(
                writer.part_path,
                writer.digests,
                workers=self._options.workers,
                looked_back=writer.looked_back,
            )
        target = writer.summary.path
        if len(self.writers) - 1 in self._published_before and not holds(target, writer.digests):
            message = (
                f"{target} exists and holds other samples than a stopped run of this command would "
                "have left; move it, use overwrite=True, or another name"
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


def holds(path: Path | RemotePath, digests: Sequence[str], *, before_loss: bool = False) -> bool:
    """Whether a file is an archive of just these samples; see `sample_digests`."""
    try:
        with warnings.catch_warnings(), open_archive(path) as archive:
            warnings.simplefilter("ignore", StoredStateWarning)
            return list(digests) == sample_digests(archive._files[0], before_loss=before_loss)
    except (H5TracesError, OSError):
        return False


def sample_digests(file: ArchiveFile, *, before_loss: bool = False) -> list[str]:
    """The stored digest of every sample, if `before_loss` from before a tier was applied."""
    samples = (file.sample_attrs(index) for index in range(file.num_samples))
    found = [
        attrs.get("exact_digest" if before_loss and "exact_digest" in attrs else "digest")
        for attrs in samples
    ]
    if None in found:
        message = f"{file.path}: {layout.sample_path(found.index(None))} has no digest"
        raise CorruptArchiveError(message)
    return [str(each) for each in found]


@dataclass(slots=True)
class Contents:
    """What archives or spooled samples hold.

    ``digests`` are from before a tier was applied; ``done`` counts samples by sample id, and
    ``later`` names those with a generation index above 0.
    """

    digests: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    later: set[tuple[str, int]] = field(default_factory=set)
    observed: Observation = field(default_factory=Observation)

    @classmethod
    def of(cls, path: Path) -> Contents:
        """The contents of one archive file; reads no array."""
        found = cls()
        with open_archive(path) as archive:
            (file,) = archive._files
            found.digests = sample_digests(file, before_loss=True)
            found.done.update(each for each in archive.ids if each is not None)
            found.later.update((name, n) for name, n in archive._keys if name is not None and n)
            for kind, attrs in file.store.kinds.items():
                layers = attrs.get("layers", ())
                found.observed.layers[kind] = set(layers if isinstance(layers, tuple) else ())
        return found


def joined(contents: Iterable[Contents]) -> Contents:
    """The contents of several files."""
    found = Contents()
    for each in contents:
        found.observed.add_sample(each.observed, len(found.digests))
        found.digests += each.digests
        found.done += each.done
        found.later |= each.later
    return found


def stored_keys(done: Counter[str], later: set[tuple[str, int]]) -> frozenset[tuple[str, int]]:
    """Sample ids with generation indices, from what `Contents` and writers have of them."""
    num_later = Counter(name for name, _ in later)
    return frozenset(later | {(name, 0) for name in done if done[name] > num_later[name]})
