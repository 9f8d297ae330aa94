"""Writers that are closed by ``atexit``, when Python has stopped its threads already."""

from __future__ import annotations

import subprocess
import sys

import pytest

import h5traces

CODE = """
import atexit, sys
import numpy as np
import h5traces

path, spool, tier = sys.argv[1], sys.argv[2] == "spool", sys.argv[3]
writer = h5traces.create(path, spool=spool, precision=tier)
atexit.register(writer.close)
values = np.random.default_rng(0).normal(size=(3, 4, 700, 200)).astype("f2")
for number, layers in enumerate(values):
    writer.append({"question_id": f"q{number}", "hidden_states": list(layers)})
"""


@pytest.mark.parametrize("tier", ["exact", "compact"])
def test_closing_at_exit_packs_everything(tier, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path / "run.h5", "spool", tier],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run.h5.spool").exists()
    assert h5traces.verify(tmp_path / "run.h5").ok
    assert len(h5traces.open(tmp_path / "run.h5")) == 3


def test_closing_without_a_spool_at_exit(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path / "run.h5", "direct", "exact"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Traceback" not in done.stderr
    assert len(h5traces.open(tmp_path / "run.h5")) == 3
