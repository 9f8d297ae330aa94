"""Ranks as tasks of a real Ray, a node killed in mid-run, and archives from Ray Data."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_runs import EXAMPLES, MODEL, digests, write_questions
from working_batches import write_batches

import h5traces
from h5traces.extract import DatasetChoice, ModelChoice, extract_dataset

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: it has no wheel here"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What one cluster did with all of it; starting Ray takes longer than the work."""
    out = tmp_path_factory.mktemp("ray")
    write_batches(out / "batches", 6, num_samples=90, seq_len=60)
    script = Path(__file__).with_name("ray_cluster.py")
    command = [sys.executable, str(script), str(out / "batches"), str(out), str(EXAMPLES / "ray")]
    # Else workers yield to all other processes of the machine.
    quick = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    environment = {**os.environ, **quick}
    done = subprocess.run(
        [*command, str(MODEL), str(write_questions(out / "questions.jsonl", 4))],
        capture_output=True,
        text=True,
        env=environment,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, json.loads((out / "found.json").read_text())


def test_a_killed_node_loses_nothing(run: tuple[Path, dict[str, Any]]) -> None:
    out, found = run
    assert found["ranks"] == [True] * 3
    lines = "".join(each.read_text() for each in out.glob("archives/ranks/*.jsonl"))
    assert lines.count('"event": "start"') > 3, "no rank was started again"
    h5traces.convert(out / "batches", f"{out}/alone/")
    assert digests(out / "archives") == digests(out / "alone")
    assert h5traces.collect(out / "archives").ok
    assert not list(out.glob("archives/*.part"))


def test_tasks_on_gpus_extract_what_one_process_does(run: tuple[Path, dict[str, Any]]) -> None:
    out, found = run
    assert sorted(found["gpus"]) == [2, 2]
    assert found["own_gpus"] == [1, 1]
    model, questions = ModelChoice(model_id=str(MODEL)), str(out / "questions.jsonl")
    extract_dataset(model, DatasetChoice(dataset=questions), f"{out}/alone-traces/")
    assert digests(out / "traces") == digests(out / "alone-traces")


def test_what_the_cluster_cannot_do_is_an_error(run: tuple[Path, dict[str, Any]]) -> None:
    _, found = run
    assert "OptionError: a task needs" in found["too_much"]
    assert "its run was planned otherwise: layers is" in found["other"]


def test_the_examples(run: tuple[Path, dict[str, Any]]) -> None:
    out, _ = run
    assert len(h5traces.open(out / "example-convert" / "catalogue.parquet")) == 540
    assert sorted(h5traces.open(out / "example-extract").ids) == ["q0", "q1", "q2", "q3"]
    traces = h5traces.open(out / "sink")
    assert sorted(traces.ids) == ["q0", "q1", "q2", "q3"]
    assert traces.by_id("q2").layer(5).shape[1] == 128
    assert traces.by_id("q2")["question"] == "What is number 2?"
    assert all(report.ok for report in h5traces.validate(out / "sink"))


def test_a_sink_keeps_what_an_attempt_before_it_wrote(run: tuple[Path, dict[str, Any]]) -> None:
    _, found = run
    assert found["again"] == ["traces-00003.h5"] * 2
    assert "another run wrote it, with 1 samples instead of 2" in found["twice"]
    assert "exists; name a folder without archives" in found["exists"]
