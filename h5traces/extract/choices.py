"""What a run is made of, by name: a model, questions, and how archives are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from h5traces.extract.questions import Columns
from h5traces.storage.codecs import GZIP
from h5traces.writing.calibrate import AUTOMATIC_SAMPLES

if TYPE_CHECKING:
    from h5traces.archive.opening import PathLike
    from h5traces.extract.models import ModelDtype
    from h5traces.format.dtypes import OverflowPolicy
    from h5traces.format.precision import Precision, Tier


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model computes, and where.

    Attributes
    ----------
    model_id
        Hub id, local folder, or alias.
    revision
        Commit, branch or tag on the hub.
    dtype
        Type to compute in; ``auto`` is the checkpoint's own, but float32 on processors.
    device
        As torch names it, or ``auto`` to spread the model over all.
    load_in_4bit
        Quantise the weights with bitsandbytes.
    """

    model_id: str
    revision: str | None = None
    dtype: ModelDtype = "auto"
    device: str | None = None
    load_in_4bit: bool = False


@dataclass(frozen=True, kw_only=True)
class DatasetChoice:
    """Which questions are asked.

    Attributes
    ----------
    dataset
        ``triviaqa``, ``truthfulqa``, or a JSONL or CSV file.
    num_samples
        The first so many; None for all.
    path
        A local copy of a data set that is known by name.
    revision
        Its commit, branch or tag on the hub.
    columns
        Which columns of a file to read.
    """

    dataset: str
    num_samples: int | None = None
    path: str | None = None
    revision: str | None = None
    columns: Columns = field(default_factory=Columns)


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How archives are written; see `h5traces.create`.

    Attributes
    ----------
    shard_samples, tier, scales, calibration_samples, on_overflow, codec, workers, verify
        As there. The stored type is that of `ExtractOptions`.
    check_space
        Refuse to start where the disk is too small for the forecast.
    """

    shard_samples: int | None = None
    tier: Tier | Precision = "exact"
    scales: PathLike | None = None
    calibration_samples: int = AUTOMATIC_SAMPLES
    on_overflow: OverflowPolicy = "float32"
    codec: str = GZIP.name
    workers: int | None = None
    verify: bool = True
    check_space: bool = True
