"""What docs/spans.md shows is run as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from h5traces.cli.app import app

ROOT = Path(__file__).parents[2]


def test_the_page_runs(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "spans.md").read_text(encoding="utf-8")
    names = {}
    for language, code in re.findall(r"```(python|bash)\n(.*?)```", text, flags=re.DOTALL):
        if language == "python":
            exec(code, names)  # the code is ours, and running it is the test
        else:
            result = CliRunner().invoke(app, shlex.split(code)[1:])
            assert result.exit_code == 0, result.output
    trace = names["trace"]
    words = trace["tokens_decoded"]
    assert "math.sqrt" in "".join(words[n] for n in trace.tokens_of(10, 19, "question"))
    assert "returns" in "".join(words[n] for n in trace.tokens_of(4, 11))
    assert set(names["labels"]) == {0, 1}
