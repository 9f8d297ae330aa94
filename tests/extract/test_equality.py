"""What is extracted is what transformers itself returns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, make_model, shared_model, tokenizer

from h5traces.extract import ExtractOptions, GenerationOptions, extract
from h5traces.extract.anatomy import anatomy_of
from h5traces.extract.capture import CaptureOptions, Capturer

QUESTION = "What does str.partition do, and what does it return when nothing is found in it?"


def reference(model, tokens):
    """Hidden states and attentions as transformers gives them."""
    with torch.inference_mode():
        return model(
            input_ids=torch.tensor([list(tokens)]),
            output_hidden_states=True,
            output_attentions=True,
        )


def arrays(record, kind):
    return {each.name: each.array.values for each in record.layered[kind].arrays}


def one(model, **options):
    generation = options.pop("generation", GenerationOptions(max_new_tokens=7))
    dtype = options.pop("dtype", "float16")
    chosen = ExtractOptions(generation=generation, **options)
    (record,) = extract(model, tokenizer(), [QUESTION], chosen, dtype=dtype)
    return record


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_equal_to_the_bit(family):
    model = shared_model(family)
    record = one(model, dtype="float32", embedding=True)
    expected = reference(model, record.tokens)
    hidden = arrays(record, "hidden_states")
    assert list(hidden) == ["embedding", *(f"layer_{n:03d}" for n in range(4))]
    for state, values in zip(expected.hidden_states, hidden.values(), strict=True):
        assert values.dtype == np.float32
        assert np.array_equal(state[0].numpy(), values)
    weights = arrays(record, "attentions")
    for layer, attention in enumerate(expected.attentions):
        assert np.array_equal(attention[0].numpy(), weights[f"layer_{layer:03d}"])
    sites = [each.site for each in record.layered["hidden_states"].arrays]
    assert sites == ["embedding", *["block_output"] * 3, "final_norm"]
    assert len(record.tokens) == record.prompt_len + 7


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_block_before_the_final_norm(family):
    model = shared_model(family)
    record = one(model, dtype="float32", last_state="block_output", layers="last")
    (entry,) = record.layered["hidden_states"].arrays
    assert (entry.name, entry.site) == ("layer_003", "block_output")
    decoder = model.get_decoder()
    norm = decoder.ln_f if family == "gpt2" else decoder.norm
    with torch.inference_mode():
        normed = norm(torch.from_numpy(entry.array.values.copy())[None])
    last = reference(model, record.tokens).hidden_states[-1]
    assert torch.equal(normed, last)
    assert not np.array_equal(entry.array.values, last[0].numpy())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_what_the_model_computed(family, dtype):
    model = make_model(family, dtype=dtype)
    record = one(model, dtype="auto", layers="1,last")
    expected = reference(model, record.tokens)
    found = record.layered["hidden_states"].arrays
    for entry, state in zip(
        found, (expected.hidden_states[2], expected.hidden_states[4]), strict=True
    ):
        assert entry.array.dtype == str(dtype).removeprefix("torch.")
        assert np.array_equal(entry.array.to_numpy(), state[0].float().numpy())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_casts_round_to_nearest(family, target):
    model = shared_model(family)
    wide, narrow = one(model, dtype="float32"), one(model, dtype=target)
    for kind in ("hidden_states", "attentions"):
        pairs = zip(wide.layered[kind].arrays, narrow.layered[kind].arrays, strict=True)
        for before, after in pairs:
            rounded = torch.from_numpy(before.array.values.copy()).to(getattr(torch, target))
            assert np.array_equal(after.array.to_numpy(), rounded.float().numpy())
            assert after.earlier.cast_from == "float32"


def test_a_subset_of_layers_runs_no_other_hooks():
    model = shared_model("llama")
    whole, part = one(model, dtype="float32"), one(model, dtype="float32", layers="0,2")
    for kind in ("hidden_states", "attentions"):
        expected = arrays(whole, kind)
        found = arrays(part, kind)
        assert list(found) == ["layer_000", "layer_002"]
        assert all(np.array_equal(values, expected[name]) for name, values in found.items())
    left = [each for module in model.modules() for each in module._forward_hooks.values()]
    assert not [each for each in left if "h5traces" in each.__module__]


@pytest.mark.parametrize("kind", ["hidden_states", "attentions"])
def test_one_kind_alone(kind):
    record = one(shared_model("llama"), kinds=(kind,))
    assert list(record.layered) == [kind]
    assert record.coverage() == "full"


def test_hidden_states_alone_need_no_eager_attention():
    record = one(make_model("llama", attn_implementation="sdpa"), kinds=("hidden_states",))
    assert len(record.layered["hidden_states"].arrays) == 4


def test_the_sequence_is_longer_than_the_window():
    record = one(shared_model("mistral"), dtype="float32")
    weights = arrays(record, "attentions")["layer_000"]
    far = np.tril(np.ones(weights.shape[1:], bool), -6)
    assert len(record.tokens) > 20
    assert (weights[:, far] == 0).all()
    unlimited = arrays(one(shared_model("llama"), dtype="float32"), "attentions")["layer_000"]
    assert (unlimited[:, far] > 0).any()


def test_the_answers_tokens_are_the_models_own():
    """They are appended as generated, never made of text again."""
    model = shared_model("qwen2")
    record = one(model, generation=GenerationOptions(max_new_tokens=60))
    prompt = torch.tensor([record.tokens[: record.prompt_len].tolist()])
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False
    )
    assert record.tokens.tolist() == expected[0].tolist()
    again = tokenizer()(tokenizer().decode(record.tokens), add_special_tokens=False)["input_ids"]
    assert again != record.tokens.tolist()


def test_beams_are_those_of_transformers():
    model = shared_model("llama")
    record = one(model, generation=GenerationOptions(max_new_tokens=7, num_beams=3))
    prompt = torch.tensor([record.tokens[: record.prompt_len].tolist()])
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=7, num_beams=3
    )
    assert record.tokens.tolist() == expected[0].tolist()
    hidden = reference(model, record.tokens).hidden_states[1][0]
    assert record.layered["hidden_states"].arrays[0].array.shape == tuple(hidden.shape)


def test_of_the_models_own_generation_config_only_drawing_is_ours():
    """Chat models come with a temperature; a penalty of theirs stays in force, and is recorded."""
    from h5traces.extract.extractor import Extractor

    model = make_model("llama")
    plain = one(model, generation=GenerationOptions(max_new_tokens=40))
    model.generation_config.update(do_sample=True, temperature=0.1, top_p=0.5, max_length=99)
    drawn = one(model, generation=GenerationOptions(max_new_tokens=40))
    assert drawn.tokens.tolist() == plain.tokens.tolist()
    model.generation_config.update(repetition_penalty=1.9)
    other = one(model, generation=GenerationOptions(max_new_tokens=40))
    prompt = torch.tensor([plain.tokens[: plain.prompt_len].tolist()])
    expected = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=40,
        do_sample=False,
        repetition_penalty=1.9,
    )
    assert other.tokens.tolist() == expected[0].tolist() != plain.tokens.tolist()
    recorded = Extractor(model, tokenizer(), ExtractOptions()).metadata().generation
    assert recorded["repetition_penalty"] == 1.9
    assert recorded["do_sample"] is False
    assert "temperature" not in recorded
    assert model.generation_config.temperature == 0.1


def test_one_overflow_widens_the_array_and_no_other():
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1e7)
    anatomy = anatomy_of(model)
    options = CaptureOptions(layers=(0, 1, 2, 3), dtype="float16")
    (found,) = Capturer(anatomy, options).run([[0, 5, 9, 11]])
    types = {each.name: each.array.dtype for each in found.arrays["hidden_states"]}
    assert types == {
        "layer_000": "float16",
        "layer_001": "float16",
        "layer_002": "float32",
        "layer_003": "float16",
    }
