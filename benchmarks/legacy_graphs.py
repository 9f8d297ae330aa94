"""The class that `h5traces.graph.TraceGraphDataset` replaces, written anew to behave as it did.

It unpickles every file once to count samples, keeps the six files used last in memory, and loads a
whole file to fetch one layer of one sample. Only for files that you made yourself: unpickling runs
what a file tells it to.
"""

from __future__ import annotations

import glob
import gzip
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.utils.data import Dataset
from torch_geometric.data import Data

if TYPE_CHECKING:
    from collections.abc import Callable

CACHED_FILES: Final = 6


def unpickle(path: str) -> list[dict[str, Any]]:
    """A whole batch."""
    with gzip.open(path, "rb") if path.endswith(".gz") else Path(path).open("rb") as file:
        batch: list[dict[str, Any]] = pickle.load(file)
    return batch


class LegacyTraceGraphDataset(Dataset[Data]):
    """One graph per sample and layer of a list of pickled batches.

    Parameters
    ----------
    pattern
        A glob; of ``*.pkl``, files in gzip are found too.
    attn_threshold
        An edge is where the mean attention exceeds it.
    load
        Reads a file; replaced by benchmarks that hold the files' bytes in memory.
    """

    def __init__(
        self,
        pattern: str,
        attn_threshold: float = 0.01,
        load: Callable[[str], list[dict[str, Any]]] = unpickle,
    ) -> None:
        names = glob.glob(pattern)  # noqa: PTH207  # takes absolute patterns
        if not pattern.endswith(".gz"):
            names += glob.glob(pattern.replace(".pkl", ".pkl.gz"))  # noqa: PTH207  # as above
        self.paths = sorted(name for name in names if not name.endswith(".part"))
        self.attn_threshold, self._load = attn_threshold, load
        self._cache: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        self._index: list[tuple[int, int, int]] = []
        self.num_layers = 0
        for number, path in enumerate(self.paths):
            batch = load(path)
            if number == 0:
                self.num_layers = len(batch[0]["hidden_states"])
            self._index += [
                (number, sample, layer)
                for sample in range(len(batch))
                for layer in range(self.num_layers)
            ]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Data:
        number, sample, layer = self._index[index]
        return graph_of(self._file(number)[sample], layer, self.attn_threshold)

    def _file(self, number: int) -> list[dict[str, Any]]:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        if len(self._cache) >= CACHED_FILES:
            self._cache.popitem(last=False)
        self._cache[number] = self._load(self.paths[number])
        return self._cache[number]


def graph_of(trace: dict[str, Any], layer: int, attn_threshold: float) -> Data:
    """The graph of one layer of a legacy dict."""
    nodes = _floats(trace["hidden_states"][layer])
    weights = _floats(trace["attentions"][layer]).mean(dim=0)
    num_nodes = nodes.size(0)
    weights = weights[:num_nodes, :num_nodes]
    causal = torch.tril(torch.ones(num_nodes, num_nodes, dtype=torch.bool))
    mask = (weights > attn_threshold) & causal
    data = Data(
        x=nodes, edge_index=mask.nonzero(as_tuple=False).t(), edge_attr=weights[mask].unsqueeze(1)
    )
    data.question_id = trace.get("question_id", "unknown")
    data.answer = trace.get("generated_answer_clean", "")
    data.tokens_decoded = trace.get("tokens_decoded", [])
    data.num_nodes, data.layer_idx = num_nodes, layer
    return data


def _floats(array: Any) -> torch.Tensor:
    return (torch.from_numpy(array) if isinstance(array, np.ndarray) else array).float()
