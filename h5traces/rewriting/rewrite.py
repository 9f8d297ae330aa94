"""Writes archives from samples of others, by copying chunks where possible."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from h5traces.archive.opening import open as open_archive
from h5traces.archive.shards import inherited_facts
from h5traces.errors import ArchiveExistsError
from h5traces.format.html import Report
from h5traces.format.precision import EXACT
from h5traces.format.text import and_more
from h5traces.rewriting.named_states import NamedSample
from h5traces.storage.remote.paths import RemotePath
from h5traces.writing.archive_writer import next_generation
from h5traces.writing.options import precision_warnings
from h5traces.writing.shards import ShardSet, stale_warnings
from h5traces.writing.stored_samples import StoredSample, to_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from h5traces.archive.agreement import ComparedTraces
    from h5traces.archive.archive import Archive
    from h5traces.archive.file import ArchiveFile
    from h5traces.archive.trace import Trace
    from h5traces.format.archive import SourceFile
    from h5traces.meaning.options import FirstState
    from h5traces.paths import Target
    from h5traces.ranks.run import RankRun
    from h5traces.writing.archive_writer import ArchiveWriter
    from h5traces.writing.options import WriteOptions, WriteSummary


@dataclass(slots=True)
class RepackReport(Report):
    """What a rewrite did.

    Attributes
    ----------
    sources, targets
        Files read, and archives written (or, in a dry run, the first that would be).
    num_samples
        Samples in the targets.
    copied
        Whether chunks were copied as they are; else arrays were recompressed.
    source_nbytes, target_nbytes
        Sizes before and after.
    precision
        Precision that the targets lost; None if nothing.
    warnings
        What the user should know.
    """

    sources: list[str]
    targets: list[str] = field(default_factory=list)
    num_samples: int = 0
    copied: bool = True
    source_nbytes: int = 0
    target_nbytes: int = 0
    precision: str | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the targets were written; a rewrite that fails raises, so this is true."""
        return True

    def raise_for_errors(self) -> None:
        """Do nothing: as in the report of a conversion, for code that takes either."""


class Rewrite:
    """Writes all targets, then publishes them."""

    def __init__(
        self,
        archive: Archive,
        report: RepackReport,
        options: WriteOptions,
        compared: ComparedTraces,
        *,
        encodes: bool,
        first_state: FirstState | None,
    ) -> None:
        self._first_state = first_state
        self._archive, self._report, self._encodes = archive, report, encodes
        self._compared = compared
        self._codec = None if report.copied else options.codec
        self._options = options
        self._sources, self._first_source = _joined_sources(archive._files)

    def run(
        self,
        place: Target,
        indices: Sequence[int],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Write and publish; an exception leaves no file."""
        shards = ShardSet(self._options)
        for number, some in enumerate(self.cut(place, indices)):
            with _discarded_on_error(shards):
                self._write(shards, place.shard(number), some, len(indices), progress)
        with _discarded_on_error(shards):
            self._publish(shards)
        self._report.warnings += stale_warnings(place, self._report.targets)

    def run_share(
        self,
        run: RankRun,
        place: Target,
        indices: Sequence[int],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Write the shards of a rank, each by itself; existing ones are kept."""
        generations: dict[str, set[int]] = {}
        share, total = set(run.share), len(indices)
        for number, some in enumerate(self.cut(place, indices)):
            path = place.shard(number)
            is_there = path.exists()
            if number not in share or is_there:
                self._pass_over(some, generations)
                if number in share:
                    self._check_shard(path, some)
                    self._report.targets.append(str(path))
                    facts = {"num_samples": len(some), "archive_nbytes": path.stat().st_size}
                    run.note(number, status="skipped", targets=[str(path)], **facts)
                continue
            shards = ShardSet(self._options, generations)
            with _discarded_on_error(shards):
                self._write(shards, path, some, total, progress)
                self._publish(shards)
            nbytes = path.stat().st_size
            run.note(
                number,
                status="written",
                num_samples=len(some),
                nbytes=nbytes,
                archive_nbytes=nbytes,
                targets=[str(path)],
            )

    @staticmethod
    def cut(place: Target, indices: Sequence[int]) -> Iterator[Sequence[int]]:
        """The samples of every shard."""
        size = place.shard_samples or max(1, len(indices))
        for start in range(0, max(1, len(indices)), size):
            yield indices[start : start + size]

    def _write(
        self,
        shards: ShardSet,
        path: Path,
        indices: Sequence[int],
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Write and finish one archive."""
        writer = shards.new(path, **self._facts(total))
        for file in self._archive._files:
            writer.carry_foreign(file)
        for index in indices:
            self._add(writer, self._archive[index])
            self._report.num_samples += 1
            if progress is not None:
                progress(self._report.num_samples, total)
        shards.finish(sources=self._sources)

    def _pass_over(self, indices: Sequence[int], generations: dict[str, set[int]]) -> None:
        """Count the generation indices of samples that are written elsewhere."""
        for index in indices:
            name, generation = self._archive._keys[index]
            if name is not None:
                next_generation(generations.setdefault(name, set()), generation)

    def _check_shard(self, path: Path, indices: Sequence[int]) -> None:
        """Reject an archive in the place of a shard that holds something else."""
        with open_archive(path) as found:
            wanted = [self._archive._keys[index][0] for index in indices]
            precision = found.metadata.precision or EXACT
            is_alike = list(found.ids) == wanted and precision == self._options.precision
        if not is_alike or found.layers != self._archive.layers:
            message = f"{path} exists and holds something else; move it away"
            raise ArchiveExistsError(message)

    def _add(self, writer: ArchiveWriter, trace: Trace) -> None:
        first_source = self._first_source[trace.path]
        self._compared.check(trace)
        if self._first_state is not None:
            writer.copy(NamedSample(trace, self._first_state, first_source=first_source))
        elif self._encodes:
            writer.append(to_record(trace, first_source=first_source))
        else:
            writer.copy(StoredSample(trace, codec=self._codec, first_source=first_source))
        writer.carry_foreign(trace._stored.file, trace.position_in_file)

    def _facts(self, num_samples: int) -> dict[str, Any]:
        """What all sources state alike; of all their samples, also what names their states."""
        files = self._archive._files
        facts = inherited_facts(files)
        before = [file.metadata.conversion for file in files]
        is_alike = before[0] is not None and all(each == before[0] for each in before)
        if self._first_state is not None and is_alike and num_samples == len(self._archive):
            facts["conversion"] = {**(before[0] or {}), "first_state": self._first_state}
        return facts

    def _publish(self, shards: ShardSet) -> None:
        """Name the targets, and report them."""
        shards.publish()
        summaries = [writer.summary for writer in shards.writers]
        report = self._report
        report.targets += [str(summary.path) for summary in summaries]
        report.warnings += [each for one in summaries for each in precision_warnings(one)]
        report.warnings += _foreign_warnings(self._archive, summaries)
        report.target_nbytes += sum(summary.nbytes for summary in summaries)


@contextlib.contextmanager
def _discarded_on_error(shards: ShardSet) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shards.discard()
        raise


def _foreign_warnings(archive: Archive, summaries: Sequence[WriteSummary]) -> list[str]:
    """Objects of other programs in the sources that the targets lack."""
    left = dict.fromkeys(each for one in summaries for each in one.left_foreign)
    found = [f"{and_more(left, separator='; ')}: not copied"] if left else []
    far = [str(file.path) for file in archive._files if _is_out_of_reach(file)]
    if far:
        found.append(
            f"{and_more(far)}: what users put there beside the traces was not copied; download "
            "the archive to keep it"
        )
    return found


def _is_out_of_reach(file: ArchiveFile) -> bool:
    return isinstance(file.path, RemotePath) and file.store.has_foreign


def _joined_sources(
    files: Sequence[ArchiveFile],
) -> tuple[tuple[SourceFile, ...] | None, dict[Path | RemotePath, int]]:
    """The sources of all archives, and the position of each archive's first."""
    joined: list[SourceFile] = []
    first: dict[Path | RemotePath, int] = {}
    for file in files:
        first[file.path] = len(joined)
        joined += file.metadata.sources or ()
    return tuple(joined) or None, first
