"""Makes a function a command: groups of options, errors as messages, exit codes, signals."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import signal
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import typer

from h5traces.cli.console import fail, note, options_named, warn
from h5traces.cli.streams import PipeClosedError, flush
from h5traces.errors import (
    ArchiveExistsError,
    ArgumentError,
    H5TracesError,
    LayerIndexError,
    LossyArchiveError,
    LossyWarning,
    MissingDependencyError,
    OptionError,
    PrecisionError,
    SampleIndexError,
    StoredStateWarning,
    TargetError,
)
from h5traces.storage.processes import handled_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from types import FrameType

EXIT_PROBLEMS: Final = 1
EXIT_USAGE: Final = 2
# Exit code of a rank that was stopped: its work is safe, and a scheduler can start it again
# (sysexits.h calls it a temporary failure).
EXIT_STOPPED: Final = 75
# In every command, these are about its arguments.
_USAGE_ERRORS: Final = (
    FileNotFoundError,
    ArgumentError,
    ArchiveExistsError,
    LayerIndexError,
    LossyArchiveError,
    MissingDependencyError,
    OptionError,
    PrecisionError,
    SampleIndexError,
    TargetError,
)


@dataclass(frozen=True, slots=True)
class Group:
    """Annotates a parameter of a command that stands for several options.

    Attributes
    ----------
    build
        Makes the value; its parameters are the options.
    """

    build: Callable[..., Any]


def command(*usage_errors: type[Exception]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates the function of a command.

    Parameters annotated with a `Group` become its options. Errors end in one line on stderr and an
    exit code: 1 for problems, 2 for wrong usage, 128 + number for a signal.

    Parameters
    ----------
    usage_errors
        Further errors that are wrong usage in this command.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        options: list[inspect.Parameter] = []
        groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
        for each in inspect.signature(function, eval_str=True).parameters.values():
            metadata = getattr(each.annotation, "__metadata__", ())
            if not (metadata and isinstance(metadata[0], Group)):
                options.append(each)
                continue
            build = metadata[0].build
            spread = inspect.signature(build, eval_str=True).parameters
            groups[each.name] = build, list(spread)
            options += spread.values()

        @functools.wraps(function)
        def run(**given: Any) -> None:
            is_rank = given.get("rank") is not None
            with _reported((*_USAGE_ERRORS, *usage_errors), frozenset(given), is_rank=is_rank):
                for name, (build, names) in groups.items():
                    given[name] = build(**{each: given.pop(each) for each in names})
                function(**given)

        named = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in options]
        run.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in named}
        return run

    return decorate


@contextlib.contextmanager
def _reported(
    usage_errors: tuple[type[Exception], ...], options: Collection[str], *, is_rank: bool
) -> Iterator[None]:
    signals = [signal.SIGTERM, signal.SIGUSR1] if is_rank else [signal.SIGTERM]
    with options_named(options), _told(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", StoredStateWarning)
        warnings.simplefilter("always", LossyWarning)
        try:
            with handled_signals(_raise_terminated, signals):
                yield
            flush()
        except PipeClosedError:
            # The reader of the pipe (head, less) has seen enough.
            caught.clear()
            raise typer.Exit(0) from None
        except (H5TracesError, OSError) as error:
            fail(f"{error}{_help_for(error, options)}")
            is_usage = isinstance(error, usage_errors)
            raise typer.Exit(EXIT_USAGE if is_usage else EXIT_PROBLEMS) from None
        except KeyboardInterrupt as stop:
            fail("stopped; no unfinished file was kept")
            number = signal.SIGTERM if isinstance(stop, _TerminatedError) else signal.SIGINT
            is_told = is_rank and isinstance(stop, _TerminatedError)
            raise typer.Exit(EXIT_STOPPED if is_told else 128 + number) from None
        finally:
            for each in caught:
                warn(str(each.message))


class _Told(logging.Handler):
    """Messages of the library while it works."""

    def emit(self, record: logging.LogRecord) -> None:
        tell = warn if record.levelno >= logging.WARNING else note
        tell(record.getMessage())


@contextlib.contextmanager
def _told() -> Iterator[None]:
    logger, handler = logging.getLogger("h5traces"), _Told()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _help_for(error: Exception, options: Collection[str]) -> str:
    """Advice of the command about an error whose message gives none."""
    if not isinstance(error, ArchiveExistsError):
        return ""
    effects = {"overwrite": "replaces it", "skip_existing": "keeps what is finished"}
    return "".join(
        f"; {name}=True {effect}"
        for name, effect in effects.items()
        if name in options and name not in str(error)
    )


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM came; handled as Ctrl-C is."""


def _raise_terminated(*_: object) -> None:
    raise _TerminatedError


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
        warn("finishing the current batch; send it again to stop at once")


@contextlib.contextmanager
def stopping(*, is_rank: bool = False) -> Iterator[Stop]:
    """Ctrl-C and SIGTERM, for ranks SIGUSR1 too, let the batch that is being computed finish."""
    stop = Stop()
    signals = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if is_rank else [])]
    with handled_signals(stop.note, signals):
        yield stop
