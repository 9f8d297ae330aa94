"""Attention weights as the edges of a graph, without a loop over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F  # as torch's own documents name it

from h5traces.arguments import checked
from h5traces.errors import DatasetError

if TYPE_CHECKING:
    from collections.abc import Iterable

HeadReduction = Literal["mean", "max", "per_head"]
EdgeDirection = Literal["query_to_key", "key_to_query", "both"]


@checked
def attention_edges(
    attention: torch.Tensor,
    num_nodes: int,
    *,
    threshold: float = 0.01,
    head_reduction: HeadReduction = "mean",
    direction: EdgeDirection = "query_to_key",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges where the attention of a query to a key, reduced over heads, exceeds a threshold.

    Only keys up to the query itself count, as in a causal model. Weights beyond `num_nodes` are
    ignored, and queries without weights have no edges.

    Parameters
    ----------
    attention
        ``(num_heads, query, key)``, or ``(query, key)`` without heads.
    num_nodes
        Tokens of the sequence.
    threshold
        An edge is where the weight is greater.
    head_reduction
        ``mean`` and ``max`` give one feature per edge. ``per_head`` has the edges of ``mean``, and
        every head's weight as a feature.
    direction
        ``query_to_key``, as in the legacy class; ``key_to_query``, in which information flows;
        ``both`` has the edges of the first, then those of the second without self-loops.

    Returns
    -------
    edge_index
        int64 ``(2, num_edges)``, by query, then by key.
    edge_attr
        float32 ``(num_edges, 1)``, or ``(num_edges, num_heads)``.

    Raises
    ------
    DatasetError
        The options are unknown, or need heads that `attention` does not have.
    """
    weights = attention.float()
    reduced = _fitted(_reduced(weights, head_reduction), num_nodes)
    heads = _fitted(weights, num_nodes) if head_reduction == "per_head" else None
    return _directed(*_edges(reduced, heads, threshold), direction)


def edges_of_rows(
    blocks: Iterable[torch.Tensor],
    *,
    threshold: float,
    head_reduction: HeadReduction,
    direction: EdgeDirection,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attention_edges`, of blocks ``(heads, queries, keys)`` of all queries in their order."""
    start, parts = 0, []
    for each in blocks:
        heads = each if head_reduction == "per_head" else None
        parts.append(_edges(_reduced(each, head_reduction), heads, threshold, start))
        start += each.shape[1]
    index, attr = zip(*parts, strict=True)
    return _directed(torch.cat(index, dim=1), torch.cat(attr), direction)


def _edges(
    reduced: torch.Tensor, heads: torch.Tensor | None, threshold: float, start: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges of some queries from `start` on, and their features: of heads where these are given."""
    edge_index = (reduced > threshold).tril_(start).nonzero().t().contiguous()
    query, key = edge_index
    if heads is None:
        edge_attr = reduced[query, key].unsqueeze(1)
    else:
        edge_attr = heads[:, query, key].t().contiguous()
    if start:
        edge_index[0] += start
    return edge_index, edge_attr


def _reduced(weights: torch.Tensor, head_reduction: HeadReduction) -> torch.Tensor:
    if weights.ndim not in (2, 3):
        message = f"attention has the shape {tuple(weights.shape)}, expected (head, query, key)"
        raise DatasetError(message)
    if weights.ndim == 2:
        if head_reduction != "mean":
            message = (
                f"the attention is stored without its heads, which head_reduction="
                f"{head_reduction!r} needs; use 'mean' where it is their mean"
            )
            raise DatasetError(message)
        return weights
    return weights.amax(dim=0) if head_reduction == "max" else weights.mean(dim=0)


def _fitted(weights: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """The last two axes cut or filled with zeros to the number of nodes."""
    weights = weights[..., :num_nodes, :num_nodes]
    queries, keys = weights.shape[-2:]
    if (queries, keys) == (num_nodes, num_nodes):
        return weights
    try:
        return F.pad(weights, (0, num_nodes - keys, 0, num_nodes - queries))
    except RuntimeError as error:
        message = f"attention of {keys} tokens cannot be filled to {num_nodes} nodes: {error}"
        raise DatasetError(message) from error


def _directed(
    edge_index: torch.Tensor, edge_attr: torch.Tensor, direction: EdgeDirection
) -> tuple[torch.Tensor, torch.Tensor]:
    if direction == "query_to_key":
        return edge_index, edge_attr
    backwards = edge_index.flip(0)
    if direction == "key_to_query":
        return backwards, edge_attr
    between = edge_index[0] != edge_index[1]
    return (
        torch.cat([edge_index, backwards[:, between]], dim=1),
        torch.cat([edge_attr, edge_attr[between]]),
    )
