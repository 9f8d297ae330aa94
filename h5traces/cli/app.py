"""The commands of ``h5traces``; the module of each is imported when it runs or shows its help."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from typing import Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from h5traces.cli import streams
from h5traces.cli.help import Command, group_help


class Entry(NamedTuple):
    """Facts about a command that need no import of its module.

    Attributes
    ----------
    module
        The module of ``h5traces.cli`` with a function of the command's name.
    panel
        The section of the help.
    summary
        The first line of that function's docstring.
    """

    module: str
    panel: str
    summary: str


# By panel of the help, the commands of each module, with the first lines of their docstrings.
_PANELS: Final = {
    "Make archives": {
        "converting": {
            "convert": "Convert legacy trace batches to archives.",
            "calibrate": "Measure the channels of hidden states, for lossy tiers.",
            "finish": "Pack what stopped or killed runs left in their spools.",
        },
        "extracting": {
            "extract": "Run a model on questions and archive its traces.",
            "estimate": "Estimate the size of traces, per sample and per 1000.",
        },
    },
    "Look and check": {
        "looking": {
            "inspect": "Show what archives or other files of traces hold, and their sizes.",
            "ls": "List the samples of archives.",
            "head": "Show the first samples with their texts.",
            "validate": "Report every problem of structure, schema and meaning.",
            "verify": "Compare the bytes of archives with their digests.",
        },
        "sharing": {
            "status": "Say how far a run of several ranks is.",
            "collect": "Report on, check and join what a run of several ranks made.",
        },
        "viewing": {"view": "Look at archives in the browser."},
        "plotting": {"plot": "Draw a sample as a picture."},
    },
    "Rewrite archives": {
        "rewriting": {
            "repack": "Rewrite archives with fewer layers or samples, or more compactly.",
            "merge": "Merge several archives of one model into one.",
            "split": "Cut archives into shards.",
            "export": "Write the samples in another format.",
            "seal": "Rebuild the index of archives that another program changed.",
            "salvage": "Copy the intact samples of a damaged archive.",
            "label": "Join labels or scores to archives by question id.",
        }
    },
    "Use archives": {
        "cataloguing": {"index": "Write the catalogue of many shards, or bring it up to date."},
        "using": {
            "features": "Compute features: a row for every sample.",
            "fidelity": "Compare a lossy archive with its original, layer by layer.",
        },
    },
}
COMMANDS: Final = {
    name: Entry(module, panel, summary)
    for panel, modules in _PANELS.items()
    for module, commands in modules.items()
    for name, summary in commands.items()
}


def load(name: str) -> TyperCommand:
    """Import a command."""
    function = getattr(import_module(f"h5traces.cli.{COMMANDS[name].module}"), name)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name, cls=Command)(function)
    command: Any = typer.main.get_command(single)
    return command  # type: ignore[no-any-return]  # typer gives the class it was handed


class _Commands(TyperGroup):
    """All commands. Listing them, for help and completion, imports none of their modules."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: Command(name, help=each.summary) for name, each in COMMANDS.items()}

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", "COMMAND…"]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            raise typer.Exit(2)  # wrong usage
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load(str(name)), rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        listed = [(name, each.panel, each.summary) for name, each in COMMANDS.items()]
        formatter.write(group_help(self, ctx, listed))


app = typer.Typer(
    name="h5traces",
    cls=_Commands,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "The archive for LLM traces: per-layer hidden states and attentions in plain HDF5.\n\n"
        "Start with `h5traces convert traces/ -o archives/`, then `h5traces inspect archives/`. "
        "`h5traces COMMAND --help` describes each command."
    ),
    epilog="Exit codes: 0 good, 1 problems found, 2 wrong usage.",
)


def _version(value: bool) -> None:
    if value:
        from h5traces.errors import __version__
        from h5traces.format.layout import FORMAT_VERSION
        from h5traces.format.native import describe

        typer.echo(f"h5traces {__version__} (format {FORMAT_VERSION}), {describe()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    streams.prepare()
    code: Any = 0
    try:
        code = _run()
        streams.flush()
    except streams.PipeClosedError:
        pass
    except streams.OutputError as error:
        from h5traces.cli.console import fail

        fail(str(error))
        code = code or 1
    # As it ends, Python looks for garbage among all objects: a second where torch was imported.
    gc.freeze()
    sys.exit(streams.exit_code(code))


def _run() -> Any:
    """The exit code of the command."""
    stdout = sys.stdout
    try:
        with streams.output_errors():
            app()
    except SystemExit as stop:
        # As typer does for a pipe that nobody reads any more while it shows help.
        if sys.stdout is not stdout:
            streams.discard(stdout)
            return 0
        return stop.code
    return 0
