"""How much is measured: sizes of the data and numbers of rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from suite.synthetic import LLAMA_2_7B, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes and repeats.

    Attributes
    ----------
    shape, num_samples
        The synthetic batch.
    rounds, real_rounds, convert_rounds, open_rounds
        How often every case is measured; in each round all cases run one after the other.
    random_reads
        Random (sample, layer) pairs per round; their mean is one figure.
    open_samples, open_layers
        The archive of tiny arrays that is opened and counted; two datasets per layer.
    growth
        Numbers of samples of the growing archives.
    real_samples
        How many of the shipped samples are used; all by default.
    memory_formats
        Formats whose memory is measured; all by default.
    copy_nbytes
        Size of the buffer whose copy shows memory bandwidth; far beyond the caches.
    """

    name: str
    shape: Shape
    num_samples: int
    rounds: int
    real_rounds: int
    convert_rounds: int
    open_rounds: int
    random_reads: int
    open_samples: int
    open_layers: int
    growth: tuple[int, ...]
    copy_nbytes: int
    real_samples: int | None = None
    memory_formats: tuple[str, ...] | None = None


SCALES: Final = {
    "full": Scale(
        name="full",
        shape=LLAMA_2_7B,
        num_samples=8,
        rounds=5,
        real_rounds=5,
        convert_rounds=5,
        open_rounds=5,
        random_reads=40,
        open_samples=1000,
        open_layers=32,
        growth=(10, 100, 1000, 10_000),
        copy_nbytes=1 << 28,
    ),
    "small": Scale(
        name="small",
        shape=Shape(8, 1024, 16),
        num_samples=8,
        rounds=3,
        real_rounds=3,
        convert_rounds=3,
        open_rounds=3,
        random_reads=20,
        open_samples=100,
        open_layers=8,
        growth=(10, 100, 1000),
        copy_nbytes=1 << 26,
    ),
    # Not for measuring: the test of the suite itself.
    "tiny": Scale(
        name="tiny",
        shape=Shape(3, 512, 4),
        num_samples=3,
        rounds=1,
        real_rounds=1,
        convert_rounds=1,
        open_rounds=1,
        random_reads=3,
        open_samples=4,
        open_layers=2,
        growth=(3,),
        copy_nbytes=1 << 20,
        real_samples=1,
        memory_formats=("h5traces gzip, 1 thread",),
    ),
}
