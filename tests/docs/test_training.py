"""docs/training.md runs as it stands; the example and the benchmark of training run, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from document_pages import ROOT, run_page

import h5traces

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_the_python_code_of_the_document_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h5traces.convert(ROOT / "examples" / "legacy", f"{tmp_path}/archives/")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    names = run_page("docs/training.md", "python", h5traces=h5traces)
    assert names["dataset"][0]["hidden_states"].shape == (2, 128)
    assert names["padded"]["mask"].sum() == names["packed"]["cu_seqlens"][-1]
    assert len(names["graphs"]) == 48
    assert len(names["table"]) == len(names["features"]) == len(names["dataset"])
    states = names["table"].with_format("numpy")[3]["states"]
    assert states.tolist() == names["dataset"].archive[3].layer(3)[-1].tolist()
    assert names["features"]["sample_id"] == list(names["dataset"].archive.ids)


def test_the_example_gives_equal_numbers(tmp_path: Path) -> None:
    command = [sys.executable, "examples/train_probes.py", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--num-questions", "8", "--epochs", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "archives and pickles gave the same numbers" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for what in ("probe", "gnn"):
        assert results["archives"][what] == results["pickles"][what]
        assert len(results["archives"][what]) == 6
    assert (tmp_path / "out" / "accuracy_by_layer.png").stat().st_size > 5000


def test_the_benchmark_of_training_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/training.py", "--scale", "tiny", "-o", tmp_path / "raw.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for title in ("random (sample, layer) graphs", "first batch of 32", "by workers", "one worker"):
        assert title in done.stdout
    figures = json.loads((tmp_path / "raw.json").read_text())["figures"]
    assert set(figures["random graphs"]) == {
        "archive",
        "legacy",
        "files_in_ram",
        "samples_in_ram",
        "layers_in_ram",
        "unpickled_in_ram",
    }
