"""A trace is used as the legacy dict is in existing code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
from legacy_batches import HEADS, HIDDEN, LAYERS, assert_same, make_archive, make_batch

import h5traces
from h5traces.errors import LayerIndexError

if TYPE_CHECKING:
    from pathlib import Path

BATCH = make_batch("full_pkl", num_samples=6)
SOURCE = BATCH[5]
SEQ_LEN = len(SOURCE["tokens"])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("trace"), BATCH)


@pytest.fixture
def trace(path: Path) -> h5traces.Trace:
    return h5traces.open(path)[5]


def test_keys_and_values(trace: h5traces.Trace) -> None:
    assert isinstance(trace, Mapping)
    assert list(trace) == list(SOURCE)
    assert list(trace.keys()) == list(SOURCE)
    assert len(trace) == len(SOURCE)
    assert bool(trace)
    assert [key for key, _ in trace.items()] == list(SOURCE)
    for key in ("tokens", "tokens_decoded", "generated_answer_clean", "question_id"):
        assert_same(trace[key], SOURCE[key])
    assert set(dict(trace)) == set(SOURCE)


def test_get_and_in(trace: h5traces.Trace) -> None:
    assert trace.get("question_id", "unknown") == "tc_5"
    assert trace.get("generated_answer_clean", "") == "the answer"
    assert len(trace.get("tokens_decoded", [])) == SEQ_LEN
    assert trace.get("label") is None
    assert trace.get("missing", 7) == 7
    assert "hidden_states" in trace
    assert "missing" not in trace
    assert 5 not in trace
    # Names inside the file are not keys.
    for name in ("hidden_states/layer_000", "extra", "samples", "digest", "coverage"):
        assert name not in trace
        with pytest.raises(KeyError):
            trace[name]


def test_tokens(trace: h5traces.Trace) -> None:
    assert len(trace["tokens"]) == SEQ_LEN
    assert trace["tokens"].dtype == np.int64
    assert trace["tokens"].tolist() == SOURCE["tokens"].tolist()
    assert isinstance(trace["tokens_decoded"], list)


def test_layers_are_a_sequence(trace: h5traces.Trace) -> None:
    states = trace["hidden_states"]
    assert isinstance(states, Sequence)
    assert len(states) == LAYERS
    assert states
    for position in range(-LAYERS, LAYERS):
        assert_same(states[position], SOURCE["hidden_states"][position])
    assert_same(states[-2:], SOURCE["hidden_states"][-2:])
    assert_same(list(states), SOURCE["hidden_states"])
    assert_same([layer.shape for layer in reversed(states)], [(SEQ_LEN, HIDDEN)] * LAYERS)
    for position in (LAYERS, -LAYERS - 1):
        with pytest.raises(IndexError, match=f"position {position} of hidden_states is out of"):
            states[position]
    for layer, weights in zip(trace["hidden_states"], trace["attentions"], strict=True):
        assert layer.shape[0] == weights.shape[-1]


def test_arrays_are_ordinary(trace: h5traces.Trace) -> None:
    states = trace["hidden_states"][1]
    assert isinstance(states, np.ndarray)
    seq_len, hidden_size = states.shape
    num_heads, queries, keys = trace["attentions"][0].shape
    assert (seq_len, hidden_size) == (SEQ_LEN, HIDDEN)
    assert (num_heads, queries, keys) == (HEADS, SEQ_LEN, SEQ_LEN)
    expected = SOURCE["hidden_states"][1]
    assert_same(states[-1], expected[-1])
    assert_same(states.mean(axis=0), expected.mean(axis=0))
    assert states.min() == expected.min()
    assert_same(np.concatenate([states, states]), np.concatenate([expected, expected]))
    assert_same(np.concatenate(trace["hidden_states"]), np.concatenate(SOURCE["hidden_states"]))
    assert_same(np.stack(trace["attentions"]), np.stack(SOURCE["attentions"]))
    states[:] = 0
    assert trace["hidden_states"][1].any()  # a new array every time


def test_zeros_above_the_diagonal_are_exact(trace: h5traces.Trace) -> None:
    for weights in trace["attentions"]:
        upper = np.triu(np.ones((SEQ_LEN, SEQ_LEN), bool), k=1)
        assert np.array_equal(weights[:, upper].view(np.uint16), np.zeros_like(weights[:, upper]))


def test_torch_takes_the_arrays_without_a_copy(trace: h5traces.Trace) -> None:
    torch = pytest.importorskip("torch")
    states = trace["hidden_states"][0]
    tensor = torch.from_numpy(states)  # warns, so fails, where the array is read-only
    tensor[0, 0] = 7
    assert states[0, 0] == 7
    assert torch.from_numpy(trace["attentions"][1]).float().dtype == torch.float32
    assert torch.from_numpy(trace["tokens"]).dtype == torch.int64


def test_a_graph_of_a_layer(trace: h5traces.Trace) -> None:
    """What the consumer of these batches builds of every sample and layer."""

    def edges(sample: Mapping[str, object] | h5traces.Trace) -> np.ndarray:
        weights = sample["attentions"][1]  # type: ignore[index]
        mean = weights.mean(axis=0)
        return np.argwhere(np.tril(mean > 0.01))

    assert_same(edges(trace), edges(SOURCE))
    assert len(edges(trace))


def test_layers_by_number_and_place(path: Path, tmp_path: Path) -> None:
    trace = h5traces.open(make_archive(tmp_path, BATCH, layers=[0, 2]))[5]
    assert_same(trace["hidden_states"][1], SOURCE["hidden_states"][2])
    assert_same(trace.layer(2), SOURCE["hidden_states"][2])
    assert_same(trace.layer(0, "attentions"), SOURCE["attentions"][0])
    for missing in (1, 3, -1):
        with pytest.raises(LayerIndexError, match=rf"layer {missing} of .*stored: \[0, 2\]"):
            trace.layer(missing)
    with pytest.raises(LayerIndexError, match=r"trace\.layer\(n\) takes the model's own"):
        trace["hidden_states"][2]
    with pytest.raises(IndexError):
        h5traces.open(path)[5]["attentions"][LAYERS]


def test_metadata_and_repr(trace: h5traces.Trace) -> None:
    assert trace.metadata.sample_id == "tc_5"
    assert trace.metadata.seq_len == SEQ_LEN
    assert trace.metadata.source is not None
    assert trace.metadata.source.position == 5
    assert trace.ordinal == 5
    assert "tc_5" in repr(trace)
    assert "3 arrays" in repr(trace["hidden_states"])


def test_to_dict_is_the_legacy_dict(trace: h5traces.Trace) -> None:
    found = trace.to_dict()
    assert type(found) is dict
    assert_same(found, SOURCE)
    found["tokens"][0] = -1
    assert trace.to_dict()["tokens"][0] != -1
    assert json.dumps(found["tokens_decoded"]) == json.dumps(SOURCE["tokens_decoded"])


def test_empty_layers_are_falsy(tmp_path: Path) -> None:
    batch = [{"hidden_states": [], "attentions": [], "tokens": np.arange(0), "tokens_decoded": []}]
    trace = h5traces.open(make_archive(tmp_path, batch))[0]
    assert not trace["hidden_states"]
    assert len(trace["attentions"]) == 0
    assert trace.metadata.coverage == "empty"
    assert_same(trace.to_dict(), batch[0])


def test_steps_are_lists_of_arrays(tmp_path: Path) -> None:
    source = make_batch("step_min")[5]
    trace = h5traces.open(make_archive(tmp_path, [source]))[0]
    assert len(trace["hidden_states"]) == LAYERS
    steps = trace["attentions"][1]
    assert isinstance(steps, list)
    assert_same(steps, source["attentions"][1])
    assert_same(trace.layer(2), source["hidden_states"][2])


def test_arrays_live_as_long_as_they_are_used(path: Path) -> None:
    archive = h5traces.open(path)
    states = archive[5]["hidden_states"][0]
    archive.close()
    del archive
    assert_same(states, SOURCE["hidden_states"][0])


def test_what_a_user_sees(path: Path) -> None:
    archive = h5traces.open(path)
    mapping = ["copy", "get", "items", "keys", "values"]
    trace = ["attention", "embedding", "fields", "layer", "mask", "metadata", "ordinal", "path"]
    trace += ["token_labels", "tokens_of"]
    assert public(archive[0]) == sorted(
        [*mapping, *trace, "position_in_file", "to_dict", "to_xarray"]
    )
    sequence = ["count", "index"]
    own = ["by_id", "close", "ids", "labels", "layers", "metadata", "paths"]
    tables = ["to_arrow", "to_pandas", "to_xarray"]
    assert public(archive) == sorted([*sequence, *own, *tables, "fetched", "read", "select"])


def public(value: object) -> list[str]:
    return [name for name in dir(value) if not name.startswith("_")]
