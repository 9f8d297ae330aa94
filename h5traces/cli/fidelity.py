"""``h5traces fidelity``."""

from __future__ import annotations

from typing import Annotated

import typer

from h5traces.cli import reports
from h5traces.cli.command import EXIT_PROBLEMS, command
from h5traces.cli.console import count_progress, fail, first_lines, print_json, warn
from h5traces.cli.options import Json, option
from h5traces.errors import H5TracesError
from h5traces.fidelity import FidelityReport, compare

_LIMITS = "Limits"


@command(H5TracesError, OSError)
def fidelity(
    a: Annotated[str, typer.Argument(metavar="A", help="The reference: archive, glob or folder.")],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The archive to judge, of the same samples.")
    ],
    *,
    threshold: Annotated[
        float,
        option(None, "--threshold T", "An edge is where the mean over heads is greater.", min=0),
    ] = 0.01,
    max_sigma: Annotated[
        float | None,
        option(
            _LIMITS, "--max-sigma X", "Exit 1 where a state is off by more than X sigma.", min=0
        ),
    ] = None,
    max_flips: Annotated[
        float | None,
        option(
            _LIMITS,
            "--max-flips X",
            "Exit 1 where more than the share X of a layer's edges flip.",
            min=0,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compare a lossy archive with its original, layer by layer.

    States: error in units of each channel's standard deviation sigma (NRMSE, largest), relative
    error, cosine of each token, share of tokens that keep their nearest neighbour, and NRMSE of the
    difference to the layer before. Attentions: error, edges that appear or vanish at the threshold,
    divergence (KL, nats) of each row. `docs/fidelity.md` defines each measure and its limits.

    Samples are matched by id and generation, without ids by index. Exit code 0 however large the
    errors are, unless `--max-sigma` or `--max-flips` is exceeded (1); 2 where nothing can be
    compared.

    - `h5traces fidelity exact.h5 small.h5`
    - `h5traces fidelity exact/ small/ --max-sigma 0.06 --max-flips 0.005 --json`
    """
    with count_progress("comparing") as update:
        report = compare(a, b, threshold=threshold, progress=update)
    exceeding = report.exceeding(max_sigma=max_sigma, max_flips=max_flips)
    if json:
        print_json({**report.as_dict(), "exceeding": exceeding})
    else:
        reports.print_fidelity(report)
    for line in _notes(report):
        warn(line)
    for line in exceeding:
        fail(line)
    if exceeding:
        raise typer.Exit(EXIT_PROBLEMS)


def _notes(report: FidelityReport) -> list[str]:
    """What was not compared."""
    lines = reports.unmatched_lines(report.only_in_a, "A")
    lines += reports.unmatched_lines(report.only_in_b, "B")
    return lines + first_lines(report.skipped)
