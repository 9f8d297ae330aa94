"""Options that several commands share, and the groups that are built from them."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from h5traces.cli.command import Group
from h5traces.format.dtypes import DtypePolicy, OverflowPolicy
from h5traces.format.precision import HeadMean as HeadMeanName
from h5traces.format.precision import Precision
from h5traces.format.precision import Tier as TierName
from h5traces.storage.codecs import ArrayCodec
from h5traces.writing.options import AUTOMATIC_SAMPLES, PrecisionOptions, TargetOptions

KEEP: Final = "What to keep"
PRECISION: Final = "Precision"
OUTPUT: Final = "Output"


def option(*names: str, **settings: Any) -> Any:
    """An option in a panel of the help, ``panel``."""
    return typer.Option(*names, rich_help_panel=settings.pop("panel", None), **settings)


Archives = Annotated[list[str], typer.Argument(metavar="FILE…", help="Archives, globs or folders.")]
Json = Annotated[bool, option("--json", help="One JSON document on stdout.")]
DryRun = Annotated[
    bool, option("--dry-run", panel=OUTPUT, help="Say what would be done; write nothing.")
]
Overwrite = Annotated[bool, option("--overwrite", panel=OUTPUT, help="Replace existing files.")]
Workers = Annotated[
    int | None,
    option("--workers", metavar="N", min=1, help="Threads [default: one per core]."),
]
Verify = Annotated[
    bool,
    option(
        "--verify/--no-verify",
        panel=OUTPUT,
        help="Read every new file back and compare it with its source before it gets its name.",
    ),
]
Output = Annotated[
    str,
    option("-o", "--output", panel=OUTPUT, metavar="DEST", help="An `.h5` name, or a folder/."),
]
Layers = Annotated[
    str | None,
    option(
        "--layers",
        panel=KEEP,
        metavar="0,5,10-12,last",
        help="Decoder blocks (0-based) [default: all].",
    ),
]
Samples = Annotated[
    str | None,
    option("--samples", panel=KEEP, metavar="0,3|0:100", help="Indices of samples [default: all]."),
]
NumSamples = Annotated[
    int, option("-n", "--num-samples", panel=KEEP, metavar="N", min=1, help="The first N samples.")
]
ShardSamples = Annotated[
    int | None,
    option(
        "--shard-samples", panel=OUTPUT, metavar="N", min=1, help="At most N samples per archive."
    ),
]


def _precision(
    tier: Annotated[
        TierName | None,
        option(
            panel=PRECISION,
            metavar="NAME",
            help="`exact` (no quantisation, the default for new archives); `fine` (0.01 sigma, as "
            "in bfloat16); `analysis` (0.05 sigma); `compact` (0.2 sigma, attentions "
            "averaged over heads); `native` (float16 rounded to 5 mantissa bits).",
        ),
    ] = None,
    step: Annotated[
        float | None,
        option(
            panel=PRECISION,
            metavar="C",
            help="Quantisation step of hidden states, 0.001 to 4 sigma of their channel; errors "
            "are at most half of it.",
        ),
    ] = None,
    attention_bits: Annotated[
        int | None,
        option(
            panel=PRECISION,
            metavar="BITS",
            help="Bits of attention weights, on a square-root scale.",
        ),
    ] = None,
    head_mean: Annotated[
        HeadMeanName | None,
        option(
            panel=PRECISION,
            metavar="none|beside|only",
            help="Attentions averaged over heads; `only` replaces the heads by them.",
        ),
    ] = None,
    mantissa_bits: Annotated[
        int | None,
        option(
            panel=PRECISION,
            metavar="K",
            help="Round what stays in float16 to K (1 to 9) of its 10 mantissa bits.",
        ),
    ] = None,
    scales: Annotated[
        str | None,
        option(
            panel=PRECISION,
            metavar="FILE",
            help="Written by `h5traces calibrate`, or an archive with scales [default: measured "
            "on the first samples].",
        ),
    ] = None,
    calibration_samples: Annotated[
        int,
        option(
            panel=PRECISION, metavar="N", min=1, help="Samples measured where there is no --scales."
        ),
    ] = AUTOMATIC_SAMPLES,
    dtype: Annotated[
        DtypePolicy | None,
        option(
            panel=PRECISION,
            metavar="TYPE",
            help="Stored type: `float16`, `bfloat16`, `float32`, or `auto`, the narrowest that "
            "keeps every bit [default: float16, or that of the archives read].",
        ),
    ] = None,
    on_overflow: Annotated[
        OverflowPolicy,
        option(
            panel=PRECISION,
            metavar="float32|error|clip",
            help="Arrays with finite values beyond the type are stored as float32, end the run, or "
            "are clipped.",
        ),
    ] = "float32",
    codec: Annotated[
        ArrayCodec | None,
        option(
            panel=PRECISION,
            metavar="gzip|zstd",
            help="Compression [default: gzip, or that of the archives read].",
        ),
    ] = None,
) -> PrecisionOptions:
    chosen: TierName | Precision | None = tier
    changes = {
        "step": step,
        "attention_bits": attention_bits,
        "head_mean": head_mean,
        "mantissa_bits": mantissa_bits,
    }
    if any(each is not None for each in changes.values()):
        chosen = Precision.of(tier or "exact", **changes)
    return PrecisionOptions(
        tier=chosen,
        scales=scales,
        calibration_samples=calibration_samples,
        dtype=dtype,
        on_overflow=on_overflow,
        codec=codec,
    )


def _new_file(overwrite: Overwrite = False, dry_run: DryRun = False) -> TargetOptions:
    return TargetOptions(overwrite=overwrite, dry_run=dry_run)


def _rewritten(
    overwrite: Overwrite = False,
    verify: Verify = True,
    workers: Workers = None,
    dry_run: DryRun = False,
) -> TargetOptions:
    return TargetOptions(overwrite=overwrite, verify=verify, workers=workers, dry_run=dry_run)


def _converted(
    shard_samples: ShardSamples = None,
    overwrite: Overwrite = False,
    skip_existing: Annotated[
        bool,
        option(
            "--skip-existing",
            panel=OUTPUT,
            help="Keep finished archives; finishes a stopped run.",
        ),
    ] = False,
    verify: Verify = True,
    workers: Annotated[
        int | None,
        option(
            metavar="N",
            min=1,
            help="Threads [default: one per core]; with several batches, processes.",
        ),
    ] = None,
    dry_run: DryRun = False,
) -> TargetOptions:
    return TargetOptions(
        shard_samples=shard_samples,
        overwrite=overwrite,
        skip_existing=skip_existing,
        verify=verify,
        workers=workers,
        dry_run=dry_run,
    )


def _extracted(
    shard_samples: ShardSamples = None,
    verify: Verify = True,
    workers: Workers = None,
    dry_run: DryRun = False,
) -> TargetOptions:
    return TargetOptions(
        shard_samples=shard_samples, verify=verify, workers=workers, dry_run=dry_run
    )


PrecisionGroup = Annotated[PrecisionOptions, Group(_precision)]
NewFile = Annotated[TargetOptions, Group(_new_file)]
Rewritten = Annotated[TargetOptions, Group(_rewritten)]
Converted = Annotated[TargetOptions, Group(_converted)]
Extracted = Annotated[TargetOptions, Group(_extracted)]
