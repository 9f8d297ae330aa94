"""Long runs: what is stored, what is left out, how a stopped run goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from child_processes import start_process
from tiny_models import QUESTIONS, TINY_LLAMA, make_model, tokenizer

import h5traces
from h5traces.errors import ArchiveError, ArchiveExistsError, ExtractionError, TargetError
from h5traces.extract import (
    DatasetChoice,
    ExtractOptions,
    GenerationOptions,
    ModelChoice,
    extract_dataset,
)
from h5traces.extract.extracting import _num_written
from h5traces.extract.running import report_path
from h5traces.writing.create import target_of_run
from h5traces.writing.options import TargetOptions

H5TRACES = str(Path(sys.executable).with_name("h5traces"))
COMMAND = [H5TRACES, "extract"]
TINY = ["--model-id", str(TINY_LLAMA), "--dataset", str(QUESTIONS)]
SHORT = GenerationOptions(max_new_tokens=6)


def run(output, *, num_samples=6, model=TINY_LLAMA, dataset=QUESTIONS, **options):
    should_stop = options.pop("should_stop", None)
    target = options.pop("target", TargetOptions())
    options.setdefault("generation", SHORT)
    return extract_dataset(
        ModelChoice(model_id=str(model)),
        DatasetChoice(dataset=str(dataset), num_samples=num_samples),
        output,
        ExtractOptions(**options),
        target=target,
        should_stop=should_stop,
    )


def digests(path):
    """Content digest of every sample, by id."""
    with h5traces.open(path) as archive:
        return {trace.metadata.sample_id: trace.metadata.digest for trace in archive}


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """Saves a random model of a family beside the example's tokenizer."""

    def save(family, change=None):
        folder = tmp_path_factory.mktemp(family)
        model = make_model(family)
        if change is not None:
            change(model)
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return folder

    return save


def test_a_run_stores_what_is_known(tmp_path):
    report = run(f"{tmp_path}/out/", num_samples=3, answer_cut="sentence", layers="0,last", seed=5)
    assert report.ok
    assert report.status == "finished"
    assert report.num_written == 3
    assert h5traces.validate(tmp_path / "out" / "traces-00000.h5").ok
    with h5traces.open(tmp_path / "out") as archive:
        metadata, trace = archive.metadata, archive[0]
        assert metadata.model_id == str(TINY_LLAMA)
        assert metadata.dataset == "questions.jsonl"
        assert (metadata.num_layers, metadata.layers) == (6, (0, 5))
        found = metadata.extraction
        assert found.model_class == "LlamaForCausalLM"
        assert found.config["hidden_size"] == 128
        assert found.torch_version == torch.__version__
        assert (found.model_dtype, found.quantization) == ("float32", None)
        assert found.generation["max_new_tokens"] == 6
        assert (found.seed, found.batch_size, found.answer_cut) == (5, 1, "sentence")
        assert found.prompt_template == "Answer the question concisely. Q: {question} A:"
        assert found.dataset_revision.startswith("xxh3-128:")
        assert trace["question"] == "What does math.sqrt do?"
        assert trace["ground_truth_answers"][0] == "Return the square root of x."
        assert trace["generated_answer"].strip() == trace["generated_answer_clean"]
        assert trace["question_id"] == trace.metadata.sample_id == "py_0001"
        assert trace["prompt_length"] == trace.metadata.prompt_len == len(trace["tokens"]) - 6
        assert trace.metadata.extraction.finish_reason == "length"
        assert trace.metadata.extraction.row == 0
        assert trace["hidden_states"].sites == ("block_output", "final_norm")
    document = json.loads(report_path(tmp_path / "out").read_text())
    (warning,) = document["warnings"]
    assert warning.startswith("attentions: ")
    assert document["ok"]
    assert document["num_written"] == 3


def test_provenance_survives_a_rewrite(tmp_path):
    run(tmp_path / "run.h5", num_samples=2)
    subprocess.run(
        [H5TRACES, "repack", str(tmp_path / "run.h5"), "-o", str(tmp_path / "new.h5")],
        check=True,
    )
    with h5traces.open(tmp_path / "run.h5") as old, h5traces.open(tmp_path / "new.h5") as new:
        assert new.metadata.extraction == old.metadata.extraction
        assert new[1].metadata.extraction == old[1].metadata.extraction
    assert digests(tmp_path / "run.h5") == digests(tmp_path / "new.h5")


def test_the_weights_digest_tells_weights_apart(tmp_path, saved_model):
    def recorded(folder, name):
        run(tmp_path / name, num_samples=1, model=folder)
        with h5traces.open(tmp_path / name) as archive:
            return archive.metadata.extraction.weights_digest

    def change(model):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] += 1

    first, same, other = saved_model("llama"), saved_model("llama"), saved_model("llama", change)
    assert recorded(first, "a.h5") == recorded(same, "b.h5") != recorded(other, "c.h5")


def test_a_finished_run_is_not_done_again(tmp_path):
    run(tmp_path / "run.h5", num_samples=3)
    before = (tmp_path / "run.h5").read_bytes()
    report = run(tmp_path / "run.h5", num_samples=3)
    assert (report.status, report.num_before, report.num_written) == ("finished", 3, 0)
    with pytest.raises(ArchiveExistsError, match=r"other options: seed=1 \(was 0\)"):
        run(tmp_path / "run.h5", num_samples=3, seed=1)
    with pytest.raises(ArchiveExistsError, match="1 that were asked for are not among them"):
        run(tmp_path / "run.h5", num_samples=4)
    assert (tmp_path / "run.h5").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"layers": "0,last"}, r"layers=\[0, 5\] \(was \[0, 1, 2, 3, 4, 5\]\)"),
        ({"kinds": ("attentions",)}, "kinds="),
        ({"embedding": True}, r"embedding=True \(was False\)"),
        ({"last_state": "block_output"}, "last_state='block_output'"),
    ],
)
def test_a_run_keeps_what_it_kept_before(tmp_path, options, difference):
    run(tmp_path / "run.h5", num_samples=1)
    assert run(tmp_path / "run.h5", num_samples=1, layers="0-5").ok  # all of them
    with pytest.raises(ArchiveExistsError, match=difference):
        run(tmp_path / "run.h5", num_samples=1, **options)
    calls = iter([False, True])
    stopped = {"num_samples": 2, "should_stop": lambda: next(calls)}
    assert run(tmp_path / "stopped.h5", **stopped).status == "stopped"
    with pytest.raises(ArchiveError, match=f"the stopped run had other options: .*{difference}"):
        run(tmp_path / "stopped.h5", num_samples=2, **options)
    assert run(tmp_path / "stopped.h5", num_samples=2).ok


def test_a_spool_that_is_packed_meanwhile_is_no_error(tmp_path, monkeypatch):
    def vanished(_sources):
        raise FileNotFoundError(2, "No such file or directory", "00000003.sample")

    run(tmp_path / "run.h5", num_samples=1)
    monkeypatch.setattr("h5traces.extract.extracting.open_archive", vanished)
    assert _num_written(target_of_run(tmp_path / "run.h5", TargetOptions())) == 0


def test_nothing_is_overwritten(tmp_path):
    with pytest.raises(TargetError, match="overwrite does not apply to a run, which resumes"):
        run(tmp_path / "run.h5", target=TargetOptions(overwrite=True))


def test_the_report_lies_beside_the_output(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert report_path(Path("run.h5")) == Path("run.h5.report.json")
    assert report_path(Path()) == tmp_path / "out.report.json"


def test_a_stopped_run_wants_the_same_options(tmp_path):
    def stopping():
        calls = iter([False, False])
        return lambda: next(calls, True)

    report = run(tmp_path / "run.h5", should_stop=stopping())
    assert (report.status, report.num_written) == ("stopped", 2)
    with pytest.raises(ArchiveError, match=r"generation.max_new_tokens=7 \(was 6\)"):
        run(tmp_path / "run.h5", generation=GenerationOptions(max_new_tokens=7))
    report = run(tmp_path / "run.h5")
    assert (report.num_before, report.num_written, report.status) == (2, 4, "finished")
    run(tmp_path / "whole.h5")
    assert digests(tmp_path / "run.h5") == digests(tmp_path / "whole.h5")


def test_a_batch_that_was_stopped_in_the_middle_is_computed_as_it_was(tmp_path, monkeypatch):
    """Samples of a batch are computed together again, so rounding is the same."""
    # Else the whole batch is stored in one step.
    monkeypatch.setattr("h5traces.extract.running._MAX_TOGETHER", 1)
    options = {"batch_size": 4, "num_samples": 8}
    run(tmp_path / "whole.h5", **options)
    target = tmp_path / "run.h5"

    class Killed(Exception):
        pass

    def killed(progress):
        if progress.num_done == 2:
            raise Killed

    with pytest.raises(Killed):
        extract_dataset(
            ModelChoice(model_id=str(TINY_LLAMA)),
            DatasetChoice(dataset=str(QUESTIONS), num_samples=8),
            target,
            ExtractOptions(batch_size=4, generation=SHORT),
            progress=killed,
        )
    report = run(target, **options)
    assert report.num_before == 2
    assert report.num_written == 6
    assert digests(target) == digests(tmp_path / "whole.h5")


def test_killed_five_times_it_ends_as_if_never_stopped(tmp_path):
    common = [*TINY, "--num-samples", "16", "--max-new-tokens", "8", "--batch-size", "3"]
    common += ["--shard-samples", "5", "--sample", "--top-k", "20", "--seed", "7"]
    run(
        f"{tmp_path}/whole/",
        num_samples=16,
        batch_size=3,
        seed=7,
        generation=GenerationOptions(max_new_tokens=8, do_sample=True, top_k=20),
        target=TargetOptions(shard_samples=5),
    )
    chance = random.Random(0)
    kills = 0
    spool = tmp_path / "out.spool"
    while kills < 5:
        command = [*COMMAND, *common, "-o", f"{tmp_path}/out/"]
        process = start_process(command, stdout=None, stderr=subprocess.DEVNULL)
        # Most of a start is importing; kills are to hit the run itself.
        while not spool.exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
    done = subprocess.run(
        [*COMMAND, *common, "-o", f"{tmp_path}/out/", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert kills > 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not spool.exists()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"traces-{number:05d}.h5" for number in range(4)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_current_sample_finish(tmp_path, number):
    command = [*COMMAND, *TINY, "--max-new-tokens", "60", "-o", str(tmp_path / "run.h5"), "--json"]
    process = start_process(command)
    spool = tmp_path / "run.h5.spool"
    while not list(spool.glob("*.sample")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    report = json.loads(out)
    assert report["status"] == "stopped"
    assert 0 < report["num_written"] < 40
    assert len(list(spool.glob("*.sample"))) == report["num_written"]
    assert "the same command continues" in err


def test_prompts_longer_than_the_context_are_left_out(tmp_path):
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": "Short?"}, {"question": "long " * 600}, {"question": "Short again?"}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(tmp_path / "run.h5", num_samples=None, dataset=questions)
    assert not report.ok
    (left_out,) = report.skipped
    assert (left_out.sample_id, left_out.row, left_out.reason) == ("questions_1", 1, "too_long")
    assert "exceeds the 512 that llama takes" in left_out.message
    assert list(digests(tmp_path / "run.h5")) == ["questions_0", "questions_2"]
    # The second start knows that the missing one cannot come.
    again = run(tmp_path / "run.h5", num_samples=None, dataset=questions)
    assert again.status == "finished"
    assert len(again.skipped) == 1


def _break_one_token(model):
    """Makes whatever sees the token of 'sqrt' a NaN."""
    (token,) = tokenizer()(" sqrt", add_special_tokens=False)["input_ids"][-1:]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")


def test_nan_stops_the_run_and_loses_nothing(tmp_path, saved_model):
    folder = saved_model("llama", _break_one_token)
    questions = tmp_path / "questions.csv"
    questions.write_text("question_id,question\nq1,What is it?\nq2,What does sqrt do?\nq3,Why?\n")
    with pytest.raises(ExtractionError, match=r"q2: .* has \d+ NaN values; compute in"):
        run(tmp_path / "run.h5", model=folder, dataset=questions)
    assert len(list((tmp_path / "run.h5.spool").glob("*.sample"))) == 1
    report = run(tmp_path / "skip.h5", model=folder, dataset=questions, on_nan="skip", batch_size=3)
    assert [(each.sample_id, each.reason) for each in report.skipped] == [("q2", "nan")]
    assert list(digests(tmp_path / "skip.h5")) == ["q1", "q3"]
    assert run(tmp_path / "keep.h5", model=folder, dataset=questions, on_nan="keep").ok
    with h5traces.open(tmp_path / "keep.h5") as archive:
        assert np.isnan(archive.by_id("q2")["hidden_states"][0]).any()


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path):
    """A limit on the size of files: writing fails as on a full disk."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from h5traces.cli import main; "
        "import h5traces.extract; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)); "
        "main()"
    )
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": "Short?"}, {"question": "a long question " * 40}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = tmp_path / "run.h5"
    arguments = ["extract", "--model-id", TINY_LLAMA, "--dataset", questions, "-o", target]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert len(list((tmp_path / "run.h5.spool").glob("*.sample"))) == 1
    document = json.loads(report_path(target).read_text())
    assert (document["status"], document["num_written"]) == ("failed", 1)


def test_what_does_not_fit_into_memory_is_halved_and_then_left_out(tmp_path):
    """A limit on the address space; the long prompt alone needs more."""
    folder = tmp_path / "model"
    config = {"max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 2}
    make_model("llama", **config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": each} for each in ("Short?", "long " * 3500, "What is it?", "Why?")]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = (
        "import resource; from h5traces.cli import main; import h5traces.extract, psutil; "
        "limit = psutil.Process().memory_info().vms + 1_200_000_000; "
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit)); main()"
    )
    arguments = ["extract", "--model-id", folder, "--dataset", questions, "--batch-size", "4"]
    arguments += ["-o", tmp_path / "run.h5", "--json", "--max-new-tokens", "4", "--workers", "1"]
    # Each further thread would take address space of its own.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    names = [f"questions_{number}" for number in range(4)]
    # Longest first.
    assert list(map(sorted, report["halved"])) == [names, names[:2]]
    assert [(each["sample_id"], each["reason"]) for each in report["skipped"]] == [
        (names[1], "out_of_memory")
    ]
    assert "left out: questions_1: does not fit into memory" in done.stderr
    assert list(digests(tmp_path / "run.h5")) == [names[0], *names[2:]]
