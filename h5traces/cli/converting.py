"""``h5traces convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from h5traces.cli import reports
from h5traces.cli.console import (
    EXIT_PROBLEMS,
    DryRun,
    Json,
    Layers,
    Overwrite,
    Verify,
    bytes_progress,
    fail,
    parse_layers,
    print_json,
    reported,
    warn,
)
from h5traces.cli.precision import (
    CALIBRATION_SAMPLES,
    PRECISION_ERRORS,
    AttentionBits,
    CalibrationSamples,
    HeadMean,
    MantissaBits,
    Scales,
    Step,
    Tier,
    parse_precision,
    warn_of_loss,
)
from h5traces.errors import ConversionError
from h5traces.format.dtypes import DtypePolicy, OverflowPolicy
from h5traces.rewriting.convert import convert as convert_batches
from h5traces.rewriting.reports import Progress
from h5traces.storage.codecs import ArrayCodec, tools_note
from h5traces.writing.options import PrecisionOptions, TargetOptions


def convert(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SRC…", help="Batches (`.pkl`, `.pkl.gz`), globs or folders."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="DEST", help="Folder for the archives, or one `.h5` name."
        ),
    ],
    layers: Layers = None,
    tier: Tier = None,
    step: Step = None,
    attention_bits: AttentionBits = None,
    head_mean: HeadMean = None,
    mantissa_bits: MantissaBits = None,
    scales: Scales = None,
    calibration_samples: CalibrationSamples = CALIBRATION_SAMPLES,
    dtype: Annotated[
        DtypePolicy,
        typer.Option(help="Stored type. `auto`: the narrowest that keeps every bit."),
    ] = "float16",
    on_overflow: Annotated[
        OverflowPolicy,
        typer.Option(
            help="Arrays with finite values beyond the type: store as float32, stop, or clip."
        ),
    ] = "float32",
    codec: Annotated[ArrayCodec, typer.Option(help="Compression of the arrays.")] = "gzip",
    merge: Annotated[bool, typer.Option("--merge", help="All batches into one archive.")] = False,
    shard_samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="At most N samples per archive.")
    ] = None,
    overwrite: Overwrite = False,
    skip_existing: Annotated[
        bool,
        typer.Option("--skip-existing", help="Pass over finished ones: resumes a stopped run."),
    ] = False,
    verify: Verify = True,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Threads [default: cores]; with several batches, that many processes.",
        ),
    ] = None,
    model_id: Annotated[
        str | None, typer.Option(help="Recorded model [default: from the file name].")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Recorded dataset [default: from the file name].")
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Convert legacy trace batches to archives.

    Pickles are read by an interpreter that executes nothing; samples stream through in bounded
    memory. Every archive is verified against its source before it gets its name, so the pickle may
    go when this command exits with 0. With any --tier but `exact`, it holds more than the archive.

    - `h5traces convert traces/ -o archives/`
    - `h5traces convert 'run/*.pkl.gz' -o run.h5 --merge --layers 0,5,10,15,20,25,31`
    - `h5traces convert traces/ -o archives/ --skip-existing` finishes a stopped run
    - `h5traces convert traces/ -o small/ --tier compact` gives up precision for size, within bounds
    """
    wanted = parse_layers(layers)
    with reported((ConversionError, *PRECISION_ERRORS)), bytes_progress("convert") as update:
        precision = parse_precision(tier, step, attention_bits, head_mean, mantissa_bits)

        def progress(state: Progress) -> None:
            text = f"{state.source.name}: {state.num_samples} samples"
            update(state.done_nbytes, state.total_nbytes, text)

        report = convert_batches(
            sources,
            output,
            layers=wanted,
            precision=PrecisionOptions(
                tier=precision,
                scales=scales,
                calibration_samples=calibration_samples,
                dtype=dtype,
                on_overflow=on_overflow,
                codec=codec,
            ),
            target=TargetOptions(
                shard_samples=shard_samples,
                overwrite=overwrite,
                skip_existing=skip_existing,
                verify=verify,
                dry_run=dry_run,
                workers=workers,
            ),
            merge=merge,
            model_id=model_id,
            dataset=dataset,
            progress=progress,
        )
    if json:
        print_json(report.as_dict())
    else:
        reports.print_conversion(report)
    note = tools_note(codec)
    if any(each.status == "converted" for each in report.files):
        warn_of_loss(report.precision)
        if note is not None:
            warn(note)
    for each in report.files:
        for message in each.warnings:
            warn(f"{', '.join(each.sources)}: {message}")
        if each.error is not None:
            fail(each.error)
    for leftover in report.leftovers:
        fail(leftover.reason)
    if not report.ok:
        raise typer.Exit(EXIT_PROBLEMS)
