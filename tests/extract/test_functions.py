"""The functions for programs that hold a model already."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_model, shared_model, tokenizer

import h5traces
import h5traces.extract
from h5traces.archive.torch_values import from_tensor
from h5traces.errors import ExtractionError, LayerIndexError, OptionError
from h5traces.extract import (
    ExtractOptions,
    GenerationOptions,
    Question,
    extract,
    extract_activations_and_attentions,
)
from h5traces.extract.anatomy import anatomy_of
from h5traces.extract.capture import cast, cast_on_device
from h5traces.extract.generation import clean_answer, sample_seed
from h5traces.format.dtypes import TypedArray, cast_for_storage
from h5traces.writing.options import PrecisionOptions

SHORT = GenerationOptions(max_new_tokens=5)
LEGACY_KEYS = [
    "hidden_states",
    "attentions",
    "tokens",
    "tokens_decoded",
    "generated_answer_clean",
    "question_id",
]


def test_exports_are_listed_and_documented():
    assert sorted(h5traces.extract.__all__) == [
        "Columns",
        "DatasetChoice",
        "ExtractOptions",
        "ExtractionReport",
        "GenerationOptions",
        "MODEL_ALIASES",
        "ModelChoice",
        "ModelShape",
        "Question",
        "estimate_from_files",
        "estimate_with_pilot",
        "extract",
        "extract_activations_and_attentions",
        "extract_dataset",
        "hide_progress_bars",
        "load_model",
        "load_tokenizer",
        "model_shape",
    ]
    assert dir(h5traces.extract) == sorted(h5traces.extract.__all__)
    assert all(getattr(h5traces.extract, each).__doc__ for each in h5traces.extract.__all__)


def test_options_and_estimates_need_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "from h5traces.extract import DatasetChoice, ExtractOptions, ModelChoice, ModelShape; "
        "from h5traces import estimate; ExtractOptions(layers='0,last'); "
        "print(len(estimate(ModelShape(num_layers=2, hidden_size=8, num_heads=2), 10).rows))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "7"


def test_running_an_extraction_imports_no_estimate():
    code = (
        "import sys, h5traces.extract.extracting; "
        "print([each for each in sys.modules if each.endswith(('.estimate', '.pilot'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_dict_of_a_pickled_batch():
    model = shared_model("llama")
    found = extract_activations_and_attentions(
        model, tokenizer(), "What is a module?", max_new_tokens=5, question_id="tc_33"
    )
    assert list(found) == LEGACY_KEYS
    size = len(found["tokens"])
    assert [each.shape for each in found["hidden_states"]] == [(size, 32)] * 4
    assert [each.shape for each in found["attentions"]] == [(4, size, size)] * 4
    assert {each.dtype.name for each in found["hidden_states"]} == {"float16"}
    assert found["tokens"].dtype == np.int64
    assert found["tokens_decoded"] == [tokenizer().decode([each]) for each in found["tokens"]]
    assert found["question_id"] == "tc_33"
    with torch.inference_mode():
        expected = model(torch.tensor([found["tokens"].tolist()]), output_hidden_states=True)
    for state, values in zip(expected.hidden_states[1:], found["hidden_states"], strict=True):
        assert np.array_equal(state[0].to(torch.float16).numpy(), values)
    pickle.dumps(found)


def test_the_dict_goes_into_the_old_pipeline(tmp_path):
    """An archive of such a dict gives the dict back, as one of a converted pickle does."""
    found = extract_activations_and_attentions(
        shared_model("llama"), tokenizer(), "Why?", 3, question_id="a"
    )
    with h5traces.create(tmp_path / "run.h5") as writer:
        writer.append(found)
    with h5traces.open(tmp_path / "run.h5") as archive:
        again = archive[0].to_dict()
    assert list(again) == LEGACY_KEYS
    for kind in ("hidden_states", "attentions"):
        assert all(map(np.array_equal, again[kind], found[kind]))


def test_float32_and_the_models_own_type():
    model = make_model("llama", dtype=torch.bfloat16)
    for dtype, expected in (("float32", "float32"), ("auto", "float32"), ("float16", "float16")):
        found = extract_activations_and_attentions(model, tokenizer(), "Why?", 3, dtype=dtype)
        assert {each.dtype.name for each in found["hidden_states"]} == {expected}
        assert "question_id" not in found


def test_records_stream_into_a_writer(tmp_path):
    questions = ["Why?", {"question": "How?", "question_id": 7, "answers": ["so"]}]
    questions.append(Question("What?", "own", row=9))
    with h5traces.create(tmp_path / "run.h5") as writer:
        for record in extract(
            shared_model("llama"), tokenizer(), questions, ExtractOptions(generation=SHORT)
        ):
            writer.append(record)
    assert h5traces.validate(tmp_path / "run.h5").ok
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert archive.ids == ("0", "7", "own")
        assert archive[1]["ground_truth_answers"] == ["so"]
        assert archive[2].metadata.extraction.row == 9
        assert archive[0]["prompt_length"] == archive[0].metadata.prompt_len


def test_nothing_is_computed_before_it_is_asked_for():
    def endless():
        while True:
            yield "Why?"

    records = extract(
        shared_model("llama"), tokenizer(), endless(), ExtractOptions(generation=SHORT)
    )
    assert next(records).sample_id == "0"
    assert next(records).sample_id == "1"


def test_the_embedding_lies_beside_the_layers(tmp_path):
    (record,) = extract(
        shared_model("llama"),
        tokenizer(),
        ["Why?"],
        ExtractOptions(generation=SHORT, embedding=True),
        dtype="float32",
    )
    with h5traces.create(
        tmp_path / "run.h5", precision=PrecisionOptions(dtype="float32")
    ) as writer:
        writer.append(record)
    assert h5traces.validate(tmp_path / "run.h5").ok
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert len(archive[0]["hidden_states"]) == 4
        weight = shared_model("llama").get_input_embeddings().weight.detach().numpy()
        assert np.array_equal(archive[0].embedding, weight[archive[0]["tokens"]])


floats = st.floats(width=32, allow_nan=False) | st.sampled_from(
    [0.0, -0.0, 65504.0, 65519.9, 65520.0, 6e-8, 2.9e-8, 6.1e-5, 1e-40, 3.39e38, float("inf")]
)


@given(st.lists(floats, min_size=1, max_size=20), st.sampled_from(["float16", "bfloat16"]))
@settings(max_examples=300)
def test_a_cast_on_the_device_is_the_writers_cast(values, target):
    array = np.array(values, dtype=np.float32)
    expected = cast_for_storage(TypedArray.of(array), policy=target)
    for how in (cast, cast_on_device):
        narrow, counts = how(torch.from_numpy(array), getattr(torch, target))
        overflow, to_zero, to_subnormal, changed, num_nan = counts.tolist()
        assert overflow == expected.counts.num_overflow
        assert num_nan == 0
        if overflow == 0:
            found, dtype = from_tensor(narrow)
            assert dtype == expected.array.dtype
            assert np.array_equal(found.view("u2"), expected.array.values.view("u2"))
            assert to_zero == expected.counts.num_to_zero
            assert to_subnormal == expected.counts.num_to_subnormal
            assert changed == expected.num_changed


def test_what_the_device_cast_changed_is_stored(tmp_path):
    """An archive says the same, wherever the cast was made."""
    model = shared_model("llama")
    stored = {}
    for dtype in ("float16", "float32"):
        (record,) = extract(
            model, tokenizer(), ["Why?"], ExtractOptions(generation=SHORT), dtype=dtype
        )
        path = tmp_path / f"{dtype}.h5"
        with h5traces.create(path, precision=PrecisionOptions(dtype="float16")) as writer:
            writer.append(record)
        with h5traces.open(path) as archive:
            stored[dtype] = {
                name: dict(entry.attrs) for name, entry in archive[0]._stored.objects.items()
            }
    assert stored["float16"] == stored["float32"]
    attrs = stored["float16"]["attentions/layer_000"]
    assert attrs["cast_from"] == "float32"
    assert attrs["num_to_zero"] > 0


@pytest.mark.parametrize(
    ("text", "cut", "expected"),
    [
        (" In 3.5 days. Or so. ", "sentence", "In 3.5 days."),
        (" In 3.5 days. Or so. ", "newline", "In 3.5 days. Or so."),
        ("York\nQ: next", "newline", "York"),
        ("York\nQ: next", "sentence", "York\nQ: next"),
        ("  York\n", "none", "York"),
        ("Really? Yes!", "sentence", "Really?"),
        ("", "sentence", ""),
    ],
)
def test_cuts(text, cut, expected):
    assert clean_answer(text, cut) == expected


def test_cutting_an_answer_cuts_no_array():
    whole, cut = (
        next(
            extract(
                shared_model("llama"),
                tokenizer(),
                ["Why?"],
                ExtractOptions(generation=GenerationOptions(max_new_tokens=60), answer_cut=each),
            )
        )
        for each in ("none", "newline")
    )
    assert whole.texts["generated_answer"] == cut.texts["generated_answer"]
    assert len(cut.texts["generated_answer_clean"]) < len(whole.texts["generated_answer_clean"])
    assert whole.tokens.tolist() == cut.tokens.tolist()
    assert cut.coverage() == "full"


def test_a_chat_template_writes_the_special_tokens_itself():
    chatty = transformers.AutoTokenizer.from_pretrained(tokenizer().name_or_path)
    chatty.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    options = ExtractOptions(generation=SHORT, chat=True, prompt_template="Short: {question}")
    (record,) = extract(shared_model("llama"), chatty, ["Why {x}?"], options)
    prompt = chatty.decode(record.tokens[: record.prompt_len])
    assert prompt == "<s>[user] Short: Why {x}?\n[assistant]"
    assert record.tokens.tolist().count(chatty.bos_token_id) == 1


def test_seeds_are_stable():
    """They are part of what a stopped run goes on with, so they must never change."""
    assert sample_seed(0, "tc_33") == 4581273983960918589
    assert sample_seed(1, "tc_33") != sample_seed(0, "tc_33")
    assert 0 <= sample_seed(0, "\ud800") < 2**63


# What cannot be used


def tiny_t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def tiny_mamba():
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=8, state_size=4, num_hidden_layers=2
    )
    return transformers.MambaForCausalLM(config).eval()


def without(*names):
    found = transformers.AutoTokenizer.from_pretrained(tokenizer().name_or_path)
    for name in names:
        setattr(found, name, None)
    return found


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (tiny_t5, {}, "T5ForConditionalGeneration is an encoder-decoder (t5); expected a decoder"),
        (tiny_mamba, {}, "MambaForCausalLM: no block has attention weights; "),
        (
            lambda: make_model("llama", attn_implementation="sdpa"),
            {},
            "computes attention with 'sdpa', which gives no attention weights; load it with "
            "attn_implementation='eager'",
        ),
        (lambda: make_model("llama").train(), {}, "is in training mode; call model.eval()"),
        (None, {"kinds": ("neurons",)}, "kinds is ['neurons'], expected some of hidden_states, "),
        (None, {"kinds": ()}, "kinds is []"),
        (None, {"batch_size": 0}, "batch_size is 0, expected at least 1"),
        (None, {"last_state": "x"}, "last_state is 'x'"),
        (None, {"prompt_template": "Q:"}, "does not hold {question}"),
        (None, {"chat": True}, "has no chat template; use a prompt template without"),
        (
            None,
            {"generation": {"temperature": 0}},
            "temperature is 0, expected above",
        ),
        (None, {"generation": {"top_p": 1.5}}, "top_p is 1.5"),
        (
            None,
            {"generation": {"do_sample": True, "num_beams": 2}},
            "sampling with beams",
        ),
        (None, {"generation": {"max_new_tokens": 300}}, "exceeds the 256"),
    ],
)
def test_rejected(model, options, message):
    chosen = shared_model("llama") if model is None else model()

    def try_it():
        generation = GenerationOptions(**options.get("generation", {}))
        wanted = ExtractOptions(**{**options, "generation": generation})
        return list(extract(chosen, tokenizer(), ["Why?"], wanted))

    with pytest.raises((ExtractionError, OptionError), match=re.escape(message)):
        try_it()


def test_a_type_that_nothing_is_stored_in():
    with pytest.raises(ExtractionError, match="dtype is 'int8', expected float16"):
        extract(shared_model("llama"), tokenizer(), ["Why?"], dtype="int8")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([4], "layer 4 was asked for, but the model has 4 layers (0 to 3)"),
        ("0,9", "layer 9 was asked for"),
        ("0-99999999999", "layer 4 was asked for"),
        ([-1], "layer -1 was asked for"),
        ("first", "'first' is not a layer"),
        ("2-1", "'2-1' runs backwards"),
        ([], "no layer was chosen"),
    ],
)
def test_layers_that_are_not_there(layers, message):
    with pytest.raises(LayerIndexError, match=re.escape(message)):
        extract(shared_model("llama"), tokenizer(), ["Why?"], ExtractOptions(layers=layers))


@pytest.mark.parametrize("question", ["", " \n", {"question": ""}])
def test_empty_questions(question):
    with pytest.raises(ExtractionError, match="0: the question is empty"):
        list(extract(shared_model("llama"), tokenizer(), [question]))


@pytest.mark.parametrize("question", [3, {"q": "Why?"}, None])
def test_things_that_are_no_questions(question):
    with pytest.raises(ExtractionError, match=r"question 0: found .*, expected text, or a dict"):
        list(extract(shared_model("llama"), tokenizer(), [question]))


def test_batches_need_something_to_fill_with():
    options = ExtractOptions(generation=SHORT, batch_size=2)
    with pytest.raises(ExtractionError, match="neither a pad token nor an end token"):
        list(extract(shared_model("llama"), without("pad_token", "eos_token"), ["Why?"], options))
    # One that ends answers will do: it is masked.
    assert len(list(extract(shared_model("llama"), without("pad_token"), ["a", "b"], options))) == 2


def test_a_model_that_drops_its_weights_is_found_out():
    """Eager by name, but the module gives None; as remote code may do."""
    model = make_model("llama")
    attention = anatomy_of(model).attentions[1]
    attention.register_forward_hook(lambda _module, _args, output: (output[0], None))
    with pytest.raises(ExtractionError, match="layer_001: LlamaAttention returned no attention"):
        list(extract(model, tokenizer(), ["Why?"], ExtractOptions(generation=SHORT)))


@pytest.mark.parametrize(
    ("has_run", "message"),
    [
        (True, "hidden_states/layer_001 is not what transformers returns"),
        (False, "transformers returns 4 hidden_states, the hooks took 5"),
    ],
)
def test_a_model_that_is_built_in_another_way_is_found_out(has_run, message):
    """Its hooks would take something, but not what transformers returns."""
    model = make_model("llama")
    if has_run:
        # transformers puts its own hooks into the blocks that are there now.
        model(torch.tensor([[0, 5]]), output_hidden_states=True)

    class Wrapped(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.self_attn, self._block = block.self_attn, [block]

        def forward(self, *args, **kwargs):
            return self._block[0](*args, **kwargs) * 2

    model.model.layers[1] = Wrapped(model.model.layers[1])
    with pytest.raises(ExtractionError, match=re.escape(message)):
        list(extract(model.eval(), tokenizer(), ["Why?"], ExtractOptions(generation=SHORT)))


def test_a_model_that_gives_one_position_is_found_out():
    """The '350 MB bug': one position instead of the sequence."""
    model = make_model("llama")
    block = anatomy_of(model).blocks[2]
    from h5traces.extract.capture import CaptureOptions, Capturer

    capturer = Capturer(anatomy_of(model), CaptureOptions(layers=(2,), kinds=("hidden_states",)))
    block.register_forward_hook(lambda _module, _args, output: output[:, -1:])
    with pytest.raises(ExtractionError, match=r"gave shape \(1, 1, 32\) for 1 sequences of 3"):
        capturer.run([[0, 5, 9]])


@pytest.mark.parametrize("layers", ["0,0", "3,0-2,3", [1, 2, 1]])
def test_a_layer_that_is_named_twice_is_an_error(layers):
    with pytest.raises(LayerIndexError, match=r"layer \d is named more than once; name each"):
        ExtractOptions(layers=layers)


def test_ranges_and_the_last_layer_may_overlap_others():
    assert ExtractOptions(layers="0,2-5,3,last").layers == "0,2-5,3,last"
