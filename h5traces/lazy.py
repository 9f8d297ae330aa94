"""Public names that load their modules on first use (PEP 562)."""

from __future__ import annotations

import contextlib
import gc
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from h5traces.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


def lazy_names(
    package: str, homes: Mapping[str, str], *, extra: str | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package whose names live in other modules.

    Parameters
    ----------
    package
        Name of the package.
    homes
        The module of each public name, ``module:name`` where it has another name there, or the
        full name of a package that is a public name itself.
    extra
        Optional dependencies that all the names need, as in ``pip install 'h5traces[extra]'``.
    """

    def load(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            message = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(message)
        module_name, _, attribute = home.partition(":")
        try:
            with _collector_paused():
                module = import_module(module_name)
        except ImportError as error:
            if extra is None or isinstance(error, MissingDependencyError):
                raise
            message = (
                f"{error.name} is not installed, which {package} needs; "
                f"pip install 'h5traces[{extra}]'"
            )
            raise MissingDependencyError(message) from error
        is_package = module_name == f"{package}.{name}" and not attribute
        value = module if is_package else getattr(module, attribute or name)
        # The next access finds it without this function.
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted(homes)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No search for garbage: importing torch and transformers makes little, and takes longer."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def needing(what: str, library: str, *, extra: str) -> Iterator[None]:
    """Imports in the block are of an optional library; without it, say what it is needed for.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{what} needs {library}, which is not installed; pip install 'h5traces[{extra}]'"
        raise MissingDependencyError(message) from error
