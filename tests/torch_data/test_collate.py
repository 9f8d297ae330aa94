"""Batches of unequal sequences: nothing is lost between items and batch, padding is masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from legacy_batches import make_archive
from shards import make_shards, plain_batch
from torch.utils.data import DataLoader

from h5traces.errors import DatasetError
from h5traces.torch_data import PackCollate, PadCollate, TraceDataset, pack_collate, pad_collate

if TYPE_CHECKING:
    from pathlib import Path

AXES = (
    ("hidden_states", ("layer", "token", "hidden")),
    ("attentions", ("layer", "head", "query", "key")),
    ("tokens", ("token",)),
)


def items_of(lengths: list[int], extra_keys: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [
        {
            "index": number,
            "sample_id": f"q{number}",
            "hidden_states": torch.rand(2, length, 3, generator=generator).half(),
            "attentions": torch.rand(2, 2, length, length + extra_keys, generator=generator),
            "tokens": torch.arange(length),
            "label": number / 2,
        }
        for number, length in enumerate(lengths)
    ]


lengths_of_batches = st.lists(st.integers(0, 6), min_size=1, max_size=5)


@given(lengths=lengths_of_batches, extra=st.integers(0, 2), value=st.sampled_from([0.0, -7.0]))
def test_padding_and_masks(lengths: list[int], extra: int, value: float) -> None:
    items = items_of(lengths, extra)
    batch = PadCollate(AXES, value)(items)
    assert batch["lengths"].tolist() == lengths
    assert batch["mask"].shape == (len(lengths), max(lengths))
    assert batch["key_mask"].shape == (len(lengths), max(lengths) + extra)
    assert batch["index"].tolist() == list(range(len(lengths)))
    assert batch["sample_id"] == [f"q{number}" for number in range(len(lengths))]
    assert batch["label"].tolist() == [number / 2 for number in range(len(lengths))]
    for number, item in enumerate(items):
        mask, keys = batch["mask"][number], batch["key_mask"][number]
        hidden = batch["hidden_states"][number]
        assert torch.equal(hidden[:, mask], item["hidden_states"])
        assert (hidden[:, ~mask] == value).all()
        weights = batch["attentions"][number]
        assert torch.equal(weights[:, :, mask][..., keys], item["attentions"])
        assert (weights[:, :, ~mask] == value).all()
        assert (weights[..., ~keys] == value).all()
        assert torch.equal(batch["tokens"][number][mask], item["tokens"])
    assert batch["hidden_states"].dtype == torch.float16


@given(lengths=lengths_of_batches, extra=st.integers(0, 2))
def test_packing(lengths: list[int], extra: int) -> None:
    items = items_of(lengths, extra)
    batch = PackCollate(AXES)(items)
    bounds = batch["cu_seqlens"]
    assert bounds.dtype == torch.int32
    assert bounds.diff().tolist() == batch["lengths"].tolist() == lengths
    assert batch["max_seqlen"] == max(lengths)
    assert torch.bincount(batch["sample_index"], minlength=len(lengths)).tolist() == lengths
    offsets, shapes = batch["attentions_offsets"], batch["attentions_shapes"]
    for number, item in enumerate(items):
        span = slice(int(bounds[number]), int(bounds[number + 1]))
        assert torch.equal(batch["hidden_states"][:, span], item["hidden_states"])
        assert torch.equal(batch["tokens"][span], item["tokens"])
        flat = batch["attentions"][int(offsets[number]) : int(offsets[number + 1])]
        assert torch.equal(flat.view(*shapes[number].tolist()), item["attentions"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("make", [pad_collate, pack_collate])
@pytest.mark.parametrize("tokens", ["all", "answer", "last", "mean"])
def test_with_datasets_of_every_kind_of_tokens(shards: Path, make: Any, tokens: Any) -> None:
    dataset = TraceDataset(
        shards, kinds=("hidden_states", "attentions"), layers=[0, 2], tokens=tokens
    )
    # Keys are as many as tokens of the whole sequence, so pooled attentions are unequal still.
    (batch,) = DataLoader(dataset, batch_size=18, collate_fn=make(dataset))
    assert ("lengths" in batch) == (tokens in ("all", "answer"))
    if tokens in ("last", "mean"):
        assert batch["hidden_states"].shape == (18, 2, 8)
    items = [dataset[number] for number in range(18)]
    total = sum(item["attentions"].sum() for item in items)
    assert torch.isclose(batch["attentions"].float().sum(), total.float(), rtol=1e-3)


def test_layers_without_an_axis(shards: Path) -> None:
    dataset = TraceDataset(shards, layers=1)
    (padded,) = DataLoader(dataset, batch_size=18, collate_fn=pad_collate(dataset))
    (packed,) = DataLoader(dataset, batch_size=18, collate_fn=pack_collate(dataset))
    assert torch.equal(padded["hidden_states"][padded["mask"]], packed["hidden_states"])


def test_what_is_no_sequence_is_not_padded(tmp_path: Path) -> None:
    items = items_of([3, 4])
    items[1]["hidden_states"] = torch.zeros(2, 4, 5)
    message = "hidden_states: item 1 of the batch is .*only token, query and key axes"
    with pytest.raises(DatasetError, match=message):
        PadCollate(AXES)(items)
    batch = plain_batch(2)
    batch[1]["hidden_states"] = [each[:, :4].copy() for each in batch[1]["hidden_states"]]
    dataset = TraceDataset(make_archive(tmp_path, batch), tokens="last")
    for make in (pad_collate, pack_collate):
        with pytest.raises(DatasetError, match="hidden_states: item 1"):
            make(dataset)([dataset[0], dataset[1]])
