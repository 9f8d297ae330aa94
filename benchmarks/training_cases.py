"""What `training.py` measures."""

from __future__ import annotations

import gzip
import multiprocessing
import os
import pickle
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from legacy_graphs import LegacyTraceGraphDataset, graph_of, unpickle
from torch_geometric.loader import DataLoader as GraphLoader

from h5traces.graph import TraceGraphDataset
from h5traces.torch_data import DeviceLoader, TraceDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from suite.measure import Series

BATCH = 32
THRESHOLD = 0.01
Notes = dict[str, Any]


@dataclass
class Data:
    """The files, and what is made of them when first needed."""

    pickles: Path
    archives: Path
    scale: Any

    def indices(self, num: int, of: int, seed: int) -> list[int]:
        """Random items."""
        return [int(each) for each in np.random.default_rng(seed).integers(0, of, num)]

    @cached_property
    def first_batch(self) -> list[dict[str, Any]]:
        """The dicts of one file."""
        return unpickle(str(sorted(self.pickles.glob("*.pkl.gz"))[0]))

    @cached_property
    def legacy(self) -> LegacyTraceGraphDataset:
        """The legacy dataset over all files; making it unpickles all of them."""
        return LegacyTraceGraphDataset(str(self.pickles / "*.pkl.gz"), THRESHOLD)


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read(get: Callable[[int], Any], indices: Sequence[int]) -> float:
    """Items per second."""

    def run() -> None:
        for index in indices:
            get(index)

    return len(indices) / seconds(run)


def first_batch(data: Data, series: Series) -> None:
    """From nothing open to the first batch of random graphs in hand."""
    num_graphs = data.scale.num_samples * data.scale.shape.num_layers
    wanted = data.indices(BATCH, num_graphs, seed=1)

    def ours() -> None:
        dataset = TraceGraphDataset(data.archives, THRESHOLD)
        _ = [dataset[index] for index in wanted]

    def theirs() -> None:
        _ = [data.legacy[index] for index in wanted]

    ours()  # imports and the page cache
    for _ in range(3):
        series.add("first batch", archive=seconds(ours))
    series.add("first batch", legacy=seconds(theirs))


def random_graphs(data: Data, series: Series) -> None:
    """Random (sample, layer) graphs, side by side within each round."""
    scale = data.scale
    dataset = TraceGraphDataset(data.archives, THRESHOLD)
    in_files = {path: Path(path).read_bytes() for path in data.legacy.paths}

    def from_memory(path: str) -> list[dict[str, Any]]:
        batch: list[dict[str, Any]] = pickle.loads(gzip.decompress(in_files[path]))
        return batch

    held = object.__new__(LegacyTraceGraphDataset)
    held.__dict__.update(data.legacy.__dict__, _load=from_memory, _cache=type(data.legacy._cache)())
    by_sample = [gzip.compress(pickle.dumps(each, 4), 6) for each in data.first_batch]
    layers = range(scale.shape.num_layers)
    by_layer = [
        gzip.compress(pickle.dumps({kind: [each[kind][layer]] for kind in _KINDS}, 4), 6)
        for each in data.first_batch[:4]
        for layer in layers
    ]
    num_layers = len(layers)
    for index in range(0, len(dataset), scale.samples_per_file * num_layers):
        dataset[index]  # the legacy class has opened every file by now as well

    def of_sample(index: int) -> Any:
        trace = pickle.loads(gzip.decompress(by_sample[index // num_layers]))
        return graph_of(trace, index % num_layers, THRESHOLD)

    def of_layer(index: int) -> Any:
        return graph_of(pickle.loads(gzip.decompress(by_layer[index])), 0, THRESHOLD)

    def of_memory(index: int) -> Any:
        return graph_of(data.first_batch[index // num_layers], index % num_layers, THRESHOLD)

    for number in range(scale.num_rounds):
        many = data.indices(scale.num_graphs, len(dataset), seed=10 + number)
        few = data.indices(scale.num_slow, len(dataset), seed=20 + number)
        here = data.indices(scale.num_graphs, len(by_sample) * num_layers, seed=30 + number)
        some = data.indices(scale.num_graphs, len(by_layer), seed=40 + number)
        series.add("random graphs", archive=read(dataset.__getitem__, many))
        series.add("random graphs", legacy=read(data.legacy.__getitem__, few))
        series.add("random graphs", files_in_ram=read(held.__getitem__, few))
        series.add("random graphs", samples_in_ram=read(of_sample, here[: 10 * scale.num_slow]))
        series.add("random graphs", layers_in_ram=read(of_layer, some))
        series.add("random graphs", unpickled_in_ram=read(of_memory, here))


_KINDS = ("hidden_states", "attentions")


def workers(data: Data, series: Series) -> None:
    """Graphs and last-token samples per second through loaders with workers."""
    scale = data.scale
    for _ in range(scale.num_rounds):
        for num_workers in (0, 1, 2):
            graphs = TraceGraphDataset(data.archives, THRESHOLD)
            loader: Any = GraphLoader(
                torch.utils.data.Subset(
                    graphs, data.indices(4 * scale.num_graphs, len(graphs), seed=3)
                ),
                batch_size=BATCH,
                **_workers(num_workers),
            )
            series.add("graphs by workers", **{str(num_workers): _through(loader)})
            samples = TraceDataset(
                data.archives,
                tokens="last",
                indices=range(min(scale.num_graphs, scale.num_samples)),
            )
            loader = torch.utils.data.DataLoader(samples, batch_size=8, **_workers(num_workers))
            series.add("last tokens by workers", **{str(num_workers): _through(loader)})


def _workers(num_workers: int) -> dict[str, Any]:
    if not num_workers:
        return {}
    return {
        "num_workers": num_workers,
        "multiprocessing_context": "fork",
        "persistent_workers": True,
    }


def _through(loader: Any) -> float:
    """Items per second of a second epoch: workers have started and read the footers' tables."""
    for _ in loader:
        pass
    return len(loader.dataset) / seconds(lambda: [None for _ in loader])


def memory(data: Data, series: Series) -> Notes:
    """Resident memory of one worker: torch alone, at the first graphs, and over an epoch."""
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        receiver, sender = context.Pipe(duplex=False)
        num_graphs = 8 * data.scale.num_graphs
        job = (str(data.archives), num_graphs, sender)
        child = context.Process(target=_grow, args=job)
        child.start()
        sender.close()  # so that a child that dies is noticed
        for figures in receiver.recv():
            series.add(f"memory, {method}", **figures)
        child.join()
    return {"memory_graphs": num_graphs}


def _grow(archives: str, num_graphs: int, sender: Any) -> None:
    torch.set_num_threads(1)  # spawned children start with all; DataLoader sets it in its workers
    found = [_memory("imported")]
    dataset = TraceGraphDataset(archives, THRESHOLD)
    indices = np.random.default_rng(5).integers(0, len(dataset), num_graphs).tolist()
    parts = np.array_split(indices, 8)
    for number, part in enumerate(parts):
        for index in part:
            dataset[int(index)]
        if number in (0, len(parts) - 1):
            found.append(_memory("begun" if not number else "ended"))
    sender.send(found)


def _memory(name: str) -> dict[str, float]:
    """Megabytes of this process: resident in all, and of these its own."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        key, value = line.split()[:2]
        fields[key.rstrip(":")] = int(value) / 1024
    own = fields["Private_Clean"] + fields["Private_Dirty"]
    return {f"{name}_rss": fields["Rss"], f"{name}_own": own}


def device(data: Data, series: Series) -> Notes:
    """Samples per second onto a CUDA device: copied while the next batch is read, or after."""
    if not torch.cuda.is_available():
        return {"device": None}
    dataset = TraceDataset(
        data.archives, layers=0, tokens="last", indices=range(min(512, data.scale.num_samples))
    )
    options = {"batch_size": BATCH, "pin_memory": True, **_workers(min(8, os.cpu_count() or 1))}
    loader: Any = torch.utils.data.DataLoader(dataset, **options)
    for _ in range(data.scale.num_rounds):
        for name, batches in (
            ("plain", lambda: ({"h": each["hidden_states"].cuda()} for each in loader)),
            ("ahead", lambda: DeviceLoader(loader, "cuda")),
        ):

            def run(batches: Any = batches) -> None:
                for _ in batches():
                    pass
                torch.cuda.synchronize()

            run()
            series.add("device", **{name: len(dataset) / seconds(run)})
    return {"device": torch.cuda.get_device_name()}


CASES: dict[str, Any] = {
    "first_batch": first_batch,
    "random_graphs": random_graphs,
    "workers": workers,
    "memory": memory,
    "device": device,
}
