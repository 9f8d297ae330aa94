"""The examples of submitit and datatrove, on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from document_pages import blocks_of
from engine_runs import EXAMPLES, MODEL, digests, write_questions
from working_batches import write_batches

import h5traces


def test_the_script_for_large_models_shares_an_extraction(tmp_path: Path) -> None:
    """With a small model on CPUs, and a `srun` that runs its command here."""
    (script,) = (
        block.code
        for block in blocks_of("docs/large-models.md")
        if block.code.startswith("#!") and "extract" in block.code
    )
    for stated, here in {
        "meta-llama/Llama-3.1-70B-Instruct": str(MODEL),
        "--device auto --model-dtype bfloat16": "--device cpu --max-new-tokens 2",
    }.items():
        assert stated in script
        script = script.replace(stated, here)
    (tmp_path / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    write_questions(tmp_path / "questions.jsonl", 4)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1"}
    for task in "10":
        environment = {**os.environ, **array, "SLURM_ARRAY_TASK_ID": task, "PATH": path}
        done = subprocess.run(
            ["bash", "-c", script],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert h5traces.status(tmp_path / "traces").done == [0, 1]
    assert sorted(h5traces.open(tmp_path / "traces").ids) == ["q0", "q1", "q2", "q3"]


@pytest.mark.parametrize("name", ["datatrove", "submitit"])
def test_an_example_makes_what_one_process_makes(tmp_path: Path, name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed: it has no wheel here")
    batches = write_batches(tmp_path / "batches", 6)
    script = EXAMPLES / f"{name}_convert.py"
    command = [sys.executable, str(script), str(batches), f"{tmp_path}/out/"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for _ in range(2):  # the second time, nothing is left to do
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
    h5traces.convert(batches, f"{tmp_path}/alone/")
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")
    found = h5traces.status(tmp_path / "out")
    assert found.ok
    assert found.done == [0, 1, 2, 3]
    if name == "datatrove":
        assert len(list((tmp_path / "out.logs" / "completions").iterdir())) == 4
    else:
        assert "complete" in done.stdout
