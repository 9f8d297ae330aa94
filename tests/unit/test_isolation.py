"""Validation in a child process: what ends the child becomes a finding."""

from __future__ import annotations

import json
import pickle
import re
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

import h5traces
from h5traces.checking import isolated as isolation
from h5traces.checking.isolated import IsolationLimits, validate_isolated
from h5traces.checking.validate import validate
from h5traces.cli.app import app
from h5traces.format.limits import ReadLimits

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    batch = [{"hidden_states": [np.ones((3, 4), "f2")], "tokens": np.arange(3), "question": "why"}]
    source = tmp_path / "batch.pkl"
    source.write_bytes(pickle.dumps(batch))
    path = tmp_path / "archive.h5"
    h5traces.convert(source, path)
    return path


def kinds(report: isolation.ValidationReport) -> list[str]:
    return [each.kind for each in report.problems]


def in_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the child do this where it would validate."""
    body = f"def stand_in(path, limits, **_):\n import os, time\n {code}\n"
    run = "from h5traces.checking import isolated\nisolated.run_child(stand_in)"
    monkeypatch.setattr(isolation, "_CHILD", body + run)


def test_report_is_the_same(archive: Path) -> None:
    assert [validate_isolated(archive)] == validate(archive)


def test_problems_come_back(archive: Path) -> None:
    with h5py.File(archive, "r+") as file:
        del file["samples/00000000/tokens"]
    report = validate_isolated(archive)
    assert [report] == validate(archive)
    assert "digest_mismatch" in kinds(report)


def test_limits_reach_the_child(archive: Path) -> None:
    with h5py.File(archive, "r+"):
        pass
    report = validate_isolated(archive, limits=ReadLimits(max_objects=1))
    assert any("the limit is 1" in each.message for each in report.problems)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        validate_isolated(tmp_path / "none.h5")


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("os.kill(os.getpid(), 11)", "crashed", "was ended by SIGSEGV"),
        ("raise ValueError('boo')", "crashed", "code 1 and without a report.*boo"),
        ("bytearray(1 << 29)", "out_of_memory", "needed more than 268435456 bytes of memory"),
        ("raise MemoryError", "out_of_memory", "needed more than"),
        ("time.sleep(60)", "timed_out", "did not end within 1 s"),
    ],
)
def test_end_of_the_child_is_a_finding(
    archive: Path, monkeypatch: pytest.MonkeyPatch, code: str, kind: str, message: str
) -> None:
    in_child(monkeypatch, code)
    small = IsolationLimits(memory_nbytes=256 << 20, timeout=1)
    (problem,) = validate_isolated(archive, isolation=small).problems
    assert problem.loc == "/"
    assert problem.kind == kind
    assert re.search(message, problem.message, re.DOTALL)


def test_clock_outside_stops_what_ignores_the_clock_inside(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_child(monkeypatch, "import signal; signal.signal(14, signal.SIG_IGN); time.sleep(60)")
    monkeypatch.setattr(isolation, "_GRACE_SECONDS", 1.0)
    report = validate_isolated(archive, isolation=IsolationLimits(timeout=0.5))
    assert kinds(report) == ["timed_out"]


def test_no_core_and_no_module_of_the_current_folder(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "h5py.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(trap)
    assert validate_isolated(archive).ok


def test_command(archive: Path) -> None:
    result = CliRunner().invoke(app, ["validate", "--isolated", str(archive), "--json"])
    assert result.exit_code == 0, result.output
    (report,) = json.loads(result.stdout)
    assert report["ok"]
    assert report["num_samples"] == 1


def test_command_with_limits(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_child(monkeypatch, "bytearray(1 << 28)")
    words = ["validate", "--isolated", "--memory", "64", "--timeout", "20", str(archive)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert "67108864 bytes of memory" in " ".join(result.output.split())


def test_reading_every_value_has_the_time_that_it_takes() -> None:
    assert IsolationLimits().seconds(0) == 60
    assert IsolationLimits().seconds(10_000_000_000) == 560
    assert IsolationLimits(timeout=5).seconds(10_000_000_000) == 5
