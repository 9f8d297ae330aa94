"""How a model makes attention weights of queries and keys: read off its calls, then tried."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from h5traces.extract.sites import BY_PRODUCT
from h5traces.format.attention import AttentionRule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Masks of floats take this much from what a query does not see; a bias never does.
_HIDDEN: Final = -1e4
_NUM_AXES_OF_MASK: Final = 4


def rule_of(
    module: Any, query: torch.Tensor, facts: Mapping[str, Any], row: int, length: int
) -> AttentionRule | None:
    """The rule of one sequence; None if the call adds something else to scores.

    Parameters
    ----------
    module
        The attention module.
    query
        ``(B, A, S, D)``.
    facts
        What the attention function was called with, by name.
    row, length
        The sequence, whose tokens are the last ones of its row.
    """
    scale = facts.get("scaling")
    cap, sinks = facts.get("softcap"), facts.get("s_aux")
    named: dict[str, Any] = {
        "scale": float(query.shape[-1] ** -0.5 if scale is None else scale),
        "soft_cap": None if cap is None else float(cap),
        "sinks": None if sinks is None else tuple(sinks.detach().float().flatten().tolist()),
    }
    mask = facts.get("attention_mask")
    if BY_PRODUCT in facts and _has_window(module):
        return None
    if mask is None or mask.ndim != _NUM_AXES_OF_MASK:
        window = facts.get("sliding_window")
        if not getattr(module, "is_causal", True):
            return AttentionRule(mask="all", **named)
        if window is not None and window < length:
            return AttentionRule(mask="window", window=int(window), **named)
        return AttentionRule(mask="causal", **named)
    if mask.shape[1] != 1:
        return None
    part = mask[row % len(mask), 0, -length:, mask.shape[-1] - length :]
    if part.shape != (length, length):
        return None
    seen = part if part.dtype == torch.bool else part == 0
    if part.dtype != torch.bool and bool((part[~seen] > _HIDDEN).any()):
        return None
    for of_mask in _candidates(seen):
        rule = AttentionRule(**named, **of_mask)
        first, end = (
            torch.from_numpy(each).to(seen.device)[:, None]
            for each in rule.seen(np.arange(length), length)
        )
        columns = torch.arange(length, device=seen.device)
        if torch.equal(seen, (columns >= first) & (columns < end)):
            return rule
    return None


def _has_window(module: Any) -> bool:
    """Whether a configuration speaks of windows, which products do not show."""
    config = vars(getattr(module, "config", None) or module)
    return any("window" in name and value is not None for name, value in config.items())


def _candidates(seen: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Masks that a square of what is seen may be."""
    yield {"mask": "causal"}
    counts = seen.sum(-1)
    yield {"mask": "window", "window": max(1, int(counts[-1]))}
    alone = (counts == 1).nonzero().flatten().tolist()
    yield from ({"mask": "chunk", "window": each} for each in alone[1:2])
    yield {"mask": "all"}
