"""Reductions of one layer's array to a few numbers, in numpy.

Hidden states are ``(tokens, hidden)``, attentions ``(heads, queries, keys)``; where a sequence was
cut at its front, the last query still is the last key. Sums are taken in float64, results are
float32. What has no tokens to reduce gives NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from h5traces.format import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


Floats = NDArray[np.float32]
AnyFloats = NDArray[Any]
# Values of attention that are turned into float32 at a time, to bound what a long sequence takes.
_BLOCK_VALUES = 1 << 22


def last_token(states: AnyFloats) -> Floats:
    """The state of the last token, ``(hidden,)``."""
    if not states.shape[0]:
        return _nothing(states.shape[1:])
    return _narrow(states[-1])


def mean_pooled(states: AnyFloats, start: int = 0) -> Floats:
    """The mean over tokens from `start` on, ``(hidden,)``."""
    if states.shape[0] <= start:
        return _nothing(states.shape[1:])
    return _narrow(states[start:].mean(axis=0, dtype=np.float64))


def max_pooled(states: AnyFloats, start: int = 0) -> Floats:
    """The largest value of every dimension over tokens from `start` on, ``(hidden,)``."""
    if states.shape[0] <= start:
        return _nothing(states.shape[1:])
    # Cast first: numpy compares halves one by one.
    top: Floats = states[start:].astype(np.float32).max(axis=0)
    return top


def row_entropy(attention: AnyFloats) -> Floats:
    """The entropy of attention in nats, mean over queries, ``(heads,)``.

    ``-sum(p * ln p)`` over keys, with rows scaled to sum to 1 (stored ones do so up to rounding)
    and ``0 * ln 0 = 0``. A row of zeros has no entropy: its head gives NaN.
    """
    totals = np.zeros(attention.shape[0])
    for heads, rows in _blocks(attention):
        sums = rows.sum(axis=2, dtype=np.float64)
        # H(p) with p = w / s is ln s - sum(w ln w) / s, which takes no scaled copy.
        logs = np.log(rows, out=np.zeros_like(rows), where=rows != 0)
        logs *= rows
        with np.errstate(divide="ignore", invalid="ignore"):
            entropies = np.log(sums) - logs.sum(axis=2, dtype=np.float64) / sums
        totals[heads] += entropies.sum(axis=1)
    return _divided(totals, attention.shape[1])


def sink_mass(attention: AnyFloats) -> Floats:
    """The share of attention that goes to the first token, mean over queries, ``(heads,)``.

    The first token itself, which can look at nothing else, is left out.
    """
    first_query = attention.shape[2] - attention.shape[1]
    rows = attention[:, 1:] if first_query == 0 else attention
    if not rows.shape[1] or not rows.shape[2]:
        return _nothing((attention.shape[0],))
    sums = _row_sums(rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _narrow((rows[:, :, 0] / sums).mean(axis=1))


def lookback_ratio(attention: AnyFloats, prompt_len: int) -> Floats:
    """How much the answer looks back at the prompt, mean over its tokens, ``(heads,)``.

    For every token of the answer, the mean attention to a token of the prompt, divided by that plus
    the mean attention to a token of the answer up to and with itself: Chuang et al., "Lookback
    Lens", EMNLP 2024, section 2. Between 0 (looks at the answer only) and 1.

    Parameters
    ----------
    attention
        ``(heads, queries, keys)`` of prompt and answer.
    prompt_len
        Tokens of the prompt; NaN where no token is before or behind it.
    """
    heads, num_queries, num_keys = attention.shape
    first = max(0, prompt_len - (num_keys - num_queries))
    rows = attention[:, first:]
    if not rows.shape[1] or not 0 < prompt_len < num_keys:
        return _nothing((heads,))
    # Position of every query, so number of answer tokens that it can look at.
    seen = np.arange(num_keys - rows.shape[1], num_keys) - prompt_len + 1
    context = rows[:, :, :prompt_len].sum(axis=2, dtype=np.float64) / prompt_len
    new = rows[:, :, prompt_len:].sum(axis=2, dtype=np.float64) / seen
    with np.errstate(divide="ignore", invalid="ignore"):
        return _narrow((context / (context + new)).mean(axis=1))


def _narrow(values: AnyFloats) -> Floats:
    return values.astype(np.float32)


def _row_sums(rows: AnyFloats) -> NDArray[np.float64]:
    sums: NDArray[np.float64] = rows.sum(axis=2, dtype=np.float64)
    return sums


def _blocks(attention: AnyFloats) -> Iterator[tuple[slice, Floats]]:
    """Some heads, or some rows of one head, in float32."""
    num_heads, num_queries, num_keys = attention.shape
    heads = max(1, _BLOCK_VALUES // max(1, num_queries * num_keys))
    rows = max(1, _BLOCK_VALUES // max(1, num_keys))
    for head in range(0, num_heads, heads):
        chosen = slice(head, head + heads)
        for row in range(0, num_queries, rows):
            yield chosen, _narrow(attention[chosen, row : row + rows])


def _divided(totals: NDArray[np.float64], count: int) -> Floats:
    if not count:
        return _nothing(totals.shape)
    return _narrow(totals / count)


def _nothing(shape: tuple[int, ...]) -> Floats:
    return np.full(shape, np.nan, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class FeatureDefinition:
    """A feature of one layer.

    Attributes
    ----------
    name
        Its name in files and options.
    kind
        The kind of array that it is made of.
    meaning
        One sentence.
    reduce
        From the layer's array, and the length of the prompt, to one row.
    needs_prompt
        Whether the length of the prompt must be known.
    """

    name: str
    kind: str
    meaning: str
    reduce: Callable[[AnyFloats, int], Floats]
    needs_prompt: bool = False

    @property
    def is_state(self) -> bool:
        """Whether it has the width of a hidden state, and so may be projected."""
        return self.kind == layout.HIDDEN_STATES


def _of_states(name: str, meaning: str, reduce: Any, *, prompt: bool = False) -> FeatureDefinition:
    return FeatureDefinition(name, layout.HIDDEN_STATES, meaning, reduce, needs_prompt=prompt)


def _of_attention(
    name: str, meaning: str, reduce: Any, *, prompt: bool = False
) -> FeatureDefinition:
    return FeatureDefinition(name, layout.ATTENTIONS, meaning, reduce, needs_prompt=prompt)


_DEFINITIONS: Final = (
    _of_states(
        "last_token",
        "Hidden state of the last token.",
        lambda states, _: last_token(states),
    ),
    _of_states(
        "mean",
        "Hidden states, mean over all tokens.",
        lambda states, _: mean_pooled(states),
    ),
    _of_states(
        "max",
        "Hidden states, maximum over all tokens.",
        lambda states, _: max_pooled(states),
    ),
    _of_states(
        "answer_mean",
        "Hidden states, mean over the tokens of the answer.",
        mean_pooled,
        prompt=True,
    ),
    _of_states(
        "answer_max",
        "Hidden states, maximum over the tokens of the answer.",
        max_pooled,
        prompt=True,
    ),
    _of_attention(
        "attention_entropy",
        "Entropy of attention in nats per head, mean over queries.",
        lambda attention, _: row_entropy(attention),
    ),
    _of_attention(
        "sink_mass",
        "Share of attention on the first token per head, mean over later queries.",
        lambda attention, _: sink_mass(attention),
    ),
    _of_attention(
        "lookback_ratio",
        "Attention of the answer to the prompt against prompt and answer, per head.",
        lookback_ratio,
        prompt=True,
    ),
)
FEATURES: Final = {each.name: each for each in _DEFINITIONS}
