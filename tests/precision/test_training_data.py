"""Graphs, tensors and features come from archives of any tier as from exact ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from attention import attention
from comparing import sigma_of
from legacy_batches import make_batch, write_batch
from torch.utils.data import DataLoader

import h5traces
from h5traces.errors import DatasetError, HeadsNotStoredError
from h5traces.features import FEATURES, compute_features
from h5traces.graph import TraceGraphDataset
from h5traces.torch_data import TraceDataset

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, HIDDEN, HEADS = 3, 16, 12
TIERS = ("fine", "analysis", "compact")


def batch(num_samples: int = 12) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    found = []
    for number in range(num_samples):
        tokens = int(rng.integers(15, 40))
        found.append(
            {
                "hidden_states": [
                    (rng.standard_normal((tokens, HIDDEN)) * (1 + layer)).astype(np.float16)
                    for layer in range(LAYERS)
                ],
                "attentions": [
                    attention(rng, HEADS, tokens, sharpness=1 + layer) for layer in range(LAYERS)
                ],
                "tokens": rng.integers(3, 99, tokens),
                "tokens_decoded": [f"t{each}" for each in range(tokens)],
                "generated_answer_clean": f"answer {number}",
                "question_id": f"q{number}",
                "prompt_length": 5,
            }
        )
    return found


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    source = write_batch(folder / "source.pkl", batch())
    for tier in ("exact", *TIERS, "native"):
        assert h5traces.convert(source, folder / f"{tier}.h5", precision=tier).ok
    return folder


@pytest.mark.parametrize("direction", ["query_to_key", "both"])
@pytest.mark.parametrize("tier", TIERS)
def test_graphs_have_the_edges_of_the_exact_archive(shelf: Path, tier: str, direction: Any) -> None:
    """To the bit; in a fine archive the mean lies beside heads that lost precision."""
    exact, lossy = (
        TraceGraphDataset(shelf / f"{name}.h5", 0.01, edge_direction=direction)
        for name in ("exact", tier)
    )
    assert len(exact) == len(lossy) == 12 * LAYERS
    edges = 0
    for one, other in zip(lossy, exact, strict=True):
        assert torch.equal(one.edge_index, other.edge_index)
        assert one.edge_index.dtype == other.edge_index.dtype
        assert one.edge_attr.shape == other.edge_attr.shape
        roots = one.edge_attr.sqrt() - other.edge_attr.sqrt()
        assert roots.abs().max() < 0.5 / 255 + 1e-3
        assert (one.question_id, one.layer_idx, one.num_nodes) == (
            other.question_id,
            other.layer_idx,
            other.num_nodes,
        )
        assert one.tokens_decoded == other.tokens_decoded
        edges += one.edge_index.shape[1]
    assert edges > 5000


def test_the_heads_of_a_fine_archive_alone_would_not_do(shelf: Path) -> None:
    """Else the test above could not fail."""
    flips = 0
    for one, other in zip(
        h5traces.open(shelf / "fine.h5"), h5traces.open(shelf / "exact.h5"), strict=True
    ):
        for mine, theirs in zip(one["attentions"], other["attentions"], strict=True):
            pair = [each.astype("f4").mean(0) > np.float32(0.01) for each in (mine, theirs)]
            flips += np.count_nonzero(pair[0] != pair[1])
    assert flips > 0


def test_graphs_in_workers(shelf: Path) -> None:
    dataset = TraceGraphDataset(shelf / "compact.h5", 0.01)
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    for found, expected in zip(loader, dataset, strict=True):
        assert torch.equal(found.edge_index, expected.edge_index)
        assert torch.equal(found.x, expected.x)


@pytest.mark.parametrize("reduction", ["max", "per_head"])
def test_graphs_of_single_heads(shelf: Path, reduction: Any) -> None:
    """From the heads where they are, and in no other way."""
    with pytest.raises(DatasetError, match=rf"without its heads.*{reduction}"):
        TraceGraphDataset(shelf / "compact.h5", head_reduction=reduction)[0]
    found = TraceGraphDataset(shelf / "fine.h5", 0.05, head_reduction=reduction)[0]
    exact = TraceGraphDataset(shelf / "exact.h5", 0.05, head_reduction=reduction)[0]
    assert found.edge_attr.shape[1] == exact.edge_attr.shape[1]


def test_graphs_where_some_heads_could_not_be_averaged(tmp_path: Path) -> None:
    """Generation steps are stored as they are, among samples of one sequence."""
    made = [*batch(2), *make_batch("step_min", num_samples=1)]
    for each in made:
        each.pop("prompt_length", None)
    source = write_batch(tmp_path / "mixed.pkl", made)
    for tier in ("exact", "compact"):
        report = h5traces.convert(source, tmp_path / f"{tier}.h5", precision=tier)
        assert report.ok, report.files[0].error
    assert any("attentions: holds generation steps" in each for each in report.files[0].warnings)
    assert h5traces.validate(tmp_path / "compact.h5").ok
    exact, lossy = (
        TraceGraphDataset(tmp_path / f"{tier}.h5", 0.01) for tier in ("exact", "compact")
    )
    for index in range(2 * LAYERS):
        assert torch.equal(lossy[index].edge_index, exact[index].edge_index)
    said = []
    for dataset in (exact, lossy):
        with pytest.raises(DatasetError, match="generation steps") as error:
            dataset[2 * LAYERS]
        said.append(str(error.value).replace("compact.h5", "exact.h5"))
    assert len(set(said)) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tier", TIERS)
def test_hidden_states_of_datasets_are_within_their_bound(
    shelf: Path, tier: str, dtype: torch.dtype
) -> None:
    step = {"fine": 0.02, "analysis": 0.1, "compact": 0.4}[tier]
    lossy, exact = (
        TraceDataset(shelf / f"{name}.h5", kinds=("hidden_states",), dtype=dtype)
        for name in (tier, "exact")
    )
    sigma = np.stack([sigma_of(shelf / f"{tier}.h5", f"layer_{n:03d}") for n in range(LAYERS)])
    for one, other in zip(lossy, exact, strict=True):
        found, expected = one["hidden_states"], other["hidden_states"]
        assert found.dtype == dtype
        error = (found.double() - expected.double()).abs().numpy()
        assert (error <= step / 2 * sigma[:, None].astype("f8")).all()
        assert error.max() > 0


def test_tokens_and_layers_of_a_compact_archive(shelf: Path) -> None:
    archive = h5traces.open(shelf / "compact.h5")
    last = TraceDataset(shelf / "compact.h5", kinds=("hidden_states",), layers=1, tokens="last")
    answers = TraceDataset(archive, kinds=("attention_mean",), layers=[2], tokens="answer")
    for index in range(3):
        expected = archive[index].layer(1)[-1]
        assert np.array_equal(last[index]["hidden_states"].numpy(), expected)
        weights = archive[index].layer(2, "attention_mean")[5:]
        assert np.array_equal(answers[index]["attention_mean"][0].numpy(), weights)


def test_asking_a_compact_archive_for_heads_names_the_mean(shelf: Path) -> None:
    with pytest.raises((HeadsNotStoredError, DatasetError, LookupError), match="attention_mean"):
        TraceDataset(shelf / "compact.h5", kinds=("attentions",))[0]


@pytest.mark.parametrize("tier", [*TIERS, "native"])
def test_features_of_hidden_states(shelf: Path, tier: str) -> None:
    names = [name for name, each in FEATURES.items() if each.kind == "hidden_states"]
    assert len(names) > 2
    found = compute_features(h5traces.open(shelf / f"{tier}.h5"), names)
    exact = compute_features(h5traces.open(shelf / "exact.h5"), names)
    for name in names:
        assert found[name].shape == exact[name].shape
        assert np.array_equal(np.isnan(found[name]), np.isnan(exact[name]))
    mean = next(name for name in names if "mean" in name)
    assert np.nanmax(np.abs(found[mean] - exact[mean])) < 0.3 * LAYERS


def test_features_of_heads_that_are_not_there(shelf: Path) -> None:
    names = [name for name, each in FEATURES.items() if each.kind == "attentions"]
    assert names
    with pytest.raises(HeadsNotStoredError, match=r"compact\.h5.*attention_mean"):
        compute_features(h5traces.open(shelf / "compact.h5"), names)
