"""Reductions of one layer's array to a few numbers, in numpy.

Hidden states are ``(tokens, hidden)``, attentions ``(heads, queries, keys)``; where the front of a
sequence was cut off, the last query is still the last key. Sums are float64, results float32. The
reduction of no tokens is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from h5traces.arguments import checked
from h5traces.format import layout
from h5traces.format.dtypes import widened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Floats = NDArray[np.float32]
AnyFloats = NDArray[Any]
# With two axes, and with three.
States = AnyFloats
Weights = AnyFloats
OfRows: TypeAlias = "Callable[[Floats, NDArray[np.int64], int], AnyFloats]"
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
    return _narrow(widened(states[start:]).mean(axis=0, dtype=np.float64))


@checked
def max_pooled(states: States, start: int = 0) -> Floats:
    """The largest value of every dimension over tokens from `start` on, ``(hidden,)``."""
    if states.shape[0] <= start:
        return _nothing(states.shape[1:])
    return _narrow(widened(states[start:]).max(axis=0))


@checked
def row_entropy(attention: Weights) -> Floats:
    """The entropy of attention in nats, mean over queries, ``(heads,)``.

    ``-sum(p * ln p)`` over keys, with rows scaled to sum to 1 (stored ones do so up to rounding)
    and ``0 * ln 0 = 0``. A row of zeros has no entropy: its head gives NaN.
    """
    return _over_rows(attention, _entropies)


@checked
def sink_mass(attention: Weights) -> Floats:
    """The share of attention on the first token, mean over queries, ``(heads,)``.

    The query of the first token, which sees nothing else, is left out.
    """
    return _over_rows(attention, _sinks)


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
    return _over_rows(attention, _lookbacks, prompt_len)


class RowMeans:
    """The mean over queries of numbers that each has, by head, of blocks of weights.

    `of_rows` makes them: float64 ``(heads, n)`` of float32 weights ``(heads, queries, keys)``, the
    key that each query belongs to, and the length of the prompt; n leaves out some queries.
    """

    def __init__(self, of_rows: OfRows, num_heads: int, prompt_len: int = 0) -> None:
        self._of_rows, self._prompt_len = of_rows, prompt_len
        self._totals, self._counts = np.zeros(num_heads), np.zeros(num_heads)

    def add(self, weights: Floats, queries: NDArray[np.int64], heads: slice = slice(None)) -> None:
        """Take in a block of some heads and queries."""
        with np.errstate(divide="ignore", invalid="ignore"):
            values = self._of_rows(weights, queries, self._prompt_len)
        self._totals[heads] += values.sum(axis=1)
        self._counts[heads] += values.shape[1]

    @property
    def value(self) -> Floats:
        """``(heads,)``; NaN where there was no query."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return _narrow(self._totals / self._counts)


def _over_rows(attention: Weights, of_rows: OfRows, prompt_len: int = 0) -> Floats:
    num_heads, num_queries, num_keys = attention.shape
    means = RowMeans(of_rows, num_heads, prompt_len)
    queries = np.arange(num_queries) + (num_keys - num_queries)
    for heads, rows, block in _blocks(attention):
        means.add(block, queries[rows], heads)
    return means.value


def _entropies(rows: Floats, _queries: NDArray[np.int64], _prompt_len: int) -> AnyFloats:
    sums = rows.sum(axis=2, dtype=np.float64)
    # H(p) with p = w / s is ln s - sum(w ln w) / s, which takes no scaled copy.
    logs = np.log(rows, out=np.zeros_like(rows), where=rows != 0)
    logs *= rows
    found: AnyFloats = np.log(sums) - logs.sum(axis=2, dtype=np.float64) / sums
    return found


def _sinks(weights: Floats, queries: NDArray[np.int64], _prompt_len: int) -> AnyFloats:
    rows = weights[:, queries > 0]
    sums: AnyFloats = rows.sum(axis=2, dtype=np.float64)
    return rows[:, :, 0] / sums if rows.size else sums


def _lookbacks(weights: Floats, queries: NDArray[np.int64], prompt_len: int) -> AnyFloats:
    is_answer = (queries >= prompt_len) & (0 < prompt_len < weights.shape[2])
    rows, seen = weights[:, is_answer], queries[is_answer] - prompt_len + 1
    context = rows[:, :, :prompt_len].sum(axis=2, dtype=np.float64) / max(1, prompt_len)
    new = rows[:, :, prompt_len:].sum(axis=2, dtype=np.float64) / seen
    found: AnyFloats = context / (context + new)
    return found


def _narrow(values: AnyFloats) -> Floats:
    return values.astype(np.float32)


def _blocks(attention: AnyFloats) -> Iterator[tuple[slice, slice, Floats]]:
    """Some heads, or some rows of one head, with their numbers, in float32."""
    num_heads, num_queries, num_keys = attention.shape
    heads = max(1, _BLOCK_VALUES // max(1, num_queries * num_keys))
    rows = max(1, _BLOCK_VALUES // max(1, num_keys))
    for head in range(0, num_heads, heads):
        chosen = slice(head, head + heads)
        for row in range(0, num_queries, rows):
            some = slice(row, row + rows)
            yield chosen, some, _narrow(attention[chosen, some])


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
    of_rows
        Of attention: the numbers of queries whose mean it is, as `RowMeans` takes them.
    """

    name: str
    kind: str
    meaning: str
    reduce: Callable[[AnyFloats, int], Floats]
    needs_prompt: bool = False
    scales_rows: bool = False
    of_rows: OfRows | None = None

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
    of_rows: OfRows | None = None,
) -> FeatureDefinition:
    """A feature, by a function of the array or, with `of_answer`, of it and the prompt's length."""
    taken = reduce if of_answer else lambda array, _: reduce(array)
    return FeatureDefinition(
        name,
        kind,
        meaning,
        taken,
        needs_prompt=of_answer,
        scales_rows=scales_rows,
        of_rows=of_rows,
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
        of_rows=_entropies,
    ),
    _definition(
        "sink_mass",
        _WEIGHTS,
        "Share of attention on the first token per head, mean over later queries.",
        sink_mass,
        scales_rows=True,
        of_rows=_sinks,
    ),
    _definition(
        "lookback_ratio",
        _WEIGHTS,
        "Attention of the answer to the prompt against prompt and answer, per head.",
        lookback_ratio,
        of_answer=True,
        of_rows=_lookbacks,
    ),
)
FEATURES: Final = {each.name: each for each in _DEFINITIONS}


def definition_of(name: str) -> FeatureDefinition | None:
    """A feature by name, or by ``mlp_output.last_token`` of another kind; None if none is."""
    kind, _, plain = name.rpartition(".")
    found = FEATURES.get(plain)
    if not kind or found is None:
        return FEATURES.get(name)
    if not found.is_state:
        return None
    meaning = found.meaning.replace("Hidden states", kind).replace("Hidden state", kind)
    return replace(found, name=name, kind=kind, meaning=meaning)
