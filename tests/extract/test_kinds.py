"""Kinds of the register are what hooks of one's own take, and what they are said to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from family_models import make_family
from tiny_models import shared_model, tokenizer

import h5traces
from h5traces.errors import ExtractionError
from h5traces.extract import ExtractOptions, GenerationOptions, extract
from h5traces.format.kinds import MODEL_KINDS, STATE_NORMS, TOKEN_FIELDS
from h5traces.format.layout import FURTHER_KIND

QUESTION = "What does str.partition do, and what does it return when nothing is found in it?"
SHORT = GenerationOptions(max_new_tokens=4)
# A window takes the place of attentions: test_long_traces.py.
KINDS = {kind: each for kind, each in MODEL_KINDS.items() if kind != "attention_window"}
DENSE = tuple(each for each in KINDS if each != "router_logits")
FAMILIES = ("llama", "gpt2", "qwen3", "gemma3_text", "olmo2", "qwen3_moe")
# The attention, its output projection, the MLP, and what follows them before the sums.
MODULES = {
    "gpt2": ("attn", "attn.c_proj", "mlp", None, None),
    "gemma3_text": (
        *("self_attn", "self_attn.o_proj", "mlp"),
        *("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "olmo2": (
        *("self_attn", "self_attn.o_proj", "mlp"),
        *("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
}
PLAIN = ("self_attn", "self_attn.o_proj", "mlp", None, None)


def one(model, **options):
    chosen = ExtractOptions(generation=SHORT, **options)
    (record,) = extract(model, tokenizer(), [QUESTION], chosen, dtype="float32")
    return record


def arrays(record, kind):
    return [each.array.values for each in record.layered[kind].arrays]


class Hooked:
    """What modules of every block took and gave in a plain pass of transformers."""

    def __init__(self, model, tokens):
        self.taken, self.given = {}, {}
        decoder = model.get_decoder()
        blocks = decoder.h if hasattr(decoder, "h") else decoder.layers
        handles = []
        for layer, block in enumerate(blocks):
            for name, module in [("", block), *block.named_modules()]:
                handles += [
                    module.register_forward_pre_hook(self._note((layer, name)), with_kwargs=True),
                    module.register_forward_hook(self._end((layer, name))),
                ]
        with torch.inference_mode():
            self.output = model(
                input_ids=torch.tensor([list(tokens)]),
                output_hidden_states=True,
                output_attentions=True,
            )
        for each in handles:
            each.remove()

    def _note(self, key):
        def note(_module, args, kwargs):
            self.taken[key] = args[0] if args else kwargs.get("hidden_states")

        return note

    def _end(self, key):
        def note(_module, _args, output):
            self.given[key] = output[0] if isinstance(output, tuple) else output

        return note


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_are_what_transformers_computes(family):
    model = make_family(family)
    record = one(model, kinds=DENSE)
    hooked = Hooked(model, record.tokens)
    attention, projection, mlp, attention_norm, mlp_norm = MODULES.get(family, PLAIN)
    for layer in range(4):

        def found(kind, layer=layer):
            return arrays(record, kind)[layer]

        added = hooked.given[layer, attention_norm or attention][0]
        assert np.array_equal(found("attention_output"), added)
        mid = hooked.taken[layer, ""][0] + added
        assert np.array_equal(found("residual_mid"), mid)
        of_mlp = hooked.given[layer, mlp_norm or mlp][0]
        assert np.array_equal(found("mlp_output"), of_mlp)
        total = found("residual_mid") + found("mlp_output")
        assert np.array_equal(total, hooked.given[layer, ""][0])
        merged = hooked.taken[layer, projection][0]
        heads = merged.view(len(merged), 4, -1).transpose(0, 1)
        assert np.array_equal(found("head_outputs"), heads)
        lengths = hooked.given[layer, ""][0].norm(dim=-1)
        assert np.allclose(found(STATE_NORMS), lengths, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_give_the_weights(family):
    """And weights and values the outputs of the heads."""
    model = make_family(family)
    record = one(model, kinds=("queries", "keys", "values", "head_outputs", "attentions"))
    for layer in range(4):
        queries, keys, values, heads, weights = (
            torch.from_numpy(arrays(record, kind)[layer].copy()) for kind in record.layered
        )
        groups = len(queries) // len(keys)
        scaling = 256**-0.5 if family == "gemma3_text" else queries.shape[-1] ** -0.5
        scores = queries @ keys.repeat_interleave(groups, 0).mT * scaling
        seen = weights > 0
        expected = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        assert torch.allclose(expected, weights, atol=1e-5)
        assert torch.allclose(weights @ values.repeat_interleave(groups, 0), heads, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "llama4_text"])
def test_router_logits_are_those_of_transformers(family):
    model = make_family(family)
    record = one(model, kinds=("router_logits",))
    with torch.inference_mode():
        ids = torch.tensor([record.tokens.tolist()])
        expected = model(input_ids=ids, output_router_logits=True).router_logits
    for found, tensor in zip(arrays(record, "router_logits"), expected, strict=True):
        assert np.array_equal(found, tensor.view(len(record.tokens), -1))


def test_parallel_blocks_have_no_middle():
    model = make_family("gptj")
    record = one(model, kinds=("attention_output", "mlp_output"))
    hooked = Hooked(model, record.tokens)
    assert np.array_equal(arrays(record, "mlp_output")[2], hooked.given[2, "mlp"][0])
    assert np.array_equal(arrays(record, "attention_output")[2], hooked.given[2, "attn"][0])
    with pytest.raises(ExtractionError, match=r"GPTJForCausalLM has no residual_mid, .*mlp_output"):
        one(model, kinds=("residual_mid",))


def test_factors_of_the_residual_stream_are_part_of_what_is_added():
    model = make_family("granite")
    kinds = ("hidden_states", "residual_mid", "mlp_output")
    record = one(model, kinds=kinds, last_state="block_output")
    for layer in range(4):
        state, mid, added = (arrays(record, kind)[layer] for kind in kinds)
        assert np.array_equal(state, mid + added)


def test_a_module_that_two_blocks_share_is_taken_in_each():
    model = make_family("zamba2")
    record = one(model, kinds=("queries", "attentions"))
    assert [each.name for each in record.layered["queries"].arrays] == ["layer_001", "layer_003"]
    first, second = arrays(record, "queries")
    assert not np.array_equal(first, second)


def test_numbers_of_every_token():
    model = make_family("qwen3")
    record = one(model, kinds=("hidden_states", "logits", "logprobs", "entropy"))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([record.tokens.tolist()])).logits[0]
    assert np.array_equal(record.extra["logits"], logits)
    logprobs = logits.log_softmax(-1)
    chosen = logprobs[range(len(record.tokens) - 1), record.tokens[1:]]
    assert np.isnan(record.extra["logprobs"][0])
    assert np.allclose(record.extra["logprobs"][1:], chosen, atol=1e-6)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    assert np.allclose(record.extra["entropy"], entropy, atol=1e-5)
    few = one(model, kinds=("hidden_states", "logits"), top_logits=3)
    assert few.extra["top_logits"].shape == (len(record.tokens), 3)
    ids = few.extra["top_logit_ids"]
    best = np.take_along_axis(record.extra["logits"], ids, 1)
    assert np.array_equal(best, few.extra["top_logits"])
    assert np.array_equal(ids[:, 0], logits.argmax(-1))
    part = {"positions", "sequence", "spans"}  # tests/extract/test_characters.py
    assert set(record.extra) | set(few.extra) == set(TOKEN_FIELDS) - part


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Every kind of two samples in an archive, with the records that it was made of."""
    path = tmp_path_factory.mktemp("kinds") / "kinds.h5"
    options = ExtractOptions(
        kinds=(*KINDS, "logits", "logprobs", "entropy"),
        layers="1,3",
        top_logits=2,
        generation=SHORT,
        batch_size=2,
    )
    questions = ["Why?", QUESTION]
    records = list(extract(make_family("qwen3_moe"), tokenizer(), questions, options))
    with h5traces.create(path, num_layers=4) as writer:
        for record in records:
            writer.append(record)
    return path, records


def test_an_archive_says_what_each_kind_is(stored):
    path, records = stored
    with h5traces.open(path) as archive:
        kinds = archive._files[0].store.kinds
        for kind, each in KINDS.items():
            assert kinds[kind]["definition"] == each.definition
        for trace, record in zip(archive, records, strict=True):
            for kind, layered in record.layered.items():
                assert list(trace[kind].layers) == [1, 3]
                for entry in layered.arrays:
                    number = int(entry.name[-3:])
                    assert np.array_equal(trace.layer(number, kind), entry.array.to_numpy())
            assert np.array_equal(trace["entropy"], record.extra["entropy"])
    assert h5traces.validate(path).ok


def test_definitions_survive_rewriting_and_no_others_are_made(stored, tmp_path):
    path, _ = stored
    h5traces.repack(path, tmp_path / "copy.h5")
    h5traces.repack(path, tmp_path / "one.h5", layers=[3], precision="analysis")
    for name, layers in (("copy.h5", (1, 3)), ("one.h5", (3,))):
        with h5traces.open(tmp_path / name) as archive:
            for kind, each in KINDS.items():
                found = archive._files[0].store.kinds[kind]
                assert (found["definition"], found["layers"]) == (each.definition, layers), kind
    # A source's field of the same name is what the source says, whatever that is.
    legacy = {
        "hidden_states": [np.ones((3, 4), np.float16)] * 2,
        "attentions": [np.ones((2, 3, 3), np.float16)] * 2,
        "mlp_output": [np.ones((3, 5), np.float16)] * 2,
    }
    with h5traces.create(tmp_path / "legacy.h5") as writer:
        writer.append({**legacy, "tokens": np.arange(3)})
    with h5traces.open(tmp_path / "legacy.h5") as archive:
        assert archive._files[0].store.kinds["mlp_output"]["definition"] == FURTHER_KIND


def test_features_of_other_kinds(stored, tmp_path):
    from h5traces.errors import FeatureError
    from h5traces.features import compute_features, extract_features

    path, records = stored
    names = ["last_token", "mlp_output.last_token", "router_logits.mean"]
    with h5traces.open(path) as archive:
        found = compute_features(archive, names)
        for row, record in enumerate(records):
            last = [each[-1] for each in arrays(record, "mlp_output")]
            assert np.array_equal(found["mlp_output.last_token"][row], np.array(last, "f4"))
            means = [each.mean(0, dtype="f8") for each in arrays(record, "router_logits")]
            assert np.allclose(found["router_logits.mean"][row], means, atol=1e-6)
        for name, message in (
            ("queries.mean", "queries has the axes head, token, channel"),
            ("mlp_output.sink_mass", "no feature is called mlp_output.sink_mass"),
            ("other.mean", "other.mean is made of other, which is not stored"),
        ):
            with pytest.raises(FeatureError, match=message):
                compute_features(archive, [name])
    extract_features(path, tmp_path / "table.npz", names)
    table = np.load(tmp_path / "table.npz", allow_pickle=True)
    assert any("mlp_output.last_token" in each for each in table.files)


def test_kinds_go_to_datasets_selections_and_pickles(stored, tmp_path):
    import pickle

    from h5traces.torch_data import TraceDataset

    path, records = stored
    h5traces.export(path, tmp_path / "back.pkl")
    back = pickle.loads((tmp_path / "back.pkl").read_bytes())
    expected = records[0].layered["router_logits"].arrays[1].array.to_numpy()
    assert np.array_equal(back[0]["router_logits"][1], expected)
    with h5traces.open(path) as archive:
        (selected,) = archive[:1].select(layers=[3])
        assert list(selected["keys"].layers) == [3]
        item = TraceDataset(path, kinds=["mlp_output", "values"])[0]
        assert item["values"].shape[1:] == records[0].layered["values"].arrays[0].array.shape


# How tiers store what is of a model; what is not named stays as it is.
ENCODINGS = {
    "analysis": {
        **dict.fromkeys(
            ("hidden_states", "residual_mid", "attention_output", "mlp_output"), "channel-steps"
        ),
        **dict.fromkeys(("attentions", "attention_mean"), "sqrt-uint8"),
    },
    "native": dict.fromkeys((each for each in KINDS if each != STATE_NORMS), "float16-rounded"),
}


@pytest.mark.parametrize("tier", sorted(ENCODINGS))
def test_tiers_store_every_kind_within_their_bound(stored, tier, tmp_path):
    path, _ = stored
    h5traces.repack(path, tmp_path / "small.h5", precision=tier)
    report = h5traces.validate(tmp_path / "small.h5")
    assert report.ok, report.problems
    with h5traces.open(path) as full, h5traces.open(tmp_path / "small.h5") as small:
        for kind in KINDS:
            stated = small[0]._stored.attrs(f"{kind}/layer_001")
            assert stated.get("encoding") == ENCODINGS[tier].get(kind), kind
            for number in (1, 3):
                was, found = (each[0].layer(number, kind) for each in (full, small))
                assert found.dtype == was.dtype
                error, was = np.abs(found.astype("f8") - was), was.astype("f8")
                if tier == "native":
                    assert np.all(error <= np.abs(was) * 2**-6 + 1e-7)
                elif stated.get("encoding") == "channel-steps":
                    sigma = small._files[0].scale(f"{kind}/layer_{number:03d}").sigma
                    assert np.all(error <= 0.05 * sigma)
                elif kind not in ENCODINGS[tier]:
                    assert np.array_equal(found, was)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("hidden_states", "routers")}, "expected some of hidden_states, residual_mid"),
        ({"kinds": ("keys", "keys")}, "kinds is ['keys', 'keys']"),
        ({"top_logits": 3}, "top_logits is 3, expected at least 1, with 'logits' among kinds"),
        ({"kinds": "logits", "top_logits": 0}, "top_logits is 0"),
        ({"kinds": "attention_window"}, "width is to be named: attentions='window:N'"),
        (
            {"kinds": "attentions", "attentions": "none"},
            "nothing is stored of kinds ['attentions'] with attentions='none'",
        ),
        ({"attentions": "window:0"}, "attentions is 'window:0', expected full, qk, window:N, mean"),
        ({"attentions": "window:N"}, "attentions is 'window:N', expected full"),
    ],
)
def test_rejected_options(options, message):
    with pytest.raises(ExtractionError) as raised:
        ExtractOptions(**options)
    assert message in str(raised.value)


def test_more_of_the_logits_than_there_are_tokens():
    """It was an error of torch after the start, which left an empty run behind."""
    model = shared_model("llama")
    size = model.config.vocab_size
    options = ExtractOptions(kinds="logits", top_logits=size + 1)
    with pytest.raises(
        ExtractionError, match=f"top_logits is {size + 1}, but .* has {size} tokens"
    ):
        extract(model, tokenizer(), ["Why?"], options)
