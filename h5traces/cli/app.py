"""The commands of ``h5traces``, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from h5traces.cli.console import print_line
from h5traces.cli.converting import convert
from h5traces.cli.extracting import estimate, extract
from h5traces.cli.features import features
from h5traces.cli.fidelity import fidelity
from h5traces.cli.labelling import label
from h5traces.cli.looking import inspect, ls, validate, verify
from h5traces.cli.precision import calibrate
from h5traces.cli.rewriting import export, merge, repack, salvage, seal, split
from h5traces.errors import __version__
from h5traces.format import layout

app = typer.Typer(
    name="h5traces",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "The archive for LLM traces: per-layer hidden states and attentions in plain HDF5.\n\n"
        "Start with: `h5traces convert traces/ -o archives/`, then `h5traces inspect archives/`."
    ),
    epilog="Exit codes: 0 fine, 1 problems found, 2 wrong usage.",
)


def _version(value: bool) -> None:
    if value:
        print_line(f"h5traces {__version__} (format {layout.FORMAT_VERSION})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass


_COMMANDS = (
    convert,
    inspect,
    ls,
    validate,
    verify,
    repack,
    merge,
    split,
    export,
    seal,
    salvage,
    calibrate,
    label,
    features,
    extract,
    estimate,
    fidelity,
)
for _command in _COMMANDS:
    app.command()(_command)


def main() -> None:
    """Run the command line."""
    app()
