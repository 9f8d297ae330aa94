"""Attention graphs for PyTorch Geometric: one per sample and layer, each read on access.

>>> from h5traces.graph import TraceGraphDataset                 # doctest: +SKIP
>>> graphs = TraceGraphDataset("archives/*.h5", attn_threshold=0.01)  # doctest: +SKIP
>>> graphs[7]                                                    # doctest: +SKIP
Data(x=[43, 4096], edge_index=[2, 610], edge_attr=[610, 1], …)
"""

from typing import TYPE_CHECKING

from h5traces.lazy import lazy_names

if TYPE_CHECKING:
    from h5traces.graph.dataset import TraceGraphDataset
    from h5traces.graph.edges import attention_edges

__all__ = [
    "TraceGraphDataset",
    "attention_edges",
]

_HOMES = {
    "TraceGraphDataset": "h5traces.graph.dataset",
    "attention_edges": "h5traces.graph.edges",
}
if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _HOMES, extra="graph")
