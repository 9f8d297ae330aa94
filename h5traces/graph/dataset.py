"""A map-style dataset of attention graphs that replaces the legacy class of the same name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
import torch
from torch.utils.data import Dataset
from torch_geometric.data import Data

from h5traces.archive.archive import Archive
from h5traces.archive.opening import open as open_archive
from h5traces.arguments import checked
from h5traces.errors import DatasetError, OptionError
from h5traces.graph.edges import EdgeDirection, HeadReduction, attention_edges, edges_of_rows
from h5traces.graph.files import record_files
from h5traces.graph.samples import ArchiveSamples, RecordSamples
from h5traces.meaning.lengths import covered_tokens
from h5traces.meaning.options import ReadingOptions
from h5traces.torch_data.dataset import Labels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from h5traces.graph.samples import GraphSamples
    from h5traces.paths import Source
    from h5traces.torch_data.tensors import NonFinite


class LegacyArguments(TypedDict, total=False):
    """Arguments of the legacy class that have another name here, or none."""

    pkl_files_pattern: Source
    lazy_loading: bool
    max_files: int | None
    max_traces_total: int | None


class TraceGraphDataset(Dataset[Data]):
    """One graph per sample and layer: tokens are nodes, attention above a threshold are edges.

    Item ``i`` is layer ``i % L`` of sample ``i // L``, L being the number of layers. Every graph
    is a `torch_geometric.data.Data` with

    - ``x``: hidden states as float32 ``(seq_len, hidden_size)``;
    - ``edge_index`` int64 ``(2, num_edges)`` and ``edge_attr`` float32 ``(num_edges, features)``;
    - ``question_id``, ``answer``, ``tokens_decoded`` (``unknown``, empty text and empty list where
      the trace has none), ``num_nodes``, ``layer_idx``;
    - ``y``, where there are labels.

    ``layer_idx`` is the model's own layer number; legacy batches store all layers.

    Parameters
    ----------
    pattern
        Archives as `h5traces.open` takes them, an open `Archive` or a slice of one; or, during a
        transition, files that `h5traces.load` takes, such as ``traces/*.pkl*``, which can only be
        read from their beginning.
    attn_threshold
        An edge is where the attention of a query to a key exceeds this.
    head_reduction
        ``mean`` over the heads, as in the legacy class, ``max``, or ``per_head``: the edges of
        ``mean`` with every head's weight as a feature.
    edge_direction
        ``query_to_key``, as in the legacy class, ``key_to_query``, or ``both``.
    layers
        The model's own layer numbers, in this order; all that are stored by default.
    labels
        As for `h5traces.torch_data.TraceDataset`, by question id; graphs get them as ``y``.
    non_finite
        ``error`` raises for graphs with NaN or infinite values, ``keep`` returns them.
    reading
        What files of other programs do not say, such as a mapping.
    transform
        Called with every graph; its result is the item.
    **legacy
        Arguments of the legacy class: ``pkl_files_pattern`` for `pattern`; ``max_files`` and
        ``max_traces_total``, how many files and samples to take, the first ones in order;
        ``lazy_loading``, without effect, as graphs are always read on access.

    Attributes
    ----------
    layers
        The model's own layer numbers, in the order of the graphs of a sample.
    num_layers, num_samples
        Graphs per sample, and samples.

    Raises
    ------
    FileNotFoundError
        Nothing matches the pattern.
    OptionError
        Arguments contradict each other.
    ArchiveError, DatasetError, LayerIndexError
        As `h5traces.torch_data.TraceDataset`.
    """

    @checked
    def __init__(
        self,
        pattern: Archive | Source | Iterable[Source] | None = None,
        attn_threshold: float = 0.01,
        *,
        head_reduction: HeadReduction = "mean",
        edge_direction: EdgeDirection = "query_to_key",
        layers: Iterable[int] | None = None,
        labels: Mapping[Any, Any] | str | Labels | None = None,
        non_finite: NonFinite = "error",
        reading: ReadingOptions = ReadingOptions(),
        transform: Callable[[Data], Any] | None = None,
        **legacy: Unpack[LegacyArguments],
    ) -> None:
        self.attn_threshold = attn_threshold
        self._head_reduction, self._edge_direction = head_reduction, edge_direction
        self._transform = transform
        keep = non_finite == "keep"
        named, limits = _legacy(pattern, legacy)
        files = [] if isinstance(named, Archive) else record_files(named, reading)
        self._samples: GraphSamples
        if files:
            self._samples = RecordSamples(
                files[: limits.max_files],
                layers,
                keep_non_finite=keep,
                reading=reading,
                max_samples=limits.max_samples,
            )
        else:
            archive = named if isinstance(named, Archive) else open_archive(named)
            averages = head_reduction == "mean"
            self._samples = ArchiveSamples(
                limits.of(archive), layers, keep_non_finite=keep, averages=averages
            )
        self.layers = self._samples.layers
        self.num_layers, self.num_samples = len(self.layers), len(self._samples.shard_numbers)
        self._labels = None
        if labels is not None:
            self._labels = self._samples.labels(Labels.of(labels))

    @property
    def shard_numbers(self) -> NDArray[np.int64]:
        """The shard of every graph."""
        return np.repeat(self._samples.shard_numbers, self.num_layers)

    @property
    def fingerprint(self) -> str:
        """Identifies the graphs and their shards."""
        return f"{self._samples.fingerprint} layers {list(self.layers)}"

    def __len__(self) -> int:
        return self.num_samples * self.num_layers

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
        hidden, attention = self._samples.arrays(sample, layer)
        shape = tuple(attention.shape) if isinstance(attention, torch.Tensor) else (0, 0, 0)
        if hidden.ndim != 2 or len(shape) not in (2, 3):
            message = (
                f"{self._samples.place(sample)}: layer {layer} has hidden states "
                f"{tuple(hidden.shape)} and attention {shape}, expected "
                "(tokens, channels) and (heads, queries, keys)"
            )
            raise DatasetError(message)
        num_nodes = hidden.shape[0]
        edge_index, edge_attr = self._edges(attention, num_nodes, sample, layer)
        graph = Data(
            x=hidden.float(),
            edge_index=edge_index,
            edge_attr=edge_attr,
            **self._samples.facts(sample),
            num_nodes=num_nodes,
            layer_idx=layer,
        )
        # A copy, since other graphs of the sample have the same facts; one text per node.
        texts = graph.tokens_decoded
        graph.tokens_decoded = list(texts[covered_tokens(len(texts), num_nodes) or slice(None)])
        if self._labels is not None:
            graph.y = torch.as_tensor(self._labels[sample]).reshape(1)
        return graph

    def _edges(
        self,
        attention: torch.Tensor | Iterator[torch.Tensor],
        num_nodes: int,
        sample: int,
        layer: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        options: Any = {
            "threshold": self.attn_threshold,
            "head_reduction": self._head_reduction,
            "direction": self._edge_direction,
        }
        if not isinstance(attention, torch.Tensor):
            return edges_of_rows(attention, **options)
        try:
            return attention_edges(attention, num_nodes, **options)
        except DatasetError as error:
            message = f"{self._samples.place(sample)}: layer {layer}: {error}"
            raise DatasetError(message) from error


@dataclass(frozen=True, slots=True)
class _Limits:
    """How many files and samples to take; None takes all."""

    max_files: int | None
    max_samples: int | None

    def of(self, archive: Archive) -> Archive:
        """The view of an archive within the limits."""
        if self.max_files is not None:
            archive = archive[archive._shard_numbers < self.max_files]
        return archive[: self.max_samples]


def _legacy(
    pattern: Archive | Source | Iterable[Source] | None, legacy: LegacyArguments
) -> tuple[Archive | Source | Iterable[Source], _Limits]:
    """What to read, and how much of it, by the arguments of the legacy class."""
    unknown = [name for name in legacy if name not in LegacyArguments.__annotations__]
    if unknown:
        message = f"TraceGraphDataset got an unexpected argument {unknown[0]!r}"
        raise TypeError(message)
    named = legacy.get("pkl_files_pattern", pattern)
    if named is None or (pattern is not None and "pkl_files_pattern" in legacy):
        message = "name the files once: as the first argument, or as pkl_files_pattern"
        raise OptionError(message)
    limits = _Limits(legacy.get("max_files"), legacy.get("max_traces_total"))
    for name, value in (("max_files", limits.max_files), ("max_traces_total", limits.max_samples)):
        if value is not None and value < 1:
            message = f"{name} is {value}, expected at least 1, or None for all"
            raise OptionError(message)
    return named, limits
