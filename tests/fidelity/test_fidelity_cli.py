"""``h5traces fidelity``: what it prints where, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING

import pytest
from commands import run as run_command
from perturbed import in_steps, make, with_means_only, write

from h5traces.fidelity import compare

if TYPE_CHECKING:
    from pathlib import Path


run = partial(run_command, "fidelity")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An archive, and copies of it that lost precision."""
    exact = make(num_samples=8)
    write(tmp_path / "exact.h5", exact)
    write(tmp_path / "fine.h5", in_steps(exact, 0.02))
    write(tmp_path / "coarse.h5", in_steps(exact, 0.4))
    write(tmp_path / "means.h5", with_means_only(in_steps(exact, 0.4)))
    return tmp_path


def test_a_table_for_every_kind(folder: Path) -> None:
    result = run(folder / "exact.h5", folder / "coarse.h5")
    lines = result.stdout.splitlines()
    assert lines[0] == "8 samples, matched by id; edges are above 0.01"
    assert [line for line in lines if line in ("hidden_states", "attentions")] == [
        "hidden_states",
        "attentions",
    ]
    rows = [line.split()[0] for line in lines if line.startswith(("layer_", "total"))]
    assert rows == ["layer_000", "layer_001", "layer_005", "total"] * 2
    report = compare(folder / "exact.h5", folder / "coarse.h5")
    (total,) = [line for line in lines[:8] if line.startswith("total")]
    assert f"{100 * report.kind('hidden_states').total.nrmse:.4g} %" in total
    assert result.stderr == ""


def test_the_same_archive(folder: Path) -> None:
    result = run(folder / "exact.h5", folder / "exact.h5", "--max-sigma", 0, "--max-flips", 0)
    totals = [line.split() for line in result.stdout.splitlines() if line.startswith("total")]
    assert totals[0] == "total 0 % 0 0 1 1 100 % 0 %".split()
    assert totals[1][1:5] == ["0", "%", "0", "0"]
    assert totals[1][6:] == "0 0 % 0 0".split()


def test_what_only_one_has_is_said(folder: Path) -> None:
    result = run(folder / "exact.h5", folder / "means.h5")
    assert "attention_mean, compared with the mean over heads of A's attentions" in result.stdout
    assert "3 layers of attentions are only in A" in result.stderr
    write(folder / "few.h5", make(num_samples=2))
    result = run(folder / "exact.h5", folder / "few.h5")
    assert "6 samples are only in A: q2, q3, q4 and 3 more" in result.stderr
    assert "only in B" in run(folder / "few.h5", folder / "exact.h5").stderr


def test_json(folder: Path) -> None:
    result = run(folder / "exact.h5", folder / "means.h5", "--json", "--threshold", 0.05)
    document = json.loads(result.stdout)
    report = compare(folder / "exact.h5", folder / "means.h5", threshold=0.05)
    assert document == {**report.as_dict(), "exceeding": []}
    assert document["only_in_a"]["arrays"]["attentions/layer_005"] == 8
    assert document["threshold"] == 0.05


@pytest.mark.parametrize("option", [("--max-sigma", 0.06), ("--max-flips", 0.2)])
def test_limits(folder: Path, option: tuple[str, float]) -> None:
    coarse = in_steps(make(num_samples=8), 0.4)
    for each in coarse:
        each.attentions.update({name: values * 0 for name, values in each.attentions.items()})
    write(folder / "wrong.h5", coarse)
    run(folder / "exact.h5", folder / "fine.h5", *option)
    result = run(folder / "exact.h5", folder / "wrong.h5", *option, "--json", code=1)
    exceeding = json.loads(result.stdout)["exceeding"]
    assert len(exceeding) == 3
    for line in exceeding:
        assert line in result.stderr


def test_what_cannot_be_compared(folder: Path) -> None:
    assert "no such file" in run(folder / "exact.h5", folder / "nope.h5", code=2).stderr
    (folder / "text.h5").write_text("no archive")
    result = run(folder / "text.h5", folder / "exact.h5", code=1)
    assert "text.h5" in result.stderr
    assert result.stdout == ""
    write(folder / "others.h5", make(num_samples=8, seed=5))
    assert "has the shape" in run(folder / "exact.h5", folder / "others.h5", code=2).stderr
    run(folder / "exact.h5", code=2)
    run(folder / "exact.h5", folder / "fine.h5", "--max-sigma", -1, code=2)
    result = run(folder / "exact.h5", folder / "fine.h5", "--threshold", "inf", code=2)
    assert "threshold is inf" in result.stderr


def test_help_teaches() -> None:
    text = run("--help").stdout
    for word in ("--max-sigma", "--threshold", "--json", "docs/fidelity.md", "small.h5"):
        assert word in text


def test_the_program(folder: Path) -> None:
    code = "from h5traces.cli import main; main()"
    arguments = ["fidelity", folder / "exact.h5", folder / "coarse.h5", "--max-sigma", "0.1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "sigma, more than 0.1" in done.stderr
    assert done.stdout.startswith("8 samples")
