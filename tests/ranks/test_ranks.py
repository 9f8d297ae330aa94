"""Ranks of one conversion: their numbers, their plan, their shares, and what goes wrong."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from legacy_batches import make_batch, write_batch

import h5traces
from h5traces.errors import ArchiveError, OptionError, TargetError
from h5traces.ranks.plan import RunPlan, deal, fix_plan, read_plan
from h5traces.ranks.rank import Rank, find_rank
from h5traces.ranks.run import RankRun
from h5traces.ranks.status import as_ranges
from h5traces.writing.options import PrecisionOptions, TargetOptions

if TYPE_CHECKING:
    from pathlib import Path

OVERWRITE = TargetOptions(overwrite=True)
ARRAY = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "10"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"H5TRACES_RANK": "1", "H5TRACES_WORLD_SIZE": "4", **ARRAY}, (1, 4)),
        ({**ARRAY, "SLURM_ARRAY_TASK_COUNT": "8", "RANK": "0", "WORLD_SIZE": "2"}, (2, 8)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}, (2, 3)),
    ],
)
def test_the_environment_says_which_rank(
    environment: dict[str, str], expected: tuple[int, int]
) -> None:
    found = find_rank("auto", None, None, environment)
    assert found is not None
    assert (found.number, found.size) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # A batch script with -n 2, which no srun started.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": str(2**32 - 5), "SLURM_STEP_NUM_TASKS": "2"},
    ],
)
def test_an_environment_without_ranks_is_an_error(environment: dict[str, str]) -> None:
    with pytest.raises(OptionError, match=r"neither H5TRACES_RANK .* pass rank and world_size"):
        find_rank("auto", None, None, environment)


def plan(world_size: int, **changes: Any) -> RunPlan:
    return RunPlan(command="convert", world_size=world_size, options={}, costs=(1,) * 10, **changes)


@pytest.mark.parametrize("first", [0, 3])
def test_a_part_of_an_array_keeps_its_ranks(tmp_path: Path, first: int) -> None:
    fix_plan(tmp_path, plan(8, first_task=first))
    alone = {f"SLURM_ARRAY_TASK_{name}": str(first + 5) for name in ("ID", "MIN", "MAX")}
    found = find_rank("auto", None, tmp_path, {**alone, "SLURM_ARRAY_TASK_COUNT": "1"})
    assert found is not None
    assert (found.number, found.size, found.first) == (5, 8, first)


def test_a_hole_in_an_array_is_said(caplog: pytest.LogCaptureFixture) -> None:
    found = find_rank("auto", None, None, {**ARRAY, "SLURM_ARRAY_TASK_COUNT": "7"})
    assert (found.number, found.size) == (2, 8)  # type: ignore[union-attr]
    assert "the array has a hole: 7 tasks for the ids 3 to 10" in caplog.text


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        (8, 8, r"rank 8 of world_size 8 .* expected a rank from 0 to world_size - 1"),
        (-1, 8, "rank -1"),
        (0, None, "rank is 0 without world_size"),
        (None, 8, "world_size is 8 without a rank"),
    ],
)
def test_numbers_that_do_not_go_together(
    rank: int | None, world_size: int | None, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        find_rank(rank, world_size)


def test_work_is_dealt_by_cost_and_all_of_it() -> None:
    costs = [5, 1, 1, 1, 1, 1]
    assert deal(costs, 2) == [[0], [1, 2, 3, 4, 5]]
    for size in (1, 3, 8):
        shares = deal(costs, size)
        assert sorted(each for share in shares for each in share) == list(range(6))


def test_ranges_are_those_of_slurm() -> None:
    assert as_ranges([0, 3, 4, 5, 9, 8]) == "0,3-5,8-9"


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    folder = tmp_path / "batches"
    folder.mkdir()
    for number in range(5):
        write_batch(
            folder / f"batch_{number}.pkl", make_batch("final_full", num_samples=2, seed=number)
        )
    return folder


def digests(folder: Path) -> dict[str, list[object]]:
    """By archive, the digest of every sample."""
    found = {}
    for path in sorted(folder.glob("*.h5")):
        with h5traces.open(path) as archive:
            (file,) = archive._files
            found[path.name] = [file.sample_attrs(n)["digest"] for n in range(file.num_samples)]
    return found


@pytest.mark.parametrize("tier", ["exact", "analysis"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_result_does_not_depend_on_ranks(
    batches: Path, tmp_path: Path, tier: Any, size: int
) -> None:
    h5traces.convert(batches, f"{tmp_path}/alone/", precision=tier)
    for rank in reversed(range(size)):
        report = h5traces.convert(
            batches, f"{tmp_path}/many/", precision=tier, rank=rank, world_size=size
        )
        assert report.ok
    assert digests(tmp_path / "many") == digests(tmp_path / "alone")
    found = h5traces.status(tmp_path / "many")
    assert found.ok
    assert (found.num_done, found.num_items, found.num_samples) == (5, 5, 10)
    assert found.done == list(range(size))


def test_a_rank_with_other_options_is_rejected(batches: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/out/"
    h5traces.convert(batches, out, rank=0, world_size=2)
    with pytest.raises(TargetError, match=r"planned otherwise: dtype is 'auto', and was 'float16'"):
        h5traces.convert(
            batches, out, precision=PrecisionOptions(dtype="auto"), rank=1, world_size=2
        )
    write_batch(batches / "batch_9.pkl", make_batch("final_full", num_samples=1))
    with pytest.raises(TargetError, match=r"batch_9\.pkl came after the plan was made"):
        h5traces.convert(batches, out, rank=1, world_size=2)
    (batches / "batch_9.pkl").unlink()
    write_batch(batches / "batch_3.pkl", make_batch("final_full", num_samples=3))
    with pytest.raises(TargetError, match=r"batch_3\.pkl changed .* \([\d,]+ bytes, was \d"):
        h5traces.convert(batches, out, rank=1, world_size=2)
    write_batch(batches / "batch_3.pkl", make_batch("final_full", num_samples=2, seed=3))
    with pytest.raises(TargetError, match=r"\(at another time, with as many bytes\)"):
        h5traces.convert(batches, out, rank=1, world_size=2)


def test_a_rank_of_another_version_is_rejected(tmp_path: Path) -> None:
    fix_plan(tmp_path, plan(2, generator="h5traces 0.0.1"))
    with pytest.raises(
        TargetError, match=r"generator is 'h5traces .*', and was 'h5traces 0\.0\.1'"
    ):
        fix_plan(tmp_path, plan(2))


def test_what_a_killed_rank_had_named_counts(batches: Path, tmp_path: Path) -> None:
    """Its archive has its name, but there is no line about it."""
    h5traces.convert(batches, f"{tmp_path}/out/")
    h5traces.convert(batches, f"{tmp_path}/out/", rank=0, world_size=1)
    assert h5traces.status(tmp_path / "out").num_samples == 10
    assert h5traces.collect(tmp_path / "out").ok


def test_options_that_do_not_go_with_ranks(batches: Path, tmp_path: Path) -> None:
    shared: Any = {"rank": 0, "world_size": 2}
    with pytest.raises(OptionError, match="merge=True does not go with rank"):
        h5traces.convert(batches, f"{tmp_path}/out/", merge=True, **shared)
    with pytest.raises(OptionError, match="overwrite=True does not go with rank"):
        h5traces.convert(batches, f"{tmp_path}/out/", target=OVERWRITE, **shared)
    with pytest.raises(TargetError, match="is one file, which ranks cannot share"):
        h5traces.convert(batches / "batch_0.pkl", tmp_path / "out.h5", **shared)
    with pytest.raises(OptionError, match="expected a whole number or 'auto'"):
        h5traces.convert(batches, f"{tmp_path}/out/", rank="first", world_size=2)  # type: ignore[arg-type]


def test_a_rank_is_run_once_at_a_time(tmp_path: Path) -> None:
    with RankRun(tmp_path, Rank(1, 3), plan(3)):
        with pytest.raises(ArchiveError, match="rank 1 of 3 is at work already"):
            RankRun(tmp_path, Rank(1, 3), plan(3))
        found = h5traces.status(tmp_path)
        assert (found.running, found.missing) == ([1], [0, 2])
        with pytest.raises(TargetError, match="of which rank 1 is at work"):
            RankRun(tmp_path, Rank(0, 2), plan(2))


def test_another_world_size_deals_the_rest_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RankRun(tmp_path, Rank(0, 3), plan(3)) as run:
        for item in run.share:
            run.note(item, status="converted")
    for rank in (0, 1):
        with RankRun(tmp_path, Rank(rank, 2), plan(2)) as run:
            for item in run.share:
                run.note(item, status="skipped")
    assert "world_size was 3 and is 2 from now on" in caplog.text
    found = h5traces.status(tmp_path)
    assert found.ok
    assert (found.world_size, found.num_done, found.done) == (2, 10, [0, 1])
    assert read_plan(tmp_path).world_size == 2  # type: ignore[union-attr]


def test_a_clock_that_is_hours_off_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "5")
    with RankRun(tmp_path, Rank(0, 1), plan(1)):
        assert h5traces.status(tmp_path).running == [0]


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    with RankRun(tmp_path, Rank(0, 1), plan(1)) as run:
        run.note(0, status="converted", num_samples=3)
    path = tmp_path / "ranks" / "00000-of-00001.jsonl"
    with path.open("ab") as file:
        file.write(b'{"event": "item", "item": 1, "sta')
    with RankRun(tmp_path, Rank(0, 1), plan(1)) as run:
        run.note(2, status="converted", num_samples=4)
    assert h5traces.status(tmp_path).num_samples == 7
    assert json.loads(path.read_bytes().splitlines()[-1])["event"] == "end"


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(TargetError, match=r"lacks what a shared run needs: locks \(No locks"):
        RankRun(tmp_path, Rank(0, 1), plan(1))


def test_a_full_disk_ends_a_rank_and_not_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work() -> None:
        with RankRun(tmp_path, Rank(0, 1), plan(1)) as run:
            run.note(0, status="converted")
            with monkeypatch.context() as context:
                context.setattr(os, "write", full)
                run.note(1, status="converted")

    with pytest.raises(OSError, match=r"No space left on device in .* make room there, then start"):
        work()
    found = h5traces.status(tmp_path)
    assert (found.num_done, found.failed) == (1, [0])


def test_a_plan_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(ArchiveError, match=r"run\.json: is not the plan of a run by h5traces"):
        h5traces.status(tmp_path)
    with pytest.raises(TargetError, match=r"holds no run\.json"):
        h5traces.status(tmp_path / "nowhere")


def test_a_thousand_ranks_start_and_are_counted_at_once(tmp_path: Path) -> None:
    """How fast is measured by benchmarks/ranks.py; here, what is asked of the file system."""
    opened: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and str(tmp_path) in str(arguments[0]):
            opened.append(event)

    sys.addaudithook(audit)
    with RankRun(tmp_path, Rank(0, 1000), plan(1000)):
        pass
    lines = (tmp_path / "ranks" / "00000-of-01000.jsonl").read_bytes()
    for rank in range(1000):
        (tmp_path / "ranks" / f"{rank:05d}-of-01000.jsonl").write_bytes(lines)
    opened.clear()
    with RankRun(tmp_path, Rank(999, 1000), plan(1000)):
        assert len(opened) < 20  # and not a file of each other rank
    opened.clear()
    found = h5traces.status(tmp_path)
    assert len(found.done) == 1000
    assert len(opened) < 1020  # each rank's file once


@pytest.mark.parametrize("check", [h5traces.verify, h5traces.validate])
def test_checks_are_shared(batches: Path, tmp_path: Path, check: Any) -> None:
    h5traces.convert(batches, f"{tmp_path}/out/")
    every = {report.path for report in check(tmp_path / "out")}
    shares = [check(tmp_path / "out", rank=rank, world_size=3) for rank in range(3)]
    assert all(share.ok for share in shares)
    found = [report.path for share in shares for report in share]
    assert len(found) == len(every) == 5
    assert set(found) == every
