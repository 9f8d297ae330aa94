"""``h5traces convert``, ``calibrate`` and ``finish``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from h5traces.archive.opening import open as open_archive
from h5traces.cli import reports
from h5traces.cli.command import EXIT_PROBLEMS, EXIT_USAGE, command
from h5traces.cli.console import (
    bytes_progress,
    count_progress,
    fail,
    finding_line,
    first_lines,
    note,
    print_json,
    print_line,
    warn,
)
from h5traces.cli.options import (
    OUTPUT,
    Checks,
    Converted,
    Json,
    Layers,
    NewFile,
    NumSamples,
    Output,
    PrecisionGroup,
    Ranks,
    Reading,
    Verify,
    Workers,
    option,
)
from h5traces.errors import ConversionError
from h5traces.format.text import and_more, counted
from h5traces.meaning.checks import CHECKS
from h5traces.storage.codecs import tools_note
from h5traces.writing.options import DEFAULT_SAMPLES, TargetOptions

if TYPE_CHECKING:
    from h5traces.rewriting.reports import ConversionReport, Progress

# Sigma of this many values is uncertain by a tenth.
_FEW_TOKENS = 100


@command(ConversionError)
def convert(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SRC…", help="Batches of traces, globs or folders."),
    ],
    *,
    layers: Layers = None,
    reading: Reading,
    checks: Checks,
    precision: PrecisionGroup,
    output: Output,
    merge: Annotated[bool, option(OUTPUT, "--merge", "All batches into one archive.")] = False,
    target: Converted,
    model_id: Annotated[
        str | None,
        option(OUTPUT, "--model-id ID", "Model to record [default: from the file name]."),
    ] = None,
    dataset: Annotated[
        str | None,
        option(OUTPUT, "--dataset NAME", "Data set to record [default: from the file name]."),
    ] = None,
    ranks: Ranks,
    json: Json = False,
) -> None:
    """Convert legacy trace batches to archives.

    Nothing in a pickle is executed; samples stream through in bounded memory. Arrays are stored in
    float16 unless `--dtype` says otherwise; the summary says what the cast changed. Every archive
    is compared with its source before it gets its name. Delete a pickle only where the archive is
    lossless and holds all layers, or where you can do without the rest.

    - `h5traces convert traces/ -o archives/`
    - `h5traces convert traces/ -o archives/ --dtype auto` keeps every bit
    - `h5traces convert 'run/*.pkl.gz' -o run.h5 --merge --layers 0,5,10,15,20,25,31`
    - `h5traces convert traces/ -o archives/ --skip-existing` finishes a stopped run
    - `h5traces convert traces/ -o small/ --tier compact` trades precision for size
    - `h5traces convert traces/ -o s3://bucket/run/` uploads each archive when it is verified
    """
    # Not above, since help does not need it.
    from h5traces.rewriting.convert import convert as convert_batches

    with bytes_progress() as update:

        def progress(state: Progress) -> None:
            text = f"{state.source.name}: {counted(state.num_samples, 'sample')}"
            update(state.done_nbytes, state.total_nbytes, text)

        report = convert_batches(
            sources,
            output,
            layers=layers,
            precision=precision,
            target=target,
            merge=merge,
            reading=reading,
            checks=checks,
            model_id=model_id,
            dataset=dataset,
            progress=progress,
            **ranks,
        )
    if json:
        print_json(report.as_dict())
    else:
        reports.print_conversion(report)
    if any(each.status == "converted" for each in report.files):
        reports.warn_of_loss(report.precision)
        reports.warn_of(tools_note(precision.codec))
    tell(report)
    for line in first_lines(report.problems, 20):
        fail(line)
    _note(report)
    if not report.ok:
        failed = [each for each in report.files if each.error is not None]
        is_usage = len(report.problems) == sum(each.is_usage_error for each in failed)
        raise typer.Exit(EXIT_USAGE if is_usage else EXIT_PROBLEMS)


def tell(report: ConversionReport) -> None:
    """Warnings and findings, the first of each check; those of several files once."""
    shared: dict[str, dict[str, list[str]]] = {}
    for each in report.files:
        told = [("", message) for message in each.warnings]
        told += [
            (found.check, finding_line(found))
            for found in each.findings
            if not report.checks.fails([found])
        ]
        for check, message in told:
            shared.setdefault(check, {}).setdefault(message, []).extend(each.sources)
    for check, messages in shared.items():
        tell = note if check and CHECKS[check].severity == "note" else warn
        lines = [f"{and_more(sources, 3)}: {message}" for message, sources in messages.items()]
        for line in first_lines(lines, what=f" of [{check}]" if check else ""):
            tell(line)


def _note(report: ConversionReport) -> None:
    """Files that need not be read, and what else is worth knowing."""
    for each in report.notes:
        note(each)
    if report.unrelated:
        files = [f"{Path(each.path).name} ({each.kind})" for each in report.unrelated]
        note(f"{counted(len(files), 'other file')} not read: {and_more(files, 8)}")


@command(ConversionError)
def calibrate(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SRC…", help="Archives or batches of one model, globs or folders."),
    ],
    *,
    layers: Layers = None,
    reading: Reading,
    num_samples: NumSamples = DEFAULT_SAMPLES,
    output: Annotated[str, option(OUTPUT, "-o --output SCALES", "The new file of scales.")],
    target: NewFile,
    model_id: Annotated[
        str | None, option(OUTPUT, "--model-id ID", "Model to record [default: from the sources].")
    ] = None,
    json: Json = False,
) -> None:
    """Measure the channels of hidden states, for lossy tiers.

    The first token of each sample and massive activations are left out. Whatever the samples, the
    bound on the error holds for all data: values beyond the scales are stored one by one.

    - `h5traces calibrate traces/ -o scales.h5`
    - `h5traces convert traces/ -o archives/ --tier analysis --scales scales.h5`
    """
    from h5traces.writing.calibrate import calibrate as calibrate_sources

    with count_progress("calibrate") as update:
        report = calibrate_sources(
            sources,
            output,
            samples=num_samples,
            layers=layers,
            reading=reading,
            model_id=model_id,
            overwrite=target.overwrite,
            dry_run=target.dry_run,
            progress=update,
        )
    if json:
        print_json(report.as_dict())
    else:
        print_line(
            f"{'would write' if target.dry_run else 'wrote'} {report.path}: "
            f"{counted(len(report.layers), 'layer')}, {report.hidden_size} channels, measured on "
            f"{counted(report.num_tokens, 'token')} of {counted(report.num_samples, 'sample')}"
        )
    if report.num_tokens < _FEW_TOKENS:
        warn(
            f"{report.num_tokens} tokens give uncertain scales; 1000 or more measure sigma to a "
            "few per cent"
        )
    if report.num_not_finite:
        warn(f"{report.num_not_finite} tokens hold NaN or Inf and were left out")


@command()
def finish(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH…", help="Outputs of runs, or their spools.")
    ],
    *,
    scales: Annotated[
        str | None,
        option(OUTPUT, "--scales FILE", "The scales that the run was given, if it was given some."),
    ] = None,
    verify: Verify = True,
    workers: Workers = None,
) -> None:
    """Pack what stopped or killed runs left in their spools.

    For runs that nobody will resume: of `extract`, of `h5traces.create`, or of a server. Every
    acknowledged sample is in an archive afterwards, and the run is finished. A finished run stays
    as it is.

    - `h5traces finish traces/`
    - `h5traces finish run.h5.spool`
    """
    from h5traces.writing.finish import finish as finish_run

    for path in paths:
        found = finish_run(
            path, scales=scales, target=TargetOptions(verify=verify, workers=workers)
        )
        if found:
            with open_archive([str(each) for each in found]) as archive:
                print_line(
                    f"{path}: {counted(len(archive), 'sample')} in {and_more(map(str, found), 1)}"
                )
        else:
            print_line(f"{path}: the run stored no sample; its spool is removed")
