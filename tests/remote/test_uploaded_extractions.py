"""Extractions whose shards go to a bucket: one result, whatever fails and wherever ranks go on."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from child_processes import start_process
from test_uploads import BUCKET, DEST, EXPIRED, UPLOAD, files, names, process
from typer.testing import CliRunner

import h5traces
from h5traces.cli.app import app
from h5traces.errors import ArchiveExistsError, PrecisionError, RemoteError, TargetError
from h5traces.extract import (
    DatasetChoice,
    ExtractOptions,
    GenerationOptions,
    ModelChoice,
    extract_dataset,
)
from h5traces.ranks.bucket import BucketRun
from h5traces.ranks.plan import RunPlan
from h5traces.ranks.rank import Rank
from h5traces.writing.options import PrecisionOptions, TargetOptions

if TYPE_CHECKING:
    from servers import Server

__all__ = ["files", "process"]

EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_SAMPLES = 7
SHARDS = [f"{BUCKET}/run/traces-0000{n}.h5" for n in range(3)]
DONE = {**UPLOAD, "query": "", **EXPIRED}


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is not uploaded lies here; another machine has none of it."""
    folder = tmp_path / "machine"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def run(dest: str, *, batch_size: int = 2, precision: Any = None, **options: Any) -> Any:
    return extract_dataset(
        ModelChoice(model_id=str(EXAMPLES / "tiny-llama-pydocs")),
        DatasetChoice(dataset=str(EXAMPLES / "questions.jsonl"), num_samples=NUM_SAMPLES),
        dest,
        ExtractOptions(generation=GenerationOptions(max_new_tokens=4), batch_size=batch_size),
        precision=precision,
        # Batches of two, which no shard ends with.
        target=TargetOptions(shard_samples=3),
        **options,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes on disk."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert run(f"{folder}/").ok
    return folder


def digests(place: Path | str) -> list[tuple[Any, ...]]:
    with h5traces.open(place) as archive:
        return [(each.path.name, each.metadata.sample_id, each.metadata.digest) for each in archive]


def stop_after(calls: int) -> Any:
    left = [calls]

    def should_stop() -> bool:
        left[0] -= 1
        return left[0] < 0

    return should_stop


def test_a_run_into_a_bucket_is_one_of_one_rank(
    files: Any, alone: Path, machine: Path, tmp_path: Path
) -> None:
    seen: list[Any] = []
    report = run(DEST, progress=seen.append)
    assert report.ok
    assert (report.output, report.num_written, report.num_planned) == (DEST, NUM_SAMPLES, 7)
    assert [each.num_done for each in seen] == list(range(1, NUM_SAMPLES + 1))
    assert {each.num_samples for each in seen} == {NUM_SAMPLES}
    assert [each for each in names(files) if each.endswith(".h5")] == SHARDS
    assert digests(DEST) == digests(alone)
    assert not list(machine.iterdir())
    found = h5traces.status(DEST)
    assert (found.ok, found.num_done, found.num_samples, found.done) == (True, 3, 7, [0])
    assert h5traces.collect(DEST, tmp_path / "one.h5", order="index").ok
    # Nothing is done twice.
    assert run(DEST).num_before == NUM_SAMPLES
    with pytest.raises(TargetError, match="batch_size is 1, and was 2"):
        run(DEST, batch_size=1)


def test_the_result_does_not_depend_on_ranks(files: Any, alone: Path) -> None:
    reports = [run(DEST, rank=rank, world_size=2) for rank in (1, 0)]
    assert all(each.ok for each in reports)
    assert sum(each.num_written for each in reports) == NUM_SAMPLES
    assert digests(DEST) == digests(alone)
    saved = json.loads(files.cat(f"{DEST}ranks/00000-of-00002/report.json"))
    assert saved["num_written"] == reports[1].num_written
    with pytest.raises(TargetError, match=r"go on with rank=0 and world_size=1"):
        run(DEST)


@pytest.mark.parametrize("is_elsewhere", [False, True], ids=["same machine", "another"])
def test_credentials_that_expire_end_a_run_that_goes_on(
    files: Any, alone: Path, process: Server, machine: Path, is_elsewhere: bool
) -> None:
    # The plan, the sign of life, then the first shard and its line.
    process.control(fail={**DONE, "after": 4})
    with pytest.raises(RemoteError, match=r"traces-0000\d\.h5: the server refuses access"):
        run(DEST)
    process.control(fail={})
    assert [each for each in names(files) if each.endswith(".h5")] == SHARDS[:1]
    assert h5traces.status(DEST).num_done == 1
    waiting = {each.name for each in machine.rglob("*.h5")}
    assert "traces-00001.h5" in waiting
    if is_elsewhere:
        shutil.rmtree(machine)
        machine.mkdir()
    report = run(DEST)
    assert report.ok
    if is_elsewhere:
        assert (report.num_before, report.num_written) == (3, 4)
    else:
        assert report.num_before >= 6
    assert digests(DEST) == digests(alone)
    assert not list(machine.iterdir())
    assert h5traces.collect(DEST).ok


def test_another_number_of_ranks_goes_on(
    files: Any, alone: Path, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(DEST, rank=0, world_size=1, should_stop=stop_after(3))
    assert report.status == "stopped"
    assert h5traces.status(DEST).missing == [0]
    assert len(list(machine.rglob("*.sample"))) > 0
    # On this machine, samples of the shard that was begun are not computed again.
    reports = [run(DEST, rank=rank, world_size=3) for rank in range(3)]
    assert sum(each.num_written for each in reports) + report.num_written == NUM_SAMPLES
    assert digests(DEST) == digests(alone)
    found = h5traces.collect(DEST)
    assert found.ok
    assert found.status.world_size == 3


def test_a_rank_at_work_keeps_its_number_of_ranks(files: Any) -> None:
    plan = RunPlan(command="extract", world_size=2, options={}, costs=(1, 1))
    with (
        BucketRun(DEST, Rank(0, 2), plan),
        pytest.raises(TargetError, match="of which rank 0 gave a sign of life"),
    ):
        BucketRun(DEST, Rank(0, 3), plan.model_copy(update={"world_size": 3}))


def test_a_shard_without_a_line_counts(files: Any, alone: Path, tmp_path: Path) -> None:
    """Its rank was killed after the upload."""
    run(DEST)
    for each in files.find(f"{BUCKET}/run/ranks"):
        files.rm(each)
    assert h5traces.status(DEST).num_done == 0
    report = run(DEST)
    assert (report.num_before, report.num_written) == (NUM_SAMPLES, 0)
    assert h5traces.status(DEST).num_samples == NUM_SAMPLES
    # One that is gone is made again; one of something else is an error.
    files.rm(SHARDS[1])
    assert len(h5traces.collect(DEST).missing) == 3
    assert run(DEST).num_written == 3
    assert digests(DEST) == digests(alone)
    files.put_file(str(alone / "traces-00000.h5"), SHARDS[2])
    with pytest.raises(ArchiveExistsError, match=r"traces-00002\.h5 exists, and is not of this"):
        run(DEST)


def test_a_killed_rank_goes_on(files: Any, alone: Path, machine: Path) -> None:
    """Real processes; the signal comes while samples wait on this machine."""
    command = [sys.executable, "-m", "h5traces", "extract"]
    command += ["--model-id", str(EXAMPLES / "tiny-llama-pydocs")]
    command += ["--dataset", str(EXAMPLES / "questions.jsonl"), "-n", str(NUM_SAMPLES)]
    command += ["--max-new-tokens", "4", "--batch-size", "2", "--shard-samples", "3", "-o", DEST]
    environment = {**os.environ, "TMPDIR": str(machine)}
    first = start_process(command, env=environment)
    end = time.monotonic() + 100
    while not list(machine.rglob("*.sample")) and first.poll() is None:
        assert time.monotonic() < end
    assert first.poll() is None
    first.kill()
    first.communicate()
    second = start_process(command, env=environment)
    _, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert digests(DEST) == digests(alone)
    assert not list(machine.glob("h5traces-*"))


def test_tiers_need_scales_that_all_shards_have(files: Any, tmp_path: Path, alone: Path) -> None:
    with pytest.raises(PrecisionError, match=r"cannot share scales .* pass scales"):
        run(DEST, precision="analysis")
    h5traces.calibrate(alone, tmp_path / "scales.h5")
    precision = PrecisionOptions(tier="analysis", scales=tmp_path / "scales.h5")
    for rank in (1, 0):
        assert run(DEST, precision=precision, rank=rank, world_size=2).ok
    run(f"{tmp_path}/local/", precision=precision)
    assert digests(DEST) == digests(tmp_path / "local")


def test_the_command_line(files: Any) -> None:
    command = ["extract", "--model-id", str(EXAMPLES / "tiny-llama-pydocs"), "-n", "2"]
    command += ["--dataset", str(EXAMPLES / "questions.jsonl"), "--max-new-tokens", "2"]
    done = CliRunner().invoke(app, [*command, "-o", DEST])
    assert done.exit_code == 0, done.output
    assert f"{DEST}: 2 of 2 samples" in done.output.replace("\n", " ")
    done = CliRunner().invoke(app, [*command, "-o", DEST.removesuffix("/")])
    assert done.exit_code == 2
    assert "end it in a slash" in done.output.replace("\n", " ")
