"""The tutorial runs as it stands, and its probe learns something."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from typer.testing import CliRunner

import h5traces
from h5traces.cli.app import app

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[2]


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("agg")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for language, code in re.findall(r"```(python|bash)\n(.*?)```", text, flags=re.DOTALL):
        if language == "python":
            exec(code, names)  # the code is ours, and running it is the test
            continue
        for line in code.splitlines():
            result = CliRunner().invoke(app, shlex.split(line)[1:])
            assert result.exit_code == 0, (line, result.output)
    with h5traces.open("traced/") as traced:
        assert len(traced) == len(Path("questions.jsonl").read_text().splitlines()) > 80
        assert {trace["label"] for trace in traced} == {0, 1}
    accuracy = names["accuracy"]
    assert len(accuracy) == 6  # layers of the shipped model
    assert max(accuracy) > 0.8
    for name in ("map.png", "heads.png", "probe.png"):
        assert Path(name).read_bytes().startswith(b"\x89PNG")
