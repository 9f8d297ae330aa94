"""Features that several ranks compute: blocks of samples, and one table of all of them."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.lib import format as npy

from h5traces.errors import CorruptArchiveError
from h5traces.features.samples import SampleFeatures, iterate_features
from h5traces.ranks.parts import PartsRun
from h5traces.ranks.plan import RunPlan, plain_options, planned_archives
from h5traces.storage.publish import PartFile, remove_abandoned_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from h5traces.archive.archive import Archive
    from h5traces.ranks.rank import Rank

_BLOCK_SAMPLES: Final = 64
_FACTS: Final = "samples.json"


class SharedFeatures(PartsRun):
    """The blocks of one rank. A block is a zip archive of arrays of numpy, one row each."""

    def __init__(
        self, output: Path, rank: Rank, view: Archive, wanted: Sequence[str], **options: Any
    ) -> None:
        self._view, self._wanted = view, list(wanted)
        starts = range(0, len(view), _BLOCK_SAMPLES)
        self._blocks = [range(n, min(n + _BLOCK_SAMPLES, len(view))) for n in starts]
        files = view._files
        each = sum(file.nbytes for file in files) // max(1, len(view))
        plan = RunPlan(
            command="features",
            world_size=rank.size,
            first_task=rank.first,
            options=plain_options({"names": self._wanted, "layers": view.layers, **options}),
            sources=planned_archives(files),
            costs=tuple(each * len(block) for block in self._blocks),
        )
        super().__init__(output, rank, plan, ".zip")

    def compute(self, workers: int | None, progress: Callable[[int, int], None] | None) -> int:
        """Compute the blocks of this rank that are not there; their number of samples."""
        total, done = sum(len(self._blocks[n]) for n in self.share), 0
        for number in self.share:
            block, path = self._blocks[number], self.part(number)
            is_there = path.exists()
            if not is_there:
                self._compute(block, path, workers)
            done += len(block)
            self.note(
                number,
                status="skipped" if is_there else "written",
                num_samples=len(block),
                nbytes=path.stat().st_size,
            )
            if progress is not None:
                progress(done, total)
        return done

    def _compute(self, block: range, path: Path, workers: int | None) -> None:
        remove_abandoned_parts(path)
        facts = []
        with PartFile(path) as part:
            with zipfile.ZipFile(part.file, "w") as archive:
                view = self._view[block.start : block.stop]
                for each in iterate_features(view, self._wanted, workers=workers):
                    for name, values in each.values.items():
                        with archive.open(f"{each.index:06d}/{name}.npy", "w") as member:
                            npy.write_array(member, values, allow_pickle=False)
                    facts.append({"problems": each.problems, "odd_sums": each.odd_sums})
                    part.file.raise_error()
                archive.writestr(_FACTS, json.dumps(facts))
            part.file.raise_error()
            # As those of another rank that had the block before the world size changed.
            part.publish(overwrite=True)

    def rows(self) -> Iterator[SampleFeatures]:
        """The features of all samples, in order; of the blocks of all ranks."""
        for number, block in enumerate(self._blocks):
            path = self.part(number)
            try:
                with zipfile.ZipFile(path) as archive:
                    yield from self._read(archive, block)
            except (zipfile.BadZipFile, KeyError, ValueError) as error:
                message = f"{path}: is damaged ({error}); delete it, and start a rank again"
                raise CorruptArchiveError(message) from error

    def _read(self, archive: zipfile.ZipFile, block: range) -> Iterator[SampleFeatures]:
        facts = json.loads(archive.read(_FACTS))
        for place, (index, known) in enumerate(zip(block, facts, strict=True)):
            values = {}
            for name in self._wanted:
                with archive.open(f"{place:06d}/{name}.npy") as member:
                    values[name] = np.asarray(npy.read_array(member, allow_pickle=False))
            sums = known["odd_sums"]
            yield SampleFeatures(
                index, values, known["problems"], None if sums is None else (sums[0], sums[1])
            )
