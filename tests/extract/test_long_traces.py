"""Attention that is computed of stored queries and keys is what eager attention gives."""

from __future__ import annotations

import re

import h5py
import numpy as np
import pytest
import torch
from family_models import make_family
from threadpoolctl import threadpool_info, threadpool_limits
from tiny_models import ROOT, make_model, tokenizer

import h5traces
from h5traces.archive.recomputing import attention_weights
from h5traces.errors import ExtractionError, LayerIndexError
from h5traces.extract import ExtractOptions, GenerationOptions, ModelShape, extract
from h5traces.extract.estimate import estimate
from h5traces.format.attention import AttentionRule
from h5traces.storage.threads import one_blas_thread
from h5traces.writing.options import PrecisionOptions

QUESTION = "What does str.partition do, and what does it return when nothing is found in it?"
SHORT = GenerationOptions(max_new_tokens=4)
KINDS = ("hidden_states", "attentions", "queries", "keys")
# Float32 states and weights; docs/long-traces.md states it.
BOUND = 2e-6
FAMILIES = (
    *("bloom", "codegen", "cohere2", "deepseek_v3", "exaone4", "falcon", "falcon_h1", "gemma2"),
    *("gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "jamba", "llama"),
    *("llama4_text", "mistral", "mpt", "opt", "xglm"),
    *("phi3", "qwen3", "qwen3_5_text", "stablelm", "starcoder2"),
)


def stored(model, path, *, dtype="float32", **options):
    chosen = ExtractOptions(**{"generation": SHORT, "kinds": KINDS, **options})
    records = list(extract(model, tokenizer(), [QUESTION, "Why?"], chosen, dtype=dtype))
    with h5traces.create(path, precision=PrecisionOptions(dtype=dtype)) as writer:
        for each in records:
            writer.append(each)
    return records


def without_weights(records, path):
    with h5traces.create(path, precision=PrecisionOptions(dtype="float32")) as writer:
        for each in records:
            layered = {kind: v for kind, v in each.layered.items() if kind != "attentions"}
            fields = tuple(name for name in each.fields if name != "attentions")
            writer.append(each.model_copy(update={"layered": layered, "fields": fields}))


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_weights_are_those_of_eager_attention(family, tmp_path):
    model = make_family(family)
    records = stored(model, tmp_path / "both.h5", batch_size=2)
    without_weights(records, tmp_path / "qk.h5")
    with h5traces.open(tmp_path / "both.h5") as full, h5traces.open(tmp_path / "qk.h5") as qk:
        for expected, found in zip(full, qk, strict=True):
            assert "attentions" not in found.fields
            assert found["attentions"].layers == expected["attentions"].layers
            for a, b in zip(expected["attentions"], found["attentions"], strict=True):
                assert a.shape == b.shape
                assert b.dtype == np.float32
                assert np.abs(a - b).max() < BOUND
    assert h5traces.validate(tmp_path / "qk.h5").ok


# Its soft cap is not within sdpa's reach.
@pytest.mark.parametrize(
    ("family", "implementation"),
    [("gemma2", "eager"), ("gemma3_text", "sdpa"), ("gpt2", "sdpa"), ("mistral", "sdpa")],
)
def test_option_qk_needs_no_eager_attention(family, implementation, tmp_path):
    model = make_model(family, attn_implementation=implementation)
    stored(model, tmp_path / "qk.h5", kinds=("hidden_states", "attentions"), attentions="qk")
    assert model.config._attn_implementation == implementation
    model.set_attn_implementation("eager")
    with h5traces.open(tmp_path / "qk.h5") as archive:
        trace = archive[0]
        assert list(trace.fields[:3]) == ["hidden_states", "queries", "keys"]
        ids = torch.tensor([trace["tokens"].tolist()])
        with torch.inference_mode():
            weights = model(input_ids=ids, output_attentions=True).attentions
        for found, expected in zip(trace["attentions"], weights, strict=True):
            assert np.abs(found - expected[0].numpy()).max() < 2e-5


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("diffllama", "DiffLlamaForCausalLM has no queries"),
        ("doge", "DogeForCausalLM: attention of layer 0, 1, 2, 3 does not follow"),
        ("falcon", "FalconForCausalLM: attention of layer 0, 1, 2, 3 does not follow"),
    ],
)
def test_models_whose_weights_do_not_follow_are_rejected_by_name(family, message):
    changes = {"alibi": True} if family == "falcon" else {}
    chosen = ExtractOptions(generation=SHORT, attentions="qk")
    with pytest.raises(ExtractionError, match=message):
        list(extract(make_family(family, **changes), tokenizer(), [QUESTION], chosen))


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    """Archives of one model with weights, their mean, and a window of them."""
    folder = tmp_path_factory.mktemp("reduced")
    model = make_model("gemma2")
    for name in ("full", "mean", "window:5"):
        path = folder / f"{name.partition(':')[0]}.h5"
        stored(model, path, kinds=("hidden_states", "attentions"), attentions=name, batch_size=2)
    return folder


def test_a_mean_takes_the_place_of_heads(reduced, tmp_path):
    with h5traces.open(reduced / "full.h5") as full, h5traces.open(reduced / "mean.h5") as mean:
        for expected, found in zip(full, mean, strict=True):
            assert found.fields[:2] == ("hidden_states", "attention_mean")
            for heads, one in zip(expected["attentions"], found["attention_mean"], strict=True):
                assert np.abs(one - heads.mean(0)).max() < 3e-4
        attrs = mean._files[0].store.kinds["attention_mean"]
        assert attrs["reduction"] == "mean"
        assert "derivation" not in attrs
        with pytest.raises(h5traces.errors.HeadsNotStoredError, match="attention_mean"):
            mean[0]["attentions"]
    # The writer makes the same of heads, where a tier asks for it.
    h5traces.repack(reduced / "full.h5", tmp_path / "of_heads.h5", precision="compact")
    h5traces.repack(reduced / "mean.h5", tmp_path / "of_mean.h5", precision="compact")
    with (
        h5traces.open(tmp_path / "of_heads.h5") as one,
        h5traces.open(tmp_path / "of_mean.h5") as other,
    ):
        for found, expected in zip(
            other[0]["attention_mean"], one[0]["attention_mean"], strict=True
        ):
            assert np.array_equal(found, expected)
    assert all(h5traces.validate(each).ok for each in sorted(tmp_path.glob("*.h5")))


def test_a_window_holds_the_last_keys_of_every_query(reduced):
    with h5traces.open(reduced / "full.h5") as full, h5traces.open(reduced / "window.h5") as some:
        for expected, found in zip(full, some, strict=True):
            whole, length = expected.layer(2, "attentions"), len(expected["tokens"])
            band = found.layer(2, "attention_window")
            assert band.shape == (4, length, 5)
            distance = np.arange(length)[:, None] - np.arange(length)
            known = np.where(distance >= 5, np.nan, whole)
            assert np.array_equal(found.attention(2), known, equal_nan=True)
            part = found.attention(2, heads=1, queries=[3, 4], keys=slice(2, 4))
            assert np.array_equal(part, whole[1, 3:5, 2:4])
            assert isinstance(found.attention(2, device="cpu"), torch.Tensor)
            assert not band[:, 0, :4].any()
        with pytest.raises(h5traces.errors.HeadsNotStoredError, match="last keys of every query"):
            some[0]["attentions"]
        with pytest.raises(LayerIndexError, match="layer 9 of attention_window is not stored"):
            some[0].attention(9)
    assert h5traces.validate(reduced / "window.h5").ok


def test_a_window_longer_than_a_sample_holds_its_whole_rows(reduced, tmp_path):
    path = tmp_path / "window.h5"
    both = {"kinds": ("hidden_states", "attentions"), "batch_size": 2}
    stored(make_model("gemma2"), path, attentions="window:100000", **both)
    with h5traces.open(reduced / "full.h5") as full, h5traces.open(path) as some:
        lengths = [len(each["tokens"]) for each in some]
        assert len(set(lengths)) > 1  # of one batch
        for expected, found, length in zip(full, some, lengths, strict=True):
            assert found.layer(2, "attention_window").shape == (4, length, length)
            assert np.array_equal(found.attention(2), expected.layer(2, "attentions"))
    assert h5traces.validate(path).ok


def test_a_window_of_some_tokens_knows_where_they_stood(tmp_path):
    model = make_model("gemma2")
    stored(model, tmp_path / "full.h5", kinds=("attentions",))
    stored(
        model, tmp_path / "some.h5", kinds=("attentions",), attentions="window:4", tokens="every:3"
    )
    with h5traces.open(tmp_path / "full.h5") as full, h5traces.open(tmp_path / "some.h5") as some:
        places = some[0]["positions"]
        expected = full[0].layer(1, "attentions")[:, places][:, :, places].copy()
        expected[:, places[:, None] - places >= 4] = np.nan
        assert np.array_equal(some[0].attention(1), expected, equal_nan=True)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    records = stored(make_model("gemma2"), folder / "both.h5")
    without_weights(records, folder / "qk.h5")
    return folder


def test_parts_are_those_of_the_whole(archives):
    with h5traces.open(archives / "qk.h5") as qk, h5traces.open(archives / "both.h5") as full:
        for archive in (qk, full):
            trace = archive[0]
            whole = trace.layer(2, "attentions")
            assert np.array_equal(trace.attention(2), whole)
            row = trace.attention(2, heads=1, queries=-1)
            assert np.allclose(row, whole[1, -1], atol=1e-7)
            assert row.shape == whole.shape[2:]
            part = trace.attention(2, heads=[3, 0], queries=slice(2, 9), keys=slice(1, 4))
            assert np.allclose(part, whole[[3, 0], 2:9, 1:4], atol=1e-7)
            with pytest.raises(LayerIndexError, match=r"attention .* of layer 2"):
                trace.attention(2, heads=9)
            with pytest.raises(LayerIndexError, match="layer 9 of attentions is not stored"):
                trace.attention(9)
            on_device = trace.attention(2, heads=[0], device="cpu")
            assert isinstance(on_device, torch.Tensor)
            assert np.allclose(on_device.numpy(), whole[[0]], atol=1e-7)


def test_views_copies_and_exports(archives, tmp_path):
    path = archives / "qk.h5"
    h5traces.repack(path, tmp_path / "copy.h5")
    h5traces.repack(path, tmp_path / "one.h5", layers=[1], precision="analysis")
    with h5traces.open(path) as archive, h5traces.open(tmp_path / "copy.h5") as copy:
        (view,) = archive[:1].select(layers=[1, 3])
        assert view["attentions"].layers == (1, 3)
        assert np.array_equal(view["attentions"][1], archive[0]["attentions"][3])
        assert np.array_equal(copy[1]["attentions"][2], archive[1]["attentions"][2])
        assert "attentions" not in archive[0].to_dict()
        assert set(archive[0].to_dict()) >= {"queries", "keys"}
        assert "recomputed" in archive[0]["attentions"]._repr_html_()
    with h5traces.open(tmp_path / "one.h5") as one, h5traces.open(path) as archive:
        assert one[0]["attentions"].layers == (1,)
        assert np.array_equal(one[0]["attentions"][0], archive[0]["attentions"][1])
    assert h5traces.verify(path).ok


def test_products_in_threads_take_one_thread_each():
    def num_threads():
        return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}

    with threadpool_limits(2, user_api="blas"):
        if num_threads() != {2}:
            pytest.skip("numpy has no BLAS whose threads can be set")
        one_blas_thread.__enter__()
        with one_blas_thread:
            assert num_threads() == {1}
            one_blas_thread.__exit__()  # of blocks that overlap, the first ends first
            assert num_threads() == {1}
        assert num_threads() == {2}


@pytest.mark.parametrize("mask", ["all", "causal", "chunk", "window"])
def test_numpy_and_torch_agree_with_the_plain_formula(mask):
    from h5traces.archive.torch_values import _on_device as in_torch

    generator = np.random.default_rng(3)
    queries = generator.normal(size=(4, 600, 8)).astype("f4")
    keys = generator.normal(size=(2, 600, 8)).astype("f4")
    window = 70 if mask in ("chunk", "window") else None
    rule = AttentionRule(
        mask=mask,
        window=window,
        scale=0.7,
        soft_cap=3.0,
        slopes=(0.004, 0.0, -0.002, 0.008),
        sinks=(0.1, -1.0, 2.0, 0.5),
    )
    scores = np.einsum("hqd,hkd->hqk", queries, keys.repeat(2, 0)).astype("f8") * 0.7
    row, column = np.ogrid[:600, :600]
    scores = np.tanh(scores / 3) * 3 + np.reshape(rule.slopes, (4, 1, 1)) * (column - row)
    seen = {
        "all": column >= 0,
        "causal": column <= row,
        "chunk": (column <= row) & (column // 70 == row // 70),
        "window": (column <= row) & (column > row - 70),
    }[mask]
    exponentials = np.where(seen, np.exp(scores), 0)
    sinks = np.exp(rule.sinks)[:, None, None]
    expected = exponentials / (exponentials.sum(-1, keepdims=True) + sinks)
    every = {"heads": np.arange(4), "rows": np.arange(600)}
    for found in (
        attention_weights(queries, keys, rule, **every),
        in_torch(queries, keys, rule, **every, device="cpu").numpy(),
    ):
        assert np.abs(found - expected).max() < 1e-6


@pytest.mark.parametrize("family", ["bloom", "gemma2", "gpt_oss", "llama4_text"])
def test_the_rule_of_the_format_is_enough(family, tmp_path, monkeypatch):
    """The code in section 20 of the format gives the weights that reading gives."""
    spec = (ROOT / "schema" / "SPEC.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", spec.split("## 20 ")[1], re.DOTALL)
    records = stored(make_family(family), tmp_path / "both.h5")
    without_weights(records, tmp_path / "long.h5")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    found["sample"].file.close()
    with h5traces.open("both.h5") as archive:
        assert np.abs(found["weights"] - archive[0].layer(0, "attentions")).max() < BOUND


@pytest.mark.parametrize("tokens", ["answer", "last"])
def test_weights_need_every_key(tokens, tmp_path):
    with pytest.raises(ExtractionError, match="needs the keys of all tokens, but tokens is"):
        ExtractOptions(attentions="qk", tokens=tokens)
    kinds = ("hidden_states", "queries", "keys")
    stored(make_model("llama"), tmp_path / "part.h5", kinds=kinds, tokens=tokens)
    with h5traces.open(tmp_path / "part.h5") as archive:
        with pytest.raises(h5traces.errors.FieldNotFoundError):
            archive[0]["attentions"]


def test_what_reads_attention_reads_what_is_computed(archives):
    pytest.importorskip("matplotlib")
    from h5traces.features import compute_features
    from h5traces.plotting import attention_grid, token_quantity
    from h5traces.torch_data import TraceDataset

    names = ["attention_entropy", "sink_mass", "lookback_ratio"]
    with h5traces.open(archives / "qk.h5") as qk, h5traces.open(archives / "both.h5") as full:
        expected = compute_features(full, names)
        for name, found in compute_features(qk, names).items():
            assert np.allclose(found, expected[name], atol=1e-5), name
        for quantity in ("entropy", "sink"):
            pair = [token_quantity(each[0], quantity) for each in (qk, full)]
            assert np.allclose(*pair, atol=1e-5)
        assert len(attention_grid(qk[0], 1).axes) == 4
    for tokens in ("all", "answer", "last", "mean", "answer_mean"):
        item, expected = (
            TraceDataset(archives / name, kinds=["attentions"], layers=[1], tokens=tokens)[0]
            for name in ("qk.h5", "both.h5")
        )
        assert torch.allclose(item["attentions"], expected["attentions"], atol=1e-5)


def test_readers_compute_rows_and_never_the_square(archives, monkeypatch):
    pytest.importorskip("torch_geometric")
    from h5traces.archive import stored_trace
    from h5traces.features import compute_features
    from h5traces.graph import TraceGraphDataset
    from h5traces.plotting import token_quantity
    from h5traces.torch_data import TraceDataset

    monkeypatch.setattr(stored_trace, "_BLOCK_WEIGHTS", 1000)
    most = []

    def noted(queries, keys, rule, *, heads, rows):
        most.append(len(heads) * len(rows) * keys.shape[1])
        return attention_weights(queries, keys, rule, heads=heads, rows=rows)

    monkeypatch.setattr(stored_trace, "attention_weights", noted)
    names = ["attention_entropy", "sink_mass", "lookback_ratio"]
    with h5traces.open(archives / "qk.h5") as qk, h5traces.open(archives / "both.h5") as full:
        expected = compute_features(full, names)
        for name, found in compute_features(qk, names).items():
            assert np.allclose(found, expected[name], atol=1e-5), name
        pair = [token_quantity(each[0], "entropy") for each in (qk, full)]
        assert np.allclose(*pair, atol=1e-5)
    TraceDataset(archives / "qk.h5", kinds=["attentions"], tokens="mean")[0]
    for reduction in ("mean", "max", "per_head"):
        for direction in ("query_to_key", "both"):
            found, expected = (
                TraceGraphDataset(
                    [archives / name],
                    layers=[1],
                    head_reduction=reduction,
                    edge_direction=direction,
                )[0]
                for name in ("qk.h5", "both.h5")
            )
            assert torch.equal(found.edge_index, expected.edge_index)
            assert torch.allclose(found.edge_attr, expected.edge_attr, atol=1e-5)
    assert 0 < max(most) <= 1000


def test_graphs_of_what_is_computed(archives):
    pytest.importorskip("torch_geometric")
    from h5traces.graph import TraceGraphDataset

    found, expected = (
        TraceGraphDataset([archives / name], layers=[1])[0] for name in ("qk.h5", "both.h5")
    )
    assert torch.equal(found.edge_index, expected.edge_index)


@pytest.mark.parametrize(
    ("length", "form", "ratio"),
    [
        (43, None, None),
        (256, None, None),
        (2048, None, "1/4.6"),
        (2048, "qk", None),
        (43, "qk", "1/6.7 of what queries and keys take: extract with attentions='full'"),
        (43, "mean", None),
        (2048, "window:64", None),
    ],
)
def test_the_estimate_says_what_is_smaller(length, form, ratio):
    shape = ModelShape(
        num_layers=2, hidden_size=4096, num_heads=32, num_key_value_heads=8, head_size=128
    )
    advice = estimate(shape, length, attentions=form).advice
    assert (ratio in advice) if ratio else (advice == "")


def test_sizes_of_windows_follow_their_width():
    shape = ModelShape(num_layers=2, hidden_size=64, num_heads=4)
    sizes = [
        estimate(shape, 100, attentions=each).rows[0].sample_nbytes
        for each in ("none", "window:8", "window:16", "mean", "full")
    ]
    longer = estimate(shape, 100, attentions="window:5000").rows[0].sample_nbytes
    assert longer == sizes[-1]
    none, eight, sixteen, mean, full = (each / (2 * 4) - 6400 for each in sizes)
    assert (none, eight, sixteen, mean, full) == (0, 3200, 6400, 10000, 40000)


def test_a_rule_that_makes_no_sense_is_named(archives, tmp_path):
    path = tmp_path / "wrong.h5"
    path.write_bytes((archives / "qk.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        file["samples/00000000/queries/layer_001"].attrs["scale"] = np.nan
    with pytest.warns(match="index"), h5traces.open(path) as archive:
        with pytest.raises(h5traces.errors.CorruptArchiveError, match=r"queries/layer_001: scale"):
            archive[0]["attentions"]
    found = [str(each) for each in h5traces.validate(path).problems]
    assert any("queries/layer_001" in each and "scale" in each for each in found), found


def test_slopes_of_another_number_of_heads_are_named(tmp_path):
    records = stored(make_family("bloom"), tmp_path / "both.h5")
    without_weights(records, tmp_path / "long.h5")
    with h5py.File(tmp_path / "long.h5", "r+") as file:
        attrs = file["samples/00000000/queries/layer_001"].attrs
        attrs.create("slopes", np.bytes_("[0.5, 0.25]"))
    h5traces.seal(tmp_path / "long.h5", accept_edits=True)
    with h5traces.open(tmp_path / "long.h5") as archive:
        with pytest.raises(h5traces.errors.CorruptArchiveError, match="2 slopes for 4 heads"):
            archive[0].layer(1, "attentions")
