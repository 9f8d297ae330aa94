"""How a model makes attention weights of queries and keys: read off its calls, then tried."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from h5traces.extract.sites import BIAS, BY_PRODUCT
from h5traces.format.attention import AttentionRule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Masks of floats take this much from what a query does not see; a bias never does.
_HIDDEN: Final = -1e4
_NUM_AXES_OF_MASK: Final = 4
# Of its largest value, a bias in float32 is off a line by so much at most.
_UNEVEN: Final = 1e-6


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
    if BY_PRODUCT in facts:
        mask = _own_mask(module, length)
        if mask is None and _has_window(module):
            return None
        if facts[BIAS] is not None and length > 1:
            named["slopes"] = _slopes(facts[BIAS], query.shape[1], row, length)
            if named["slopes"] is None:
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


def _own_mask(module: Any, length: int) -> torch.Tensor | None:
    """What is seen ``(1, 1, S, S)``, by a table that the module has; GPT-Neo's has its window."""
    buffers: Iterator[tuple[str, torch.Tensor]] = module.named_buffers()
    for name, table in buffers:
        is_mask = table.dtype == torch.bool and table.ndim == _NUM_AXES_OF_MASK
        if name.rpartition(".")[2] == "bias" and is_mask:
            return table[:1, :, :length, :length]
    return None


def _slopes(bias: torch.Tensor, heads: int, row: int, length: int) -> tuple[float, ...] | None:
    """How what is added to the scores of each head grows from key to key; None if not evenly.

    In half precision it does so up to some hundred keys.
    """
    if bias.shape[-2] != 1 or bias.numel() % (heads * bias.shape[-1]):
        return None
    of_rows = bias.detach().double().cpu().reshape(-1, heads, bias.shape[-1])
    values = of_rows[row % len(of_rows), :, -length:]
    slopes = (values[:, -1:] - values[:, :1]) / (length - 1)
    line = values[:, :1] + slopes * torch.arange(length)
    if bool(((values - line).abs() > _UNEVEN * values.abs().amax(1, keepdim=True)).any()):
        return None
    return tuple(slopes.flatten().tolist())


def variants(rule: AttentionRule) -> tuple[AttentionRule, ...]:
    """The rule, and the same without a scale; which of them holds is tried.

    GPT-Neo does not scale, XGLM has scaled its queries before.
    """
    return rule, rule.model_copy(update={"scale": 1.0})


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
