"""``h5traces seal``, ``export``, ``repack``, ``merge``, ``split`` and ``salvage``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from h5traces.checking.salvage import salvage as salvage_archive
from h5traces.checking.seal import seal as seal_archive
from h5traces.cli.console import (
    EXIT_PROBLEMS,
    Archives,
    DryRun,
    Json,
    Layers,
    Overwrite,
    Verify,
    count_progress,
    fail,
    human_size,
    parse_layers,
    print_json,
    print_line,
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
from h5traces.errors import ArchiveExistsError, ConversionError, LossyArchiveError
from h5traces.format.dtypes import DtypePolicy
from h5traces.paths import expand_paths
from h5traces.rewriting.export import export as export_archive
from h5traces.rewriting.repack import RepackReport
from h5traces.rewriting.repack import merge as merge_archives
from h5traces.rewriting.repack import repack as repack_archives
from h5traces.rewriting.repack import split as split_archives
from h5traces.storage.codecs import ArrayCodec, tools_note
from h5traces.writing.options import PrecisionOptions, TargetOptions

Output = Annotated[Path, typer.Option("-o", "--output", metavar="DEST", help="The new archive.")]


def seal(
    sources: Archives,
    accept_edits: Annotated[
        bool,
        typer.Option("--accept-edits", help="Seal although values or metadata were changed."),
    ] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Rebuild the index of archives that another program changed.

    Any open for writing removes the footer; archives are then read through HDF5, correctly but
    slowly. Sealing reads every chunk, and refuses if contents no longer fit their digests.
    """
    found = []
    with reported():
        for path in expand_paths(sources):
            with count_progress(path.name) as update:
                found += seal_archive(
                    path, accept_edits=accept_edits, dry_run=dry_run, progress=update
                )
    if json:
        print_json([each.as_dict() for each in found])
    for each in found:
        for place in each.edited:
            warn(f"{each.path}: {place} was changed since the archive was written")
        if each.sealed and not json:
            print_line(f"{each.path}: sealed, {each.num_samples} samples")
        elif each.edited and not accept_edits:
            fail(f"{each.path}: not sealed; --accept-edits seals it as it is now")
    if any(each.edited and not accept_edits for each in found):
        raise typer.Exit(EXIT_PROBLEMS)


def export(
    source: Annotated[str, typer.Argument(metavar="FILE", help="Archive, glob or folder.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DEST", help="`.pkl`, `.pkl.gz` or `.h5`.")
    ],
    dtype: Annotated[
        DtypePolicy | None, typer.Option(help="Stored type of an `.h5` export [default: float32].")
    ] = None,
    numpy: Annotated[
        bool, typer.Option("--numpy", help="Arrays where the source held torch tensors.")
    ] = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Write a legacy batch, or an archive for viewers without float16.

    - `h5traces export run.h5 -o run.pkl.gz`
    - `h5traces export run.h5 -o run_float32.h5` for browser viewers that cannot show float16
    """
    with reported((ConversionError, ArchiveExistsError)), count_progress(str(output)) as update:
        export_archive(
            source,
            output,
            dtype=dtype,
            container="numpy" if numpy else "source",
            overwrite=overwrite,
            dry_run=dry_run,
            progress=update,
        )
    print_line(f"{'would write' if dry_run else 'wrote'} {output}")


def parse_samples(value: str | None) -> slice | list[int] | None:
    """Sample indices from ``0,3,7`` or a slice such as ``0:100`` or ``::10``.

    Raises
    ------
    typer.BadParameter
        The text is something else.
    """
    if value is None:
        return None
    try:
        if ":" in value:
            return slice(*(int(part) if part else None for part in value.split(":")))
        return [int(part) for part in value.split(",")]
    except (ValueError, TypeError):
        message = f"{value!r}: expected indices such as 0,3,7 or a slice such as 0:100"
        raise typer.BadParameter(message) from None


def _rewrite(
    run: Callable[..., RepackReport], output: Path, target: TargetOptions, codec: str, *, json: bool
) -> None:
    """Run a rewrite with progress, and say what it did."""
    usage = (ArchiveExistsError, IndexError, LossyArchiveError, *PRECISION_ERRORS)
    with reported(usage), count_progress(str(output)) as update:
        report = run(target=target, progress=update)
    if json:
        print_json(report.as_dict())
    else:
        print_line(_summary(report, dry_run=target.dry_run))
    for message in report.warnings:
        warn(message)
    if not target.dry_run:
        warn_of_loss(report.precision)
    note = tools_note(codec)
    if note is not None:
        warn(note)


def _summary(report: RepackReport, *, dry_run: bool) -> str:
    targets = report.targets[0]
    if len(report.targets) > 1:
        targets += f" … {report.targets[-1]}"
    how = "chunks copied" if report.copied else "compressed anew"
    if dry_run:
        return f"would write {targets}: {report.num_samples} samples, {how}"
    sizes = f"{human_size(report.source_nbytes)} -> {human_size(report.target_nbytes)}"
    return f"wrote {targets}: {report.num_samples} samples, {sizes}, {how}"


def repack(
    sources: Archives,
    output: Output,
    layers: Layers = None,
    samples: Annotated[
        str | None, typer.Option(metavar="0,3|0:100", help="Keep only these samples, by index.")
    ] = None,
    tier: Tier = None,
    step: Step = None,
    attention_bits: AttentionBits = None,
    head_mean: HeadMean = None,
    mantissa_bits: MantissaBits = None,
    scales: Scales = None,
    calibration_samples: CalibrationSamples = CALIBRATION_SAMPLES,
    dtype: Annotated[DtypePolicy | None, typer.Option(help="Cast the arrays anew.")] = None,
    codec: Annotated[ArrayCodec | None, typer.Option(help="Compress the arrays anew.")] = None,
    overwrite: Overwrite = False,
    verify: Verify = True,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Rewrite archives with fewer layers or samples, or more compactly.

    Without --tier, --dtype or --codec, chunks are copied byte for byte, as fast as the disk is.

    - `h5traces repack run.h5 -o seven.h5 --layers 0,5,10,15,20,25,31`
    - `h5traces repack run.h5 -o fast.h5 --codec zstd`
    - `h5traces repack run.h5 -o small.h5 --tier analysis`
    """
    with reported(PRECISION_ERRORS):
        precision = parse_precision(tier, step, attention_bits, head_mean, mantissa_bits)
    run = partial(
        repack_archives,
        sources,
        output,
        layers=parse_layers(layers),
        samples=parse_samples(samples),
        precision=PrecisionOptions(
            tier=precision,
            scales=scales,
            calibration_samples=calibration_samples,
            dtype=dtype,
            codec=codec,
        ),
    )
    target = TargetOptions(overwrite=overwrite, verify=verify, dry_run=dry_run)
    _rewrite(run, output, target, codec or "gzip", json=json)


def merge(
    sources: Archives,
    output: Output,
    overwrite: Overwrite = False,
    verify: Verify = True,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Merge several archives of one model into one.

    Chunks are copied byte for byte.

    - `h5traces merge shards/*.h5 -o run.h5`
    """
    target = TargetOptions(overwrite=overwrite, verify=verify, dry_run=dry_run)
    _rewrite(partial(merge_archives, sources, output), output, target, "gzip", json=json)


def split(
    sources: Archives,
    output: Output,
    samples: Annotated[
        int, typer.Option("-n", "--samples", metavar="N", min=1, help="Samples per archive.")
    ],
    overwrite: Overwrite = False,
    verify: Verify = True,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Cut archives into shards.

    Chunks are copied byte for byte.

    - `h5traces split run.h5 -o shards/run.h5 -n 250` writes `shards/run-00000.h5` and so on
    """
    run = partial(split_archives, sources, output, samples)
    target = TargetOptions(overwrite=overwrite, verify=verify, dry_run=dry_run)
    _rewrite(run, output, target, "gzip", json=json)


def salvage(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="The damaged archive.")],
    output: Output,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Copy the intact samples of a damaged archive.

    Exit code 1 if samples were left behind.

    - `h5traces salvage damaged.h5 -o saved.h5`
    """
    with reported((ArchiveExistsError,)), count_progress(source.name) as update:
        report = salvage_archive(
            source, output, overwrite=overwrite, dry_run=dry_run, progress=update
        )
    if json:
        print_json(report.as_dict())
    else:
        done = "would save" if dry_run else "saved"
        print_line(
            f"{done} {report.num_saved} samples in {report.target}, lost {report.lost_samples}"
        )
    for each in report.lost:
        warn(f"{source}: {each.loc}: {each.message}")
    if report.lost:
        raise typer.Exit(EXIT_PROBLEMS)
