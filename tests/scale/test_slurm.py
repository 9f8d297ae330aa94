"""Ranks under a real SLURM: arrays, kills, requeue, pre-emption, and `srun` over two nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from slurm_cluster import SlurmCluster, reason_to_skip
from working_batches import write_batches

import h5traces
from h5traces.ranks.status import status

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))

NUM_BATCHES = 8
EXAMPLE = Path(__file__).parents[2] / "examples" / "slurm" / "convert.sh"
H5TRACES = f"{sys.executable} -m h5traces"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_batches(tmp_path_factory.mktemp("sources") / "batches", NUM_BATCHES)


@pytest.fixture(scope="module")
def slow_batches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some seconds of work."""
    return write_batches(tmp_path_factory.mktemp("slow") / "batches", 6, 150, 40)


def check_complete(folder: Path, sources: Path) -> None:
    """The archives hold every sample once, and nothing else lies there."""
    found = h5traces.open(folder)
    ids = sorted(str(each) for each in found.ids)
    names = sorted(path.stem for path in sources.glob("*.pkl"))
    assert len(ids) == len(set(ids))
    assert {f"b{each.split('_')[1]}" for each in ids} == set(names)
    assert sorted(path.stem for path in folder.glob("*.h5")) == names
    assert not list(folder.rglob("*.part"))
    assert status(folder).ok


def convert(sources: Path, target: Path, *options: str) -> str:
    return f"exec {H5TRACES} convert {sources} -o {target}/ --rank auto {' '.join(options)}"


def test_an_array_makes_what_one_process_makes(
    slurm: SlurmCluster, batches: Path, tmp_path: Path
) -> None:
    slurm.wait(slurm.submit(convert(batches, tmp_path / "array"), "--array=3-6"))
    check_complete(tmp_path / "array", batches)
    h5traces.convert(str(batches), f"{tmp_path}/alone/")
    assert h5traces.open(tmp_path / "array") == h5traces.open(tmp_path / "alone")


def test_a_hole_in_an_array_is_named_and_filled(
    slurm: SlurmCluster, batches: Path, tmp_path: Path
) -> None:
    target = tmp_path / "run"
    script = convert(batches, target, "--world-size", "4")
    slurm.wait(slurm.submit(script, "--array=0,2-3"))
    done = subprocess.run(
        [*H5TRACES.split(), "status", str(target), "--missing"], capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("1", 1)
    slurm.wait(slurm.submit(script, f"--array={done.stdout.strip()}"))
    check_complete(target, batches)


def test_two_nodes_share_a_step(slurm: SlurmCluster, batches: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    command = convert(batches, target).removeprefix("exec ")
    slurm.wait(slurm.submit(f"srun --mpi=none {command}", "-N", "2", "-n", "2"))
    check_complete(target, batches)
    assert sorted(path.name for path in (target / "ranks").glob("*.jsonl")) == [
        "00000-of-00002.jsonl",
        "00001-of-00002.jsonl",
    ]


def test_a_batch_script_without_srun_is_one_process(
    slurm: SlurmCluster, batches: Path, tmp_path: Path
) -> None:
    """SLURM sets SLURM_PROCID=0 of SLURM_NTASKS=2 there, which would do half of the work."""
    slurm.wait(slurm.submit(convert(batches, tmp_path / "run"), "-n", "2"))
    assert not list(tmp_path.rglob("*.h5"))
    assert "rank is 'auto', but the environment has neither" in slurm.output().replace("\n", " ")


def run_here(slurm: SlurmCluster, tmp_path: Path, *command: str) -> str:
    """The output of a program that submits jobs."""
    h5traces_command = tmp_path / "h5traces"
    h5traces_command.write_text(f'#!/bin/sh\nexec {H5TRACES} "$@"\n')
    h5traces_command.chmod(0o755)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # A job would inherit limits of this one.
    environment = {**slurm.environment, "PATH": path, "H5TRACES": str(h5traces_command)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr + slurm.output()
    return done.stdout


def test_the_example_goes_from_a_pilot_to_a_catalogue(
    slurm: SlurmCluster, batches: Path, tmp_path: Path
) -> None:
    target = tmp_path / "run"
    script = str(EXAMPLE.with_name("run.sh"))
    run_here(slurm, tmp_path, "bash", script, f"{batches}/", f"{target}/")
    check_complete(target, batches)
    with h5traces.open(target / "catalogue.parquet") as catalogue:
        assert len(catalogue) == 2 * NUM_BATCHES


@pytest.mark.parametrize("name", ["datatrove", "submitit"])
def test_launchers_submit_to_slurm(
    slurm: SlurmCluster, batches: Path, tmp_path: Path, name: str
) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed: it has no wheel here")
    target = tmp_path / "run"
    script = str(EXAMPLE.parents[1] / f"{name}_convert.py")
    run_here(slurm, tmp_path, sys.executable, script, str(batches), f"{target}/", "slurm")
    end = time.monotonic() + 120
    while not ((target / "run.json").exists() and status(target).ok):
        assert time.monotonic() < end, slurm.output()
        time.sleep(0.2)
    check_complete(target, batches)


def started(target: Path) -> None:
    """Return when the first archive is there."""
    end = time.monotonic() + 60
    while not list(target.glob("*.h5")):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_rank_starts_again(
    slurm: SlurmCluster, slow_batches: Path, tmp_path: Path
) -> None:
    target = tmp_path / "run"
    script = convert(slow_batches, target)
    job = slurm.submit(script, "--array=0-1", "--requeue")
    started(target)
    slurm.run("scancel", "--signal=KILL", "--full", f"{job}_1")
    slurm.wait(job)
    left: Any = status(target).missing
    assert left
    slurm.wait(slurm.submit(script, "--array=0-1"))
    check_complete(target, slow_batches)


def test_a_requeued_rank_goes_on(slurm: SlurmCluster, slow_batches: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    job = slurm.submit(convert(slow_batches, target), "--array=0-1", "--requeue")
    started(target)
    slurm.run("scontrol", "requeue", f"{job}_0")
    slurm.wait(job)
    check_complete(target, slow_batches)


def test_a_preempted_rank_leaves_on_its_signal_and_comes_back(
    slurm: SlurmCluster, slow_batches: Path, tmp_path: Path
) -> None:
    """By the script of the examples."""
    target, command = tmp_path / "run", tmp_path / "h5traces"
    command.write_text(f'#!/bin/sh\nexec {H5TRACES} "$@"\n')
    command.chmod(0o755)
    script = f"export H5TRACES={command}\n{EXAMPLE.read_text()}"
    options = ("--array=0-1", "--mem=100M", "--exclusive", "--time=10", "--signal=USR1@5")
    job = slurm.submit(script, *options, arguments=(str(slow_batches), f"{target}/"))
    started(target)
    urgent = slurm.submit("sleep 1", "-N", "2", "--exclusive", "-p", "high")
    slurm.wait(urgent, job)
    check_complete(target, slow_batches)
    text = "".join(each.read_text() for each in target.glob("ranks/*.jsonl"))
    lines = [json.loads(line) for line in text.splitlines()]
    starts = [line for line in lines if line["event"] == "start"]
    assert len(starts) > 2, lines
