"""Extraction with vLLM, where a small model of transformers stands for its engine.

`tools/check_vllm` runs the real one.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import h5traces
from h5traces.cli.app import app
from h5traces.errors import ExtractionError, MissingDependencyError
from h5traces.extract import (
    Columns,
    DatasetChoice,
    ExtractOptions,
    GenerationOptions,
    ModelChoice,
    extract_dataset,
)
from h5traces.format.dtypes import TypedArray
from h5traces.vllm import VllmEngine
from h5traces.vllm.recorder import Finished, Handover, asked_for

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = str(EXAMPLES / "tiny-llama-pydocs")
DATA = DatasetChoice(dataset=str(EXAMPLES / "questions.jsonl"), num_samples=4)
OPTIONS = ExtractOptions(
    kinds=("hidden_states",),
    last_state="block_output",
    embedding=True,
    batch_size=3,
    generation=GenerationOptions(max_new_tokens=5),
)
FLOAT32 = h5traces.PrecisionOptions(dtype="float32")


class Sampling:
    def __init__(self, **options):
        self.extra_args = None
        self.__dict__.update(options)


class Engine:
    """What the extraction uses of ``vllm.LLM``; states go through the connector's own code."""

    prompts: list[int] = []  # noqa: RUF012
    wrong = 0.0
    dead = False

    def __init__(self, **arguments):
        if arguments.get("reject"):
            raise ValueError("no SupportsEagle3\nmore")
        self.arguments = arguments
        self.model = AutoModelForCausalLM.from_pretrained(arguments["model"], dtype=torch.float32)
        transfer = arguments["kv_transfer_config"]["kv_connector_extra_config"]
        self.handover = Handover(transfer["handover"])
        hf = arguments["speculative_config"]["draft_model_config"]["hf_config"]
        self.ids = hf["eagle_aux_hidden_state_layer_ids"]
        space = types.SimpleNamespace
        model_config = space(
            hf_config=self.model.config, dtype=torch.float32, quantization=None, seed=0,
            max_model_len=arguments["max_model_len"], enforce_eager=True,
        )  # fmt: skip
        config = space(
            model_config=model_config,
            parallel_config=space(tensor_parallel_size=1, pipeline_parallel_size=1),
            scheduler_config=space(max_num_batched_tokens=4096, max_num_seqs=256),
            cache_config=space(enable_prefix_caching=True),
            compilation_config=space(static_forward_context={}),
        )
        core = space(shutdown=lambda: None)
        self.llm_engine = space(vllm_config=config, engine_core=core)

    def get_default_sampling_params(self):
        return Sampling()

    def generate(self, inputs, parameters, *, use_tqdm):
        if Engine.dead and Engine.prompts:
            raise RuntimeError("EngineCore died")
        return [
            self._one(a["prompt_token_ids"], b) for a, b in zip(inputs, parameters, strict=True)
        ]

    def _one(self, prompt, parameters):
        assert len(prompt) + parameters.max_tokens <= self.arguments["max_model_len"]
        Engine.prompts.append(len(prompt))
        asked = (parameters.extra_args or {}).get("kv_transfer_params")
        if asked:
            self._leave(prompt, asked)
        ids, reason = list(prompt), "length"
        for _ in range(parameters.max_tokens):
            with torch.no_grad():
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == self.model.config.eos_token_id:
                reason = "stop"
                break
        output = types.SimpleNamespace(token_ids=ids[len(prompt) :], finish_reason=reason)
        return types.SimpleNamespace(outputs=[output])

    def _leave(self, prompt, asked):
        seen = []
        hooks = [
            block.register_forward_hook(lambda _m, _a, out: seen.append(out))
            for block in self.model.model.layers
        ]
        with torch.no_grad():
            found = self.model(torch.tensor([prompt]), output_hidden_states=True)
        for each in hooks:
            each.remove()
        blocks = [each[0] if isinstance(each, tuple) else each for each in seen]
        states = [
            found.hidden_states[0],
            *(each.reshape(found.hidden_states[0].shape) for each in blocks),
        ]
        stacked = torch.stack([states[each][0] for each in sorted(self.ids)], dim=1)
        sample_id, _ = asked_for(asked)
        request = Finished("r", tuple(prompt), len(prompt), (), "length", sample_id=sample_id)
        self.handover.take(request, TypedArray.of(stacked.numpy() + Engine.wrong), {})


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.__version__, module.LLM, module.SamplingParams = "0.32.0", Engine, Sampling
    platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = types.SimpleNamespace(
        get_device_name=lambda: "cpu", is_cpu=lambda: True
    )
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(Engine, "prompts", [])
    return module


def run(dest, options=OPTIONS, data=DATA, engine=None, **more):
    return extract_dataset(
        ModelChoice(model_id=MODEL, engine=engine), data, dest, options, precision=FLOAT32, **more
    )


def assert_alike(ours, theirs):
    with h5traces.open(ours) as found, h5traces.open(theirs) as expected:
        assert len(found) == len(expected)
        for one in expected:
            other = found.by_id(one.metadata.sample_id)
            assert list(one) == list(other)
            for name in set(one) - {"hidden_states"}:
                np.testing.assert_array_equal(one[name], other[name], err_msg=name)
            assert one.metadata.extraction.finish_reason == other.metadata.extraction.finish_reason
            assert one.metadata.prompt_len == other.metadata.prompt_len
            np.testing.assert_array_equal(one.embedding, other.embedding)
            for left, right in zip(one["hidden_states"], other["hidden_states"], strict=True):
                np.testing.assert_allclose(left, right, atol=2e-5)


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_the_same_archive_as_with_transformers(vllm, tmp_path, tokens):
    options = ExtractOptions(**{**vars(OPTIONS), "tokens": tokens, "layers": [0, 5]})
    assert run(tmp_path / "a.h5", options, engine=VllmEngine()).ok
    assert run(tmp_path / "b.h5", options).ok
    assert_alike(tmp_path / "a.h5", tmp_path / "b.h5")
    with h5traces.open(tmp_path / "a.h5") as archive:
        extraction = archive.metadata.extraction
        assert extraction.engine == "vllm 0.32.0, extract_hidden_states"
        assert extraction.sites == {"hidden_states": {"block_output": [0, 5]}}
        assert 0 <= extraction.difference < 3e-5
        assert extraction.generation["max_new_tokens"] == 5
        assert archive.metadata.num_layers == 6


def test_given_answers_and_prompts_alone(vllm, tmp_path):
    rows = tmp_path / "q.jsonl"
    rows.write_text(json.dumps({"question": "What is a list?", "given": " A sequence."}) + "\n")
    data = DatasetChoice(dataset=str(rows), columns=Columns(given="given"))
    prompts = ExtractOptions(**{**vars(OPTIONS), "generation": GenerationOptions(max_new_tokens=0)})
    for number, (options, chosen) in enumerate(((OPTIONS, data), (prompts, DATA))):
        ours, theirs = tmp_path / f"a{number}.h5", tmp_path / f"b{number}.h5"
        run(ours, options, chosen, engine=VllmEngine(self_check=False))
        run(theirs, options, chosen)
        assert_alike(ours, theirs)
    with h5traces.open(ours) as archive:
        assert archive.metadata.extraction.difference is None


def test_an_engine_that_dies_and_a_resumed_run(vllm, tmp_path, monkeypatch):
    target, whole = tmp_path / "a.h5", tmp_path / "b.h5"
    stops = iter([False, True])
    report = run(target, engine=VllmEngine(), should_stop=lambda: next(stops))
    assert (report.status, report.num_written) == ("stopped", 3)
    monkeypatch.setattr(Engine, "dead", True)
    with pytest.raises(ExtractionError, match="vLLM failed: RuntimeError: EngineCore died"):
        run(target, engine=VllmEngine(self_check=False))
    monkeypatch.setattr(Engine, "dead", False)
    monkeypatch.setattr(Engine, "prompts", [])
    report = run(target, engine=VllmEngine())
    assert (report.num_before, report.num_written) == (3, 1)
    assert len(Engine.prompts) == 3  # the comparison, the last answer, its states
    run(whole)
    assert_alike(target, whole)


def test_states_that_are_not_those_of_transformers(vllm, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "wrong", 0.1)
    with pytest.raises(ExtractionError, match="differs from that of transformers by"):
        run(tmp_path / "a.h5", engine=VllmEngine())
    assert not (tmp_path / "a.h5").exists()


def test_what_vllm_cannot_do(vllm, tmp_path):
    for options, message in [
        (ExtractOptions(), "kinds is .*'attentions'.*vLLM takes"),
        (ExtractOptions(kinds=("hidden_states",)), "last_state is 'final_norm'"),
    ]:
        with pytest.raises(ExtractionError, match=message):
            run(tmp_path / "a.h5", options, engine=VllmEngine())
    with pytest.raises(ExtractionError, match="'kv_transfer_config', which the extraction decides"):
        VllmEngine(arguments={"kv_transfer_config": {}})
    with pytest.raises(ExtractionError, match="vLLM cannot run it: ValueError: no SupportsEagle3"):
        run(tmp_path / "a.h5", engine=VllmEngine(arguments={"reject": True}, self_check=False))


def test_without_vllm(tmp_path):
    target = tmp_path / "a.h5"
    with pytest.raises(MissingDependencyError, match="vllm is not installed here"):
        run(target, engine=VllmEngine())
    for options, code, message in [
        (["--engine", "vllm"], 2, "vllm is not installed here"),
        (["--engine", "vllm", "--engine-arguments", "[1]"], 2, "expected an object of JSON"),
        (["--engine-arguments", "{}"], 2, "are those of --engine vllm"),
    ]:
        command = ["extract", "--model-id", MODEL, "--dataset", DATA.dataset, "-o", str(target)]
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code == code, result.output
        assert message in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_only_numbers_are_handed_over(tmp_path):
    handover = Handover(str(tmp_path))
    states = TypedArray.of(np.zeros((2, 1, 4), "<f4"))
    for name in (None, "../x", "q1"):
        handover.take(Finished("r", (1, 2), 2, (), "stop", sample_id=name), states, {})
    assert list(tmp_path.iterdir()) == []
