"""Output to a terminal: data on stdout, messages and progress on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from h5traces.cli.streams import discard, is_unicode, lose_errors, output_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from rich.table import Table

    from h5traces.extract.running import RunProgress
    from h5traces.meaning.checks import CheckOptions, FindingSummary


# Control characters other than tab and newline, and those that turn the direction of writing.
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# How messages of the library name a parameter: overwrite=True, head_mean='only', shard_samples.
_PARAMETER = re.compile(
    r"(?<![\w/.'-])(?P<name>[a-z]+(?:_[a-z]+)*)(?P<value>=True|=False|='[^' ]*')?(?![\w/'=-]|\.\w)"
)
_options: ContextVar[frozenset[str]] = ContextVar("options", default=frozenset())


class _Errors(Console):
    """Standard error; that it cannot be written ends no command, but its exit code says so."""

    def say(self, text: str) -> None:
        """Print markup as one line."""
        try:
            self.print(text)
        except OSError:
            self.quiet = True
            lose_errors()

    def on_broken_pipe(self) -> None:
        """Be quiet from now on: nobody reads it."""
        self.quiet = True
        discard(sys.stderr)


# Data goes to stdout, everything else to stderr.
errors = _Errors(stderr=True, highlight=False, soft_wrap=True)


def human_size(nbytes: float) -> str:
    """Bytes in decimal units: ``15.1 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def visible(text: str) -> str:
    """`text` with characters that steer a terminal spelled out."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def cell(text: str) -> str:
    """`text` for a table: without markup, spelled out."""
    return escape(_on_one_line(text))


def _on_one_line(text: str) -> str:
    return visible(text).replace("\n", r"\n")


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    ascii_only = not is_unicode(sys.stdout)
    _write(visible(json.dumps(document, ensure_ascii=ascii_only, indent=2, default=str)))


def print_json_rows(rows: Iterable[Any]) -> None:
    """A JSON list on stdout, a line for each of its items, as they come."""
    ascii_only, before = not is_unicode(sys.stdout), "["
    for row in rows:
        _write(before + visible(json.dumps(row, ensure_ascii=ascii_only)), end="")
        before = ",\n "
    _write("[]" if before == "[" else "]")


def print_line(line: str = "") -> None:
    """A line of data on stdout, without markup, whatever is in it."""
    _write(_on_one_line(line))


def print_lines(lines: Iterable[str]) -> None:
    """Lines of data on stdout at once, which takes less than one after the other."""
    _write("\n".join(map(_on_one_line, lines)))


def _write(line: str, end: str = "\n") -> None:
    # Texts may hold lone surrogates, which no terminal takes; JSON, too, writes them like this.
    with output_errors():
        sys.stdout.write(line.encode("utf-8", "backslashreplace").decode() + end)


def print_table(table: Table) -> None:
    """A table of `cell` on stdout; wide if stdout is not a terminal."""
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else 160
    printed = io.StringIO()
    Console(file=printed, width=width, force_terminal=is_terminal, highlight=False).print(table)
    _write(printed.getvalue().rstrip("\n"))


def warn(message: str) -> None:
    """A warning on stderr."""
    errors.say(f"[yellow]warning:[/] {_plain(message)}")


def note(message: str) -> None:
    """Something to know, on stderr."""
    errors.say(f"[cyan]note:[/] {_plain(message)}")


def fail(message: str) -> None:
    """An error on stderr."""
    errors.say(f"[red]error:[/] {_plain(message)}")


def tell_findings(
    found: Iterable[FindingSummary], place: str, options: CheckOptions | None = None
) -> None:
    """Findings of checks on stderr; not those that are a failure by the options."""
    for each in found:
        if options is None or not options.fails([each]):
            tell = note if each.severity == "note" else warn
            tell(f"{place}: {finding_line(each)}")


def finding_line(found: FindingSummary) -> str:
    """A finding for people, with the flags of `convert` in place of parameters."""
    with options_named(("first_state", "keep_padding")):
        return with_flags(str(found))


def _plain(message: str) -> str:
    return visible(with_flags(message)).replace("[", r"\[")


@contextlib.contextmanager
def options_named(names: Collection[str]) -> Iterator[None]:
    """Inside the block, messages name these parameters as options of the command."""
    token = _options.set(frozenset(names))
    try:
        yield
    finally:
        _options.reset(token)


def with_flags(message: str) -> str:
    """A message of the library with flags in place of parameters of Python."""

    def flag(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if name not in _options.get() or not (value or "_" in name):
            return found[0]
        flag = name.replace("_", "-")
        if value == "=False":
            return f"--no-{flag}"
        return f"--{flag}" if value in (None, "=True") else f"--{flag} {value[2:-1]}"

    return _PARAMETER.sub(flag, message)


@contextlib.contextmanager
def bytes_progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar of bytes with rate and remaining time; calls take done, total and a text."""
    with _progress(DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task("convert", total=None)
        yield lambda done, total, text: bar.update(
            task, completed=done, total=total, description=text
        )


@contextlib.contextmanager
def count_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of counts with remaining time; calls take done and total."""
    with _progress(MofNCompleteColumn()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def samples_progress(label: str) -> Iterator[Callable[[RunProgress], None]]:
    """A bar of samples with speed, bytes written and remaining time."""
    with _progress(MofNCompleteColumn(), TextColumn("{task.fields[state]}")) as bar:
        task = bar.add_task(label, total=None, state="")

        def update(state: RunProgress) -> None:
            text = f"{state.tokens_per_second:.0f} tokens/s, {human_size(state.nbytes)}"
            bar.update(task, completed=state.num_done, total=state.num_samples, state=text)

        yield update


def _progress(*columns: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )


def first_lines(lines: list[str], most: int = 5, what: str = "") -> list[str]:
    """The first of many lines, and one that says how many more there are."""
    more = len(lines) - most
    return [*lines[:most], *([f"and {more} more{what}, which --json lists"] if more > 0 else [])]
