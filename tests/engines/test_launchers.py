"""The examples of submitit and datatrove, on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from engine_runs import EXAMPLES, digests, write_batches

import h5traces

if TYPE_CHECKING:
    from pathlib import Path


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
