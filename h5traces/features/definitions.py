"""The features by name: what each is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from h5traces.features import reductions
from h5traces.format import layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.features.reductions import AnyFloats, Floats


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
        lambda states, _: reductions.last_token(states),
    ),
    _of_states(
        "mean",
        "Hidden states, mean over all tokens.",
        lambda states, _: reductions.mean_pooled(states),
    ),
    _of_states(
        "max",
        "Hidden states, maximum over all tokens.",
        lambda states, _: reductions.max_pooled(states),
    ),
    _of_states(
        "answer_mean",
        "Hidden states, mean over the tokens of the answer.",
        reductions.mean_pooled,
        prompt=True,
    ),
    _of_states(
        "answer_max",
        "Hidden states, maximum over the tokens of the answer.",
        reductions.max_pooled,
        prompt=True,
    ),
    _of_attention(
        "attention_entropy",
        "Entropy of attention in nats per head, mean over queries.",
        lambda attention, _: reductions.row_entropy(attention),
    ),
    _of_attention(
        "sink_mass",
        "Share of attention on the first token per head, mean over later queries.",
        lambda attention, _: reductions.sink_mass(attention),
    ),
    _of_attention(
        "lookback_ratio",
        "Attention of the answer to the prompt against prompt and answer, per head.",
        reductions.lookback_ratio,
        prompt=True,
    ),
)
FEATURES: Final = {each.name: each for each in _DEFINITIONS}
