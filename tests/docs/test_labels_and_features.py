"""What docs/labels.md and docs/features.md show is run as it stands there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_readme import ROOT, blocks

import h5traces

SCORES = [0.1, 0.7, 0.31, 0.5, 0.9, 0.2, 0.4, 0.6]
VERDICTS = ["correct"] * 3 + ["hallucinated"] * 3 + ["correct"] * 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the archives of README's first steps, and the tables that documents name."""
    batch = next((ROOT / "examples" / "legacy").glob("*.pkl.gz"))
    h5traces.convert(batch, tmp_path / "run.h5", layers=[0, 2, 5], merge=True)
    h5traces.convert(batch, f"{tmp_path}/archives/")
    ids = h5traces.open(tmp_path / "run.h5").ids
    judged = [VERDICTS[0].replace("correct", "unsure"), *VERDICTS[1:]]
    words = {"correct": "right", "hallucinated": "wrong", "unsure": "unsure"}
    tables = {
        "scores.csv": ("bleurt_score", SCORES),
        "rouge.csv": ("rougeL", SCORES),
        "entropy.csv": ("entropy", SCORES),
        "human.csv": ("verdict", VERDICTS),
        "judges.csv": ("verdict", [words[each] for each in judged]),
    }
    for name, (column, values) in tables.items():
        rows = [f"{each},{value}" for each, value in zip(ids, values, strict=True)]
        (tmp_path / name).write_text("\n".join([f"question_id,{column}", *rows]), encoding="utf-8")
    lines = (
        json.dumps({"question_id": each, "is_correct": int(verdict == "correct")})
        for each, verdict in zip(ids, VERDICTS, strict=True)
    )
    (tmp_path / "judged.jsonl").write_text("\n".join(lines), encoding="utf-8")
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
    *commands, by_score = blocks("bash", "docs/labels.md")
    (code,) = blocks("python", "docs/labels.md")
    for each in commands:
        shell(each)
    human = tuple(int(verdict == "hallucinated") for verdict in VERDICTS)
    # The last of them leaves one sample without a label.
    assert h5traces.open("run.h5").labels == (None, *human[1:])
    shell(by_score)
    names: dict[str, object] = {}
    exec(code, names)  # the code is ours, and running it is the test
    assert names["archive"].labels == human
    assert names["report"].labels == {0: 5, 1: 3}
    expected = tuple(int(score < 0.5) for score in SCORES)
    for made in ("archives", "labelled.h5"):
        assert h5traces.open(folder / made).labels == expected

    (folder / "run.h5").rename("moved.h5")
    assert h5traces.open("moved.h5").labels == (None,) * 8
    (folder / "run.h5.labels.json").rename("moved.h5.labels.json")
    assert h5traces.open("moved.h5").labels == human


def test_the_shown_report_is_printed(folder: Path) -> None:
    command, *shown = blocks("bash", "docs/labels.md")[0].splitlines()[:5]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.check_output(command, shell=True, env={**os.environ, "PATH": path}, text=True)
    assert done.splitlines() == [each.removeprefix("# ") for each in shown]


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
