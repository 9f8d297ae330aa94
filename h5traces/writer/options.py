"""How an archive is written, and what was written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from h5traces.storage.codecs import GZIP

if TYPE_CHECKING:
    from pathlib import Path

    from h5traces.dtypes import CastCounts, DtypePolicy, OverflowPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """How an archive is written.

    Attributes
    ----------
    dtype
        Stored type of hidden states and attentions, or ``auto`` for the narrowest exact one.
    on_overflow
        What becomes of arrays with finite values beyond that type.
    codec
        Codec of the layered arrays.
    workers
        Threads that cast and compress; None for one per core.
    overwrite
        Replace an existing target, in one atomic step when the new file is whole.
    """

    dtype: DtypePolicy = "float16"
    on_overflow: OverflowPolicy = "float32"
    codec: str = GZIP.name
    workers: int | None = None
    overwrite: bool = False


@dataclass(slots=True)
class WriteSummary:
    """What was written.

    Attributes
    ----------
    path
        The published file.
    num_samples
        Samples in it.
    raw_nbytes, stored_nbytes
        Bytes of the arrays before and after compression, by kind (``other`` for the rest).
    nbytes
        Size of the file.
    counts
        Values not finite or changed by casts, by kind.
    coverage
        Number of samples by coverage.
    """

    path: Path
    num_samples: int = 0
    raw_nbytes: Counter[str] = field(default_factory=Counter)
    stored_nbytes: Counter[str] = field(default_factory=Counter)
    nbytes: int = 0
    counts: dict[str, CastCounts] = field(default_factory=dict)
    coverage: Counter[str] = field(default_factory=Counter)
