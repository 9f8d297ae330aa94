"""How to understand files of other programs that do not say it themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Self, get_args

from h5traces.arguments import checked_options
from h5traces.errors import OptionError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

FirstState = Literal["embedding", "block"]
FIRST_STATES: Final[tuple[FirstState, ...]] = get_args(FirstState)
# What messages call a mapping, the way out for files with several readings.
A_MAPPING: Final = (
    "a mapping (mapping='mapping.toml'; 'h5traces inspect' of the file prints one to begin with)"
)

# Numbers of hidden states and names of kinds that an archive may record of a run.
_MOST_FACTS: Final = 64


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What files of one run establish for those that leave it open.

    Attributes
    ----------
    first_states
        By number of hidden states, what the first of them is.
    axes
        Order of axes of stacked arrays by kind, and axes of kinds that the format does not name.
    """

    first_states: Mapping[int, FirstState] = field(default_factory=dict)
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.first_states or self.axes)

    def as_dict(self) -> dict[str, Any]:
        """The facts as JSON-ready values, which archives record."""
        return {
            "first_states": {str(number): first for number, first in self.first_states.items()},
            "axes": {kind: list(axes) for kind, axes in self.axes.items()},
        }

    @classmethod
    def from_dict(cls, found: Any) -> Self:
        """Facts that an archive records; what is none of them is left out."""
        parts = [found.get(name) if isinstance(found, dict) else None for name in _FACTS]
        first, axes = (each if isinstance(each, dict) else {} for each in parts)
        if max(len(first), len(axes)) > _MOST_FACTS:
            return cls()
        return cls(
            {
                int(number): each
                for number, each in first.items()
                if _is_count(number) and each in FIRST_STATES
            },
            {kind: tuple(each) for kind, each in axes.items() if _are_axes(each)},
        )

    def contradicts(self, other: RunFacts) -> bool:
        """Whether both say something else of the same thing."""
        mine, others = self.as_dict(), other.as_dict()
        return any(
            others[name].get(key, value) != value
            for name, facts in mine.items()
            for key, value in facts.items()
        )


_FACTS: Final = ("first_states", "axes")


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= len("100000")


def _are_axes(value: Any) -> bool:
    return isinstance(value, list) and "token" in value and all(type(each) is str for each in value)


@checked_options
@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingOptions:
    """What the user says about a source.

    Attributes
    ----------
    first_state
        What the first hidden state is: the ``embedding``, or the output of ``block`` 0. None: what
        the file establishes, see `h5traces.meaning.records`.
    keep_padding
        Keep padded positions and store the mask; by default they are cut.
    mapping
        A file that says which name holds which field, and what its axes are.
    layer_ids
        Layers of the hidden states, counted as vLLM does: 0 is the embedding, i the output of
        block i - 1. States lie in ascending order of ids.
    responses
        A file of JSON or JSON Lines with the responses of a server, which say of each request what
        its file does not: prompt length, answer, finish reason.
    run
        What other files of the same run establish; whoever reads several files of a run fills it.
    """

    first_state: FirstState | None = None
    keep_padding: bool = False
    mapping: str | os.PathLike[str] | None = None
    layer_ids: tuple[int, ...] | None = None
    responses: str | os.PathLike[str] | None = None
    run: RunFacts = RunFacts()

    def __post_init__(self) -> None:
        if self.first_state not in (None, *FIRST_STATES):
            message = f"first_state is {self.first_state!r}, expected 'embedding' or 'block'"
            raise OptionError(message)
        ids = self.layer_ids
        if ids is not None and (not ids or min(ids) < 0 or len(set(ids)) < len(ids)):
            message = f"layer_ids is {list(ids)}, expected different numbers from 0 on"
            raise OptionError(message)
        if ids is not None:
            # vLLM stores them sorted, however they were given.
            object.__setattr__(self, "layer_ids", tuple(sorted(ids)))
        if None not in (ids, self.first_state):
            message = "layer_ids and first_state both say what the first state is; leave one out"
            raise OptionError(message)
        if None not in (self.responses, self.mapping):
            message = "responses are read with files that need no mapping; leave one out"
            raise OptionError(message)
