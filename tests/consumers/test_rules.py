"""Features, datasets and graphs answer the same questions alike: one table of cases for all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from legacy_batches import write_batch

import h5traces
from h5traces.errors import DatasetError, FeatureError, LayerIndexError
from h5traces.features import compute_features, lookback_ratio, row_entropy, sink_mass
from h5traces.graph import TraceGraphDataset, attention_edges
from h5traces.meaning.options import ReadingOptions
from h5traces.torch_data import TraceDataset, pack_collate, pad_collate

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, HEADS, HIDDEN, PROMPT, TOKENS = 3, 2, 4, 3, 8
PAD = 99.0


def sample(positions: int, tokens: int = TOKENS, **changes: Any) -> dict[str, Any]:
    """A trace with so many positions and tokens."""
    rng = np.random.default_rng(positions)
    weights = np.exp(rng.normal(size=(LAYERS, HEADS, positions, positions))) * np.tri(positions)
    weights /= weights.sum(-1, keepdims=True)
    return {
        "hidden_states": list(rng.normal(size=(LAYERS, positions, HIDDEN)).astype(np.float32)),
        "attentions": list(weights.astype(np.float32)),
        "tokens": np.arange(tokens) + 10,
        "tokens_decoded": [f"t{token}" for token in range(tokens)],
        "prompt_length": PROMPT,
        "question_id": "q",
        **changes,
    }


def padded(real: dict[str, Any], left: int, right: int) -> dict[str, Any]:
    """The trace as a row of a padded batch, with its mask; pads hold 99."""
    ends = (left, right)
    mask = np.pad(np.ones(len(real["tokens"]), np.int64), ends)
    return {
        **real,
        "hidden_states": [
            np.pad(each, (ends, (0, 0)), constant_values=PAD) for each in real["hidden_states"]
        ],
        "attentions": [
            np.pad(each, ((0, 0), ends, ends), constant_values=0.5) for each in real["attentions"]
        ],
        "tokens": np.pad(real["tokens"], ends),
        "tokens_decoded": ["<pad>"] * left + real["tokens_decoded"] + ["<pad>"] * right,
        "prompt_length": left + PROMPT,
        "attention_mask": mask,
    }


def masked(trace: dict[str, Any], mask: list[int]) -> dict[str, Any]:
    """The trace with a mask, and without attention to what it leaves out."""
    weights = [each * np.array(mask, np.float32) for each in trace["attentions"]]
    weights = [each / each.sum(-1, keepdims=True) for each in weights]
    return {**trace, "attentions": weights, "attention_mask": np.array(mask)}


@dataclass
class Case:
    """A trace, and which of its positions are what."""

    trace: dict[str, Any]
    real: list[int]
    # None if the answer cannot be cut out.
    answer: list[int] | None
    why: str = ""
    reading: ReadingOptions = field(default_factory=lambda: ReadingOptions(keep_padding=True))


CASES = {
    "as many positions as tokens": Case(sample(8), list(range(8)), [3, 4, 5, 6, 7]),
    "one position less": Case(sample(7), list(range(7)), [3, 4, 5, 6]),
    "padded on the left": Case(padded(sample(8), 2, 0), list(range(2, 10)), [5, 6, 7, 8, 9]),
    "padded on the right": Case(padded(sample(8), 0, 3), list(range(8)), [3, 4, 5, 6, 7]),
    "padded at both ends": Case(padded(sample(8), 2, 1), list(range(2, 10)), [5, 6, 7, 8, 9]),
    "a mask with holes": Case(
        masked(sample(8), [1, 1, 0, 1, 1, 0, 1, 1]), [0, 1, 3, 4, 6, 7], [3, 4, 6, 7]
    ),
    "padding that was cut": Case(
        padded(sample(8), 2, 1), list(range(8)), [3, 4, 5, 6, 7], reading=ReadingOptions()
    ),
    "no length of the prompt": Case(
        sample(8, prompt_length=None), list(range(8)), None, "length of the prompt is not stored"
    ),
    "one position of eight": Case(
        sample(1), [0], None, r"arrays of 1 do not cover the 8 stored tokens \(coverage 'last_p"
    ),
    "tokens of the answer alone": Case(
        sample(8, tokens=5), list(range(8)), None, r"arrays of 8 do not cover the 5 stored tokens"
    ),
    "fewer positions by two": Case(
        sample(6), list(range(6)), None, r"arrays of 6 do not cover the 8 stored tokens \(coverage"
    ),
    "a prompt as long as the sequence": Case(sample(8, prompt_length=8), list(range(8)), []),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def path(case: Case, tmp_path: Path) -> Path:
    trace = {key: value for key, value in case.trace.items() if value is not None}
    write_batch(tmp_path / "run.pkl", [trace])
    target = tmp_path / "run.h5"
    report = h5traces.convert(tmp_path / "run.pkl", target, reading=case.reading)
    assert report.ok, report.files[0].error
    return target


def stored(path: Path, kind: str) -> list[np.ndarray]:
    return [each.astype(np.float64) for each in h5traces.open(path)[0][kind]]


def same(found: Any, wanted: Any) -> None:
    plain = found.numpy() if isinstance(found, torch.Tensor) else found
    np.testing.assert_allclose(plain, wanted, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_features(case: Case, path: Path) -> None:
    archive = h5traces.open(path)
    names = ["last_token", "mean", "max", "attention_entropy", "sink_mass"]
    found = compute_features(archive, names)
    for layer, (states, weights) in enumerate(
        zip(stored(path, "hidden_states"), stored(path, "attentions"), strict=True)
    ):
        real = states[case.real]
        same(found["last_token"][0, layer], real[-1])
        same(found["mean"][0, layer], real.mean(axis=0))
        same(found["max"][0, layer], real.max(axis=0))
        block = weights[:, case.real][:, :, case.real]
        same(found["attention_entropy"][0, layer], row_entropy(block))
        same(found["sink_mass"][0, layer], sink_mass(block))


def test_answers_in_features(case: Case, path: Path) -> None:
    archive = h5traces.open(path)
    names = ["answer_mean", "answer_max", "lookback_ratio"]
    if case.answer is None:
        for name in names:
            with pytest.raises(FeatureError, match=rf"run\.h5.*'q'.*{name}: .*{case.why}"):
                compute_features(archive, [name])
        return
    found = compute_features(archive, names)
    for layer, (states, weights) in enumerate(
        zip(stored(path, "hidden_states"), stored(path, "attentions"), strict=True)
    ):
        answer = states[case.answer]
        nothing = np.full(HIDDEN, np.nan)
        same(found["answer_mean"][0, layer], answer.mean(axis=0) if len(answer) else nothing)
        same(found["answer_max"][0, layer], answer.max(axis=0) if len(answer) else nothing)
        block = weights[:, case.real][:, :, case.real]
        prompt = len(case.real) - len(case.answer)
        same(found["lookback_ratio"][0, layer], lookback_ratio(block, prompt))


KINDS = ("hidden_states", "attentions")


def test_datasets(case: Case, path: Path) -> None:
    states, weights = (np.stack(stored(path, kind)) for kind in KINDS)
    last = TraceDataset(path, kinds=KINDS, tokens="last")[0]
    same(last["hidden_states"], states[:, case.real[-1]])
    same(last["attentions"], weights[:, :, case.real[-1]])
    mean = TraceDataset(path, kinds=KINDS, tokens="mean")[0]
    same(mean["hidden_states"], states[:, case.real].mean(axis=1))
    same(mean["attentions"], weights[:, :, case.real].mean(axis=2))


def test_answers_in_datasets(case: Case, path: Path) -> None:
    states, weights = (np.stack(stored(path, kind)) for kind in KINDS)
    for tokens in ("answer", "answer_mean"):
        dataset = TraceDataset(path, kinds=KINDS, tokens=tokens, fields="tokens")  # type: ignore[arg-type]
        if case.answer is None:
            with pytest.raises(DatasetError, match=rf"run\.h5.*'q'.*{case.why}.*tokens='all'"):
                dataset[0]
        elif tokens == "answer":
            item = dataset[0]
            same(item["hidden_states"], states[:, case.answer])
            same(item["attentions"], weights[:, :, case.answer])
            same(item["tokens"], h5traces.open(path)[0]["tokens"][case.answer])
            assert "mask" not in item
        elif case.answer:
            same(dataset[0]["hidden_states"], states[:, case.answer].mean(axis=1))
        else:
            with pytest.raises(DatasetError, match="holds no tokens for tokens='answer_mean'"):
                dataset[0]


def test_batches(case: Case, path: Path, tmp_path: Path) -> None:
    """One sample of the case, and one that is longer and has no mask."""
    long = sample(12, 12, question_id="long")
    write_batch(tmp_path / "long.pkl", [long])
    assert h5traces.convert(tmp_path / "long.pkl", tmp_path / "long.h5").ok
    dataset = TraceDataset([path, tmp_path / "long.h5"], kinds=KINDS, fields="tokens")
    items = [dataset[0], dataset[1]]
    batch = pad_collate(dataset)(items)
    num_positions = len(stored(path, "hidden_states")[0])
    assert batch["hidden_states"].shape[:3] == (2, LAYERS, max(12, num_positions))
    for mask in ("mask", "key_mask"):
        assert batch[mask][0].nonzero().flatten().tolist() == case.real
        assert batch[mask][1].nonzero().flatten().tolist() == list(range(12))
    assert batch["lengths"].tolist() == [len(case.real), 12]
    packed = pack_collate(dataset)(items)
    states = np.stack(stored(path, "hidden_states"))
    same(packed["hidden_states"][:, : len(case.real)], states[:, case.real])
    same(packed["hidden_states"][:, len(case.real) :], np.stack(long["hidden_states"]))
    assert packed["cu_seqlens"].tolist() == [0, len(case.real), len(case.real) + 12]
    weights = np.stack(stored(path, "attentions"))[:, :, case.real][..., case.real]
    same(packed["attentions"][: weights.size], weights.ravel())
    if case.answer is not None:
        tokens = h5traces.open(path)[0]["tokens"][case.real]
        assert packed["tokens"].tolist() == [*tokens, *long["tokens"]]


def test_graphs(case: Case, path: Path) -> None:
    graphs = TraceGraphDataset(path, 0.05)
    decoded = np.array(h5traces.open(path)[0]["tokens_decoded"])
    for layer, graph in enumerate(graphs):
        states, weights = (stored(path, kind)[layer] for kind in KINDS)
        same(graph.x, states[case.real])
        assert graph.num_nodes == len(case.real)
        block = torch.from_numpy(weights[:, case.real][:, :, case.real])
        edges, features = attention_edges(block, len(case.real), threshold=0.05)
        assert torch.equal(graph.edge_index, edges)
        assert torch.equal(graph.edge_attr, features)
        if len(case.real) < len(states) or len(decoded) - 1 == len(states) > 1:
            # One text per node, also where generate() left out the last position.
            assert graph.tokens_decoded == decoded[case.real].tolist()
        else:
            assert graph.tokens_decoded == decoded.tolist()


# --- kinds and samples that lack something ------------------------------------------------------


def convert(folder: Path, batch: list[dict[str, Any]], **options: Any) -> Path:
    write_batch(folder / "run.pkl", batch)
    report = h5traces.convert(folder / "run.pkl", folder / "run.h5", **options)
    assert report.ok, report.files[0].error
    return folder / "run.h5"


def test_a_kind_that_no_sample_has(tmp_path: Path) -> None:
    batch = [{k: v for k, v in sample(8).items() if k != "attentions"}]
    options = ReadingOptions(first_state="block")
    path = convert(tmp_path, batch, reading=options)
    archive = h5traces.open(path)
    with pytest.raises(FeatureError, match=r"sink_mass is made of attentions, which is not stored"):
        compute_features(archive, ["mean", "sink_mass"])
    with pytest.raises(DatasetError, match=r"stores no attentions; stored: hidden_states"):
        TraceDataset(path, kinds=KINDS)
    with pytest.raises(DatasetError, match=r"stores no attentions; stored: hidden_states"):
        TraceGraphDataset(path)
    with pytest.raises(ValueError, match="kind 'attentions' is not stored"):
        archive.read(0, kinds="attentions")
    assert compute_features(archive, ["mean"])["mean"].shape == (1, LAYERS, HIDDEN)
    assert TraceDataset(path)[0]["hidden_states"].shape == (LAYERS, 8, HIDDEN)
    assert archive.read(0)[0]["attentions"] == []


def test_a_sample_without_arrays_among_others(tmp_path: Path) -> None:
    empty = sample(8, hidden_states=[], attentions=[], question_id="empty")
    path = convert(tmp_path, [sample(8), empty])
    found = compute_features(h5traces.open(path), ["mean"])["mean"]
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()
    with pytest.raises(LayerIndexError, match=r"'empty'.*layer 0 of hidden_states is not stored"):
        TraceDataset(path)[1]
    with pytest.raises(LayerIndexError, match=r"'empty'.*layer 0 of hidden_states is not stored"):
        TraceGraphDataset(path)[LAYERS]
    assert h5traces.open(path).read(1) == [{"hidden_states": [], "attentions": []}]


def without(key: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in sample(8, **changes).items() if name != key}


def test_attentions_alone(tmp_path: Path) -> None:
    path = convert(tmp_path, [without("hidden_states")])
    weights = np.stack(stored(path, "attentions"))
    found = compute_features(h5traces.open(path), ["sink_mass", "lookback_ratio"])
    same(found["sink_mass"][0], [sink_mass(each) for each in weights])
    same(found["lookback_ratio"][0], [lookback_ratio(each, PROMPT) for each in weights])
    with pytest.raises(FeatureError, match="mean is made of hidden_states, which is not stored"):
        compute_features(h5traces.open(path), ["mean"])
    item = TraceDataset(path, kinds="attentions", tokens="answer", fields="tokens")[0]
    same(item["attentions"], weights[:, :, PROMPT:])
    assert item["tokens"].tolist() == list(range(10 + PROMPT, 18))
    for use in (TraceDataset, TraceGraphDataset):
        with pytest.raises(DatasetError, match="stores no hidden_states; stored: attentions"):
            use(path)


def test_positions_where_no_layer_is_known(tmp_path: Path) -> None:
    path = convert(tmp_path, [without("attentions")])
    archive = h5traces.open(path)
    states = np.stack(stored(path, "hidden_states"))
    assert "hidden_states/position_000" in archive[0]._stored.objects
    assert archive.layers == (0, 1, 2)
    same(compute_features(archive, ["mean"])["mean"][0], states.mean(axis=1))
    same(compute_features(archive, ["mean"], layers=[2])["mean"][0, 0], states[2].mean(axis=0))
    item = TraceDataset(path, layers=[2, 0], tokens="answer", fields="tokens")[0]
    same(item["hidden_states"], states[[2, 0], PROMPT:])
    assert len(item["tokens"]) == 8 - PROMPT
    same(archive.read(0, layers=[1])[0]["hidden_states"][0], states[1])


def test_the_embedding_is_no_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    states = [rng.normal(size=(8, HIDDEN)).astype(np.float16) for _ in range(LAYERS + 1)]
    path = convert(tmp_path, [sample(8, hidden_states=tuple(states))])
    archive = h5traces.open(path)
    assert archive.layers == (0, 1, 2)
    same(archive[0].embedding, states[0])
    assert len(archive[0]["hidden_states"]) == LAYERS + 1  # the source's list
    same(compute_features(archive, ["last_token"])["last_token"][0], [s[-1] for s in states[1:]])
    same(TraceDataset(path, tokens="last")[0]["hidden_states"], [s[-1] for s in states[1:]])
    graphs = TraceGraphDataset(path)
    with pytest.warns(UserWarning, match="reading legacy pickles"):
        pickles = TraceGraphDataset(path.with_suffix(".pkl"))
    for found in (graphs, pickles):
        assert len(found) == LAYERS
        for layer in range(LAYERS):
            same(found[layer].x, states[layer + 1])


def test_further_kinds(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    outputs = [rng.normal(size=(8, 5)).astype(np.float16) for _ in range(LAYERS)]
    heads = [rng.normal(size=(HEADS, 8, 3)).astype(np.float16) for _ in range(LAYERS)]
    path = convert(tmp_path, [sample(8, mlp_outputs=outputs, head_outputs=heads)])
    dataset = TraceDataset(path, kinds=("mlp_outputs", "head_outputs"), tokens="answer")
    item = dataset[0]
    same(item["mlp_outputs"], np.stack(outputs)[:, PROMPT:])
    same(item["head_outputs"], np.stack(heads)[:, :, PROMPT:])
    last = TraceDataset(path, kinds="mlp_outputs", tokens="last")[0]
    same(last["mlp_outputs"], np.stack(outputs)[:, -1])
    assert pad_collate(dataset)([item, item])["mask"].all()
    assert compute_features(h5traces.open(path), ["mean"])["mean"].shape == (1, LAYERS, HIDDEN)
    same(h5traces.open(path).read(0, kinds="mlp_outputs")[0]["mlp_outputs"], outputs)


@pytest.mark.parametrize("form", ["stacked", "by layer", "batch of one"])
def test_what_held_the_arrays_makes_no_difference(tmp_path: Path, form: str) -> None:
    plain = sample(8)
    make: Any = {
        "stacked": np.stack,
        "by layer": lambda arrays: dict(enumerate(arrays)),
        "batch of one": lambda arrays: [each[None] for each in arrays],
    }[form]
    held = {**plain, **{kind: make(plain[kind]) for kind in KINDS}}
    (tmp_path / "plain").mkdir()
    paths = [convert(tmp_path / "plain", [plain]), convert(tmp_path, [held])]
    names = ["mean", "answer_mean", "sink_mass"]
    wanted, found = (compute_features(h5traces.open(path), names) for path in paths)
    for name in names:
        same(found[name], wanted[name])
    items = [TraceDataset(path, kinds=KINDS, tokens="answer")[0] for path in paths]
    graphs = [TraceGraphDataset(path)[1] for path in paths]
    for kind in KINDS:
        same(items[1][kind], items[0][kind])
    assert torch.equal(graphs[0].edge_index, graphs[1].edge_index)
    trace = h5traces.open(paths[1])[0]
    assert trace == h5traces.load(paths[1])[0]
    assert trace != h5traces.load(paths[0])[0]


# --- attention rows that do not sum to 1 --------------------------------------------------------


def with_sinks(share: float) -> dict[str, Any]:
    found = sample(8)
    return {**found, "attentions": [each * share for each in found["attentions"]]}


def test_features_say_where_rows_do_not_sum_to_one(tmp_path: Path) -> None:
    path = convert(tmp_path, [sample(8), with_sinks(0.5), with_sinks(0.75)])
    archive = h5traces.open(path)
    with pytest.warns(
        UserWarning, match=r"2 samples with attention rows .* 0\.5 to 0\.75.*divided"
    ):
        found = compute_features(archive, ["attention_entropy", "sink_mass", "mean"])
    same(found["sink_mass"][1], found["sink_mass"][0])
    report = h5traces.features.extract_features(path, tmp_path / "f.h5", ["attention_entropy"])
    assert "2 samples with attention rows" in report.notes[0]
    assert compute_features(archive, ["mean", "lookback_ratio"])  # of which no row is scaled
    with h5traces.open(path) as whole:
        assert len(compute_features(whole[:1], ["sink_mass"])) == 1


@pytest.mark.parametrize("tier", ["fine", "analysis", "native"])
def test_rounding_of_tiers_is_no_such_row(tmp_path: Path, tier: str) -> None:
    path = convert(tmp_path, [sample(8), sample(7)], precision=tier)
    assert compute_features(h5traces.open(path), ["attention_entropy"])
