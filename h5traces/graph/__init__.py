"""Attention graphs for PyTorch Geometric: one per sample and layer, each read on access.

>>> from h5traces.graph import TraceGraphDataset                 # doctest: +SKIP
>>> graphs = TraceGraphDataset("archives/*.h5", attn_threshold=0.01)  # doctest: +SKIP
>>> graphs[7]                                                    # doctest: +SKIP
Data(x=[43, 4096], edge_index=[2, 610], edge_attr=[610, 1], …)
"""

from h5traces.errors import MissingDependencyError

try:
    import torch  # noqa: F401  # only to see whether it is installed
    import torch_geometric  # noqa: F401
except ImportError as error:
    message = (
        "h5traces.graph needs torch and torch-geometric, and one of them is not installed; install "
        "h5traces[graph]"
    )
    raise MissingDependencyError(message) from error

from h5traces.graph.dataset import TraceGraphDataset
from h5traces.graph.edges import attention_edges

__all__ = ["TraceGraphDataset", "attention_edges"]
