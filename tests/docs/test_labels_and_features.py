"""What docs/labels.md and docs/features.md show is run as it stands there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_readme import ROOT, blocks

import h5traces

SCORES = [0.1, 0.7, 0.31, 0.5, 0.9, 0.2, 0.4, 0.6]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the archives of README's first steps, and the table that the documents name."""
    batch = next((ROOT / "examples" / "legacy").glob("*.pkl.gz"))
    h5traces.convert(batch, tmp_path / "run.h5", layers=[0, 2, 5], merge=True)
    h5traces.convert(batch, f"{tmp_path}/archives/")
    ids = h5traces.open(tmp_path / "run.h5").ids
    rows = [f"{name},{score}" for name, score in zip(ids, SCORES, strict=True)]
    table = "\n".join(["question_id,bleurt_score", *rows])
    (tmp_path / "scores.csv").write_text(table, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(commands: str) -> None:
    """Commands of a document, with the `h5traces` that is tested."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path}
    done = subprocess.run(
        ["bash", "-e", "-c", commands], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_labels(folder: Path) -> None:
    (commands,) = blocks("bash", "docs/labels.md")
    (code,) = blocks("python", "docs/labels.md")
    shell(commands)
    names: dict[str, object] = {}
    exec(code, names)  # the code is ours, and running it is the test
    expected = tuple(int(score < 0.5) for score in SCORES)
    assert names["archive"].labels == expected
    for made in ("archives", "labelled.h5"):
        assert h5traces.open(folder / made).labels == expected

    (folder / "run.h5").rename("moved.h5")
    assert h5traces.open("moved.h5").labels == (None,) * 8
    (folder / "run.h5.labels.json").rename("moved.h5.labels.json")
    assert h5traces.open("moved.h5").labels == expected


@pytest.mark.usefixtures("folder")
def test_features() -> None:
    commands = "".join(blocks("bash", "docs/features.md"))
    shell(commands)
    names: dict[str, object] = {}
    for code in blocks("python", "docs/features.md"):
        exec(code, names)
    archive = h5traces.open("archives/")
    last = [[states[-1] for states in trace["hidden_states"]] for trace in archive]
    np.testing.assert_array_equal(names["x"], np.array(last, np.float32))
    assert names["entropy"].shape == (8, 6, 8)
