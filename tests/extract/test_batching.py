"""Left-padded batches give what one-by-one runs give, within the stated tolerances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from family_models import make_family
from tiny_models import FAMILIES, make_model, shared_model, tokenizer

from h5traces.errors import ExtractionError
from h5traces.extract import ExtractOptions, GenerationOptions, extract
from h5traces.extract.anatomy import anatomy_of
from h5traces.extract.batches import TOLERANCES, check_batches

QUESTIONS = (
    "What does math.sqrt do?",
    "What does str.partition do, and what does it return when nothing at all is found in it?",
    "Why?",
    "What is a module?",
    "What does list.append do?",
)


def records(model, batch_size, **options):
    generation = options.pop("generation", GenerationOptions(max_new_tokens=9))
    dtype = options.pop("dtype", "float16")
    chosen = ExtractOptions(generation=generation, batch_size=batch_size, **options)
    return list(extract(model, tokenizer(), QUESTIONS, chosen, dtype=dtype))


def assert_close(found, expected, tolerance):
    assert found.tokens.tolist() == expected.tokens.tolist()
    for kind in ("hidden_states", "attentions"):
        pairs = zip(found.layered[kind].arrays, expected.layered[kind].arrays, strict=True)
        for one, other in pairs:
            a, b = one.array.to_numpy().astype(float), other.array.to_numpy().astype(float)
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), (kind, one.name)


@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_in_float32(family, batch_size):
    model = shared_model(family)
    alone = records(model, 1, dtype="float32")
    together = records(model, batch_size, dtype="float32")
    for found, expected in zip(together, alone, strict=True):
        assert_close(found, expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_in_half_precision(family, dtype):
    """Over the same tokens: rounding alone may turn a near tie of two tokens around."""
    from h5traces.extract.capture import CaptureOptions, Capturer

    model = make_model(family, dtype=dtype)
    sequences = [tokenizer()(each)["input_ids"] for each in QUESTIONS]
    capturer = Capturer(anatomy_of(model), CaptureOptions(layers=(0, 1, 2, 3), dtype="auto"))
    together = capturer.run(sequences)
    for ids, found in zip(sequences, together, strict=True):
        (expected,) = capturer.run([ids])
        for kind, entries in expected.arrays.items():
            for one, other in zip(found.arrays[kind], entries, strict=True):
                a, b = one.array.to_numpy().astype(float), other.array.to_numpy().astype(float)
                assert np.abs(a - b).max() <= TOLERANCES[dtype] * np.abs(b).max()


def test_the_tolerance_notices_wrong_positions():
    """Without positions of its own, a padded sequence is another one."""
    from h5traces.extract.capture import padded

    model = shared_model("gpt2")
    ids = tokenizer()(QUESTIONS[0])["input_ids"]
    inputs = padded([ids, ids + ids], 2, torch.device("cpu"))
    inputs.pop("position_ids")
    with torch.inference_mode():
        wrong = model(**inputs, output_hidden_states=True).hidden_states[2][0, len(ids) :]
        right = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    difference = (wrong - right).abs().max() / right.abs().max()
    assert difference > 100 * TOLERANCES[torch.float32]


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_answers_do_not_depend_on_the_batch(family):
    model = shared_model(family)
    drawing = GenerationOptions(max_new_tokens=9, do_sample=True, temperature=0.8, top_p=0.95)
    alone = records(model, 1, generation=drawing, seed=3)
    together = records(model, 4, generation=drawing, seed=3)
    assert [r.tokens.tolist() for r in alone] == [r.tokens.tolist() for r in together]
    other = records(model, 4, generation=drawing, seed=4)
    assert [r.tokens.tolist() for r in alone] != [r.tokens.tolist() for r in other]


def test_draws_follow_the_softmax():
    """The highest of logits with Gumbel noise is a draw from their softmax."""
    from h5traces.extract.generation import Drawing

    logits = torch.tensor([[1.0, 0.0, 2.0, -float("inf")]]).repeat(4000, 1)
    drawn = Drawing(range(4000))(torch.zeros(4000, 1, dtype=torch.long), logits).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.03)


@pytest.mark.parametrize("family", ["recurrent_gemma", "rwkv"])
def test_families_that_mix_padding_in_are_rejected_by_name(family):
    """The convolution of one and the state of the other run over the padding."""
    with pytest.raises(ExtractionError, match=rf"\({family}\) cannot be run in batches: .* differ"):
        records(make_family(family), 2, kinds="hidden_states")


def test_half_precision_has_a_tolerance_of_its_own():
    model = make_family("qwen3", dtype=torch.bfloat16)
    check_batches(model, anatomy_of(model), ("hidden_states",), 2)


def test_scores_of_generated_tokens_are_compared():
    """States of prompts are right, but the cache takes padding for tokens."""
    model = make_family("llama")
    forward = model.forward

    def forgetful(*args, **kwargs):
        if kwargs["past_key_values"].get_seq_length():
            kwargs["attention_mask"] = None
        return forward(*args, **kwargs)

    model.forward = forgetful
    with pytest.raises(ExtractionError, match="scores of generated token 1 differ"):
        check_batches(model, anatomy_of(model), ("hidden_states",), 2)
