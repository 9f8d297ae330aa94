"""Runs the code of README.md and docs/ as it stands there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from typer.testing import CliRunner

from h5traces.cli.app import app

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```([a-z]+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code of a page, which counts from 0."""

    page: str
    number: int
    language: str
    code: str

    @property
    def commands(self) -> list[list[str]]:
        """Words of each line of a shell."""
        joined = self.code.replace("\\\n", " ")
        lines = (shlex.split(line, comments=True) for line in joined.splitlines())
        return [words for words in lines if words]


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, given by its path from the root of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = enumerate(_BLOCK.findall(text))
    return [Block(page, number, language, code) for number, (language, code) in found]


def run_command(words: list[str], exit_code: int = 0) -> str:
    """Run a line that begins with ``h5traces``; what it writes may be there from a line before.

    Ranks write into one folder.
    """
    assert words[0] == "h5traces", words
    if "-o" in words and "--rank" not in words:
        place = Path(words[words.index("-o") + 1])
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == exit_code, (words, result.output, result.exception)
    return result.output


def run_page(page: str, *languages: str, **names: Any) -> dict[str, Any]:
    """Run the blocks of a page that are in these languages, in order; names that Python has then.

    All lines of a shell begin with ``h5traces``; `names` are there from the start.
    """
    for block in (each for each in blocks_of(page) if each.language in languages):
        if block.language == "python":
            run_code(block.code, names)
        else:
            for words in block.commands:
                run_command(words)
    return names


def run_code(code: str, names: dict[str, Any]) -> None:
    """Run a block of Python."""
    exec(code, names)  # the code is ours, and running it is the test
