"""`h5traces.finish`: what a stopped run left becomes archives, without its program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from scenarios import is_same, item
from typer.testing import CliRunner

import h5traces
from h5traces.cli.app import app
from h5traces.errors import ArchiveError, OptionError, PrecisionError
from h5traces.writing.options import PrecisionOptions, TargetOptions


def suspended(path, count, **options):
    writer = h5traces.create(path, **options)
    for number in range(count):
        writer.append(item(number))
    writer.suspend()


def run(*arguments, code=0):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize("named", ["run.h5", "run.h5.spool", "run.h5.spool/"])
def test_one_archive_by_its_name_or_that_of_the_spool(tmp_path, named):
    suspended(tmp_path / "run.h5", 5, model_id="tiny")
    (found,) = h5traces.finish(f"{tmp_path}/{named}")
    assert found == tmp_path / "run.h5"
    assert [each.name for each in tmp_path.iterdir()] == ["run.h5"]
    with h5traces.open(found) as archive:
        assert archive.metadata.model_id == "tiny"
        assert all(is_same(trace.to_dict(), item(n)) for n, trace in enumerate(archive))
    assert h5traces.finish(tmp_path / "run.h5") == [found]
    assert h5traces.validate(found).ok


@pytest.mark.parametrize("count", [3, 7])
def test_shards_in_a_folder(tmp_path, count):
    suspended(f"{tmp_path}/out/", count, target=TargetOptions(shard_samples=4))
    found = h5traces.finish(f"{tmp_path}/out")  # with 3 samples, the folder does not exist yet
    assert [each.name for each in found] == ["traces-00000.h5", "traces-00001.h5"][: -(-count // 4)]
    assert len(h5traces.open(f"{tmp_path}/out")) == count
    assert h5traces.finish(f"{tmp_path}/out") == found[:1] or len(found) == 2


def test_options_are_those_of_the_run(tmp_path):
    options = PrecisionOptions(tier="analysis", codec="zstd")
    suspended(tmp_path / "run.h5", 3, precision=options)
    with h5traces.create(tmp_path / "same.h5", precision=options) as writer:
        for number in range(3):
            writer.append(item(number))
    h5traces.finish(tmp_path / "run.h5")
    with h5traces.open(tmp_path / "run.h5") as ours, h5traces.open(tmp_path / "same.h5") as same:
        assert ours.metadata.precision == same.metadata.precision
        assert ours.metadata.codec == "zstd"
        for left, right in zip(ours, same, strict=True):
            assert is_same(left.to_dict(), right.to_dict())


def test_given_scales_are_asked_for(tmp_path):
    suspended(tmp_path / "exact.h5", 3)
    (exact,) = h5traces.finish(tmp_path / "exact.h5")
    scales, others = tmp_path / "scales.h5", tmp_path / "others.h5"
    h5traces.calibrate(exact, scales)
    h5traces.calibrate(exact, others, samples=1)
    options = PrecisionOptions(tier="fine", scales=scales)
    suspended(tmp_path / "run.h5", 2, precision=options)
    with pytest.raises(PrecisionError, match="the run was given a file of scales"):
        h5traces.finish(tmp_path / "run.h5")
    with pytest.raises(PrecisionError, match="not the scales that the run of"):
        h5traces.finish(tmp_path / "run.h5", scales=others)
    (found,) = h5traces.finish(tmp_path / "run.h5", scales=scales)
    assert len(h5traces.open(found)) == 2


def test_a_live_run_is_left_alone(tmp_path):
    with h5traces.create(tmp_path / "run.h5") as writer:
        writer.append(item(0))
        with pytest.raises(ArchiveError, match=f"process {os.getpid()} on .* is writing it"):
            h5traces.finish(tmp_path / "run.h5")
        writer.append(item(1))
    assert len(h5traces.open(tmp_path / "run.h5")) == 2


def test_a_killed_run(tmp_path):
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "import h5traces; from scenarios import item\n"
        "writer = h5traces.create(sys.argv[1])\n"
        "for number in range(4): writer.append(item(number)); print(number, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    folder = str(Path(__file__).parent)
    command = [sys.executable, "-c", code, str(tmp_path / "run.h5"), folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == ["0", "1", "2", "3"]
    assert "4 samples" in run("finish", tmp_path / "run.h5")
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert all(is_same(trace.to_dict(), item(n)) for n, trace in enumerate(archive))


def test_nothing_stored_and_nothing_there(tmp_path):
    suspended(tmp_path / "run.h5", 0)
    assert "stored no sample" in run("finish", tmp_path / "run.h5")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="no such archive, and no spool"):
        h5traces.finish(tmp_path / "run.h5")
    with pytest.raises(OptionError, match="overwrite has no meaning"):
        h5traces.finish(tmp_path / "run.h5", target=TargetOptions(overwrite=True))
