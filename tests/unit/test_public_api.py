"""What `h5traces` exports, and nothing else."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import h5traces

PUBLIC = [
    "Archive",
    "Trace",
    "__version__",
    "convert",
    "create",
    "load",
    "open",
    "validate",
    "verify",
]


def test_exports_are_listed() -> None:
    assert sorted(h5traces.__all__) == PUBLIC


def test_exports_exist_and_are_documented() -> None:
    for name in h5traces.__all__:
        each = getattr(h5traces, name)
        assert name == "__version__" or inspect.getdoc(each), name


def test_no_module_shares_the_name_of_a_function() -> None:
    modules = {
        path.stem for path in Path(h5traces.__file__).parent.glob("*") if path.stem[0] != "_"
    }
    assert not modules & set(h5traces.__all__)


def test_the_version_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z.]+\d+)?", h5traces.__version__)


def test_options_are_named() -> None:
    for function in (h5traces.convert, h5traces.open, h5traces.validate):
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            if isinstance(parameter.default, bool):
                assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, (function, parameter.name)
