"""What all commands share: where output goes, how sizes read, how errors end."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer
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

from h5traces.errors import H5TracesError, LossyWarning, StoredStateWarning, TargetError
from h5traces.storage.processes import handled_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from rich.table import Table

    from h5traces.extract.running import RunProgress


# Control characters other than tab and newline, and those that turn the direction of writing.
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
EXIT_PROBLEMS = 1
EXIT_USAGE = 2

# Data goes to stdout, everything else to stderr.
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def human_size(nbytes: float) -> str:
    """Bytes in decimal units, as disks are sold: ``15.1 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def visible(text: str) -> str:
    """`text` with characters that steer a terminal spelled out, as files of strangers hold them."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def cell(text: str) -> str:
    """`text` for a table: without markup, spelled out."""
    return escape(_on_one_line(text))


def _on_one_line(text: str) -> str:
    return visible(text).replace("\n", r"\n")


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    _write(visible(json.dumps(document, ensure_ascii=False, indent=2, default=str)))


def print_line(line: str = "") -> None:
    """A line of data on stdout, without markup, whatever is in it."""
    _write(_on_one_line(line))


def _write(line: str) -> None:
    # Texts may hold lone surrogates, which no terminal takes; JSON, too, writes them like this.
    sys.stdout.write(line.encode("utf-8", "backslashreplace").decode() + "\n")


def print_table(table: Table) -> None:
    """A table of `cell` on stdout; as wide as it needs where stdout is no terminal."""
    width = None if sys.stdout.isatty() else 160
    console = Console(file=sys.stdout, width=width, highlight=False)
    with console.capture() as printed:
        console.print(table)
    _write(printed.get().rstrip("\n"))


def warn(message: str) -> None:
    """A warning on stderr."""
    errors.print(f"[yellow]warning:[/] {_plain(message)}")


def fail(message: str) -> None:
    """An error on stderr; it names options as they are typed."""
    message = re.sub(r"\boverwrite=True\b", "--overwrite", message)
    message = re.sub(r"\bskip_existing=True\b", "--skip-existing", message)
    message = re.sub(r"\bcheck_space=False\b", "--no-check-space", message)
    errors.print(f"[red]error:[/] {_plain(message)}")


def _plain(message: str) -> str:
    return visible(message).replace("[", r"\[")


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM came; handled as Ctrl-C is."""


def _raise_terminated(*_: object) -> None:
    raise _TerminatedError


@contextlib.contextmanager
def reported(usage_errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns errors into one line on stderr and an exit code: 1 problems, 2 usage, 128 + signal."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", StoredStateWarning)
        warnings.simplefilter("always", LossyWarning)
        try:
            with handled_signals(_raise_terminated, [signal.SIGTERM]):
                yield
        except BrokenPipeError:
            # The reader of a pipe (head, less) has seen enough.
            sys.stderr.close()
            raise typer.Exit(0) from None
        except (H5TracesError, OSError) as error:
            fail(str(error))
            is_usage = isinstance(error, (FileNotFoundError, TargetError, *usage_errors))
            raise typer.Exit(EXIT_USAGE if is_usage else EXIT_PROBLEMS) from None
        except KeyboardInterrupt as stop:
            fail("stopped; nothing half-written was kept")
            number = signal.SIGTERM if isinstance(stop, _TerminatedError) else signal.SIGINT
            raise typer.Exit(128 + number) from None
        finally:
            for each in caught:
                warn(str(each.message))


@contextlib.contextmanager
def bytes_progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar of bytes with rate and remaining time; calls take done, total and a text."""
    with _progress(DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task(label, total=None)
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
    """A bar of samples with speed, bytes written and remaining time, as an extraction tells it."""
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


Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace archives that exist.")]
Layers = Annotated[
    str | None,
    typer.Option(metavar="0,5,10-12", help="Keep only these decoder blocks (0-based)."),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Read all back from disk and compare with the source before naming a file.",
    ),
]
Archives = Annotated[list[str], typer.Argument(metavar="FILE…", help="Archives, globs or folders.")]


def is_number(text: str) -> bool:
    """Whether `text` is a decimal number; `str.isdigit` takes superscripts, too."""
    return text.isascii() and text.isdigit()


def parse_layers(value: str | None) -> list[int] | None:
    """Layer numbers from ``0,5,10`` and ranges such as ``28-31``.

    Raises
    ------
    typer.BadParameter
        The text is something else.
    """
    if value is None:
        return None
    layers: list[int] = []
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        if not is_number(first) or (dash and not is_number(last)):
            message = f"{part!r} is no layer number; expected 0-based numbers such as 0,5,10 or 0-7"
            raise typer.BadParameter(message)
        layers += range(int(first), int(last if dash else first) + 1)
    return layers


def first_lines(lines: list[str], most: int = 5) -> list[str]:
    """The first of many lines, and one that says how many more there are."""
    more = len(lines) - most
    return [*lines[:most], *([f"and {more} more, which --json lists"] if more > 0 else [])]


class Stop:
    """Whether a signal came. One before the first batch, and a second one, stop at once.

    Attributes
    ----------
    number
        The signal; 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._is_computing = False

    def __call__(self) -> bool:
        """Asked before every batch."""
        self._is_computing = True
        return self.number != 0

    def note(self, number: int, frame: FrameType | None, before: Any) -> None:
        """Handle a signal, which `before` handled."""
        if callable(before) and (self.number or not self._is_computing):
            before(number, frame)
        self.number = number
        warn("finishing the current batch; again to stop at once")


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM let the batch that is being computed come to its end."""
    stop = Stop()
    with handled_signals(stop.note):
        yield stop
