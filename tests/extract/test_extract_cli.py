"""``h5traces extract`` and ``estimate``: what they print, and how they end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from commands import run
from family_models import make_family
from tiny_models import QUESTIONS, ROOT, TINY_LLAMA, tokenizer

import h5traces
from h5traces.extract.models import MODEL_ALIASES, aliases_path, known_aliases, resolve_model
from h5traces.extract.sizes import STATED_RATES
from h5traces.format.precision import TIERS

TINY = ["--model-id", TINY_LLAMA, "--dataset", QUESTIONS]
FEW = ["--num-samples", 2, "--max-new-tokens", 4]


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    """No test waits for a network, or reads the user's own aliases."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_the_command_of_the_readme(tmp_path):
    """As it stands there, in the repository, with nothing but what lies in it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^h5traces (extract --model-id examples.*) -o extracted/$", text, re.M)
    done = subprocess.run(
        [Path(sys.executable).with_name("h5traces"), *command.split(), "-o", f"{tmp_path}/out/"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert re.search(r"out: 40 of 40 samples; [\d.]+ MB in [\d.]+ s, \d+ tokens/s", done.stdout)
    # What float16 does to small attention weights is a warning, as in 'h5traces convert'.
    expected = re.compile(
        r"warning: (hidden_states|attentions): \d+ values? (became 0|lost precision)"
    )
    assert done.stderr
    assert all(expected.match(line) for line in done.stderr.splitlines())
    with h5traces.open(tmp_path / "out") as archive:
        assert len(archive) == 40
        assert archive[0]["hidden_states"][3].shape == (len(archive[0]["tokens"]), 128)


def test_findings_are_a_failure_or_left_out_by_option(tmp_path):
    questions = tmp_path / "questions.jsonl"
    rows = [{"question_id": each, "question": "How is a file opened?"} for each in "ab"]
    questions.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    few = ["--model-id", TINY_LLAMA, "--dataset", questions, "--max-new-tokens", 2]
    expected = "[duplicate-sample] sample: the same bytes as sample 0"
    told = run("extract", *few, "-o", tmp_path / "told.h5")
    assert f"warning: {tmp_path}/told.h5: {expected}" in told.stderr
    failed = run("extract", *few, "-o", tmp_path / "failed.h5", "--fail-on", "warning", code=1)
    assert failed.stderr.count(expected) == 1
    assert f"error: {tmp_path}/failed.h5: {expected}" in failed.stderr
    assert len(h5traces.open(tmp_path / "failed.h5")) == 2
    options = ["--fail-on", "warning", "--ignore", "duplicate-sample", "--json"]
    ignored = run("extract", *few, "-o", tmp_path / "ignored.h5", *options)
    assert expected not in ignored.stderr
    report = json.loads(ignored.stdout)
    assert report["ok"]
    assert report["findings"] == []
    run("extract", *few, "-o", tmp_path / "none.h5", "--ignore", "no-check", code=2)


@pytest.mark.h5tools
def test_h5dump_reads_it(tmp_path):
    run("extract", *TINY, *FEW, "-o", tmp_path / "run.h5", "--embedding")
    path = "/samples/00000001"
    objects = ["-d", f"{path}/hidden_states/embedding", "-d", f"{path}/tokens"]
    objects += ["-a", "/extraction", "-a", f"{path}/extraction"]
    done = subprocess.run(
        ["h5dump", *objects, str(tmp_path / "run.h5")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"model_class":"LlamaForCausalLM"' in done.stdout
    assert '"finish_reason":"length"' in done.stdout
    with h5traces.open(tmp_path / "run.h5") as archive:
        tokens = ", ".join(str(each) for each in archive[1]["tokens"])
    assert tokens in re.sub(r"\n\s*\(\d+\): ", " ", done.stdout)


def test_a_run_as_json(tmp_path):
    result = run("extract", *TINY, *FEW, "-o", f"{tmp_path}/out/", "--json", "--layers", "0,last")
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert report["num_written"] == 2
    assert report["num_generated"] == 8
    assert report["tokens_per_second"] > 0
    assert report["nbytes"] > 1000
    again = run("extract", *TINY, *FEW, "-o", f"{tmp_path}/out/", "--layers", "0,last")
    assert "2 of 2 samples, 2 of them before" in again.stdout


def test_a_dry_run_writes_nothing(tmp_path):
    result = run("extract", *TINY, "-o", f"{tmp_path}/out/", "--dry-run", "--layers", "0,3,last")
    assert "archive, float16, gzip, layers 0,3,5" in result.stdout
    assert re.search(r"40 samples: [\d.]+ MB needed at most, .*; [\d.]+ \w+ free", result.stdout)
    assert list(tmp_path.iterdir()) == []


def test_the_forecast_is_no_less_than_what_is_written(tmp_path):
    arguments = ["extract", *TINY, "-o", tmp_path / "run.h5", "--json"]
    needed = json.loads(run(*arguments, "--dry-run").stdout)["needed_nbytes"]
    run(*arguments)
    assert needed > 2 * (tmp_path / "run.h5").stat().st_size


@pytest.fixture
def huge_model(tmp_path):
    """A configuration of terabytes per sample, without weights."""
    folder = tmp_path / "huge"
    config = transformers.LlamaConfig(
        num_hidden_layers=1000,
        hidden_size=2**17,
        num_attention_heads=1024,
        max_position_embeddings=2**20,
    )
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_disk_too_small_is_noticed_before_weights_are_loaded(tmp_path, huge_model):
    arguments = ["extract", "--model-id", huge_model, "--dataset", QUESTIONS]
    arguments += ["--max-new-tokens", 100_000, "-o", f"{tmp_path}/out/"]
    result = run(*arguments, code=2)
    assert re.search(r"may need [\d,.]+ GB .* but [\d,.]+ GB are free", result.stderr)
    assert "or --no-check-space" in result.stderr
    assert not list(tmp_path.glob("out*"))
    assert "the disk is too small for the forecast" in run(*arguments, "--dry-run").stderr
    # Without the check it comes to the weights, which are not there.
    assert "cannot be loaded" in run(*arguments, "--no-check-space", code=2).stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"--model-id": "llama2_chat_7b"},
            "no folder and no alias has that name (close aliases: llama2_chat_7B",
        ),
        (
            {"--model-id": "llama2_chat_7B"},
            "llama2_chat_7B stands for meta-llama/Llama-2-7b-chat-hf; without a network",
        ),
        ({"--model-id": ROOT / "tests"}, "cannot be loaded: Unrecognized model"),
        ({"--dataset": "squad"}, "no data set is known as 'squad', and no file has that name"),
        ({"--dataset": "triviaqa"}, "cannot be loaded"),
        ({"--layers": "0,6"}, "layer 6 was asked for, but the model has 6 layers (0 to 5)"),
        ({"--kinds": "hidden_states,neurons"}, "expected some of hidden_states"),
        ({"--kinds": ""}, "kinds is [''], expected some of hidden_states"),
        ({"--prompt-template": "Q:"}, "does not hold {question}"),
        ({"--device": "nonsense"}, "cannot be moved to device 'nonsense'"),
        ({"--device": "auto"}, "device 'auto' needs accelerate, which is not installed"),
        (
            {"--question-column": "query"},
            "has no column 'query'; its columns are 'question_id', 'question'",
        ),
        ({"--max-new-tokens": 512}, "no question fits: py_0001: the prompt has"),
    ],
)
def test_wrong_usage(tmp_path, changes, message):
    if "--device" in changes and "accelerate" in message:
        pytest.importorskip("torch")
        try:
            import accelerate  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("accelerate is installed")
    options = {"--model-id": TINY_LLAMA, "--dataset": QUESTIONS, "--num-samples": 2}
    arguments = [each for pair in {**options, **changes}.items() for each in pair]
    result = run("extract", *arguments, "-o", f"{tmp_path}/out/", code=2)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("option", ["--chat", "--load-in-4bit"])
def test_what_the_tiny_model_or_this_machine_lacks(tmp_path, option):
    result = run("extract", *TINY, *FEW, option, "-o", f"{tmp_path}/out/", code=2)
    expected = {"--chat": "has no chat template", "--load-in-4bit": "bitsandbytes"}
    assert expected[option] in result.stderr


def test_an_encoder_decoder(tmp_path):
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    result = run(
        "extract", "--model-id", tmp_path / "t5", "--dataset", QUESTIONS, "-o", f"{tmp_path}/out/",
        code=2,
    )  # fmt: skip
    assert "is an encoder-decoder (t5); expected a decoder-only model" in result.stderr


def test_a_family_that_cannot_be_run_in_batches(tmp_path):
    make_family("recurrent_gemma").save_pretrained(tmp_path / "griffin")
    tokenizer().save_pretrained(tmp_path / "griffin")
    arguments = ["extract", "--model-id", tmp_path / "griffin", "--dataset", QUESTIONS, *FEW]
    result = run(*arguments, "--batch-size", 2, "-o", f"{tmp_path}/out/", code=2)
    assert "RecurrentGemmaForCausalLM (recurrent_gemma) cannot be run in batches" in result.stderr
    run(*arguments, "-o", f"{tmp_path}/out/")


def test_samples_left_out_end_in_exit_code_1(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text('{"question": "Why?"}\n' + json.dumps({"question": "long " * 600}))
    result = run(
        "extract", "--model-id", TINY_LLAMA, "--dataset", path, "-o", f"{tmp_path}/out/", code=1
    )
    assert "1 of 2 samples" in result.stdout
    assert "left out: asked_1: the prompt has" in result.stderr


def test_aliases_of_the_users_own(tmp_path):
    assert resolve_model("llama2_chat_7B") == "meta-llama/Llama-2-7b-chat-hf"
    aliases_path().parent.mkdir(parents=True)
    aliases_path().write_text(f'[models]\ntiny = "{TINY_LLAMA}"\nllama2_7B = "/data/llama"\n')
    assert known_aliases() == {**MODEL_ALIASES, "tiny": str(TINY_LLAMA), "llama2_7B": "/data/llama"}
    run("extract", "--model-id", "tiny", "--dataset", QUESTIONS, *FEW, "-o", f"{tmp_path}/out/")
    with h5traces.open(tmp_path / "out") as archive:
        assert archive.metadata.model_id == str(TINY_LLAMA)
    aliases_path().write_text("[models]\ntiny = 3\n")
    result = run("estimate", "--model-id", "tiny", code=2)
    assert 'models.toml: expected a table [models] with lines such as mine = "' in result.stderr


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_without_the_libraries(tmp_path, library):
    """Estimates from shapes need neither; everything else says what to install."""
    code = f"import sys; sys.modules[{library!r}] = None; from h5traces.cli import main; main()"

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )

    done = command("extract", *TINY, "-o", f"{tmp_path}/out/")
    assert done.returncode == 2
    assert f"{library} is not installed" in done.stderr
    assert "pip install 'h5traces[extract]'" in done.stderr
    shape = ["--num-layers", 2, "--hidden-size", 8, "--num-heads", 2]
    assert command("estimate", *shape).returncode == 0


def test_estimate_from_shapes():
    arguments = ["--num-layers", 32, "--hidden-size", 4096, "--num-heads", 32]
    result = run("estimate", *arguments, "--seq-len", 43)
    rows = re.findall(
        r"^(raw \w+|archive.*?)  +(\d+) +([\d.]+ \w+) +([\d.]+ \w+)", result.stdout, re.M
    )
    assert [(name, per_thousand) for name, _, _, per_thousand in rows] == [
        ("raw float32", "30.1 GB"),
        ("raw float16", "15.1 GB"),
        ("archive, float16, gzip", "11.5 GB"),
        ("archive, float16, gzip, layers 0,5,10,15,20,25,31", "2.5 GB"),
    ]
    assert "estimated" in result.stdout


def test_estimate_from_a_configuration(huge_model):
    found = json.loads(run("estimate", "--model-id", huge_model, "--json").stdout)
    assert found["shape"] == {
        "num_layers": 1000,
        "hidden_size": 2**17,
        "num_heads": 1024,
        "num_key_value_heads": 1024,
        "head_size": 128,
        "num_experts": 0,
    }


def test_estimate_from_a_pilot(tmp_path):
    """What it says is what the same samples take."""
    arguments = ["--codec", "zstd", "--max-new-tokens", 16]
    found = json.loads(
        run("estimate", *TINY, "--pilot", 5, *arguments, "--layers", "0,last", "--json").stdout
    )
    assert [row["basis"] for row in found["rows"]] == [
        "computed",
        "computed",
        "measured",
        "measured",
    ]
    whole = tmp_path / "whole.h5"
    run("extract", *TINY, "--num-samples", 5, *arguments, "-o", whole)
    assert found["rows"][2]["sample_nbytes"] * 5 == pytest.approx(whole.stat().st_size, rel=0.02)
    part = tmp_path / "part.h5"
    run("extract", *TINY, "--num-samples", 5, *arguments, "-o", part, "--layers", "0,last")
    assert found["rows"][3]["sample_nbytes"] * 5 == pytest.approx(part.stat().st_size, rel=0.15)


def test_a_pilot_of_any_source(tmp_path):
    """What it says is what converting the file takes."""
    rng = np.random.default_rng(0)
    samples = [
        {
            "question_id": f"q{n}",
            "hidden_states": [torch.tensor(rng.normal(size=(20, 64))).half() for _ in range(4)],
            "attentions": [torch.full((2, 20, 20), 0.05).half() for _ in range(3)],
        }
        for n in range(8)
    ]
    torch.save(samples, tmp_path / "run.pt")
    found = json.loads(run("estimate", "--pilot", tmp_path / "run.pt", "--json").stdout)
    assert found["shape"].items() >= {"num_layers": 4, "hidden_size": 64, "num_heads": 2}.items()
    assert found["mean_seq_len"] == 20
    run("convert", tmp_path / "run.pt", "-o", tmp_path / "run.h5")
    row = found["rows"][2]
    assert row["basis"] == "measured"
    assert row["sample_nbytes"] * 8 == pytest.approx((tmp_path / "run.h5").stat().st_size, rel=0.1)
    again = json.loads(run("estimate", "--pilot", tmp_path / "run.h5", "--json").stdout)
    assert again["rows"][2]["sample_nbytes"] == pytest.approx(row["sample_nbytes"], rel=0.01)


def test_a_pilot_measures_the_tiers(tmp_path):
    short = [*TINY, "--max-new-tokens", 16]
    found = json.loads(run("estimate", *short, "--pilot", 3, "--json").stdout)
    assert [row["basis"] for row in found["rows"]] == ["computed"] * 2 + ["measured"] * 10
    row = next(each for each in found["rows"] if each["name"] == "tier compact")
    compact = tmp_path / "compact.h5"
    result = run("extract", *short, "--num-samples", 3, "-o", compact, "--tier", "compact")
    assert "compact (hidden states in steps of 0.4 sigma, head mean only)" in result.stderr
    with h5traces.open(compact) as archive:
        assert archive.metadata.precision == TIERS["compact"]
        scales = archive._files[0].sizes()["scales"].stored_nbytes
    nbytes = compact.stat().st_size - scales
    assert row["sample_nbytes"] * 3 == pytest.approx(nbytes, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-layers", 3], "give --model-id, or all of"),
        (["--pilot", 3], "--pilot needs --model-id and --dataset"),
        (
            ["--num-layers", 3, "--hidden-size", 8, "--num-heads", 2, "--dtype", "auto"],
            "no rates are known for dtype auto",
        ),
    ],
)
def test_wrong_usage_of_estimate(arguments, message):
    result = run("estimate", *arguments, code=2)
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stated_rates_are_those_of_the_trained_model(dtype):
    """A third of its questions, so not quite the same figures."""
    found = json.loads(run("estimate", *TINY, "--pilot", 13, "--dtype", dtype, "--json").stdout)
    stated = STATED_RATES[dtype].of_kinds(found["rates"]["bits"])
    assert set(stated.bits) == {"hidden_states", "attentions"}
    assert found["rates"]["bits"] == pytest.approx(stated.bits, rel=0.05)
    beside = found["rates"]["sample_nbytes"]
    # A file's own 6 KB are shared by fewer samples than in the stated figure.
    assert beside == pytest.approx(stated.sample_nbytes + 6300 * (1 / 13 - 1 / 40), rel=0.1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_stated_bytes_of_an_array_are_what_one_more_layer_takes(dtype, tmp_path):
    whole, part = tmp_path / "whole.h5", tmp_path / "part.h5"
    run("extract", *TINY, "--num-samples", 6, "--max-new-tokens", 4, "--dtype", dtype, "-o", whole)
    run("repack", whole, "-o", part, "--layers", "0,1")

    def beside_arrays(path):
        with h5traces.open(path) as archive:
            sizes = archive._files[0].sizes()
        stored = sum(sizes[kind].stored_nbytes for kind in ("hidden_states", "attentions"))
        return path.stat().st_size - stored

    num_arrays = 6 * 4 * 2
    found = (beside_arrays(whole) - beside_arrays(part)) / num_arrays
    assert found == pytest.approx(STATED_RATES[dtype].array_nbytes, rel=0.1)
