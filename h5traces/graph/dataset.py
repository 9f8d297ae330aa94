"""A map-style dataset of attention graphs, in the place of the legacy class of the same name."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torch_geometric.data import Data

from h5traces.archive.archive import Archive
from h5traces.archive.opening import open_archive
from h5traces.errors import DatasetError
from h5traces.graph.archive_source import ArchiveSource
from h5traces.graph.edges import EdgeDirection, HeadReduction, attention_edges, check_options
from h5traces.graph.pickle_source import PickleSource
from h5traces.paths import expand_paths
from h5traces.sources.opening import SOURCE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.graph.archive_source import GraphSource
    from h5traces.paths import PathLike
    from h5traces.torch_data.tensors import NonFinite


def open_source(
    pattern: Archive | PathLike | Iterable[PathLike],
    *,
    layers: Iterable[int] | None,
    non_finite: NonFinite,
    cached_files: int,
    averages: bool,
) -> GraphSource:
    """The samples behind archives or legacy batches; `averages` where heads become their mean.

    Raises
    ------
    FileNotFoundError
        Nothing matches.
    DatasetError
        There are no samples, or archives and pickles are mixed.
    """
    if not isinstance(pattern, Archive):
        legacy = _legacy_batches(pattern)
        if legacy:
            return PickleSource(legacy, layers, non_finite, cached_files)
        pattern = open_archive(pattern)
    return ArchiveSource(pattern, layers, non_finite, averages=averages)


def _legacy_batches(pattern: PathLike | Iterable[PathLike]) -> list[Path]:
    """The pickles that were named, by their suffixes or in folders without archives."""
    named = [pattern] if isinstance(pattern, (str, os.PathLike)) else list(pattern)
    found = [each for each in named if _names_pickles(each)]
    if found and len(found) < len(named):
        message = (
            f"{os.fspath(found[0])}: a legacy batch among archives; one dataset reads either; "
            "convert it with 'h5traces convert'"
        )
        raise DatasetError(message)
    paths: list[Path] = []
    for each in found:
        paths += _expanded(os.fspath(each))
    return list(dict.fromkeys(paths))


def _names_pickles(named: PathLike) -> bool:
    if not isinstance(named, (str, os.PathLike)):
        return False
    path = os.fspath(named)
    if not os.path.isdir(path):  # noqa: PTH112  # may be an address on a server
        return path.endswith(SOURCE_SUFFIXES)
    try:
        expand_paths(path)
    except FileNotFoundError:
        return bool(expand_paths(path, SOURCE_SUFFIXES))
    return False


def _expanded(named: str) -> list[Path]:
    """The files behind a name; of ``*.pkl`` also those in gzip, as the legacy class has it."""
    if "*" not in named or not named.endswith(".pkl"):
        return expand_paths(named, SOURCE_SUFFIXES)
    found: list[Path] = []
    for each in (named, f"{named}.gz"):
        with contextlib.suppress(FileNotFoundError):
            found += expand_paths(each)
    return sorted(found) if found else expand_paths(named)


# Whole files that the legacy class keeps.
_LEGACY_CACHED_FILES = 6


class TraceGraphDataset(Dataset[Data]):
    """One graph per sample and layer: tokens are nodes, attention above a threshold are edges.

    Item ``i`` is layer ``i % L`` of sample ``i // L``, L being the number of layers. Every graph
    is a `torch_geometric.data.Data` with

    - ``x``: hidden states as float32 ``(seq_len, hidden_size)``;
    - ``edge_index`` int64 ``(2, num_edges)`` and ``edge_attr`` float32 ``(num_edges, features)``;
    - ``question_id``, ``answer``, ``tokens_decoded`` (``unknown``, empty text and empty list where
      the trace has none), ``num_nodes``, ``layer_idx``;
    - ``y``, where there are labels.

    ``layer_idx`` is the model's own number; where all layers are stored, which is all that legacy
    batches know, it is the position in the list.

    Parameters
    ----------
    pattern
        Archives as `h5traces.open` takes them, an open `Archive` or a slice of one; or, for the
        time of transition, ``.pkl`` and ``.pkl.gz`` batches.
    attn_threshold
        An edge is where the attention of a query to a key exceeds this.
    head_reduction
        ``mean`` over the heads, as in the legacy class, ``max``, or ``per_head``: the edges of
        ``mean`` with every head's weight as a feature.
    edge_direction
        ``query_to_key``, as in the legacy class, ``key_to_query``, or ``both``.
    layers
        The model's own layer numbers; all that are stored by default.
    labels
        Values by question id, or the name of what the archive knows itself, as in
        `h5traces.torch_data.TraceDataset`; graphs get them as ``y``.
    allow_unused_labels
        Accept labels of ids that no sample has.
    non_finite
        ``error`` refuses graphs with NaN or infinite values, ``keep`` hands them out.
    cached_files
        Of pickles, how many whole files stay in memory.
    transform
        Called with every graph; what it returns is handed out.

    Raises
    ------
    FileNotFoundError
        Nothing matches the pattern.
    ArchiveError, DatasetError, LayerIndexError
        As `h5traces.torch_data.TraceDataset`.
    """

    def __init__(
        self,
        pattern: Archive | PathLike | Iterable[PathLike],
        attn_threshold: float = 0.01,
        *,
        head_reduction: HeadReduction = "mean",
        edge_direction: EdgeDirection = "query_to_key",
        layers: Iterable[int] | None = None,
        labels: Mapping[Any, Any] | str | None = None,
        allow_unused_labels: bool = False,
        non_finite: NonFinite = "error",
        cached_files: int = _LEGACY_CACHED_FILES,
        transform: Callable[[Data], Any] | None = None,
    ) -> None:
        check_options(head_reduction, edge_direction)
        if cached_files < 1:
            message = f"cached_files is {cached_files}, expected at least 1"
            raise DatasetError(message)
        self.attn_threshold = attn_threshold
        self._head_reduction, self._edge_direction = head_reduction, edge_direction
        self._non_finite, self._transform = non_finite, transform
        self._source = open_source(
            pattern,
            layers=layers,
            non_finite=non_finite,
            cached_files=cached_files,
            averages=head_reduction == "mean",
        )
        self._num_samples = len(self._source.shard_numbers)
        self._labels = (
            None
            if labels is None
            else self._source.labels(labels, allow_unused=allow_unused_labels)
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's own layer numbers, in the order of the graphs of a sample."""
        return self._source.layers

    @property
    def num_layers(self) -> int:
        """Graphs per sample."""
        return len(self.layers)

    @property
    def num_samples(self) -> int:
        """Samples, each of which gives a graph per layer."""
        return self._num_samples

    @property
    def shard_numbers(self) -> NDArray[np.int64]:
        """For every graph, the shard that it lies in."""
        return np.repeat(self._source.shard_numbers, self.num_layers)

    @property
    def fingerprint(self) -> str:
        """The same text for the same graphs of the same shards."""
        return f"{self._source.fingerprint} layers {list(self.layers)}"

    def __len__(self) -> int:
        return self._num_samples * self.num_layers

    def __getitem__(self, index: int) -> Any:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            message = f"graph {index} is out of range; the dataset has {len(self)}"
            raise IndexError(message)
        sample, number = divmod(int(position), self.num_layers)
        graph = self._graph(sample, self.layers[number])
        return graph if self._transform is None else self._transform(graph)

    def __iter__(self) -> Iterator[Any]:
        # Without it, Python would take a LayerIndexError for the end of the dataset.
        return (self[index] for index in range(len(self)))

    def _graph(self, sample: int, layer: int) -> Data:
        hidden, attention = self._source.arrays(sample, layer)
        if hidden.ndim != 2 or attention.ndim not in (2, 3):
            message = (
                f"{self._source.place(sample)}: layer {layer} has hidden states "
                f"{tuple(hidden.shape)} and attention {tuple(attention.shape)}, expected "
                "(tokens, channels) and (heads, queries, keys)"
            )
            raise DatasetError(message)
        x, num_nodes = hidden.float(), hidden.shape[0]
        try:
            edge_index, edge_attr = attention_edges(
                attention,
                num_nodes,
                threshold=self.attn_threshold,
                head_reduction=self._head_reduction,
                direction=self._edge_direction,
            )
        except DatasetError as error:
            message = f"{self._source.place(sample)}: layer {layer}: {error}"
            raise DatasetError(message) from error
        facts = self._source.facts(sample)
        graph = Data(x=x, edge_index=edge_index, edge_attr=edge_attr)
        graph.question_id, graph.answer = facts.question_id, facts.answer
        # A list of its own: other graphs of the sample share the facts.
        graph.tokens_decoded = list(facts.tokens_decoded)
        graph.num_nodes, graph.layer_idx = num_nodes, layer
        if self._labels is not None:
            graph.y = torch.as_tensor(self._labels[sample]).reshape(1)
        return graph
