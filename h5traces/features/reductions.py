"""Reductions of one layer's array to a few numbers, in numpy.

Hidden states are ``(tokens, hidden)``, attentions ``(heads, queries, keys)``; where the front of a
sequence was cut off, the last query is still the last key. Sums are float64, results float32. The
reduction of no tokens is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from h5traces.arguments import checked
from h5traces.format import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Floats = NDArray[np.float32]
AnyFloats = NDArray[Any]
# With two axes, and with three.
States = AnyFloats
Weights = AnyFloats
# Values of attention that become float32 at a time, so that long sequences need little memory.
_BLOCK_VALUES = 1 << 22


@checked
def last_token(states: States) -> Floats:
    """The state of the last token, ``(hidden,)``."""
    if not states.shape[0]:
        return _nothing(states.shape[1:])
    return _narrow(states[-1])


@checked
def mean_pooled(states: States, start: int = 0) -> Floats:
    """The mean over tokens from `start` on, ``(hidden,)``."""
    if states.shape[0] <= start:
        return _nothing(states.shape[1:])
    return _narrow(states[start:].mean(axis=0, dtype=np.float64))


@checked
def max_pooled(states: States, start: int = 0) -> Floats:
    """The largest value of every dimension over tokens from `start` on, ``(hidden,)``."""
    if states.shape[0] <= start:
        return _nothing(states.shape[1:])
    # Cast first: numpy compares halves one by one.
    top: Floats = states[start:].astype(np.float32).max(axis=0)
    return top


@checked
def row_entropy(attention: Weights) -> Floats:
    """The entropy of attention in nats, mean over queries, ``(heads,)``.

    ``-sum(p * ln p)`` over keys, with rows scaled to sum to 1 (stored ones do so up to rounding)
    and ``0 * ln 0 = 0``. A row of zeros has no entropy: its head gives NaN.
    """
    if not attention.shape[1]:
        return _nothing(attention.shape[:1])
    totals = np.zeros(attention.shape[0])
    for heads, rows in _blocks(attention):
        sums = rows.sum(axis=2, dtype=np.float64)
        # H(p) with p = w / s is ln s - sum(w ln w) / s, which takes no scaled copy.
        logs = np.log(rows, out=np.zeros_like(rows), where=rows != 0)
        logs *= rows
        with np.errstate(divide="ignore", invalid="ignore"):
            entropies = np.log(sums) - logs.sum(axis=2, dtype=np.float64) / sums
        totals[heads] += entropies.sum(axis=1)
    return _narrow(totals / attention.shape[1])


@checked
def sink_mass(attention: Weights) -> Floats:
    """The share of attention on the first token, mean over queries, ``(heads,)``.

    The query of the first token, which sees nothing else, is left out.
    """
    first_query = attention.shape[2] - attention.shape[1]
    rows = attention[:, 1:] if first_query == 0 else attention
    if not rows.shape[1] or not rows.shape[2]:
        return _nothing((attention.shape[0],))
    sums = rows.sum(axis=2, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _narrow((rows[:, :, 0] / sums).mean(axis=1))


@checked
def lookback_ratio(attention: Weights, prompt_len: int) -> Floats:
    """How much the answer looks back at the prompt, mean over its tokens, ``(heads,)``.

    For every token of the answer, the mean attention to a token of the prompt, divided by that plus
    the mean attention to a token of the answer up to itself: Chuang et al., "Lookback Lens", EMNLP
    2024, section 2. Between 0 (looks at the answer only) and 1.

    Parameters
    ----------
    attention
        ``(heads, queries, keys)`` of prompt and answer.
    prompt_len
        Tokens of the prompt; the result is NaN without prompt or without answer.
    """
    heads, num_queries, num_keys = attention.shape
    first = max(0, prompt_len - (num_keys - num_queries))
    rows = attention[:, first:]
    if not rows.shape[1] or not 0 < prompt_len < num_keys:
        return _nothing((heads,))
    # By position of the query: the number of answer tokens that it sees.
    seen = np.arange(num_keys - rows.shape[1], num_keys) - prompt_len + 1
    context = rows[:, :, :prompt_len].sum(axis=2, dtype=np.float64) / prompt_len
    new = rows[:, :, prompt_len:].sum(axis=2, dtype=np.float64) / seen
    with np.errstate(divide="ignore", invalid="ignore"):
        return _narrow((context / (context + new)).mean(axis=1))


def _narrow(values: AnyFloats) -> Floats:
    return values.astype(np.float32)


def _blocks(attention: AnyFloats) -> Iterator[tuple[slice, Floats]]:
    """Some heads, or some rows of one head, in float32."""
    num_heads, num_queries, num_keys = attention.shape
    heads = max(1, _BLOCK_VALUES // max(1, num_queries * num_keys))
    rows = max(1, _BLOCK_VALUES // max(1, num_keys))
    for head in range(0, num_heads, heads):
        chosen = slice(head, head + heads)
        for row in range(0, num_queries, rows):
            yield chosen, _narrow(attention[chosen, row : row + rows])


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
        The kind of array that it is made from.
    meaning
        One sentence.
    reduce
        Makes one row of the layer's array and the length of the prompt.
    needs_prompt
        Whether the length of the prompt must be known.
    scales_rows
        Whether rows of attention are divided by their sum.
    """

    name: str
    kind: str
    meaning: str
    reduce: Callable[[AnyFloats, int], Floats]
    needs_prompt: bool = False
    scales_rows: bool = False

    @property
    def is_state(self) -> bool:
        """Whether it has the width of a hidden state, and so may be projected."""
        return self.kind == layout.HIDDEN_STATES


def _definition(
    name: str,
    kind: str,
    meaning: str,
    reduce: Callable[..., Floats],
    *,
    of_answer: bool = False,
    scales_rows: bool = False,
) -> FeatureDefinition:
    """A feature, by a function of the array or, with `of_answer`, of it and the prompt's length."""
    taken = reduce if of_answer else lambda array, _: reduce(array)
    return FeatureDefinition(
        name, kind, meaning, taken, needs_prompt=of_answer, scales_rows=scales_rows
    )


_STATES, _WEIGHTS = layout.HIDDEN_STATES, layout.ATTENTIONS
_DEFINITIONS: Final = (
    _definition("last_token", _STATES, "Hidden state of the last token.", last_token),
    _definition("mean", _STATES, "Hidden states, mean over all tokens.", mean_pooled),
    _definition("max", _STATES, "Hidden states, maximum over all tokens.", max_pooled),
    _definition(
        "answer_mean",
        _STATES,
        "Hidden states, mean over the tokens of the answer.",
        mean_pooled,
        of_answer=True,
    ),
    _definition(
        "answer_max",
        _STATES,
        "Hidden states, maximum over the tokens of the answer.",
        max_pooled,
        of_answer=True,
    ),
    _definition(
        "attention_entropy",
        _WEIGHTS,
        "Entropy of attention in nats per head, mean over queries.",
        row_entropy,
        scales_rows=True,
    ),
    _definition(
        "sink_mass",
        _WEIGHTS,
        "Share of attention on the first token per head, mean over later queries.",
        sink_mass,
        scales_rows=True,
    ),
    _definition(
        "lookback_ratio",
        _WEIGHTS,
        "Attention of the answer to the prompt against prompt and answer, per head.",
        lookback_ratio,
        of_answer=True,
    ),
)
FEATURES: Final = {each.name: each for each in _DEFINITIONS}
