"""Which decoder block an item of a layered field is, and whether the first one is the embedding.

transformers gives N + 1 hidden states for N blocks: the embedding first, and the last one after the
model's final norm. The old pipeline dropped the embedding, so that item i was block i. Attentions
are N. So one hidden state more than attentions means that the first is the embedding, and as many
that none is. Without attentions nobody knows, unless the user, or an earlier sample, says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.format.text import counted
from h5traces.meaning.checks import Finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from h5traces.meaning.containers import Apart
    from h5traces.meaning.options import FirstState, RunFacts


FIRST_STATE_UNKNOWN: Final = Finding(
    "first-state-unknown",
    layout.HIDDEN_STATES,
    "nothing says whether the first is the embedding or block 0; stored by position",
)


@dataclass(slots=True)
class Established:
    """What samples of one source, and other files of its run, have established so far.

    Attributes
    ----------
    num_blocks
        Decoder blocks, the largest number so far; 0 where no sample says which is which, or some
        are missing.
    numbers
        Numbers of blocks, else positions, that samples have; ascending.
    by_position
        Whether a sample has positions.
    num_layers
        Decoder blocks of the model, where the user says so.
    first_states
        By number of hidden states, what the first of them is.
    axes
        Order of axes of stacked arrays by kind, and axes of kinds that the format does not name.
    """

    num_blocks: int = 0
    numbers: tuple[int, ...] = ()
    by_position: bool = False
    num_layers: int | None = None
    first_states: dict[int, FirstState] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RunFacts) -> Established:
        """What is known before the first sample."""
        return cls(first_states=dict(run.first_states), axes=dict(run.axes))

    def add(self, numbered: Numbered) -> None:
        """Note the numbers of a kind."""
        found = (layout.parse_layer_name(each) for each in numbered.names)
        numbers = {each for each in found if each is not None}
        self.numbers = tuple(sorted(numbers.union(self.numbers)))
        if any(map(layout.is_position, numbered.names)):
            self.by_position = True
        elif len(numbers) == max(numbers, default=-1) + 1:
            # After a gap there may be more: blocks 0, 5 and 10 are of any model with 11 or more.
            self.num_blocks = max(self.num_blocks, len(numbers))


@dataclass(frozen=True, slots=True)
class Numbered:
    """Names of the items of a kind, such as ``layer_000``, and where each was taken."""

    names: tuple[str, ...]
    sites: tuple[str | None, ...]

    @property
    def has_embedding(self) -> bool:
        """Whether one of them is the embedding."""
        return layout.EMBEDDING in self.names


def num_blocks_of(apart: dict[str, Apart]) -> int | None:
    """How many blocks the model has; None without attentions, or where keys leave out blocks."""
    counts = {kind: len(each.items) for kind, each in apart.items() if each.items}
    counts.pop(layout.HIDDEN_STATES, None)
    if len(set(counts.values())) > 1:
        found = " and ".join(f"{number} {kind}" for kind, number in counts.items())
        message = f"there are {found}; expected the same number of both"
        raise ConversionError(message)
    if any(has_gaps(apart[kind]) for kind in counts):
        return None
    return next(iter(counts.values()), None)


def has_gaps(blocks: Apart) -> bool:
    """Whether the keys of a kind with one item per block leave out blocks."""
    numbers = blocks.numbers
    return numbers is not None and set(numbers) != set(range(len(numbers)))


def numbered_blocks(found: Apart) -> Numbered:
    """Items of a kind that has one per block: attentions, and further kinds."""
    numbers = range(len(found.items)) if found.numbers is None else found.numbers
    if None in numbers:
        message = (
            f"field {found.kind!r} is a dict with a key for the embedding, which has no "
            f"{found.kind}; leave it out"
        )
        raise ConversionError(message)
    names = tuple(layout.layer_name(each) for each in numbers if each is not None)
    return Numbered(names, (None,) * len(names))


def numbered_states(
    found: Apart,
    blocks: Apart | None,
    first_state: FirstState | None,
    num_layers: int | None,
    established: Established,
    *,
    has_sites: bool = True,
) -> Numbered:
    """Hidden states, whose first item may be the embedding.

    Parameters
    ----------
    found
        The hidden states.
    blocks
        A kind with one item per block, if there is one.
    first_state
        What the user says the first state is.
    num_layers
        Decoder blocks of the model, if the sample or the user says so.
    established
        What earlier samples said; added to.
    has_sites
        Whether they are transformers' own.

    Raises
    ------
    ConversionError
        Numbers of states and blocks, keys, and `first_state` contradict each other.
    """
    num_states = len(found.items)
    if blocks is not None and has_gaps(blocks):
        # Of some blocks only; the same keys say the same.
        blocks = blocks if set(blocks.numbers or ()) == set(found.numbers or ()) - {None} else None
    if found.numbers is not None and None in found.numbers:
        first: FirstState | None = "embedding"
    elif blocks is not None:
        first = _by_counts(num_states, len(blocks.items), blocks.kind)
    else:
        first = None
    if first is not None and first_state not in (None, first):
        _contradict(num_states, blocks, first, first_state)
    earlier = established.first_states.get(num_states)
    if blocks is None:
        first = first or first_state or _by_number(num_states, num_layers)
    if first is not None and earlier not in (None, first):
        found.note(
            "unlike-earlier", f"the first is the {first}, and the {earlier} in earlier samples"
        )
    is_told = first is None
    if blocks is None:
        first = first or earlier
    if first is None:
        found.findings.append(FIRST_STATE_UNKNOWN)
        positions = range(num_states) if found.numbers is None else found.numbers
        names = tuple(layout.position_name(each or 0) for each in positions)
        return Numbered(names, (None,) * num_states)
    established.first_states[num_states] = first
    numbered = _named(found, blocks, first)
    if first == "embedding":
        is_normed = has_sites and layout.SITE_FINAL_NORM in numbered.sites
        last = ", the last is after the norm" * is_normed
        as_told = ", as in other samples of the run" * is_told
        found.note("embedding-first", f"the first is the embedding{last}{as_told}")
    return numbered if has_sites else Numbered(numbered.names, (None,) * num_states)


def numbered_by_ids(found: Apart, blocks: Apart | None, ids: Sequence[int]) -> Numbered:
    """Hidden states of layers as vLLM counts them: 0 is the embedding, i the output of block i - 1.

    Raises
    ------
    ConversionError
        There is another number of states, keys say which layers they are, or there are attentions.
    """
    if found.numbers is not None or blocks is not None:
        message = (
            "field 'hidden_states' says itself which layers it has, by keys or beside attentions; "
            "leave layer_ids out"
        )
        raise ConversionError(message)
    if len(found.items) != len(ids):
        message = (
            f"field 'hidden_states' has {counted(len(found.items), 'state')}, but layer_ids names "
            f"{len(ids)}: {', '.join(map(str, ids))}; name the ids that the server was given"
        )
        raise ConversionError(message)
    names = tuple(layout.layer_name(each - 1) if each else layout.EMBEDDING for each in ids)
    sites = tuple(layout.SITE_BLOCK_OUTPUT if each else layout.SITE_EMBEDDING for each in ids)
    return Numbered(names, sites)


def _by_counts(num_states: int, num_blocks: int, kind: str) -> FirstState:
    if num_states not in (num_blocks, num_blocks + 1):
        message = (
            f"field 'hidden_states' has {num_states} layers for {num_blocks} of {kind!r}; expected "
            f"{num_blocks}, or {num_blocks + 1} with the embedding first"
        )
        raise ConversionError(message)
    return "block" if num_states == num_blocks else "embedding"


def _by_number(num_states: int, num_layers: int | None) -> FirstState | None:
    if num_layers is None or num_states not in (num_layers, num_layers + 1):
        return None
    return "block" if num_states == num_layers else "embedding"


def _contradict(
    num_states: int, blocks: Apart | None, first: FirstState, first_state: FirstState | None
) -> None:
    why = "its keys say" if blocks is None else f"{num_states} for {len(blocks.items)} blocks say"
    message = (
        f"field 'hidden_states': {why} that the first is the {first}, but first_state is "
        f"{first_state!r}; leave first_state out"
    )
    raise ConversionError(message)


def _named(found: Apart, blocks: Apart | None, first: FirstState) -> Numbered:
    """Names and sites if the first state is known."""
    num_states = len(found.items)
    numbers: list[int | None] = list(range(num_states))
    if found.numbers is not None:
        numbers = _numbers_of_keys(found, blocks, first)
    elif first == "embedding":
        numbers = [None, *range(num_states - 1)]
    known = [each for each in numbers if each is not None]
    last = max(known, default=None)
    # Dicts come from hooks as well, which take the last block before the norm or after it. Only
    # transformers' own states, and the lists of the old pipeline, are known.
    of_transformers = blocks is not None and len(numbers) > len(known) == len(blocks.items)
    sites_known = found.sequence != "dict" or of_transformers
    return Numbered(
        tuple(layout.EMBEDDING if each is None else layout.layer_name(each) for each in numbers),
        tuple(_site(each, last) if sites_known or each is None else None for each in numbers),
    )


def _numbers_of_keys(found: Apart, blocks: Apart | None, first: FirstState) -> list[int | None]:
    """Block numbers that the keys of a dict of hidden states stand for."""
    numbers = list(found.numbers or ())
    if None in numbers:
        return numbers
    if first == "embedding":
        # Numbered as transformers numbers its hidden states: 0 is the embedding.
        numbers = [each - 1 if each else None for each in numbers]
    expected = None
    if blocks is not None:
        expected = set(range(len(blocks.items)) if blocks.numbers is None else blocks.numbers)
    lacks_embedding = first == "embedding" and None not in numbers
    if lacks_embedding or (expected is not None and set(numbers) - {None} != expected):
        keys = ", ".join(map(repr, found.keys or ()))[:100]
        message = (
            f"field 'hidden_states' is a dict with the keys {keys}; expected the layer numbers of "
            "the attentions, or one more from 0 on, which is the embedding"
        )
        raise ConversionError(message)
    return numbers


def named_positions(names: Iterable[str], first: FirstState) -> dict[str, str]:
    """The layers of stored positions such as ``position_000``, once the first state is known.

    New names by old ones, without a site: nothing says where in a block numbers were taken.
    """
    shift = 1 if first == "embedding" else 0
    numbers = {name: (layout.parse_layer_name(name) or 0) - shift for name in names}
    return {
        name: layout.EMBEDDING if number < 0 else layout.layer_name(number)
        for name, number in numbers.items()
    }


def _site(layer: int | None, last: int | None) -> str:
    """transformers returns the last hidden state after the final norm."""
    if layer is None:
        return layout.SITE_EMBEDDING
    return layout.SITE_FINAL_NORM if layer == last else layout.SITE_BLOCK_OUTPUT
