"""Items of `TraceDataset`: every choice of layers, tokens and type, against the legacy dicts."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from legacy_batches import assert_same, make_archive, make_batch, with_torch
from shards import HEADS, HIDDEN, LAYERS, NUM_SAMPLES, PROMPT, make_shards, plain_batch

import h5traces
from h5traces.errors import DatasetError, LayerIndexError, OptionError
from h5traces.storage import plans
from h5traces.storage.kernels import run_plan
from h5traces.torch_data import Labels, Tokens, TraceDataset

if TYPE_CHECKING:
    from pathlib import Path

BATCH = plain_batch()
KINDS = ("hidden_states", "attentions")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


def expected(sample: dict[str, Any], kind: str, layers: list[int], tokens: str) -> np.ndarray:
    """The item by numpy, from the dict."""
    found = []
    for layer in layers:
        array = sample[kind][layer]
        axis = 0 if kind == "hidden_states" else 1
        if tokens.startswith("answer"):
            array = array.take(range(PROMPT, array.shape[axis]), axis)
        if tokens == "last":
            array = array.take(-1, axis)
        if tokens.endswith("mean"):
            array = array.astype(np.float64).mean(axis)
        found.append(array)
    return np.stack(found)


def test_everything_is_handed_out_by_default(shards: Path) -> None:
    dataset = TraceDataset(shards)
    assert len(dataset) == NUM_SAMPLES
    for index, sample in enumerate(BATCH):
        item = dataset[index]
        assert list(item) == ["index", "sample_id", "hidden_states"]
        assert (item["index"], item["sample_id"]) == (index, f"tc_{index}")
        assert_same(item["hidden_states"].numpy(), np.stack(sample["hidden_states"]))
    assert_same(dataset[-1]["hidden_states"], dataset[NUM_SAMPLES - 1]["hidden_states"])
    with pytest.raises(IndexError, match="item 18 is out of range; the dataset has 18"):
        dataset[NUM_SAMPLES]


@pytest.mark.parametrize("tokens", ["all", "answer", "last", "mean", "answer_mean"])
@pytest.mark.parametrize("layers", [[0], [2, 0], [0, 1, 2]])
def test_layers_and_tokens(shards: Path, tokens: Any, layers: list[int]) -> None:
    dataset = TraceDataset(shards, kinds=KINDS, layers=layers, tokens=tokens)
    for index in (0, 7, 17):
        item = dataset[index]
        for kind in KINDS:
            wanted, found = expected(BATCH[index], kind, layers, tokens), item[kind]
            assert found.dtype == torch.float16
            assert len(dataset.axes[kind]) == found.ndim
            if tokens.endswith("mean"):
                np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-6)
            else:
                assert_same(found.numpy(), wanted)


def test_axes_are_named(shards: Path) -> None:
    axes = TraceDataset(shards, kinds=KINDS, fields=["tokens"]).axes
    assert axes == {
        "hidden_states": ("layer", "token", "hidden"),
        "attentions": ("layer", "head", "query", "key"),
        "tokens": ("token",),
    }
    axes = TraceDataset(shards, kinds=KINDS, layers=1, tokens="last").axes
    assert axes == {"hidden_states": ("hidden",), "attentions": ("head", "key")}


@pytest.mark.parametrize("tokens", ["all", "answer", "last", "mean"])
def test_a_bare_layer_number_gives_no_layer_axis(shards: Path, tokens: Any) -> None:
    found = TraceDataset(shards, layers=1, tokens=tokens)[3]["hidden_states"]
    stacked = TraceDataset(shards, layers=[1], tokens=tokens)[3]["hidden_states"]
    assert torch.equal(found, stacked[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layers", [1, [0, 1]])
def test_types(shards: Path, dtype: torch.dtype, layers: Any) -> None:
    found = TraceDataset(shards, layers=layers, dtype=dtype)[0]["hidden_states"]
    stored = TraceDataset(shards, layers=layers)[0]["hidden_states"]
    assert found.dtype == dtype
    assert torch.equal(found, stored.to(dtype))


def test_bfloat16_is_bfloat16_bit_for_bit(tmp_path: Path) -> None:
    batch = with_torch(plain_batch(2, dtype="float32"), "bfloat16")
    path = make_archive(tmp_path, batch, dtype="bfloat16")
    for layers in (1, [2, 1]):
        found = TraceDataset(path, layers=layers)[1]["hidden_states"]
        wanted = batch[1]["hidden_states"]
        assert_same(found, wanted[1] if layers == 1 else torch.stack([wanted[2], wanted[1]]))


def test_tensors_keep_nothing_alive_but_themselves(shards: Path) -> None:
    for tokens in ("all", "answer", "last", "mean"):
        for layers in (1, [0, 2]):
            dataset = TraceDataset(shards, kinds=KINDS, layers=layers, tokens=tokens)
            for kind in KINDS:
                tensor = dataset[5][kind]
                assert tensor.is_contiguous()
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def test_one_chunk_is_read_per_layer(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = TraceDataset(shards, kinds=KINDS, layers=[2, 0])
    dataset[5]  # the footer's tables are read once
    chunks = [
        (chunk.offsets[0], chunk.sizes[0])
        for kind in KINDS
        for layer in (2, 0)
        if (chunk := dataset.archive[6]._stored.entry(f"{kind}/layer_{layer:03d}").chunks)
        is not None
    ]
    seen: list[tuple[int, int]] = []

    def counted(plan: Any, source: Any, *others: Any, **options: Any) -> None:
        seen.extend(zip(plan["offset"].tolist(), plan["nbytes"].tolist(), strict=True))
        run_plan(plan, source, *others, **options)

    monkeypatch.setattr(plans, "run_plan", counted)
    dataset[6]
    assert sorted(seen) == sorted(chunks)


def test_fields(shards: Path) -> None:
    fields = ["tokens", "generated_answer_clean", "tokens_decoded"]
    item = TraceDataset(shards, fields=fields)[4]
    assert_same(item["tokens"].numpy(), BATCH[4]["tokens"])
    assert item["generated_answer_clean"] == "answer 4"
    assert item["tokens_decoded"] == BATCH[4]["tokens_decoded"]
    answer = TraceDataset(shards, fields=["tokens"], tokens="answer")[4]["tokens"]
    assert_same(answer.numpy(), BATCH[4]["tokens"][PROMPT:])
    with pytest.raises(DatasetError, match=r"shards.*'tc_0'.*no field 'nothing'; stored: hidden"):
        TraceDataset(shards, fields=["nothing"])[0]


def test_indices_and_slices_of_archives(shards: Path) -> None:
    archive = h5traces.open(shards)
    chosen = TraceDataset(archive, indices=[17, 3, -1])
    assert [item["sample_id"] for item in (chosen[0], chosen[1], chosen[2])] == [
        "tc_17",
        "tc_3",
        "tc_17",
    ]
    assert chosen.shard_numbers.tolist() == [4, 0, 4]
    view = TraceDataset(archive[::5])
    assert [view[index]["sample_id"] for index in range(len(view))] == [
        "tc_0",
        "tc_5",
        "tc_10",
        "tc_15",
    ]
    assert view.shard_numbers.tolist() == [0, 1, 2, 3]
    assert TraceDataset(archive.select(layers=[1]))[0]["hidden_states"].shape[0] == 1
    assert TraceDataset(archive).fingerprint == TraceDataset(shards).fingerprint
    assert TraceDataset(archive).fingerprint != chosen.fingerprint


def test_transform_and_threads(shards: Path) -> None:
    plain = TraceDataset(shards)
    threaded = TraceDataset(shards, threads=3, transform=lambda item: item["hidden_states"])
    for tensor, index in zip(threaded.__getitems__([4, 0, 9]), [4, 0, 9], strict=True):
        assert torch.equal(tensor, plain[index]["hidden_states"])
    with ThreadPoolExecutor(8) as pool:
        items = list(pool.map(plain.__getitem__, [number % 18 for number in range(90)]))
    for number, item in enumerate(items):
        assert_same(item["hidden_states"].numpy(), np.stack(BATCH[number % 18]["hidden_states"]))


def test_pickling_is_small_and_exact(shards: Path) -> None:
    dataset = TraceDataset(
        shards, kinds=KINDS, layers=[1], labels={f"tc_{n}": n for n in range(18)}
    )
    first = dataset[7]
    dumped = pickle.dumps(dataset)
    assert len(dumped) < 30_000
    again = pickle.loads(dumped)
    assert_same(again[7], first)
    assert again.fingerprint == dataset.fingerprint


# --- labels -------------------------------------------------------------------------------------


def test_labels_by_id(shards: Path) -> None:
    labels = {f"tc_{number}": number % 2 for number in range(NUM_SAMPLES)}
    dataset = TraceDataset(shards, labels=labels)
    assert [dataset[index]["label"] for index in range(4)] == [0, 1, 0, 1]
    assert TraceDataset(shards, labels=labels, indices=[3, 2]).labels == [1, 0]
    del labels["tc_9"]
    with pytest.raises(DatasetError, match=r"shards.*\.h5: /samples/00000001 \(sample id 'tc_9'\)"):
        TraceDataset(shards, labels=labels)
    assert len(TraceDataset(shards, labels=labels, indices=range(9))) == 9


def test_labels_of_unknown_ids(shards: Path) -> None:
    labels = {f"tc_{number}": 0 for number in range(NUM_SAMPLES)} | {"tc_99": 1, "tc_98": 1}
    with pytest.raises(DatasetError, match=r"shards.*labels names 'tc_99', 'tc_98', which no sam"):
        TraceDataset(shards, labels=labels)
    partial = Labels(labels, allow_unused=True)
    assert len(TraceDataset(shards, labels=partial)) == NUM_SAMPLES


def test_labels_of_ids_that_repeat(tmp_path: Path) -> None:
    batch = plain_batch(4)
    for sample, question_id in zip(batch, "aabb", strict=True):
        sample["question_id"] = question_id
    path = make_archive(tmp_path, batch)
    with pytest.raises(DatasetError, match=r"'a'\): 2 samples have that id.*generation_index"):
        TraceDataset(path, labels={"a": 0, "b": 1})
    keys = {("a", 0): 5, ("a", 1): 6, ("b", 0): 7, ("b", 1): 8}
    assert TraceDataset(path, labels=keys).labels == [5, 6, 7, 8]
    del keys["b", 1]
    with pytest.raises(DatasetError, match="holds no value"):
        TraceDataset(path, labels=keys)


def test_labels_that_the_archive_knows(tmp_path: Path) -> None:
    batch = plain_batch(3)
    for number, sample in enumerate(batch):
        sample["label"] = number
    path = make_archive(tmp_path, batch)
    assert TraceDataset(path, labels="label").labels == [0, 1, 2]
    with pytest.raises(DatasetError, match=r"batch\.h5.*'tc_0'.*no label 'bleurt'; stored: label"):
        TraceDataset(path, labels="bleurt")


# --- what cannot be -----------------------------------------------------------------------------


def test_an_unknown_prompt_length(tmp_path: Path) -> None:
    batch = plain_batch(2)
    for sample in batch:
        del sample["prompt_length"]
    path = make_archive(tmp_path, batch)
    for tokens in ("answer", "answer_mean"):
        with pytest.raises(DatasetError, match=r"batch\.h5.*'tc_1'.*prompt_lens=\{sample_id"):
            TraceDataset(path, tokens=tokens)[1]
    found = TraceDataset(path, tokens=Tokens("answer", {"tc_1": 2}))[1]["hidden_states"]
    assert_same(found.numpy(), np.stack(batch[1]["hidden_states"])[:, 2:])
    with pytest.raises(DatasetError, match="a prompt of 99 tokens does not fit"):
        TraceDataset(path, tokens=Tokens("answer", {"tc_0": 99}))[0]


@pytest.mark.parametrize(
    ("layout", "index", "message"),
    [
        ("step_min", 5, "'tc_5'.*hidden_states are generation steps"),
        ("step_min", 1, "'tc_1'.*(not stored|holds no tokens|generation steps)"),
        ("full_pkl", 2, r"'tc_2'.*hidden_states of layers \[0\].*NaN or infinite"),
    ],
)
def test_odd_samples(tmp_path: Path, layout: str, index: int, message: str) -> None:
    dataset = TraceDataset(make_archive(tmp_path, make_batch(layout)))
    with pytest.raises((DatasetError, LayerIndexError), match=rf"batch\.h5.*{message}"):
        dataset[index]


def test_one_position_has_no_answer_to_cut_out(tmp_path: Path) -> None:
    path = make_archive(tmp_path, make_batch("final_full"))
    with pytest.raises(DatasetError, match=r"batch\.h5.*coverage 'last_position'.*tokens='all'"):
        TraceDataset(path, tokens=Tokens("answer", {"tc_5": 5}))[5]
    assert TraceDataset(path)[5]["hidden_states"].shape == (3, 1, 8)


def test_values_that_are_not_finite_may_be_kept(tmp_path: Path) -> None:
    path = make_archive(tmp_path, make_batch("full_pkl"))
    kept = TraceDataset(path, non_finite="keep")[2]["hidden_states"]
    assert not kept.isfinite().all()
    # Where the tokens asked for are fine, so is the item.
    batch = make_batch("full_pkl")
    assert not np.isfinite(batch[2]["hidden_states"][0][-1]).all()
    with pytest.raises(DatasetError, match=r"hidden_states of layers \[0\]"):
        TraceDataset(path, tokens="last")[2]
    TraceDataset(path, tokens=Tokens("answer", {"tc_5": 5}))[5]
    # A cast that overflows is found out too.
    huge = plain_batch(1, dtype="float32")
    huge[0]["hidden_states"][1][0, 0] = 1e6
    path = make_archive(tmp_path / "huge", huge)
    with pytest.raises(DatasetError, match=r"hidden_states of layers \[1\].*NaN or infinite"):
        TraceDataset(path, layers=[1], dtype=torch.float16)[0]


def test_layers_of_unequal_shape(tmp_path: Path) -> None:
    batch = plain_batch(1)
    batch[0]["hidden_states"][1] = batch[0]["hidden_states"][1][:, :4].copy()
    path = make_archive(tmp_path, batch)
    with pytest.raises(DatasetError, match=r"batch\.h5.*'tc_0'.*layer 1 .* cannot be stacked"):
        TraceDataset(path)[0]
    assert TraceDataset(path, layers=1)[0]["hidden_states"].shape[1] == 4


def test_layers_and_kinds_that_are_not_stored(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(LayerIndexError, match=r"00000\.h5: layers \[7\] of hidden_states are not"):
        TraceDataset(shards, layers=[0, 7])
    with pytest.raises(DatasetError, match=r"00000\.h5: stores no logits; stored: "):
        TraceDataset(shards, kinds=["logits"])
    for options in ({"layers": []}, {"kinds": []}):
        with pytest.raises(DatasetError, match="empty"):
            TraceDataset(shards, **options)
    empty = plain_batch(2)
    empty[1] |= {"hidden_states": [], "attentions": []}
    path = make_archive(tmp_path, empty)
    with pytest.raises(LayerIndexError, match=r"'tc_1'.*layer 0 of hidden_states is not stored; "):
        TraceDataset(path)[1]


def test_mixed_models_and_layer_sets(tmp_path: Path) -> None:
    first = make_archive(tmp_path, plain_batch(2), name="a.pkl")
    second = make_archive(tmp_path, plain_batch(2), name="b.pkl", layers=[0, 2])
    with pytest.raises(h5traces.errors.ArchiveError, match=r"b\.h5 has layers=.*a\.h5 has layers"):
        TraceDataset([first, second])


def test_empty_datasets(tmp_path: Path, shards: Path) -> None:
    empty = make_archive(tmp_path, [], name="empty.pkl")
    with pytest.raises(DatasetError, match=r"empty\.h5: there are no samples to train on"):
        TraceDataset(empty)
    with pytest.raises(DatasetError, match=r"indices is empty"):
        TraceDataset(shards, indices=[])
    with pytest.raises(DatasetError, match="indices: sample 18 was asked for, but there are 18"):
        TraceDataset(shards, indices=[0, 18])
    with pytest.raises(FileNotFoundError, match="no such file"):
        TraceDataset(tmp_path / "nothing" / "*.h5")


@pytest.mark.parametrize(
    "options", [{"tokens": "some"}, {"non_finite": "drop"}, {"threads": 0}], ids=str
)
def test_unknown_options(shards: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(options))} is .*expected"):
        TraceDataset(shards, **options)


@given(
    layers=st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=4),
    tokens=st.sampled_from(["all", "answer", "last"]),
    index=st.integers(-NUM_SAMPLES, NUM_SAMPLES - 1),
    kind=st.sampled_from(KINDS),
)
def test_any_choice_equals_numpy(
    shards: Path, layers: list[int], tokens: Any, index: int, kind: str
) -> None:
    found = TraceDataset(shards, kinds=[kind], layers=layers, tokens=tokens)[index][kind]
    assert_same(found.numpy(), expected(BATCH[index], kind, layers, tokens))
    assert found.shape[-1] == HIDDEN or found.shape[1] == HEADS
