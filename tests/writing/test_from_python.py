"""`create().append` takes what models return, by the rules of the files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from legacy_batches import bits

import h5traces
from h5traces.errors import ConversionError, OptionError, SchemaError

LAYERS, HEADS, WIDTH, VOCABULARY = 3, 4, 16, 64
PAD = 2
ALL = {"output_hidden_states": True, "output_attentions": True}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=PAD,
        initializer_range=0.4,
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()


def inputs_of(*lengths: int, left: bool = True) -> transformers.BatchEncoding:
    """Sequences of these lengths, padded on one side as a tokenizer does."""
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(longest - length, None) if left else slice(length)
        ids[row, place] = torch.arange(3, 3 + length) + row
        mask[row, place] = 1
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})


@torch.no_grad()
def forward(model: Any, inputs: Any, **options: Any) -> Any:
    return model(**inputs, **{**ALL, **options})


def written(tmp_path: Path, *samples: tuple[Any, ...], **inputs: Any) -> h5traces.Archive:
    target = tmp_path / "run.h5"
    with h5traces.create(target, precision=h5traces.PrecisionOptions(dtype="auto")) as writer:
        for sample in samples:
            writer.append(*sample, **inputs)
    assert h5traces.validate(target).ok
    return h5traces.open(target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_output_of_a_forward_pass(tmp_path: Path, model: Any, dtype: torch.dtype) -> None:
    inputs = inputs_of(7)
    outputs = forward(model.to(dtype), inputs)
    model.to(torch.float32)
    trace = written(tmp_path, (outputs, "q0"), inputs=inputs)[0]
    assert trace.metadata.sample_id == "q0"
    assert trace.metadata.coverage == "full"
    assert trace["tokens"].tolist() == inputs["input_ids"][0].tolist()
    states = trace["hidden_states"]
    assert states.layers == (None, 0, 1, 2)
    assert states.sites == ("embedding", "block_output", "block_output", "final_norm")
    assert len(states) == LAYERS + 1
    for found, expected in zip(states, outputs.hidden_states, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected[0])
    assert len(trace["attentions"]) == LAYERS
    for found, expected in zip(trace["attentions"], outputs.attentions, strict=True):
        assert torch.equal(found, expected[0])
    assert "logits" not in trace
    assert "past_key_values" not in trace


def test_states_without_attentions_begin_with_the_embedding(tmp_path: Path, model: Any) -> None:
    outputs = forward(model, inputs_of(5), output_attentions=False)
    assert outputs.attentions is None
    trace = written(tmp_path, (outputs,))[0]
    assert trace["hidden_states"].layers == (None, 0, 1, 2)
    assert torch.equal(trace.embedding, outputs.hidden_states[0][0])


def test_attentions_of_none_are_absent(tmp_path: Path, model: Any) -> None:
    outputs = forward(model, inputs_of(5))
    outputs.attentions = (None,) * LAYERS
    assert written(tmp_path, (outputs,))[0]["hidden_states"].layers == (None, 0, 1, 2)


def test_ids_may_come_alone_or_as_lists(tmp_path: Path, model: Any) -> None:
    inputs = inputs_of(5)
    outputs = forward(model, inputs)
    lists = {key: value.tolist() for key, value in inputs.items()}
    with h5traces.create(tmp_path / "a.h5") as writer:
        writer.append(outputs, inputs=inputs["input_ids"])
        writer.append(outputs, inputs=lists)
    for trace in h5traces.open(tmp_path / "a.h5"):
        assert trace["tokens"].tolist() == inputs["input_ids"][0].tolist()


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_batch_is_taken_apart_and_its_padding_cut(tmp_path: Path, model: Any, left: bool) -> None:
    lengths = (3, 6, 1)
    inputs = inputs_of(*lengths, left=left)
    outputs = forward(model, inputs)
    archive = written(tmp_path, (outputs, ["a", "b", "c"]), inputs=inputs)
    assert archive.ids == ("a", "b", "c")
    for row, (trace, length) in enumerate(zip(archive, lengths, strict=True)):
        place = slice(6 - length, None) if left else slice(length)
        assert trace["tokens"].tolist() == inputs["input_ids"][row, place].tolist()
        for found, expected in zip(trace["hidden_states"], outputs.hidden_states, strict=True):
            assert torch.equal(found, expected[row, place])
        for found, expected in zip(trace["attentions"], outputs.attentions, strict=True):
            assert torch.equal(found, expected[row, :, place, place])


@torch.no_grad()
def generated(model: Any, inputs: Any, **options: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=4,
        return_dict_in_generate=True,
        **{**ALL, "do_sample": False, **options},
    )


def test_generate_is_joined_to_the_sequence(tmp_path: Path, model: Any) -> None:
    """The arrays are those of one forward pass over all tokens but the last."""
    inputs = inputs_of(5)
    outputs = generated(model, inputs)
    assert len(outputs.hidden_states) == 4
    trace = written(tmp_path, (outputs, "q"), inputs=inputs)[0]
    tokens = outputs.sequences[0]
    assert trace["tokens"].tolist() == tokens.tolist()
    assert trace["prompt_length"] == 5
    again = forward(model, {"input_ids": tokens[None, :-1]})
    assert len(trace["hidden_states"]) == LAYERS + 1
    for found, expected in zip(trace["hidden_states"], again.hidden_states, strict=True):
        assert found.shape == (8, WIDTH)
        torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
    for found, expected in zip(trace["attentions"], again.attentions, strict=True):
        assert found.shape == (HEADS, 8, 8)
        torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
    # Bit for bit what the steps held.
    assert torch.equal(trace["hidden_states"][2][:5], outputs.hidden_states[0][2][0])
    assert torch.equal(trace["hidden_states"][2][6], outputs.hidden_states[2][2][0, 0])
    assert torch.equal(trace["attentions"][1][:, 6, :7], outputs.attentions[2][1][0, :, 0])


def test_generate_knows_the_prompt_without_inputs(tmp_path: Path, model: Any) -> None:
    trace = written(tmp_path, (generated(model, inputs_of(5), output_attentions=False),))[0]
    assert trace["prompt_length"] == 5
    assert trace["hidden_states"].layers == (None, 0, 1, 2)
    assert len(trace["tokens"]) == 9


def test_a_generated_batch(tmp_path: Path, model: Any) -> None:
    inputs = inputs_of(3, 5)
    outputs = generated(model, inputs)
    archive = written(tmp_path, (outputs, ["a", "b"]), inputs=inputs)
    for row, (trace, pads) in enumerate(zip(archive, (2, 0), strict=True)):
        assert trace["tokens"].tolist() == outputs.sequences[row, pads:].tolist()
        assert trace["prompt_length"] == 5 - pads
        expected = torch.cat([step[3] for step in outputs.hidden_states], dim=1)[row, pads:]
        assert torch.equal(trace["hidden_states"][3], expected)


def test_several_answers_of_one_prompt(tmp_path: Path, model: Any) -> None:
    torch.manual_seed(0)
    outputs = generated(model, inputs_of(4), do_sample=True, num_return_sequences=3)
    archive = written(tmp_path, (outputs, ["q"] * 3), inputs=inputs_of(4))
    assert archive.ids == ("q", "q", "q")
    assert [each.metadata.generation_index for each in archive] == [0, 1, 2]
    for row, trace in enumerate(archive):
        assert trace["tokens"].tolist() == outputs.sequences[row].tolist()
        assert trace["prompt_length"] == 4


def test_beams_stay_generation_steps(tmp_path: Path, model: Any) -> None:
    outputs = generated(model, inputs_of(4), num_beams=2)
    trace = written(tmp_path, (outputs,), inputs=inputs_of(4))[0]
    assert trace.metadata.coverage == "steps"
    step = trace["hidden_states"][1][0]
    assert torch.equal(step, outputs.hidden_states[0][1])


def test_a_dict_of_stacked_arrays(tmp_path: Path, model: Any) -> None:
    outputs = forward(model, inputs_of(6))
    states = np.stack([each[0].numpy() for each in outputs.hidden_states])
    attentions = torch.stack(outputs.attentions)
    trace = written(tmp_path, ({"hidden_states": states, "attentions": attentions}, "q"))[0]
    assert bits(trace["hidden_states"][1]) == bits(states[1])
    assert torch.equal(trace["attentions"][2], attentions[2, 0])


def test_an_output_in_a_dict_with_more(tmp_path: Path, model: Any) -> None:
    outputs = forward(model, inputs_of(6))
    item = {
        "hidden_states": outputs.hidden_states,
        "attentions": outputs.attentions,
        "tokens": inputs_of(6)["input_ids"][0],
        "generated_answer": "yes",
    }
    trace = written(tmp_path, (item, "q"))[0]
    assert trace["hidden_states"].layers == (None, 0, 1, 2)
    assert trace["generated_answer"] == "yes"


def test_what_cannot_be_taken_is_said(tmp_path: Path, model: Any) -> None:
    outputs, batch = forward(model, inputs_of(4)), forward(model, inputs_of(4, 3))
    plain = forward(model, inputs_of(4), output_hidden_states=False, output_attentions=False)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((plain,), {}, ConversionError, "call the model with output_hidden_states=True"),
        ((batch, "q"), {"inputs": inputs_of(4, 3)}, SchemaError, "1 sample id for a batch of 2"),
        ((batch,), {}, SchemaError, "0 sample ids for a batch of 2"),
        ((outputs, ["a", "b"]), {}, SchemaError, "2 sample ids for a batch of 1"),
        (
            ({"hidden_states": [np.zeros((2, 3), np.float32)]},),
            {"inputs": inputs_of(2)},
            OptionError,
            "inputs are for what a model returned",
        ),
        ((3,), {}, ConversionError, "found int, expected a TraceRecord, the dict of a trace"),
        ((outputs,), {"inputs": {"input_ids": [[1], [2, 3]]}}, ConversionError, "several lengths"),
    ]
    with h5traces.create(tmp_path / "run.h5") as writer:
        for words, options, error, message in cases:
            with pytest.raises(error, match=message):
                writer.append(*words, **options)
        assert writer.num_samples == 0
        writer.append(outputs, "q")
    assert len(h5traces.open(tmp_path / "run.h5")) == 1


def test_an_encoder_and_decoder_are_two_sequences(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2
    )
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.arange(4)[None]
    with torch.no_grad():
        outputs = t5(input_ids=ids, decoder_input_ids=ids[:, :3], output_hidden_states=True)
    with h5traces.create(tmp_path / "run.h5") as writer:
        with pytest.raises(ConversionError, match="an encoder and a decoder"):
            writer.append(outputs)
        writer.append({"hidden_states": outputs.decoder_hidden_states})
    assert len(h5traces.open(tmp_path / "run.h5")[0]["hidden_states"]) == 3


# --- TransformerLens ------------------------------------------------------------------------------


class FakeCache:
    """What `append` needs of an ``ActivationCache``; the library's own is tried where it is."""

    def __init__(self, cache_dict: dict[str, torch.Tensor], has_batch_dim: bool = True) -> None:
        self.cache_dict, self.has_batch_dim = cache_dict, has_batch_dim


def hooks(batch: int = 1, tokens: int = 5) -> dict[str, torch.Tensor]:
    """The activations of a small model, by the names that TransformerLens gives them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    found = {"hook_embed": normal(batch, tokens, WIDTH)}
    stream = normal(batch, tokens, WIDTH)
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        found[f"{block}.hook_resid_pre"] = stream
        found[f"{block}.attn.hook_pattern"] = normal(batch, HEADS, tokens, tokens).softmax(-1)
        found[f"{block}.hook_mlp_out"] = normal(batch, tokens, WIDTH)
        stream = stream + found[f"{block}.hook_mlp_out"]
        found[f"{block}.hook_resid_post"] = stream
    found["ln_final.hook_scale"] = normal(batch, tokens, 1)
    return found


@pytest.mark.parametrize("as_dict", [False, True], ids=["cache", "dict"])
@pytest.mark.parametrize("has_batch", [True, False], ids=["batch of one", "no batch"])
def test_a_cache_of_hooks(tmp_path: Path, as_dict: bool, has_batch: bool) -> None:
    found = hooks()
    if not has_batch:
        found = {name: value[0] for name, value in found.items()}
    sample = found if as_dict else FakeCache(found, has_batch)
    trace = written(tmp_path, (sample, "q"), inputs=torch.arange(5)[None])[0]

    def of(name: str) -> torch.Tensor:
        return found[name][0] if has_batch else found[name]

    states = trace["hidden_states"]
    assert states.layers == (None, 0, 1, 2)
    # The last one is taken before the final norm, unlike that of transformers.
    assert states.sites == (None, None, None, None)
    assert torch.equal(states[0], of("blocks.0.hook_resid_pre"))
    for layer in range(LAYERS):
        assert torch.equal(states[layer + 1], of(f"blocks.{layer}.hook_resid_post"))
        assert torch.equal(trace["attentions"][layer], of(f"blocks.{layer}.attn.hook_pattern"))
        assert torch.equal(trace["hook_mlp_out"][layer], of(f"blocks.{layer}.hook_mlp_out"))
    assert torch.equal(trace["hook_embed"], of("hook_embed"))
    assert trace["tokens"].tolist() == list(range(5))


def test_a_batch_of_hooks_with_padding(tmp_path: Path) -> None:
    found, inputs = hooks(2, 6), inputs_of(4, 6)
    archive = written(tmp_path, (FakeCache(found), ["a", "b"]), inputs=inputs)
    for row, (trace, pads) in enumerate(zip(archive, (2, 0), strict=True)):
        expected = found["blocks.1.hook_resid_post"][row, pads:]
        assert torch.equal(trace["hidden_states"][2], expected)
        expected = found["blocks.2.hook_mlp_out"][row, pads:]
        assert torch.equal(trace["hook_mlp_out"][2], expected)


def test_some_hooks_of_the_residual_stream(tmp_path: Path) -> None:
    found = hooks()
    post = {name: value for name, value in found.items() if name.endswith("resid_post")}
    pre = {name: value for name, value in found.items() if name.endswith("resid_pre")}
    first = written(tmp_path / "a", (post,))[0]
    assert first["hidden_states"].layers == (0, 1, 2)
    second = written(tmp_path / "b", (pre,))[0]
    assert second["hidden_states"].layers == (None, 0, 1)
    assert torch.equal(second["hidden_states"][2], found["blocks.1.hook_resid_post"][0])
    some = written(
        tmp_path / "c", ({"blocks.2.hook_resid_post": found["blocks.2.hook_resid_post"]},)
    )
    assert some[0]["hidden_states"].layers == (2,)


def test_a_cache_of_the_library(tmp_path: Path) -> None:
    lens = pytest.importorskip("transformer_lens")
    folder = str(Path(__file__).parents[2] / "examples" / "tiny-llama-pydocs")
    bridge = lens.TransformerBridge.boot_transformers(folder)
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
        expected = plain(tokens, output_hidden_states=True).hidden_states
    trace = written(tmp_path, (cache, "q"), inputs=tokens)[0]
    states = trace["hidden_states"]
    assert states.layers == (None, *range(len(expected) - 1))
    # The last of transformers is taken behind the final norm.
    for found, other in zip(states[:-1], expected[:-1], strict=False):
        torch.testing.assert_close(found.float(), other[0].float(), rtol=1e-2, atol=1e-2)


def test_appending_arrays_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, h5traces\n"
        f"with h5traces.create({str(tmp_path / 'a.h5')!r}) as writer:\n"
        "    writer.append({'hidden_states': [np.ones((3, 4), np.float32)]}, 'q')\n"
        "print(*sorted({'torch', 'transformers', 'transformer_lens'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@torch.no_grad()
def test_the_code_of_the_document_runs(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "writing.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```py\n(.*?)```", text, flags=re.DOTALL)
    names = {
        "h5traces": h5traces,
        "model": model,
        "tokenizer": lambda prompts, **_: inputs_of(*map(len, prompts)),
        "prompts": ["abc", "abcde"],
        "ids": ["q0", "q1"],
    }
    exec(code, names)
    archive = h5traces.open("traces.h5")
    assert archive.ids == ("q0", "q1", "q0", "q1")
    assert archive[2]["prompt_length"] == 3
