"""``h5traces status`` and ``collect``: runs of several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from h5traces.cli import reports
from h5traces.cli.command import EXIT_PROBLEMS, command
from h5traces.cli.console import (
    count_progress,
    fail,
    first_lines,
    human_size,
    print_json,
    print_line,
    warn,
    with_flags,
)
from h5traces.cli.converting import tell
from h5traces.cli.options import OUTPUT, Json, MergeOrder, Workers, option
from h5traces.format.text import counted
from h5traces.ranks.status import as_ranges
from h5traces.ranks.status import status as status_of
from h5traces.rewriting.reports import ConversionReport

if TYPE_CHECKING:
    from h5traces.checking.collect import CollectReport
    from h5traces.ranks.status import RunStatus

Folder = Annotated[str, typer.Argument(metavar="DEST", help="The output of the run.")]


@command()
def status(
    folder: Folder,
    *,
    missing: Annotated[
        bool, option(None, "--missing", "Print the ranks to start, for `sbatch --array=`.")
    ] = False,
    json: Json = False,
) -> None:
    """Say how far a run of several ranks is.

    A rank is at work while it holds its lock and touches its file in `DEST/ranks` every 10 seconds.
    Exit code 0 only if all the work is done.

    - `h5traces status archives/`
    - `sbatch --array=$(h5traces status archives/ --missing) convert.sh`
    """
    found = status_of(folder)
    if missing:
        print_line(found.array)
    elif json:
        print_json({**found.as_dict(), "array": found.array})
    else:
        for line in _lines(found):
            print_line(line)
    for line in first_lines(found.errors):
        fail(with_flags(line))
    if not found.ok:
        raise typer.Exit(EXIT_PROBLEMS)


@command()
def collect(
    folder: Folder,
    *,
    output: Annotated[
        str | None,
        option(
            OUTPUT,
            "-o --output NAME",
            "Join the archives: `.h5` for one archive, `.parquet` for a catalogue.",
        ),
    ] = None,
    order: MergeOrder = None,
    verify: Annotated[
        Literal["sample", "all", "none"],
        option(
            None,
            "--verify sample|all|none",
            "Which archives are compared with their checksums: 60 drawn at random, all or none.",
        ),
    ] = "sample",
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Report on, check and join what a run of several ranks made.

    Says what is missing and what is there twice. Of an extraction, what dead ranks left in the
    spool is packed where a shard is complete. Exit code 0 only if all the work is done and no
    archive is damaged; only then archives are joined.

    - `h5traces collect archives/`
    - `h5traces collect archives/ -o run.parquet --verify all`
    - `h5traces collect archives/ -o run.h5 --order id`
    """
    from h5traces.checking.collect import collect as collect_run

    with count_progress("verify") as update:
        report = collect_run(
            folder, output, verify=verify, order=order, workers=workers, progress=update
        )
    if json:
        print_json(report.as_dict())
    else:
        _print_collected(report)
    tell(ConversionReport(files=report.files))
    for line in (*first_lines(report.warnings), *first_lines(report.duplicates)):
        warn(line)
    for line in first_lines([f"left out: {each['message']}" for each in report.left_out]):
        warn(line)
    for line in first_lines([f"missing: {each}" for each in report.missing]):
        fail(line)
    for line in first_lines(report.problems):
        fail(line)
    if not report.ok:
        raise typer.Exit(EXIT_PROBLEMS)


def _print_collected(report: CollectReport) -> None:
    reports.print_conversion(ConversionReport(files=report.files))
    for line in _lines(report.status):
        print_line(line)
    for path in report.packed:
        print_line(f"packed {path}")
    print_line(
        f"{counted(report.num_archives, 'archive')} with {counted(report.num_samples, 'sample')}, "
        f"{report.num_verified} verified; {'complete' if report.is_complete else 'not complete'}"
    )
    if report.output is not None:
        print_line(f"wrote {report.output}")


def _lines(found: RunStatus) -> list[str]:
    groups = {
        "done": found.done,
        "running": found.running,
        "failed": found.failed,
        "missing": found.missing,
    }
    ranks = [f"{len(some)} {name} ({as_ranges(some)})" for name, some in groups.items() if some]
    share = found.done_cost / found.total_cost if found.total_cost else float(found.ok)
    lines = [
        f"{found.folder}: {found.command}, {counted(found.world_size, 'rank')}: {', '.join(ranks)}",
        f"{found.num_done} of {found.num_items} done ({share:.1%}), {found.num_failed} failed; "
        f"{counted(found.num_samples, 'sample')}, {human_size(found.nbytes)}",
    ]
    if found.running:
        left = "unknown" if found.seconds_left is None else f"{found.seconds_left / 60:.1f} minutes"
        lines.append(f"{found.rate:,.0f} {found.unit}/s, time left: {left}")
    if found.array:
        lines.append(f"to start: --array={found.array}, or any number of ranks; the rest is kept")
    return lines
