"""How an archive is written, and what was written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, get_args

from h5traces.arguments import checked_options
from h5traces.errors import OptionError, PrecisionError
from h5traces.format.precision import EXACT, Precision
from h5traces.format.text import counted, short_repr
from h5traces.storage.codecs import GZIP

if TYPE_CHECKING:
    from pathlib import Path

    from h5traces.format.dtypes import CastCounts, DtypePolicy, OverflowPolicy
    from h5traces.format.precision import Tier
    from h5traces.paths import PathLike
    from h5traces.precision.scales import ScaleSet


Compare = Literal["time", "ends", "content"]
Foreign = Literal["keep", "drop"]

# Samples to measure scales on if no file of scales is given: the tokens of 64 samples give sigma
# to about one per cent.
AUTOMATIC_SAMPLES: Final = 64
# And to make such a file.
DEFAULT_SAMPLES: Final = 200

_HALF_NBYTES: Final = 2
# Above this share, exceptions take a tenth of what the coarsest tier stores.
_MANY_EXCEPTIONS: Final = 0.005


@checked_options
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PrecisionOptions:
    """How precisely hidden states and attentions are stored, and with which codec.

    Attributes
    ----------
    tier
        ``exact``, ``fine``, ``analysis``, ``compact`` or ``native``, or a `Precision`.
        None means ``exact`` for new archives, and the precision of the source for rewritten ones.
    scales
        File that `h5traces.calibrate` wrote, or an archive with scales; measured on the first
        samples by default.
    calibration_samples
        Number of samples for that measurement.
    dtype
        Stored type: ``float16``, ``bfloat16``, ``float32``, or ``auto`` for the narrowest type that
        holds every value of an array. None means ``float16`` for new archives, and the type of the
        source for rewritten ones.
    on_overflow
        Arrays with finite values beyond `dtype` are stored as ``float32``, raise an ``error``, or
        are ``clip``-ped.
    codec
        Name of the codec. None means ``gzip`` for new archives, and the codec of the source for
        rewritten ones.

    Raises
    ------
    OptionError
        `dtype` or `on_overflow` has another value.
    """

    tier: Tier | Precision | None = None
    scales: PathLike | None = None
    calibration_samples: int = AUTOMATIC_SAMPLES
    dtype: DtypePolicy | None = None
    on_overflow: OverflowPolicy = "float32"
    codec: str | None = None

    __repr__ = short_repr

    @classmethod
    def of(cls, value: PrecisionOptions | Tier | Precision | None) -> PrecisionOptions:
        """The options that a caller gave as such, as a tier, or as a `Precision`."""
        return value if isinstance(value, PrecisionOptions) else cls(tier=value)

    @property
    def precision(self) -> Precision:
        """The precision of a new archive.

        Raises
        ------
        PrecisionError
            No tier has that name.
        """
        return EXACT if self.tier is None else Precision.of(self.tier)


@checked_options
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TargetOptions:
    """What happens to the archives that are written.

    Attributes
    ----------
    shard_samples
        Largest number of samples in an archive; ``-00000`` and so on go before the suffix.
    overwrite
        Replace existing targets, each in one atomic step.
    skip_existing
        Keep targets that exist if they are what would be written; resumes a stopped run. For
        ``convert`` only.
    compare
        How `skip_existing` compares a source with the one that was recorded: by size, ``time`` of
        the last change and digest of its ends; without the time (``ends``), for sources that were
        copied; or by size and digest of all bytes (``content``), which a conversion with this
        option records.
    verify
        Read every file back and compare it with its source before it gets its name.
    dry_run
        Check sources and options; write nothing.
    workers
        Threads; None for one per core.

    Raises
    ------
    OptionError
        Both `overwrite` and `skip_existing` are given, `compare` has another value, or `workers`
        is below 1.
    """

    shard_samples: int | None = None
    overwrite: bool = False
    skip_existing: bool = False
    compare: Compare = "time"
    verify: bool = True
    dry_run: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.overwrite and self.skip_existing:
            message = "overwrite=True and skip_existing=True contradict each other; leave one out"
            raise OptionError(message)

    __repr__ = short_repr

    def check_unused(self, *names: str) -> None:
        """Reject options that a function cannot follow; OptionError names the first."""
        for name in names:
            if getattr(self, name) != getattr(TargetOptions(), name):
                message = f"{name} has no meaning here, only for h5traces.convert; leave it out"
                raise OptionError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """What a writer of archives needs of both groups, with defaults filled in.

    ``scales`` are those of quantised hidden states; ``earlier_precisions`` say what the arrays lost
    before. ``foreign`` says whether objects of other programs are copied with samples of archives.
    """

    dtype: DtypePolicy = "float16"
    on_overflow: OverflowPolicy = "float32"
    codec: str = GZIP.name
    workers: int | None = None
    overwrite: bool = False
    verify: bool = True
    precision: Precision = EXACT
    scales: ScaleSet | None = None
    earlier_precisions: tuple[Precision, ...] = ()
    foreign: Foreign = "keep"

    @classmethod
    def of(
        cls,
        precision: PrecisionOptions,
        target: TargetOptions,
        *,
        scales: ScaleSet | None = None,
        earlier_precisions: tuple[Precision, ...] = (),
        foreign: Foreign = "keep",
    ) -> WriteOptions:
        """Join what a caller chose; None means the default of a new archive."""
        return cls(
            dtype=precision.dtype or "float16",
            on_overflow=precision.on_overflow,
            codec=precision.codec or GZIP.name,
            workers=target.workers,
            overwrite=target.overwrite,
            verify=target.verify,
            precision=precision.precision,
            scales=scales,
            earlier_precisions=earlier_precisions,
            foreign=foreign,
        )

    def __post_init__(self) -> None:
        check_type(self.precision, self.dtype)
        if self.foreign not in get_args(Foreign):
            message = f"foreign is {self.foreign!r}, expected 'keep' or 'drop'"
            raise OptionError(message)


def check_type(precision: Precision, dtype: DtypePolicy) -> None:
    """Reject a precision that needs another stored type."""
    if not precision.is_exact and dtype != "float16":
        message = f"precision {precision} needs dtype float16, not {dtype}; leave one out"
        raise PrecisionError(message)


@dataclass(slots=True)
class WriteSummary:
    """What was written.

    Attributes
    ----------
    raw_nbytes, stored_nbytes
        Bytes of the arrays before and after compression, by kind (``other`` for the rest).
    counts
        Values that are not finite or were changed by casts, by kind.
    coverage
        Number of samples by coverage.
    kept_exact
        Arrays stored in float16 although the precision asks for less, by reason.
    num_exceptions
        Values listed beside the arrays, by kind.
    left_foreign
        Objects of other programs that could not be copied, and why.
    """

    path: Path
    num_samples: int = 0
    raw_nbytes: Counter[str] = field(default_factory=Counter)
    stored_nbytes: Counter[str] = field(default_factory=Counter)
    nbytes: int = 0
    counts: dict[str, CastCounts] = field(default_factory=dict)
    coverage: Counter[str] = field(default_factory=Counter)
    kept_exact: Counter[str] = field(default_factory=Counter)
    num_exceptions: Counter[str] = field(default_factory=Counter)
    left_foreign: list[str] = field(default_factory=list)


def precision_warnings(summary: WriteSummary) -> list[str]:
    """Limits that the chosen precision met."""
    found = [
        f"{counted(count, 'array is', 'arrays are')} stored in float16, not as the tier asks: "
        f"{reason}"
        for reason, count in sorted(summary.kept_exact.items())
    ]
    for kind, count in summary.num_exceptions.items():
        share = count * _HALF_NBYTES / max(1, summary.raw_nbytes[kind])
        if share > _MANY_EXCEPTIONS:
            found.append(
                f"{kind}: {share:.1%} of the values lie beyond their scales and are stored one by "
                "one, which takes space; 'h5traces calibrate' on samples like these gives better "
                "scales"
            )
    return found
