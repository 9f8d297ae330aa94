"""Every dataset under every way to start workers: shuffled, shared by ranks, resumed exactly."""

from __future__ import annotations

import multiprocessing
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from shards import LAYERS, NUM_SAMPLES, make_legacy, make_shards, only_item, plain_batch
from torch.utils.data import DataLoader, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from h5traces.errors import StoredStateWarning
from h5traces.graph import TraceGraphDataset
from h5traces.torch_data import IterableTraceDataset, ShardSampler, TraceDataset

if TYPE_CHECKING:
    from pathlib import Path

# Imported once, by the server, in place of once per worker.
multiprocessing.set_forkserver_preload(["torch", "torch_geometric.data", "h5traces.torch_data"])

DATASETS = ("map", "stream", "graph", "graph stream", "graph of pickles")
METHODS = ("fork", "spawn", "forkserver", "threads")
NUM_RANKS, EPOCH, NUM_WORKERS = 2, 3, 2
# Items that come before the checkpoint.
USED = 5
BATCH = plain_batch()

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::h5traces.errors.StoredStateWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_shards(folder)
    (folder / "legacy").mkdir()
    make_legacy(folder / "legacy")
    return folder


def summary(item: Any) -> tuple[int, int, bytes]:
    """Sample, layer and the bytes of its hidden states."""
    if isinstance(item, dict):
        hidden = item["hidden_states"]
        return int(item["sample_id"].removeprefix("tc_")), -1, hidden.numpy().tobytes()
    hidden = item.x.numpy().astype(np.float16)
    return int(item.question_id.removeprefix("tc_")), item.layer_idx, hidden.tobytes()


@cache
def truth(sample: int, layer: int) -> bytes:
    hidden = BATCH[sample]["hidden_states"]
    return (np.stack(hidden) if layer < 0 else hidden[layer]).tobytes()


def base_dataset(kind: str, folder: Path, threads: int = 1) -> Any:
    if kind in ("map", "stream"):
        return TraceDataset(folder / "shards", threads=threads)
    if kind == "graph of pickles":
        return TraceGraphDataset(folder / "legacy" / "*.pkl")
    return TraceGraphDataset(folder / "shards")


def make_loader(kind: str, folder: Path, method: str, rank: int) -> StatefulDataLoader:
    """The loader of one rank, at the epoch of the test."""
    dataset = base_dataset(kind, folder, threads=3 if method == "threads" else 1)
    workers: dict[str, Any] = {"num_workers": 0}
    if method != "threads":
        workers = {"num_workers": NUM_WORKERS, "multiprocessing_context": method}
    options: dict[str, Any] = {
        "shuffle": True,
        "seed": 11,
        "window": 2,
        "num_replicas": NUM_RANKS,
        "rank": rank,
    }
    if kind.endswith("stream"):
        threads = 3 if method == "threads" else 0
        stream = IterableTraceDataset(dataset, **options, threads=threads)
        stream.set_epoch(EPOCH)
        return StatefulDataLoader(stream, batch_size=1, collate_fn=only_item, **workers)
    sampler = ShardSampler(dataset, **options)
    sampler.set_epoch(EPOCH)
    return StatefulDataLoader(
        dataset, batch_size=1, sampler=sampler, collate_fn=only_item, **workers
    )


def planned(kind: str, folder: Path, rank: int) -> list[tuple[int, int]]:
    """Sample and layer of every item of a rank, in order, without any loader."""
    sampler = ShardSampler(
        base_dataset(kind, folder), seed=11, window=2, num_replicas=NUM_RANKS, rank=rank
    )
    sampler.set_epoch(EPOCH)
    if kind in ("map", "stream"):
        return [(index, -1) for index in sampler]
    return [divmod(index, LAYERS) for index in sampler]


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Any:
    """Runs a dataset under a method once, for all tests of the two."""

    @cache
    def run(kind: str, method: str) -> dict[str, list[Any]]:
        with warnings.catch_warnings():
            for category in (StoredStateWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            # To spawn costs seconds, so it is left to the loader that takes up the state.
            begun = "fork" if method == "spawn" else method
            first = make_loader(kind, folder, begun, rank=0)
            found, state = [], b""
            for number, item in enumerate(first, start=1):
                found.append(summary(item))
                if number == USED:
                    state = pickle.dumps(first.state_dict())
            # Ranks are in step: the other one takes up its own share from the state of the first.
            second = make_loader(kind, folder, method, rank=1)
            second.load_state_dict(pickle.loads(state))
            rest = [summary(item) for item in second]
            plans = [planned(kind, folder, rank) for rank in range(NUM_RANKS)]
        return {"whole": found, "rest": rest, "plans": plans}

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", DATASETS)
class TestMatrix:
    def test_values(self, outcome: Any, kind: str, method: str) -> None:
        found = outcome(kind, method)
        for sample, layer, values in (*found["whole"], *found["rest"]):
            assert values == truth(sample, layer)

    def test_shuffle(self, outcome: Any, kind: str, method: str) -> None:
        found = outcome(kind, method)
        order = [item[:2] for item in found["whole"]]
        assert order == found["plans"][0]
        assert order != sorted(order)

    def test_distributed(self, outcome: Any, kind: str, method: str) -> None:
        found = outcome(kind, method)
        assert len(found["plans"][0]) == len(found["plans"][1])
        both = [item[:2] for item in found["whole"]] + found["plans"][1]
        layers = [-1] if kind in ("map", "stream") else range(LAYERS)
        assert sorted(both) == [(n, layer) for n in range(NUM_SAMPLES) for layer in layers]

    def test_resume(self, outcome: Any, kind: str, method: str) -> None:
        found = outcome(kind, method)
        assert [item[:2] for item in found["rest"]] == found["plans"][1][USED:]


@pytest.mark.parametrize("kind", DATASETS)
def test_loaders_in_many_threads_share_a_dataset(folder: Path, kind: str) -> None:
    dataset = base_dataset(kind, folder)

    def read(rank: int) -> list[tuple[int, int, bytes]]:
        if kind.endswith("stream"):
            stream = IterableTraceDataset(dataset, shuffle=True, num_replicas=4, rank=rank)
            return [summary(item) for item in stream]
        sampler = ShardSampler(dataset, num_replicas=4, rank=rank)
        return [summary(dataset[index]) for index in sampler]

    with ThreadPoolExecutor(4) as pool:
        found = [item for part in pool.map(read, range(4)) for item in part]
    assert {item[:2] for item in found} == {
        (sample, layer)
        for sample in range(NUM_SAMPLES)
        for layer in ([-1] if kind in ("map", "stream") else range(LAYERS))
    }
    assert all(found_bytes == truth(sample, layer) for sample, layer, found_bytes in found)


@pytest.mark.parametrize("kind", ["map", "graph"])
def test_the_distributed_sampler_of_torch(folder: Path, kind: str) -> None:
    dataset = base_dataset(kind, folder)
    found = []
    for rank in range(3):
        sampler: Any = DistributedSampler(dataset, num_replicas=3, rank=rank, seed=5)
        sampler.set_epoch(2)
        loader = DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=list)
        found += [summary(item)[:2] for batch in loader for item in batch]
    assert len(found) == len(set(found)) == len(dataset)


def read_as_rank(rank: int, rendezvous: str, shards: Path, results: Any) -> None:
    """What one process of a real group reads, through sampler and stream."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=NUM_RANKS
    )
    dataset = TraceDataset(shards)
    sampled = list(ShardSampler(dataset, seed=4))
    streamed = [item["index"] for item in IterableTraceDataset(dataset, shuffle=True, seed=4)]
    torch.distributed.destroy_process_group()
    results.put((rank, sampled, streamed))


def test_ranks_come_from_torch_distributed(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [
        context.Process(
            target=read_as_rank,
            args=(rank, str(tmp_path / "rendezvous"), folder / "shards", results),
        )
        for rank in range(NUM_RANKS)
    ]
    for child in children:
        child.start()
    found = sorted(results.get(timeout=120) for _ in children)
    for child in children:
        child.join()
    assert [rank for rank, _, _ in found] == list(range(NUM_RANKS))
    assert all(sampled == streamed for _, sampled, streamed in found)
    assert sorted(index for _, sampled, _ in found for index in sampled) == list(range(NUM_SAMPLES))


@pytest.mark.filterwarnings("ignore:This DataLoader will create .* worker processes:UserWarning")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("used", [0, 1, 4, 8, 9])
@pytest.mark.parametrize("kind", ["map", "stream"])
def test_resuming_anywhere_with_batches(folder: Path, kind: str, used: int, workers: int) -> None:
    def make() -> StatefulDataLoader:
        dataset = base_dataset("map", folder)
        options: dict[str, Any] = {"batch_size": 2, "collate_fn": list, "num_workers": workers}
        if workers:
            options["multiprocessing_context"] = "fork"
        if kind == "stream":
            return StatefulDataLoader(IterableTraceDataset(dataset, shuffle=True), **options)
        return StatefulDataLoader(dataset, sampler=ShardSampler(dataset), **options)

    whole, first, state = [], [], None
    loader = make()
    if not used:
        state = loader.state_dict()
    for number, batch in enumerate(loader, start=1):
        whole += [summary(item) for item in batch]
        if number == used:
            first, state = list(whole), pickle.loads(pickle.dumps(loader.state_dict()))
    assert len({item[0] for item in whole}) == NUM_SAMPLES
    again = make()
    again.load_state_dict(state)
    assert first + [summary(item) for batch in again for item in batch] == whole


def test_epochs_reach_workers_that_stay(folder: Path) -> None:
    stream = IterableTraceDataset(base_dataset("map", folder), shuffle=True, seed=1)
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([summary(item)[0] for item in loader])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(NUM_SAMPLES))


def test_a_stream_wants_the_same_number_of_workers(folder: Path) -> None:
    stream = IterableTraceDataset(base_dataset("map", folder))
    iterator: Any = iter(stream)
    state = {**iterator.state_dict(), "num_workers": 3}
    with pytest.raises(Exception, match="saved with 3 workers, now there are 1"):
        iterator.load_state_dict(state)


@pytest.mark.parametrize("prefetch", [None, 1, 50])
def test_reading_ahead_keeps_the_order(folder: Path, prefetch: int | None) -> None:
    stream = IterableTraceDataset(base_dataset("map", folder), threads=4, prefetch=prefetch)
    assert [summary(item)[0] for item in stream] == list(range(NUM_SAMPLES))
    # An iteration that is left early leaves no threads behind that anything waits for.
    assert summary(next(iter(stream)))[0] == 0
