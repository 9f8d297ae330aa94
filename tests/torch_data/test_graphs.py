"""Graphs equal those of the legacy rules: against plain loops, and against the legacy class."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from legacy_batches import make_archive, make_batch, with_torch, write_batch
from shards import HEADS, LAYERS, NUM_SAMPLES, load_script, make_legacy, make_shards, plain_batch
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GATv2Conv

import h5traces
from h5traces.errors import (
    ArchiveError,
    DatasetError,
    LayerIndexError,
    OptionError,
    StoredStateWarning,
)
from h5traces.graph import TraceGraphDataset, attention_edges, samples

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH = plain_batch()
KEYS = [
    "answer",
    "edge_attr",
    "edge_index",
    "layer_idx",
    "num_nodes",
    "question_id",
    "tokens_decoded",
    "x",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    make_shards(folder)
    (folder / "legacy").mkdir()
    make_legacy(folder / "legacy")
    return folder


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with pytest.warns(StoredStateWarning, match="reading legacy pickles"):
        yield


def edges_by_loops(
    weights: np.ndarray, num_nodes: int, threshold: float, reduction: str, direction: str
) -> tuple[list[tuple[int, int]], list[list[float]]]:
    """Edges and their features by the words of the legacy rules, in plain Python."""
    heads = weights.astype(np.float64).tolist()
    edges, features = [], []
    for query in range(num_nodes):
        for key in range(query + 1):
            every = [
                head[query][key] if query < len(head) and key < len(head[query]) else 0.0
                for head in heads
            ]
            mean = sum(every) / len(every)
            deciding = max(every) if reduction == "max" else mean
            if deciding > threshold:
                edges.append((query, key))
                features.append(every if reduction == "per_head" else [deciding])
    if direction == "key_to_query":
        edges = [(key, query) for query, key in edges]
    if direction == "both":
        back = [number for number, (query, key) in enumerate(edges) if query != key]
        edges, features = (
            [*edges, *((edges[number][1], edges[number][0]) for number in back)],
            [*features, *(features[number] for number in back)],
        )
    return edges, features


def assert_edges(found: tuple[torch.Tensor, torch.Tensor], wanted: Any, width: int) -> None:
    edge_index, edge_attr = found
    assert edge_index.dtype == torch.int64
    assert edge_attr.dtype == torch.float32
    assert edge_index.is_contiguous()
    assert edge_attr.is_contiguous()
    assert edge_index.shape == (2, len(wanted[0]))
    assert edge_attr.shape == (len(wanted[0]), width)
    assert list(zip(*edge_index.tolist(), strict=True)) == wanted[0]
    np.testing.assert_allclose(edge_attr.numpy(), np.array(wanted[1]).reshape(-1, width), rtol=1e-6)


@given(
    weights=hnp.arrays(
        np.float16,
        st.tuples(st.integers(1, 4), st.integers(0, 6), st.integers(0, 6)),
        elements=st.floats(0, 1, width=16),
    ),
    num_nodes=st.integers(0, 7),
    threshold=st.floats(-0.1, 1),
    reduction=st.sampled_from(["mean", "max", "per_head"]),
    direction=st.sampled_from(["query_to_key", "key_to_query", "both"]),
)
def test_edges_are_those_of_plain_loops(
    weights: np.ndarray, num_nodes: int, threshold: float, reduction: Any, direction: Any
) -> None:
    wide = weights.astype(np.float64)
    # Where a mean is the threshold but for the last bit of float32, either answer is right.
    near = np.abs(np.concatenate([wide.mean(0).ravel(), wide.ravel(), [0.0]]) - threshold) < 1e-6
    assume(not near.any())
    found = attention_edges(
        torch.from_numpy(weights),
        num_nodes,
        threshold=threshold,
        head_reduction=reduction,
        direction=direction,
    )
    wanted = edges_by_loops(weights, num_nodes, threshold, reduction, direction)
    assert_edges(found, wanted, len(weights) if reduction == "per_head" else 1)


@pytest.mark.parametrize("reduction", ["mean", "max", "per_head"])
@pytest.mark.parametrize("direction", ["query_to_key", "key_to_query", "both"])
@pytest.mark.parametrize("threshold", [0.01, 0.2])
def test_graphs_of_archives(folder: Path, reduction: Any, direction: Any, threshold: float) -> None:
    dataset = TraceGraphDataset(
        folder / "shards", threshold, head_reduction=reduction, edge_direction=direction
    )
    assert len(dataset) == NUM_SAMPLES * LAYERS
    for index in (0, 4, 26, 53, -1):
        graph = dataset[index]
        sample, layer = divmod(index % len(dataset), LAYERS)
        trace = BATCH[sample]
        assert sorted(graph.keys()) == KEYS
        assert graph.x.dtype == torch.float32
        assert np.array_equal(graph.x.numpy(), trace["hidden_states"][layer].astype(np.float32))
        assert graph.num_nodes == len(trace["tokens"])
        assert graph.layer_idx == layer
        assert graph.question_id == trace["question_id"]
        assert graph.answer == trace["generated_answer_clean"]
        assert graph.tokens_decoded == trace["tokens_decoded"]
        wanted = edges_by_loops(
            trace["attentions"][layer], graph.num_nodes, threshold, reduction, direction
        )
        width = HEADS if reduction == "per_head" else 1
        assert_edges((graph.edge_index, graph.edge_attr), wanted, width)


def assert_same_graph(found: Any, wanted: Any) -> None:
    assert sorted(found.keys()) == sorted(wanted.keys())
    for key in wanted.keys():  # a Data is not a mapping
        if isinstance(wanted[key], torch.Tensor):
            assert found[key].dtype == wanted[key].dtype
            # Bit for bit: the means are the same operation on the same numbers.
            assert torch.equal(found[key], wanted[key]), key
        else:
            assert found[key] == wanted[key], key


@pytest.mark.usefixtures("no_warnings")
def test_it_drops_in_for_the_legacy_class(folder: Path) -> None:
    legacy_class = load_script("benchmarks/legacy_graphs.py").LegacyTraceGraphDataset
    pattern = str(folder / "legacy" / "*.pkl")
    legacy = legacy_class(pattern, attn_threshold=0.05)
    archives = TraceGraphDataset(folder / "shards", attn_threshold=0.05)
    pickles = TraceGraphDataset(pattern, attn_threshold=0.05)
    assert len(legacy) == len(archives) == len(pickles) == NUM_SAMPLES * LAYERS
    assert legacy.num_layers == archives.num_layers == pickles.num_layers
    for index in (*range(0, len(legacy), 5), 3, 50):
        assert_same_graph(archives[index], legacy[index])
        assert_same_graph(pickles[index], legacy[index])


@pytest.mark.usefixtures("no_warnings")
def test_the_shipped_batch_gives_the_same_graphs(tmp_path: Path) -> None:
    legacy = load_script("benchmarks/legacy_graphs.py")
    source = Path(h5traces.__file__).parents[1] / "examples" / "legacy"
    assert h5traces.convert(source, tmp_path).ok
    wanted = legacy.LegacyTraceGraphDataset(str(source / "*.pkl.gz"))
    archives, pickles = TraceGraphDataset(tmp_path), TraceGraphDataset(source)
    assert len(wanted) == len(archives) == len(pickles) == 48
    for index in range(48):
        assert_same_graph(archives[index], wanted[index])
        assert_same_graph(pickles[index], wanted[index])


def test_defaults_where_the_trace_has_no_such_field(tmp_path: Path) -> None:
    batch = plain_batch(2)
    for key in ("question_id", "generated_answer_clean", "tokens_decoded"):
        del batch[0][key]
    graph = TraceGraphDataset(make_archive(tmp_path, batch))[0]
    assert (graph.question_id, graph.answer, graph.tokens_decoded) == ("unknown", "", [])


def test_the_bug_of_one_position(tmp_path: Path) -> None:
    batch = make_batch("final_full")
    graph = TraceGraphDataset(make_archive(tmp_path, batch))[5 * LAYERS]
    mean = float(batch[5]["attentions"][0].astype(np.float32).mean(0)[0, 0])
    assert graph.num_nodes == 1
    assert graph.edge_index.tolist() == ([[0], [0]] if mean > 0.01 else [[], []])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_types(tmp_path: Path, dtype: str) -> None:
    batch = with_torch(plain_batch(2, dtype="float32"), dtype)
    dataset = TraceGraphDataset(make_archive(tmp_path, batch, dtype=dtype))
    legacy = load_script("benchmarks/legacy_graphs.py")
    assert_same_graph(dataset[4], legacy.graph_of(batch[1], 1, 0.01))


def test_layers_are_the_models_own(folder: Path, tmp_path: Path) -> None:
    whole = TraceGraphDataset(folder / "shards")
    chosen = TraceGraphDataset(folder / "shards", layers=[2, 0])
    assert len(chosen) == NUM_SAMPLES * 2
    assert [chosen[index].layer_idx for index in range(4)] == [2, 0, 2, 0]
    assert_same_graph(chosen[2], whole[5])
    path = make_archive(tmp_path, BATCH[:2], layers=[1])
    subset = TraceGraphDataset(path)
    assert (len(subset), subset[1].layer_idx) == (2, 1)
    assert_same_graph(subset[1], whole[4])
    archive = h5traces.open(folder / "shards")
    assert_same_graph(TraceGraphDataset(archive[1:])[0], whole[3])


def test_graphs_do_not_share_what_can_be_changed(folder: Path) -> None:
    dataset = TraceGraphDataset(folder / "shards")
    dataset[0].tokens_decoded.append("changed")
    assert dataset[0].tokens_decoded == BATCH[0]["tokens_decoded"]


def test_the_loader_of_torch_geometric(folder: Path) -> None:
    labels = {f"tc_{number}": number % 2 for number in range(NUM_SAMPLES)}
    dataset = TraceGraphDataset(
        folder / "shards", labels=labels, head_reduction="per_head", edge_direction="both"
    )
    seen = []
    layer = GATv2Conv(8, 4, edge_dim=HEADS)
    for batch in DataLoader(dataset, batch_size=7, shuffle=True, num_workers=0):
        out = layer(batch.x, batch.edge_index, batch.edge_attr)
        assert out.shape == (batch.num_nodes, 4)
        assert batch.num_nodes == sum(len(each) for each in batch.tokens_decoded)
        seen += list(zip(batch.question_id, batch.layer_idx.tolist(), strict=True))
        wanted = [int(each.removeprefix("tc_")) % 2 for each in batch.question_id]
        assert batch.y.tolist() == wanted
    assert len(set(seen)) == len(seen) == len(dataset)


# --- pickles, which are read from their beginning -----------------------------------------------


@pytest.mark.usefixtures("no_warnings")
def test_pickles_in_any_order_with_little_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passed samples are read again; no more than a limit stays in memory."""
    wanted = TraceGraphDataset(folder / "shards")
    one_record = sum(
        each.nbytes for kind in ("hidden_states", "attentions") for each in BATCH[0][kind]
    )
    monkeypatch.setattr(samples, "_MOST_KEPT_NBYTES", 3 * one_record)
    pickles = TraceGraphDataset(folder / "legacy")
    order = np.random.default_rng(0).permutation(len(wanted)).tolist()
    for index in order:
        assert_same_graph(pickles[index], wanted[index])
        assert len(pickles._samples._reader._kept) < 8
    again = pickle.loads(pickle.dumps(pickles))
    assert not again._samples._reader._kept
    assert_same_graph(again[order[0]], wanted[order[0]])


@pytest.mark.usefixtures("no_warnings")
def test_pickles_whose_graphs_are_changed(tmp_path: Path) -> None:
    write_batch(tmp_path / "b.pkl", plain_batch(2, dtype="float32"))
    dataset = TraceGraphDataset(tmp_path / "b.pkl")
    dataset[0].x.zero_()
    assert dataset[0].x.any()


# --- labels and what cannot be ------------------------------------------------------------------


@pytest.mark.usefixtures("no_warnings")
def test_labels_of_pickles(folder: Path) -> None:
    pattern = folder / "legacy" / "*.pkl"
    labels = {f"tc_{number}": float(number) for number in range(NUM_SAMPLES)}
    assert TraceGraphDataset(pattern, labels=labels)[3 * LAYERS].y.tolist() == [3.0]
    with pytest.raises(DatasetError, match=r"batch_0001\.pkl\.gz: sample 1 .*'tc_5'.*no value"):
        TraceGraphDataset(pattern, labels={k: v for k, v in labels.items() if k != "tc_5"})
    with pytest.raises(DatasetError, match=r"batch_0000\.pkl: labels names 'x'"):
        TraceGraphDataset(pattern, labels={**labels, "x": 1.0})
    with pytest.raises(DatasetError, match="have no labels by name"):
        TraceGraphDataset(pattern, labels="label")


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    path = make_archive(tmp_path, make_batch("full_pkl"))
    dataset = TraceGraphDataset(path)
    with pytest.raises(DatasetError, match=r"batch\.h5.*'tc_2'.*layer 0 of hidden_states.*NaN"):
        dataset[2 * LAYERS]
    assert dataset[2 * LAYERS + 1].x.isfinite().all()
    kept = TraceGraphDataset(path, non_finite="keep")[2 * LAYERS]
    assert not kept.x.isfinite().all()
    with pytest.warns(StoredStateWarning, match="legacy pickles"):
        pickles = TraceGraphDataset(tmp_path / "batch.pkl")
    with pytest.raises(DatasetError, match=r"batch\.pkl: sample 2 .*layer 0 of hidden_states.*NaN"):
        pickles[2 * LAYERS]


def test_generation_steps_and_missing_layers(tmp_path: Path) -> None:
    path = make_archive(tmp_path, make_batch("step_min"))
    with pytest.raises(DatasetError, match=r"batch\.h5.*'tc_5'.*generation steps"):
        TraceGraphDataset(path)[5 * LAYERS]
    with pytest.warns(StoredStateWarning, match="legacy pickles"):
        pickles = TraceGraphDataset(tmp_path / "batch.pkl")
    with pytest.raises(DatasetError, match=r"batch\.pkl: sample 5 .*generation steps"):
        pickles[5 * LAYERS]
    empty = plain_batch(2)
    empty[1] |= {"hidden_states": [], "attentions": []}
    path = make_archive(tmp_path / "empty", empty)
    with pytest.raises(LayerIndexError, match=r"batch\.h5.*'tc_1'.*layer 0 of hidden_states is no"):
        TraceGraphDataset(path)[LAYERS]
    with pytest.warns(StoredStateWarning, match="legacy pickles"):
        pickles = TraceGraphDataset(tmp_path / "empty" / "batch.pkl")
    with pytest.raises(LayerIndexError, match=r"batch\.pkl: sample 1 .*layer 0 of hidden_states"):
        pickles[LAYERS]


def test_attention_without_heads(tmp_path: Path) -> None:
    path = make_archive(tmp_path, make_batch("container_dict"))
    graph = TraceGraphDataset(path)[0]
    assert graph.edge_attr.shape[1] == 1
    with pytest.raises(DatasetError, match=r"batch\.h5.*'tc_0'.*without its heads"):
        TraceGraphDataset(path, head_reduction="per_head")[0]


def test_datasets_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        TraceGraphDataset(tmp_path / "*.h5")
    with pytest.raises(DatasetError, match=r"empty\.h5: there are no samples"):
        TraceGraphDataset(make_archive(tmp_path, [], name="empty.pkl"))
    with (
        pytest.warns(StoredStateWarning, match="legacy pickles"),
        pytest.raises(DatasetError, match=r"none\.pkl: there are no samples"),
    ):
        TraceGraphDataset(write_batch(tmp_path / "none.pkl", []))
    with pytest.raises(DatasetError, match=r"a legacy batch among archives"):
        TraceGraphDataset([folder / "shards", folder / "legacy" / "m_d_batch_0000.pkl"])
    with pytest.raises(LayerIndexError, match=r"00000\.h5: layers \[9\] of hidden_states are not"):
        TraceGraphDataset(folder / "shards", layers=[9])
    with (
        pytest.warns(StoredStateWarning, match="legacy pickles"),
        pytest.raises(LayerIndexError, match=r"layers \[9\] are not stored; stored: \[0, 1, 2\]"),
    ):
        TraceGraphDataset(folder / "legacy", layers=[9])
    for options in (
        {"head_reduction": "sum"},
        {"edge_direction": "up"},
    ):
        with pytest.raises(OptionError, match=f"{next(iter(options))} is .*expected"):
            TraceGraphDataset(folder / "shards", **options)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="graph 54 is out of range; the dataset has 54"):
        TraceGraphDataset(folder / "shards")[54]


def test_mixed_models(tmp_path: Path) -> None:
    first = make_archive(tmp_path, plain_batch(2), name="a.pkl")
    second = make_archive(tmp_path, plain_batch(2), name="b.pkl", layers=[0])
    with pytest.raises(ArchiveError, match=r"b\.h5 has layers"):
        TraceGraphDataset([first, second])


# --- the arguments and patterns of the legacy class ---------------------------------------------


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("pattern", ["*.pkl", "m_d_batch_*.pkl", "m_d_batch_0000.pkl", "*.pkl.gz"])
@pytest.mark.parametrize("lazy", [True, False])
def test_legacy_arguments(folder: Path, pattern: str, lazy: bool) -> None:
    named = str(folder / "legacy" / pattern)
    legacy = load_script("benchmarks/legacy_graphs.py").LegacyTraceGraphDataset(named)
    found = TraceGraphDataset(pkl_files_pattern=named, attn_threshold=0.01, lazy_loading=lazy)
    assert len(found) == len(legacy)
    assert found.num_layers == legacy.num_layers
    for index in range(0, len(legacy), 4):
        assert_same_graph(found[index], legacy[index])


@pytest.mark.usefixtures("no_warnings")
def test_the_legacy_pattern_of_all_suffixes(folder: Path, tmp_path: Path) -> None:
    """``*.pkl*`` finds pickles, also in gzip, each once, and neither parts nor archives."""
    for file in (folder / "legacy").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "m_d_batch_0009.pkl.gz.part").write_bytes(b"unfinished")
    with pytest.warns(
        StoredStateWarning, match=r"not all of .* is read: .*0009\.pkl\.gz\.part.*unf"
    ):
        found = TraceGraphDataset(tmp_path / "*.pkl*")
    wanted = TraceGraphDataset(folder / "legacy")
    assert len(found) == len(wanted) == NUM_SAMPLES * LAYERS
    for index in range(0, len(wanted), 7):
        assert_same_graph(found[index], wanted[index])


@pytest.mark.parametrize("kind", ["shards", "legacy"])
@pytest.mark.filterwarnings("ignore:.*reading legacy pickles")
def test_the_first_files_and_samples(folder: Path, kind: str) -> None:
    whole = TraceGraphDataset(folder / kind)
    for options, number in (
        ({"max_files": 2}, 8),
        ({"max_traces_total": 5}, 5),
        ({"max_files": 2, "max_traces_total": 100}, 8),
        ({"max_files": None, "max_traces_total": None}, NUM_SAMPLES),
        ({"max_files": 100}, NUM_SAMPLES),
    ):
        found = TraceGraphDataset(folder / kind, **options)  # type: ignore[arg-type]
        assert found.num_samples == number
        assert_same_graph(found[len(found) - 1], whole[len(found) - 1])
    archive = h5traces.open(folder / "shards")[2:]
    assert TraceGraphDataset(archive, max_files=1).num_samples == 2


def test_legacy_arguments_that_contradict(folder: Path) -> None:
    for options in ({}, {"pattern": folder, "pkl_files_pattern": folder}):
        with pytest.raises(OptionError, match="name the files once"):
            TraceGraphDataset(**options)
    for name in ("max_files", "max_traces_total"):
        with pytest.raises(OptionError, match=f"{name} is 0, expected at least 1"):
            TraceGraphDataset(folder / "shards", **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected argument 'cache'"):
        TraceGraphDataset(folder / "shards", cache=6)  # type: ignore[call-arg]


def test_sources_of_other_kinds(folder: Path, tmp_path: Path) -> None:
    torch.save(with_torch(BATCH[:4]), tmp_path / "batch_0.pt")
    torch.save(with_torch(BATCH[4:8]), tmp_path / "batch_1.pt")
    wanted = TraceGraphDataset(folder / "shards")
    for named in (tmp_path, tmp_path / "*.pt", tmp_path / "*", sorted(tmp_path.glob("*.pt"))):
        with pytest.warns(
            StoredStateWarning, match=r"batch_0\.pt: reading files that are not archives"
        ):
            found = TraceGraphDataset(named)
        assert found.num_samples == 8
        for index in (0, 10, 23):
            assert_same_graph(found[index], wanted[index])


@pytest.mark.parametrize("pattern", ["*.h5", "*", ""])
def test_files_of_ours_beside_archives_are_skipped(
    folder: Path, tmp_path: Path, pattern: str
) -> None:
    for file in (folder / "shards").iterdir():
        (tmp_path / file.name).symlink_to(file)
    h5traces.features.extract_features(folder / "shards", tmp_path / "features.h5", ["mean"])
    with pytest.warns(UserWarning, match=r"skipped, .*features\.h5 is of features or scales"):
        found = TraceGraphDataset(tmp_path / pattern)
    assert found.num_samples == NUM_SAMPLES
