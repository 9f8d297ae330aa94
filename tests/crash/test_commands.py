"""The command line under signals, full disks and missing permissions: message, exit code, state."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from child_processes import start_process

import h5traces
from h5traces.errors import ExtractionError
from h5traces.format.dtypes import TypedArray
from h5traces.vllm.recorder import Finished, Recorder, Settings
from h5traces.writing.options import TargetOptions

COMMAND = Path(sys.executable).with_name("h5traces")
SAMPLES = 60


def batch(path, num_samples=SAMPLES, seed=0):
    rng = np.random.default_rng(seed)
    items = [
        {
            "hidden_states": [rng.standard_normal((20, 128)).astype(np.float16) for _ in range(8)],
            "attentions": [rng.random((2, 20, 20)).astype(np.float16) for _ in range(8)],
            "tokens": rng.integers(0, 100, 20),
            "question_id": f"q{number}",
        }
        for number in range(num_samples)
    ]
    path.write_bytes(pickle.dumps(items))


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    for number in range(3):
        batch(folder / f"b{number}.pkl", seed=number)
    return folder


def start(*arguments, **options):
    command = [COMMAND, *map(str, arguments)]
    return start_process(command, start_new_session=True, **options)


def wait_for(process, condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(folder, out):
    """What the same command with --skip-existing does, without another start of Python."""
    assert h5traces.convert(folder, f"{out}/", target=TargetOptions(skip_existing=True)).ok
    assert sorted(path.name for path in out.iterdir()) == ["b0.h5", "b1.h5", "b2.h5"]
    with h5traces.open(out) as archive:
        assert len(archive) == 3 * SAMPLES


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_cleanly(batches, tmp_path, number, code, workers):
    out = tmp_path / "out"
    process = start("convert", batches, "-o", f"{out}/", "--workers", workers)
    wait_for(process, lambda: out.exists() and any(out.glob("*.part")))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C does
    else:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert "stopped; no unfinished file was kept" in stderr
    assert "Traceback" not in stderr
    assert not list(out.glob("*.part"))
    finish(batches, out)


def test_processes_end_with_a_parent_that_is_killed(batches, tmp_path):
    out = tmp_path / "out"
    process = start("convert", batches, "-o", f"{out}/", "--workers", 2)
    wait_for(process, lambda: out.exists() and any(out.glob("*.part")))
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    finish(batches, out)


def test_a_killed_worker_is_a_clean_failure(batches, tmp_path):
    out = tmp_path / "out"
    process = start("convert", batches, "-o", f"{out}/", "--workers", 2)
    wait_for(process, lambda: out.exists() and any(out.glob("*.part")))
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ended before
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "one of the processes was killed" in stderr
    assert "Traceback" not in stderr
    finish(batches, out)


def test_a_file_size_limit_is_a_clean_failure(batches, tmp_path):
    out = tmp_path / "out"
    limit = 300_000
    process = start(
        "convert",
        batches,
        "-o",
        f"{out}/",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "b0.h5: cannot be written: [Errno 27] File too large" in stderr
    assert "Traceback" not in stderr
    assert list(out.iterdir()) == []
    finish(batches, out)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, where mounting one is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "h5traces-test", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not possible here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_a_clean_failure(batches, small_disk, tmp_path):
    out = small_disk / "out"
    process = start("convert", batches, "-o", f"{out}/")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "b1.h5: cannot be written: [Errno 28] No space left on device" in stderr
    assert "make room or choose another folder" in stderr
    assert "Traceback" not in stderr
    assert [path.name for path in out.iterdir()] == ["b0.h5"]
    assert h5traces.validate(out / "b0.h5").ok
    shutil.move(out, tmp_path / "room")
    finish(batches, tmp_path / "room")


def test_a_full_disk_keeps_every_acknowledged_sample(batches, small_disk):
    items = h5traces.load(batches / "b0.pkl") * 3
    acked = 0
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012  # counts until it raises
        with h5traces.create(
            f"{small_disk}/run/", target=TargetOptions(shard_samples=20)
        ) as writer:
            for item in items:
                writer.append(item)
                acked += 1
    assert acked > 10
    shutil.move(small_disk / "run.spool", small_disk.parent / "run.spool")
    shutil.copytree(small_disk / "run", small_disk.parent / "run")
    with h5traces.create(
        f"{small_disk.parent}/run/", target=TargetOptions(shard_samples=20)
    ) as writer:
        assert writer.num_samples == acked


def test_a_full_disk_stops_an_engine_of_vllm(small_disk):
    """What its connector stored before stays."""
    target = small_disk / "run.h5"
    settings = Settings.of({"target": str(target), "max_waiting_nbytes": 1})
    recorder = Recorder.of(settings, num_layers=1)
    array = np.random.default_rng(0).standard_normal((100, 1, 2000)).astype("<f2")

    def store():
        for number in range(100):
            request = Finished(f"r{number}", tuple(range(100)), 2, (7, 8), "stop")
            recorder.take(request, TypedArray.of(array), {0: 0})

    with pytest.raises(ExtractionError, match=r"trace could not be stored: .*No space left"):
        store()
    with pytest.raises(ExtractionError, match="No space left"):
        recorder.close()
    stored = len(list(Path(f"{target}.spool").glob("*.sample")))
    assert 5 < stored < 15
    shutil.move(f"{target}.spool", small_disk.parent / "run.h5.spool")
    (found,) = h5traces.finish(small_disk.parent / "run.h5")
    with h5traces.open(found) as archive:
        assert list(archive.ids) == [f"r{number}" for number in range(stored)]
        np.testing.assert_array_equal(archive[stored - 1].layer(0), array[:, 0])


def test_a_disk_mounted_read_only(batches, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    process = start("convert", batches, "-o", small_disk)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "b0.h5: cannot be written: [Errno 30] Read-only file system" in stderr
    assert "Traceback" not in stderr


def unprivileged():
    """Options that start a process which permissions bind; root ignores them."""
    return {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}


def test_a_folder_that_may_not_be_written(batches, tmp_path):
    try:
        start("--version", cwd="/", **unprivileged()).communicate()
    except PermissionError:
        pytest.skip("an unprivileged user cannot run h5traces here")
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o555)
    for folder in (batches, *tmp_path.parents, *batches.parents):
        with contextlib.suppress(PermissionError):
            folder.chmod(folder.stat().st_mode | 0o055)
    tmp_path.chmod(0o755)
    process = start("convert", batches, "-o", f"{out}/", cwd="/", **unprivileged())
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cannot be written: [Errno 13] Permission denied" in stderr
    assert "Traceback" not in stderr
    out.chmod(0o755)
