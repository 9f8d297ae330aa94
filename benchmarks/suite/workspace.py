"""The data that all cases share, made when first asked for."""

from __future__ import annotations

import pickle
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import h5traces
from suite.synthetic import KINDS, REPOSITORY, Generator, Shape, write_batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from suite.scales import Scale

REAL_BATCHES: Final = REPOSITORY / "examples" / "legacy"
# Names as the old pipeline gave them, so that the converter finds model and dataset in them.
_BATCH_NAME = "synthetic-llama2-7b-shape_none_batch_0000"


class Workspace:
    """A folder for everything that is written, and the samples."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        self.folder, self.scale = folder, scale

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The synthetic batch."""
        return list(Generator(self.scale.shape).samples(self.scale.num_samples))

    @cached_property
    def real_batch(self) -> Path:
        """The shipped batch of real activations."""
        return sorted(REAL_BATCHES.glob("*.pkl.gz"))[0]

    @cached_property
    def real_samples(self) -> list[dict[str, Any]]:
        """What is in it."""
        return h5traces.load(self.real_batch)

    @cached_property
    def sample_files(self) -> Path:
        """The synthetic samples one by one, for children that must not hold them all."""
        folder = self.folder / "samples"
        folder.mkdir()
        for number, sample in enumerate(self.samples):
            with (folder / f"{number:08d}").open("xb") as file:
                pickle.dump(sample, file, protocol=5)
        return folder

    @cached_property
    def batch_pkl(self) -> Path:
        """The synthetic batch as the old pipeline wrote it first."""
        path = self.folder / f"{_BATCH_NAME}.pkl"
        write_batch(self.samples, path)
        return path

    @cached_property
    def batch_gz(self) -> Path:
        """The synthetic batch as the old pipeline wrote it last."""
        path = self.folder / f"{_BATCH_NAME}.pkl.gz"
        write_batch(self.samples, path)
        return path

    def tiny_samples(self, num_samples: int, num_layers: int) -> list[dict[str, Any]]:
        """Samples of tiny arrays, for what depends on their number only."""
        generator = Generator(Shape(num_layers, 16, 2))
        # All different: pickle would write an array that it meets again as a reference.
        return [generator.sample(index, 4) for index in range(num_samples)]


def stored_samples(folder: Path) -> Iterator[dict[str, Any]]:
    """The files of `Workspace.sample_files`, one at a time."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            sample = pickle.load(file)
        yield sample
        del sample


def payload_nbytes(samples: Sequence[dict[str, Any]]) -> int:
    """Bytes of hidden states and attentions."""
    return sum(array.nbytes for sample in samples for kind in KINDS for array in sample[kind])
