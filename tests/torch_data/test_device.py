"""Batches onto devices, and resuming through what copies them."""

from __future__ import annotations

from collections import namedtuple
from typing import TYPE_CHECKING, Any

import pytest
import torch
from shards import make_shards
from torch.utils.data import DataLoader
from torch_geometric.loader import DataLoader as GraphLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from h5traces.errors import DatasetError
from h5traces.graph import TraceGraphDataset
from h5traces.torch_data import DeviceLoader, ShardSampler, TraceDataset, pad_collate, to_device

if TYPE_CHECKING:
    from pathlib import Path

DEVICES = ["cpu", "meta", *(["cuda"] if torch.cuda.is_available() else [])]
Pair = namedtuple("Pair", "left right")  # what torch's own collate knows


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("device", DEVICES)
def test_everything_in_a_batch_moves(device: str) -> None:
    tensor = torch.arange(3)
    batch = {"a": tensor, "b": [tensor, "text"], "c": (tensor, 4), "d": Pair(tensor, None)}
    moved = to_device(batch, device)
    for found in (moved["a"], moved["b"][0], moved["c"][0], moved["d"].left):
        assert found.device.type == device
    assert moved["b"][1] == "text"
    assert moved["c"][1] == 4
    assert type(moved["d"]) is Pair


@pytest.mark.parametrize("device", DEVICES)
def test_batches_of_samples_and_of_graphs(shards: Path, device: str) -> None:
    dataset = TraceDataset(shards, kinds=("hidden_states", "attentions"))
    loader = DataLoader(
        dataset,
        batch_size=5,
        collate_fn=pad_collate(dataset),
        pin_memory=device == "cuda",
    )
    plain = list(loader)
    on_device = DeviceLoader(loader, device)
    assert len(on_device) == len(plain)
    for found, wanted in zip(on_device, plain, strict=True):
        assert found["hidden_states"].device.type == device
        assert found["sample_id"] == wanted["sample_id"]
        assert found["mask"].shape == wanted["mask"].shape
        if device != "meta":
            assert torch.equal(found["attentions"].cpu(), wanted["attentions"])
    graphs = GraphLoader(TraceGraphDataset(shards), batch_size=8)
    for found, wanted in zip(DeviceLoader(graphs, device), graphs, strict=True):
        assert found.x.device.type == device
        assert found.question_id == wanted.question_id
        if device != "meta":
            assert torch.equal(found.edge_index.cpu(), wanted.edge_index)


@pytest.mark.parametrize("device", [device for device in DEVICES if device != "meta"])
@pytest.mark.parametrize("used", [1, 4])
def test_resuming_is_exact_through_it(shards: Path, device: str, used: int) -> None:
    def make() -> DeviceLoader:
        dataset = TraceDataset(shards)
        sampler = ShardSampler(dataset, seed=2)
        loader = StatefulDataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=ids_of)
        return DeviceLoader(loader, device)

    loader, found, state = make(), [], None
    for number, batch in enumerate(loader, start=1):
        found.append(batch)
        if number == used:
            state = loader.state_dict()
    again = make()
    again.load_state_dict(state)
    assert found[:used] + list(again) == found


def test_a_loader_without_a_state(shards: Path) -> None:
    loader = DeviceLoader(DataLoader(TraceDataset(shards)), "cpu")
    with pytest.raises(DatasetError, match="DataLoader has no state_dict; use torchdata"):
        loader.state_dict()


def ids_of(items: list[dict[str, Any]]) -> list[str]:
    return [item["sample_id"] for item in items]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_on_cuda_do_not_wait(shards: Path) -> None:
    dataset = TraceDataset(shards, tokens="last")
    loader = DataLoader(dataset, batch_size=3, pin_memory=True)
    wanted = torch.cat([batch["hidden_states"] for batch in loader])
    weight = torch.eye(8, dtype=torch.float16, device="cuda")
    # What is computed from a batch is not disturbed by the copy of the next one.
    found = torch.cat([batch["hidden_states"] @ weight for batch in DeviceLoader(loader, "cuda")])
    assert torch.equal(found.cpu(), wanted)
