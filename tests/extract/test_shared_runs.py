"""Extractions that several ranks share: one result, whatever stops them."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from child_processes import start_process
from tiny_models import QUESTIONS, TINY_LLAMA
from typer.testing import CliRunner

import h5traces
from h5traces.cli.app import app
from h5traces.errors import TargetError
from h5traces.extract import (
    DatasetChoice,
    ExtractOptions,
    GenerationOptions,
    ModelChoice,
    extract_dataset,
)
from h5traces.writing.options import TargetOptions

SHARDS = TargetOptions(shard_samples=3)


def run(output, *, num_samples=7, precision=None, batch_size=1, target=SHARDS, **ranks):
    options = ExtractOptions(generation=GenerationOptions(max_new_tokens=4), batch_size=batch_size)
    return extract_dataset(
        ModelChoice(model_id=str(TINY_LLAMA)),
        DatasetChoice(dataset=str(QUESTIONS), num_samples=num_samples),
        f"{output}/",
        options,
        precision=precision,
        target=target,
        **ranks,
    )


def digests(folder):
    """By shard, id and digest of every sample, in order."""
    found = {}
    for path in sorted(folder.glob("*.h5")):
        with h5traces.open(path) as archive:
            found[path.name] = [(e.metadata.sample_id, e.metadata.digest) for e in archive]
    return found


@pytest.mark.parametrize(
    ("size", "precision", "batch_size"), [(1, None, 1), (3, None, 2), (2, "analysis", 1)]
)
def test_the_result_does_not_depend_on_ranks(tmp_path, size, precision, batch_size):
    run(tmp_path / "alone", precision=precision, batch_size=batch_size)
    for rank in reversed(range(size)):
        report = run(
            tmp_path / "many",
            precision=precision,
            batch_size=batch_size,
            rank=rank,
            world_size=size,
        )
        assert report.ok
    assert digests(tmp_path / "many") == digests(tmp_path / "alone")
    assert not (tmp_path / "many.spool").exists()
    found = h5traces.status(tmp_path / "many")
    assert found.ok
    assert (found.num_samples, found.done) == (7, list(range(size)))


def test_other_ranks_go_on_with_a_stopped_run(tmp_path):
    """What a rank that never came back had stored is neither lost nor computed again."""
    asked = iter([False, False, True])
    report = run(tmp_path / "out", rank=0, world_size=2, should_stop=lambda: next(asked))
    assert report.status == "stopped"
    assert report.num_written == 2
    assert h5traces.status(tmp_path / "out").missing == [0, 1]
    with pytest.raises(TargetError, match="holds a run of several ranks"):
        run(tmp_path / "out")
    reports = [run(tmp_path / "out", rank=rank, world_size=3) for rank in range(3)]
    assert sum(each.num_written for each in reports) == 5
    run(tmp_path / "alone")
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")


def test_a_rank_with_other_options_is_rejected(tmp_path):
    run(tmp_path / "out", rank=0, world_size=2)
    with pytest.raises(TargetError, match="batch_size is 2, and was 1"):
        run(tmp_path / "out", batch_size=2, rank=1, world_size=2)
    with pytest.raises(TargetError, match="shard_samples is 4, and was 3"):
        run(tmp_path / "out", target=TargetOptions(shard_samples=4), rank=1, world_size=2)


def test_a_finished_run_is_not_done_again(tmp_path):
    for _ in range(2):
        reports = [run(tmp_path / "out", rank=rank, world_size=2) for rank in range(2)]
    assert [each.num_written for each in reports] == [0, 0]
    assert all(each.ok for each in reports)
    assert not (tmp_path / "out.spool").exists()
    assert h5traces.status(tmp_path / "out").num_samples == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_rank_with_a_code_of_its_own(tmp_path, number):
    command = [str(Path(sys.executable).with_name("h5traces")), "extract"]
    command += [
        "--model-id",
        str(TINY_LLAMA),
        "--dataset",
        str(QUESTIONS),
        "--max-new-tokens",
        "90",
    ]
    command += ["-o", f"{tmp_path}/out/", "--rank", "0", "--world-size", "1", "--json"]
    process = start_process(command)
    spool = tmp_path / "out.spool"
    deadline = time.monotonic() + 60
    while not list(spool.glob("*.sample")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert json.loads(out)["status"] == "stopped"
    assert h5traces.status(tmp_path / "out").missing == [0]


def test_ranks_that_are_killed_at_random_lose_nothing(tmp_path):
    chance = random.Random(0)
    command = [str(Path(sys.executable).with_name("h5traces")), "extract"]
    command += ["--model-id", str(TINY_LLAMA), "--dataset", str(QUESTIONS), "--max-new-tokens", "4"]
    command += ["-o", f"{tmp_path}/out/", "--num-samples", "7", "--shard-samples", "3"]
    for size in (2, 3):
        ranks = [
            start_process([*command, "--rank", str(rank), "--world-size", str(size)])
            for rank in range(size)
        ]
        time.sleep(chance.uniform(2, 5))
        for each in ranks:
            each.kill()
            each.communicate()
    for rank in range(2):
        run(tmp_path / "out", rank=rank, world_size=2)
    run(tmp_path / "alone")
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")
    assert h5traces.status(tmp_path / "out").ok


def test_collect_takes_over_from_a_rank_that_was_killed(tmp_path):
    """Rank 1, a process, is killed in the middle, after rank 0 has ended."""
    out, spool = tmp_path / "out", tmp_path / "out.spool"
    chosen = {"num_samples": 16, "target": TargetOptions(shard_samples=2)}
    command = [str(Path(sys.executable).with_name("h5traces")), "extract", "-o", f"{out}/"]
    command += ["--model-id", str(TINY_LLAMA), "--dataset", str(QUESTIONS), "-n", "16"]
    command += ["--max-new-tokens", "4", "--shard-samples", "2", "--rank", "1"]

    def stored():
        return len(list(spool.glob("*.sample"))) + 2 * len(list(out.glob("*.h5")))

    run(out, rank=0, world_size=2, **chosen)
    before = stored()
    killed = start_process([*command, "--world-size", "2"])
    while stored() < before + 2:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    there = stored()
    assert there < 16
    done = CliRunner().invoke(app, ["collect", str(out)])
    assert done.exit_code == 1
    assert "to start: --array=1, or any number of ranks" in done.output.replace("\n", " ")
    assert "packed " in done.output
    report = h5traces.collect(out)
    assert report.status.missing == [1]
    # What waits in the spool is in no archive yet.
    waiting = len(list(spool.glob("*.sample")))
    assert len(report.missing) == 16 - there + waiting
    said = [each for each in report.warnings if "for the rest of their shards" in each]
    assert len(said) == bool(waiting)
    assert all(f"{waiting} sample" in each for each in said)
    left = run(out, rank=1, world_size=2, **chosen)
    assert left.num_written == 16 - there
    assert h5traces.collect(out).ok
    assert not spool.exists()
    run(tmp_path / "alone", **chosen)
    assert digests(out) == digests(tmp_path / "alone")


def test_collect_packs_what_dead_ranks_left(tmp_path):
    out = tmp_path / "out"
    asked = iter([False] * 4 + [True])
    run(out, rank=0, world_size=1, should_stop=lambda: next(asked))
    assert not list(out.glob("*.h5"))
    report = h5traces.collect(out)
    assert not report.ok
    assert [Path(each).name for each in report.packed] == ["traces-00000.h5"]
    (stored,) = digests(out).values()
    assert len(report.missing) == 7 - len(stored)
    assert not {name for name, _ in stored} & set(report.missing)
    run(out, rank=0, world_size=1)
    report = h5traces.collect(out, tmp_path / "one.h5", order="index")
    assert report.ok
    run(tmp_path / "alone")
    assert digests(out) == digests(tmp_path / "alone")
    rows = [each.metadata.extraction.row for each in h5traces.open(tmp_path / "one.h5")]
    assert rows == sorted(rows)


def test_finish_packs_shards_that_lack_samples(tmp_path):
    out = tmp_path / "out"
    asked = iter([False] * 4 + [True])
    run(out, rank=1, world_size=2, num_samples=9, should_stop=lambda: next(asked))
    found = h5traces.finish(f"{out}/")
    assert [each.name for each in found] == sorted(each.name for each in out.glob("*.h5"))
    assert not (tmp_path / "out.spool").exists()
    stored = {name for each in digests(out).values() for name, _ in each}
    assert len(stored) == 4
    report = h5traces.collect(out)
    assert not report.ok
    assert len(report.missing) == 5


def test_a_sample_that_was_left_out_is_named(tmp_path):
    ranks = {"rank": 0, "world_size": 1}
    questions = tmp_path / "questions.jsonl"
    rows = [{"id": "short", "question": "What?"}, {"id": "long", "question": "word " * 3000}]
    questions.write_text("".join(json.dumps(each) + "\n" for each in rows))
    report = extract_dataset(
        ModelChoice(model_id=str(TINY_LLAMA)),
        DatasetChoice(dataset=str(questions)),
        f"{tmp_path}/out/",
        ExtractOptions(generation=GenerationOptions(max_new_tokens=2)),
        **ranks,
    )
    assert not report.ok
    found = h5traces.collect(tmp_path / "out")
    assert not found.ok
    (left,) = found.left_out
    assert (left["sample_id"], left["reason"]) == ("long", "too_long")
