"""The spool of a run that several ranks write: one folder, samples by their number in the run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from h5traces.errors import ArchiveError
from h5traces.format.text import and_more, counted
from h5traces.storage.publish import locked, remove_unlocked
from h5traces.writing.create import described_run
from h5traces.writing.options import PrecisionOptions, TargetOptions
from h5traces.writing.shards import Contents
from h5traces.writing.spool_folder import SpoolFolder, spool_path
from h5traces.writing.spool_writer import SpoolWriter
from h5traces.writing.trace_writer import TraceWriter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from h5traces.format.precision import Precision, Tier
    from h5traces.format.record import TraceRecord
    from h5traces.paths import PathLike
    from h5traces.writing.options import WriteOptions


@dataclass(frozen=True)
class Share:
    """What one rank writes of a run.

    Attributes
    ----------
    numbers
        By sample id and generation index, the number of each of its samples in the run.
    total
        Samples of the run.
    """

    numbers: dict[tuple[str, int], int]
    total: int


class SharedWriter(SpoolWriter):
    """Stores samples of one rank, and packs every shard whose samples all ranks have stored.

    A sample that was left out has a marker in the spool, so that its shard can be packed.
    """

    def __init__(
        self,
        path: PathLike,
        share: Share,
        *,
        precision: PrecisionOptions | Precision | Tier | None = None,
        target: TargetOptions = TargetOptions(),
        **facts: Any,
    ) -> None:
        precision = PrecisionOptions.of(precision)
        place, state, options, calibration = described_run(path, precision, target, **facts)
        TraceWriter.__init__(self, place, state, options)
        folder = SpoolFolder(spool_path(place), is_shared=True)
        self._set_up(folder, options, calibration, precision.calibration_samples)
        self._share = share
        try:
            for part in folder.path.glob("*.part"):
                remove_unlocked(part)
            if folder.state() is None:
                folder.save(state)
            done = self.finished()
        except BaseException:
            folder.release()
            raise
        for (sample_id, index), number in share.numbers.items():
            if number in done:
                self.done[sample_id] += 1
                if index:
                    self.later.add((sample_id, index))
        self.num_samples = sum(self.done.values())
        self._checks.resume(self.num_samples, self.done)

    def finished(self) -> set[int]:
        """Numbers of the samples that are stored by any rank, or left out."""
        folder = self._spool()
        found = set(folder.samples()) | set(folder.left_out())
        for shard in range(self._num_all_shards):
            if self._target.shard(shard).exists():
                found.update(self._numbers_of(shard))
        return found

    @property
    def _num_all_shards(self) -> int:
        return self._target.shard_of(self._share.total - 1) + 1

    def _numbers_of(self, shard: int) -> range:
        first = self._target.first_sample(shard)
        last = min(self._share.total, self._target.first_sample(shard + 1))
        return range(first, last)

    def _append(self, record: TraceRecord) -> None:
        assert record.sample_id is not None
        self._next = self._share.numbers[record.sample_id, record.generation_index or 0]
        super()._append(record)

    def append_records(self, records: Sequence[TraceRecord]) -> None:
        """As `append` for each: other ranks tell by the names of files which samples are stored."""
        TraceWriter.append_records(self, records)

    def _set_closing(self, *, closing: bool) -> None:
        """Nothing: all samples of the run are known from the beginning."""

    def pack(self) -> list[Path]:
        """Nothing while samples come: others may be at work on the same shard."""
        return []

    def pack_complete(self, *, incomplete: bool = False) -> list[Path]:
        """Make an archive of every shard whose samples are all there, and that nobody packs.

        With `incomplete`, also of those that lack some.
        """
        done, packed = self.finished(), []
        for shard in range(self._num_all_shards):
            path, numbers = self._target.shard(shard), self._numbers_of(shard)
            needs_first = shard and self._options.precision.step is not None
            if path.exists() or not (incomplete or done.issuperset(numbers)):
                continue
            if needs_first and self._calibration is None and not self._target.shard(0).exists():
                # The scales of all shards are those of the first.
                break
            with self._claimed(shard) as is_claimed:
                if is_claimed and not path.exists():
                    packed += self._pack_shard(shard)
        return packed

    def _pack_shard(self, shard: int) -> list[Path]:
        folder = self._spool()
        stored = [n for n in self._numbers_of(shard) if folder.sample_path(n).exists()]
        if not stored:
            return []
        self._num_shards = shard
        found = [Contents.of(folder.sample_path(number)) for number in stored]
        self._spooled = {n: each.digests for n, each in zip(stored, found, strict=True)}
        return [self._pack_next()]

    def _packing_options(self, numbers: list[int]) -> WriteOptions:
        step = self._options.precision.step
        if step is None or self._calibration is None:
            return super()._packing_options(numbers)
        return replace(self._options, scales=self._calibration.scales(step))

    def _claimed(self, shard: int) -> AbstractContextManager[bool]:
        """Whether no other rank packs a shard."""
        return locked(self._spool().path / f"pack-{shard:05d}.lock")

    def remove_spool(self) -> None:
        """Remove the spool of a run that nobody goes on with; all its samples must be packed."""
        folder, left = self._spool(), self._spool().samples()
        if left:
            message = (
                f"{folder.path}: {counted(len(left), 'sample')} cannot be packed: the scales of "
                "all shards are those of the first, of which no sample is there"
            )
            raise ArchiveError(message)
        if folder.claim():
            folder.remove_all()
        self.suspend()

    def close(self) -> None:
        """Pack what is complete; the rank that ends last removes the spool of a whole run."""
        if self._closed:
            return
        folder = self._spool()
        self.pack_complete()
        done = self.finished()
        left = [each for each in self._share.numbers.values() if each not in done]
        if left:
            self.warnings.append(f"samples {and_more(left)} of this rank are missing")
        if len(done) == self._share.total and not folder.samples() and folder.claim():
            folder.remove_all()
        self.suspend()
