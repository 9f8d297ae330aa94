"""Standard streams as they come: closed, full, of any encoding, or a pipe that nobody reads."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

# Symbols that we write, for encodings that lack them; box drawing is that of help and tables.
_PLAIN: Final = {
    "\u2713": "ok",
    "\u2026": "...",
    "\u2192": "->",
    "\u2013": "-",
    "\u2014": "-",
    "\u2212": "-",
    "\u2022": "*",
    "\u00d7": "x",
    "\u00b5": "u",
    "\u03bc": "u",
    "\u2264": "<=",
    "\u2265": ">=",
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u00a0": " ",
}
_BOX: Final = range(0x2500, 0x2580)
_BOX_LINES: Final = {0x2500: "-", 0x2501: "-", 0x2502: "|", 0x2503: "|", 0x2550: "-", 0x2551: "|"}
_HANDLER: Final = "h5traces.plain"
_lost: Final[list[bool]] = []


class OutputError(OSError):
    """Standard output cannot be written."""


class PipeClosedError(Exception):
    """Whoever read standard output has seen enough."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    """The replacement of characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spelled, error.object[error.start : error.end])), error.end


def _spelled(character: str) -> str:
    number = ord(character)
    if number in _BOX:
        return _BOX_LINES.get(number, "+")
    escaped = character.encode("ascii", "backslashreplace").decode()
    return _PLAIN.get(character, escaped)


codecs.register_error(_HANDLER, _plain)


def is_unicode(stream: Any) -> bool:
    """Whether a stream takes all characters."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def as_printed(text: str) -> str:
    """A text as standard output can show it; typer prints UTF-8 if the encoding is ASCII."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, _HANDLER).decode(encoding)


@contextlib.contextmanager
def output_errors() -> Iterator[None]:
    """Inside the block, standard output is written; failures are raised as those of it.

    Raises
    ------
    PipeClosedError
        It is a pipe that is read no longer.
    OutputError
        It cannot be written for another reason.
    """
    try:
        yield
    except BrokenPipeError:
        discard(sys.stdout)
        raise PipeClosedError from None
    except OSError as error:
        discard(sys.stdout)
        message = f"standard output cannot be written: {error.strerror}"
        raise OutputError(message) from error


def flush() -> None:
    """Write what is buffered for standard output; errors as in `output_errors`."""
    with output_errors():
        sys.stdout.flush()


def lose_errors() -> None:
    """Stop writing to standard error; a run that lost messages does not end well."""
    _lost.append(True)
    discard(sys.stderr)


def exit_code(code: Any) -> Any:
    """The exit code of a run that ended with `code`, after closing standard error."""
    return code or int(bool(_lost))


def discard(stream: Any) -> None:
    """Discard what a stream still holds: Python flushes it again at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def prepare() -> None:
    """Make standard streams safe to write to, whatever they are."""
    # Otherwise the next file to be opened gets the number, and so the printed text.
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)
    if sys.stdout is None:
        # Its descriptor is open for reading only, so that printing fails.
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)
