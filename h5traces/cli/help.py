"""The help of commands: options in panels, names whole, readable at 80 columns."""

from __future__ import annotations

import inspect
import io
import re
import shutil
import sys
from typing import TYPE_CHECKING, Any, Final

from typer.core import TyperCommand

from h5traces.cli.streams import as_printed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console, RenderableType
    from rich.text import Text

_MOST_COLUMNS: Final = 100
# Of the column of names; descriptions start at the same place in all panels.
_NAMES_WIDTH: Final = 28
_OTHER_OPTIONS: Final = "Other"


class Command(TyperCommand):
    """A command with this help."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", *(_names(each)[0] for each in _arguments(self, ctx))]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(_command_help(self, ctx))


def _command_help(command: TyperCommand, ctx: Any) -> str:
    console = _console()
    _print_usage(console, ctx)
    _print_text(console, command.help)
    panels: dict[str, list[Any]] = {}
    for each in command.get_params(ctx):
        is_argument = each.param_type_name == "argument"
        title = getattr(each, "rich_help_panel", None) or _OTHER_OPTIONS
        panels.setdefault("Arguments" if is_argument else title, []).append(each)
    last = panels.pop(_OTHER_OPTIONS, [])
    for title, parameters in (*panels.items(), (_OTHER_OPTIONS, last)):
        _print_panel(console, title, [(*_names(each), _described(each)) for each in parameters])
    return _printed(console)


def _arguments(command: TyperCommand, ctx: Any) -> list[Any]:
    return [each for each in command.get_params(ctx) if each.param_type_name == "argument"]


def group_help(group: Any, ctx: Any, commands: Sequence[tuple[str, str, str]]) -> str:
    """The help of the program.

    Parameters
    ----------
    group, ctx
        As they are handed to ``format_help``.
    commands
        Name, panel and summary of each.
    """
    console = _console()
    _print_usage(console, ctx)
    _print_text(console, group.help)
    for title in dict.fromkeys(panel for _, panel, _ in commands):
        rows = [(name, "", summary) for name, panel, summary in commands if panel == title]
        _print_panel(console, title, rows, width=max(len(name) for name, _, _ in commands))
    options = [(*_names(each), _described(each)) for each in group.get_params(ctx)]
    _print_panel(console, "Options", options)
    _print_text(console, group.epilog)
    return _printed(console)


def _console() -> Console:
    from rich.console import Console  # only where help is shown

    return Console(
        file=io.StringIO(),
        width=min(shutil.get_terminal_size().columns, _MOST_COLUMNS),
        force_terminal=sys.stdout.isatty(),
        highlight=False,
    )


def _printed(console: Console) -> str:
    written: Any = console.file
    lines = written.getvalue().splitlines()
    return as_printed("\n".join(line.rstrip() for line in lines))


def _print_usage(console: Console, ctx: Any) -> None:
    pieces = ctx.command.collect_usage_pieces(ctx)
    console.print(_styled(" ".join(["`Usage:`", ctx.command_path, *pieces])))
    console.print()


def _print_text(console: Console, paragraphs: str | None) -> None:
    """Paragraphs, and lists whose items begin with a dash: commands, remarks as their comments."""
    from rich.padding import Padding

    for paragraph in inspect.cleandoc(paragraphs or "").split("\n\n"):
        for item in re.split(r"\n(?=- )", paragraph):
            line = " ".join(item.split())
            is_item = line.startswith("- ")
            text = re.sub(r"^- (`[^`]+`) ", r"\1  # ", line).removeprefix("- ")
            console.print(Padding(_styled(text), (0, 0, 0, 2 * is_item)))
        console.print()


def _names(parameter: Any) -> tuple[str, str]:
    """Names of an option and its value; the choices apart where they do not fit on the line."""
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper(), ""
    names = sorted((*parameter.opts, *parameter.secondary_opts), key=lambda each: each[1] == "-")
    names[0] = names[0] if names[0][1] != "-" else f"    {names[0]}"
    separator = ", " if names[0][0] == "-" else "/"
    joined = separator.join(names)
    if len(joined) > _NAMES_WIDTH:
        joined = f"{separator.strip()}\n    ".join(names)
    metavar = "" if parameter.is_flag else parameter.metavar or "TEXT"
    if len(joined.rpartition("\n")[2]) + 1 + len(metavar) <= _NAMES_WIDTH:
        return f"{joined} {metavar}".rstrip(), ""
    return joined, metavar.replace("|", ", ")


def _described(parameter: Any) -> str:
    text = parameter.help or ""
    default = parameter.default
    if parameter.required:
        text += " [required]"
    elif parameter.show_default and default not in (None, "", False) and not callable(default):
        shown = default
        if parameter.secondary_opts:
            shown = (parameter.opts if default else parameter.secondary_opts)[0].lstrip("-")
        text += f" [default: {shown}]"
    return text


def _print_panel(
    console: Console, title: str, rows: Iterable[tuple[str, str, str]], width: int = _NAMES_WIDTH
) -> None:
    """Names on the left, descriptions on the right."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True, min_width=width, max_width=width)
    table.add_column(ratio=1)
    for names, choices, text in rows:
        about: RenderableType = _styled(f"{choices}: {text}" if choices else text)
        table.add_row(Text(names, style="bold cyan"), about)
    if table.row_count:
        console.print(Panel(table, title=title, title_align="left", border_style="dim"))


def _styled(text: str) -> Text:
    """`text` with words in backticks emphasised."""
    from rich.text import Text

    styled = Text()
    for number, part in enumerate(text.split("`")):
        styled.append(part, style="bold cyan" if number % 2 else "")
    return styled
