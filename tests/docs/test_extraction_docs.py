"""What docs/extraction.md shows is run as it stands there."""

from __future__ import annotations

import re
import shlex

import pytest
from document_pages import ROOT, blocks_of
from typer.testing import CliRunner

import h5traces
from h5traces.cli.app import app

DOCUMENT = ROOT / "docs" / "extraction.md"


def blocks(language):
    return [each.code for each in blocks_of("docs/extraction.md") if each.language == language]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)


def test_the_python_code_runs():
    (code,) = blocks("python")
    names = {}
    exec(code, names)  # the code is ours, and running it is the test
    assert len(names["trace"]["hidden_states"]) == 6
    with h5traces.open("traces") as archive:
        assert len(archive) == 2
        assert archive.layers == (0, 3, 5)


def test_the_commands_run():
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 6
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, (command, result.output)
    assert len(h5traces.open("extracted")) == 40


def test_every_option_that_is_named_exists():
    help_text = CliRunner().invoke(app, ["extract", "--help"], env={"COLUMNS": "200"}).output
    table = DOCUMENT.read_text(encoding="utf-8").partition("| option |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(--[a-z0-9-]+)", table))
    assert len(named) > 20
    assert {each for each in named if each not in help_text} == set()


def test_the_figures_are_those_that_the_command_prints():
    command = blocks("bash")[2].splitlines()[0]
    output = CliRunner().invoke(app, shlex.split(command)[1:]).output
    text = " ".join(DOCUMENT.read_text(encoding="utf-8").split())
    sizes = dict(re.findall(r"^(archive.*?)  +\d+ .*?([\d.]+ GB)", output, re.MULTILINE))
    everything, subset = sizes.values()
    assert f"{everything} for archives with gzip" in text
    assert f"and {subset} for 7 of the 32 layers" in text
    (raw,) = re.findall(r"^raw float16 .*?([\d.]+ GB)", output, re.MULTILINE)
    assert f"prints {raw} per 1000 samples for raw float16 arrays" in text
