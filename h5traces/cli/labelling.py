"""``h5traces label``."""

from __future__ import annotations

from typing import Annotated

import typer

from h5traces.cli import reports
from h5traces.cli.command import command
from h5traces.cli.console import count_progress, print_json, warn
from h5traces.cli.options import OUTPUT, Archives, Json, NewFile, option
from h5traces.format.text import and_more
from h5traces.rewriting.label import THRESHOLD, LabelReport, ScoreColumns
from h5traces.rewriting.label import label as label_archives

_LABELS = "Labels"
_COLUMNS = ScoreColumns()


@command()
def label(
    sources: Archives,
    table: Annotated[str, typer.Argument(metavar="SCORES.csv", help="The table of scores.")],
    *,
    threshold: Annotated[
        float, option(_LABELS, "--threshold NUMBER", "A label is 1 where the score is below this.")
    ] = THRESHOLD,
    scores_only: Annotated[
        bool, option(_LABELS, "--scores-only", "Keep the scores and make no labels.")
    ] = False,
    partial: Annotated[
        bool, option(_LABELS, "--partial", "Accept samples without a score; they get no label.")
    ] = False,
    id_column: Annotated[str, option(_LABELS, "--id-column NAME", "Column of ids.")] = _COLUMNS.id,
    score_column: Annotated[
        str, option(_LABELS, "--score-column NAME", "Column of scores.")
    ] = _COLUMNS.score,
    output: Annotated[
        str | None,
        option(
            OUTPUT,
            "-o --output DEST",
            "A new archive with the labels inside: an `.h5` name, or a folder/.",
        ),
    ] = None,
    folder: Annotated[
        str | None,
        option(OUTPUT, "--folder DIR", "Put the labels here [default: beside the archives]."),
    ] = None,
    target: NewFile,
    json: Json = False,
) -> None:
    """Join scores to archives by question id.

    Writes `<archive>.labels.json` beside each archive, where `h5traces.open` finds it; archives are
    never changed. A sample without a score is an error, or with `--partial` stays without a label.
    Ids that only the table has are counted.

    - `h5traces label run.h5 scores.csv`
    - `h5traces label shards/*.h5 scores.csv --threshold 0.4 --dry-run`
    - `h5traces label run.h5 scores.csv -o labelled.h5` copies chunks into a new archive
    """
    if output is not None and folder is not None:
        message = "--output makes a new archive, --folder is for labels beside archives; name one"
        raise typer.BadParameter(message)
    with count_progress("joining") as update:
        report = label_archives(
            sources,
            table,
            output=output,
            folder=folder,
            threshold=None if scores_only else threshold,
            columns=ScoreColumns(id_column, score_column),
            partial=partial,
            target=target,
            progress=update,
        )
    if json:
        print_json(report.as_dict())
    else:
        reports.print_labels(report, dry_run=target.dry_run)
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
