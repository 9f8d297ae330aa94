"""``h5traces status``: runs of several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from h5traces.cli.command import EXIT_PROBLEMS, command
from h5traces.cli.console import fail, first_lines, human_size, print_json, print_line
from h5traces.cli.options import Json, option
from h5traces.format.text import counted
from h5traces.ranks.status import as_ranges
from h5traces.ranks.status import status as status_of

if TYPE_CHECKING:
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
        fail(line)
    if not found.ok:
        raise typer.Exit(EXIT_PROBLEMS)


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
        lines.append(f"to start: --array={found.array}")
    return lines
