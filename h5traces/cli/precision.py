"""Options of precision that several commands share, and ``h5traces calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from h5traces.cli.console import (
    DryRun,
    Json,
    Layers,
    Overwrite,
    count_progress,
    parse_layers,
    print_json,
    print_line,
    reported,
    warn,
)
from h5traces.errors import ArchiveExistsError, ConversionError, PrecisionError
from h5traces.format.precision import HeadMean as HeadMeanName
from h5traces.format.precision import Precision
from h5traces.format.precision import Tier as TierName
from h5traces.writing.calibrate import DEFAULT_SAMPLES
from h5traces.writing.calibrate import calibrate as calibrate_sources
from h5traces.writing.options import AUTOMATIC_SAMPLES

PRECISION_ERRORS = (PrecisionError,)

Tier = Annotated[
    TierName | None,
    typer.Option(
        help="How precisely: `exact`; `fine` (0.01 sigma, like computing in bfloat16); `analysis` "
        "(0.05 sigma); `compact` (0.2 sigma, attentions averaged over heads); `native` (float16 "
        "rounded to 5 mantissa bits).",
    ),
]
Step = Annotated[
    float | None,
    typer.Option(
        metavar="C",
        help="Hidden states in steps of C sigma (0.001 to 4) of their channel: off by C/2 at most.",
    ),
]
AttentionBits = Annotated[
    Literal["8"] | None,
    typer.Option(help="Attention weights in 8 bits, on a square-root scale."),
]
HeadMean = Annotated[
    HeadMeanName | None,
    typer.Option(help="Attentions averaged over heads: not stored, beside the heads, or `only`."),
]
MantissaBits = Annotated[
    int | None,
    typer.Option(
        metavar="K", help="Round what stays in float16 to K (1 to 9) of its 10 mantissa bits."
    ),
]
Scales = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What `h5traces calibrate` wrote, or an archive [default: measured on the first "
        "samples].",
    ),
]
CalibrationSamples = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Samples to measure steps on, without --scales."),
]
CALIBRATION_SAMPLES = AUTOMATIC_SAMPLES

# Sigma of so many is uncertain by a tenth.
_FEW_TOKENS = 100


def parse_precision(
    tier: TierName | None,
    step: float | None,
    attention_bits: str | None,
    head_mean: HeadMeanName | None,
    mantissa_bits: int | None,
) -> Precision | None:
    """What the options say together; None where none was given.

    Raises
    ------
    PrecisionError
        They do not go together.
    """
    if (tier, step, attention_bits, head_mean, mantissa_bits) == (None,) * 5:
        return None
    return Precision.of(
        tier or "exact",
        step=step,
        attention_bits=None if attention_bits is None else 8,
        head_mean=head_mean,
        mantissa_bits=mantissa_bits,
    )


def warn_of_loss(precision: str | None) -> None:
    """Say once that something was given up."""
    if precision is not None:
        warn(f"{precision}: the archives hold less than their sources; keep those to have it all")


def calibrate(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SRC…", help="Archives or batches of one model, globs or folders."),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="SCALES", help="The new file of scales.")
    ],
    samples: Annotated[
        int, typer.Option("-n", "--samples", metavar="N", min=1, help="Samples to look at.")
    ] = DEFAULT_SAMPLES,
    layers: Layers = None,
    model_id: Annotated[
        str | None, typer.Option(help="Recorded model [default: as the sources say].")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Measure the channels of hidden states, for lossy tiers.

    The first token of each sample and massive activations are left out. Whatever the samples, the
    bound on the error holds for all data: values beyond the scales are stored one by one.

    - `h5traces calibrate traces/ -o scales.h5`
    - `h5traces convert traces/ -o archives/ --tier analysis --scales scales.h5`
    """
    errors = (ArchiveExistsError, ConversionError, PrecisionError)
    with reported(errors), count_progress("calibrate") as update:
        report = calibrate_sources(
            sources,
            output,
            samples=samples,
            layers=parse_layers(layers),
            model_id=model_id,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=update,
        )
    if json:
        print_json(report.as_dict())
    else:
        print_line(
            f"{'would write' if dry_run else 'wrote'} {report.path}: {len(report.layers)} layers, "
            f"{report.hidden_size} channels, from {report.num_tokens} tokens of "
            f"{report.num_samples} samples"
        )
    if report.num_tokens < _FEW_TOKENS:
        warn(f"{report.num_tokens} tokens tell little; 1000 or more tell sigma to a few per cent")
    if report.num_not_finite:
        warn(f"{report.num_not_finite} tokens hold NaN or Inf and were left out")
