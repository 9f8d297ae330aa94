"""``h5traces label``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from h5traces.cli import reports
from h5traces.cli.console import Archives, DryRun, Json, count_progress, print_json, reported, warn
from h5traces.errors import ArchiveExistsError
from h5traces.format.text import and_more
from h5traces.rewriting.label import THRESHOLD, LabelReport, ScoreColumns
from h5traces.rewriting.label import label as label_archives
from h5traces.writing.options import TargetOptions


def label(
    sources: Archives,
    table: Annotated[Path, typer.Argument(metavar="SCORES.csv", help="The table of scores.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DEST", help="A new archive that holds the labels itself."
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Put the labels here, not beside the archives."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(metavar="NUMBER", help="A label is 1 where the score is below this.")
    ] = THRESHOLD,
    scores_only: Annotated[
        bool, typer.Option("--scores-only", help="Keep the scores and make no labels.")
    ] = False,
    id_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of ids.")
    ] = ScoreColumns().id,
    score_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of scores.")
    ] = ScoreColumns().score,
    partial: Annotated[
        bool,
        typer.Option("--partial", help="Go on where samples have no score; these get no label."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace labels, or an archive, that exist.")
    ] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Join scores to archives by question id.

    Writes `<archive>.labels.json` beside each archive; archives are never changed. A sample without
    a score is an error, unless --partial leaves it without a label: none becomes 0 by itself. Ids
    that only the table has are counted.

    - `h5traces label run.h5 scores.csv`
    - `h5traces label shards/*.h5 scores.csv --threshold 0.4 --dry-run`
    - `h5traces label run.h5 scores.csv -o labelled.h5` copies chunks into a new archive
    """
    if output is not None and folder is not None:
        message = "--output makes a new archive, --folder is for labels beside archives; name one"
        raise typer.BadParameter(message)
    with reported((ArchiveExistsError,)), count_progress("joining") as update:
        report = label_archives(
            sources,
            table,
            output=output,
            folder=folder,
            threshold=None if scores_only else threshold,
            columns=ScoreColumns(id_column, score_column),
            partial=partial,
            target=TargetOptions(overwrite=overwrite, dry_run=dry_run),
            progress=update,
        )
    if json:
        print_json(report.as_dict())
    else:
        reports.print_labels(report, dry_run=dry_run)
    _warn(report)


def _warn(report: LabelReport) -> None:
    """What did not join, on stderr."""
    found = {
        "samples without a score stay without a label": report.missing,
        "samples share an id and stay without a label": report.ambiguous,
        "ids of the table are in none of the archives": report.unknown,
        "rows of the table have no score": report.unscored,
    }
    for what, names in found.items():
        if names:
            warn(f"{len(names)} {what}: {and_more(names)}")
