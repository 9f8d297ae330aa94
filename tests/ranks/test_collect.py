"""`collect`: one report of a run of several ranks, its checks, and one archive of its shards."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from legacy_batches import make_batch, write_batch
from typer.testing import CliRunner

import h5traces
from h5traces.cli.app import app
from h5traces.errors import OptionError, TargetError

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, number: int, *, name: str | None = None) -> Path:
    samples = make_batch("final_full", num_samples=2, seed=number)
    for each in samples:
        each["question_id"] = f"{each['question_id']}_{number}"
    return write_batch(folder / f"{name or f'b{number}'}.pkl", samples)


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    folder = tmp_path / "batches"
    folder.mkdir()
    for number in range(5):
        write(folder, number)
    return folder


@pytest.fixture
def run(batches: Path, tmp_path: Path) -> Path:
    for rank in range(2):
        assert h5traces.convert(batches, f"{tmp_path}/out/", rank=rank, world_size=2).ok
    return tmp_path / "out"


def test_a_complete_run_becomes_one_archive(run: Path, batches: Path, tmp_path: Path) -> None:
    report = h5traces.collect(run, tmp_path / "one.h5")
    assert report.ok
    assert (report.num_archives, report.num_samples, report.num_verified) == (5, 10, 5)
    assert [each.status for each in report.files] == ["converted"] * 5
    assert not report.duplicates
    h5traces.convert(batches, tmp_path / "merged.h5", merge=True)
    assert h5traces.open(tmp_path / "one.h5") == h5traces.open(tmp_path / "merged.h5")
    assert h5traces.collect(run, tmp_path / "c.parquet", verify="none").num_verified == 0
    assert h5traces.open(tmp_path / "c.parquet") == h5traces.open(run)


def test_what_is_missing_is_named_and_nothing_is_joined(batches: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    h5traces.convert(batches, f"{out}/", rank=1, world_size=2)
    report = h5traces.collect(out, tmp_path / "one.h5")
    assert not report.ok
    assert report.status.missing == [0]
    done = {each.sources[0] for each in report.files}
    assert done | set(report.missing) == {str(each) for each in batches.iterdir()}
    assert report.output is None
    assert not (tmp_path / "one.h5").exists()
    h5traces.convert(batches, f"{out}/", rank=0, world_size=2)
    assert h5traces.collect(out, tmp_path / "one.h5").ok


def test_what_is_there_twice_is_said(batches: Path, tmp_path: Path) -> None:
    write(batches, 3, name="again")
    shared = make_batch("final_full", num_samples=2, seed=7)
    shared[0]["question_id"] = "tc_1_4"
    shared[1] = make_batch("final_full", num_samples=2, seed=1)[1]
    shared[1]["question_id"] = "new"
    write_batch(batches / "b9.pkl", shared)
    for rank in range(2):
        h5traces.convert(batches, f"{tmp_path}/out/", rank=rank, world_size=2)
    report = h5traces.collect(tmp_path / "out")
    assert report.ok
    assert report.duplicates == [
        "b3.h5 holds the same samples as again.h5",
        "1 sample has the contents of another: 'new' (sample 1 of b9.h5) as 'tc_1_1' (sample 1 of "
        "b1.h5)",
        "1 sample has the id of another, and other contents: 'tc_1_4' (sample 0 of b9.h5) as "
        "'tc_1_4' (sample 1 of b4.h5)",
    ]


def test_archives_that_are_lost_strange_or_damaged_are_problems(run: Path) -> None:
    shutil.copy(run / "b0.h5", run / "strange.h5")
    (run / "b1.h5").unlink()
    data = bytearray((run / "b2.h5").read_bytes())
    data[len(data) // 3] ^= 255
    (run / "b2.h5").write_bytes(data)
    h5traces.repack(run / "b3.h5", run.parent / "less.h5", samples=[0])
    (run.parent / "less.h5").replace(run / "b3.h5")
    problems = "\n".join(h5traces.collect(run).problems)
    assert "b1.h5: was written, and is not there any more" in problems
    assert "strange.h5: not of this run" in problems
    assert "b2.h5: " in problems
    assert "b3.h5: 1 samples, and 2 were written" in problems


def test_a_failed_batch_is_missing(batches: Path, tmp_path: Path) -> None:
    (batches / "b2.pkl").write_bytes((batches / "b2.pkl").read_bytes()[:-40])
    for rank in range(2):
        h5traces.convert(batches, f"{tmp_path}/out/", rank=rank, world_size=2)
    report = h5traces.collect(tmp_path / "out")
    assert report.missing == [str(batches / "b2.pkl")]
    assert any("b2.pkl" in each for each in report.problems)
    write(batches, 2)
    report = h5traces.collect(tmp_path / "out")
    assert not report.ok


def test_the_folder_may_have_moved(run: Path) -> None:
    run.rename(run.parent / "moved")
    assert h5traces.collect(run.parent / "moved").ok


def test_only_a_run_can_be_collected(run: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"holds no run\.json"):
        h5traces.collect(tmp_path)
    with pytest.raises(TargetError, match=r"expected a name that ends in \.h5"):
        h5traces.collect(run, tmp_path / "one.npz")


def test_the_command_line(run: Path, tmp_path: Path) -> None:
    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["collect", *map(str, arguments)])

    done = invoke(run, "-o", tmp_path / "one.h5", "--order", "source", "--verify", "all")
    assert done.exit_code == 0, done.output
    assert "5 archives with 10 samples, 5 verified; complete" in done.output
    assert len(h5traces.open(tmp_path / "one.h5")) == 10
    (run / "b1.h5").unlink()
    done = invoke(run, "--json")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert (report["ok"], report["num_archives"], report["status"]["num_done"]) == (False, 4, 5)
    assert invoke(tmp_path).exit_code == 2


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (None, ["q10", "q9", "a", "q2"]),
        ("id", ["a", "q2", "q9", "q10"]),
        ("source", ["a", "q2", "q10", "q9"]),
    ],
)
def test_merge_has_orders_that_do_not_depend_on_the_division(
    tmp_path: Path, order: Any, expected: list[str]
) -> None:
    for source, target, names in (("z", "1", ["q10", "q9"]), ("y", "2", ["a", "q2"])):
        samples = make_batch("final_full", num_samples=2, seed=ord(source))
        for each, name in zip(samples, names, strict=True):
            each["question_id"] = name
        h5traces.convert(
            write_batch(tmp_path / f"{source}.pkl", samples), tmp_path / f"{target}.h5"
        )
    shards = [tmp_path / "1.h5", tmp_path / "2.h5"]
    h5traces.merge(shards, tmp_path / "one.h5", order=order)
    assert list(h5traces.open(tmp_path / "one.h5").ids) == expected
    with pytest.raises(OptionError, match=r"order is 'index', but .* records no row"):
        h5traces.merge(shards, tmp_path / "other.h5", order="index")
