"""Runs commands of h5traces in this process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from typer.testing import CliRunner

from h5traces.cli.app import app

if TYPE_CHECKING:
    from click.testing import Result


def run(*arguments: Any, code: int = 0) -> Result:
    """What a command printed, which must end with a code and without a traceback or colours."""
    result = CliRunner().invoke(app, [os.fspath(each) for each in map(_text, arguments)])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, (SystemExit, type(None)))
    assert "\x1b[" not in result.output  # no colours, no bars: this is not a terminal
    return result


def _text(value: Any) -> Any:
    return value if isinstance(value, (str, os.PathLike)) else str(value)
