"""Which layers and samples a user chooses: the text of the command line, and what it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Final, TypeVar

import numpy as np

from h5traces.arguments import shown
from h5traces.errors import LayerIndexError, SampleIndexError

LayerChoice = str | int | Iterable[int] | None
SampleChoice = str | slice | int | Iterable[int] | None

Item = TypeVar("Item")

_LAST: Final = "last"
_MOST_DIGITS: Final = 18
_LAYERS_FORM: Final = "expected 0-based numbers, ranges and 'last', such as 0,5,10-12,last"
_SAMPLES_FORM: Final = "expected indices such as 0,3,7 or a slice such as 0:100"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Layers and samples to keep, as ``archive.select`` takes them; None keeps all."""

    layers: LayerChoice = None
    samples: SampleChoice = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            _layer_ranges(self.layers)
        if isinstance(self.samples, str):
            _parsed_samples(self.samples)


def as_numbers(choice: int | Iterable[int]) -> tuple[int, ...]:
    """The numbers that a caller gave: one, or several."""
    return tuple(choice) if isinstance(choice, Iterable) else (index(choice),)


def sliced(items: Sequence[Item], chosen: slice) -> Sequence[Item]:
    """A part of a sequence; SampleIndexError for a slice that is none of numbers."""
    try:
        return items[chosen]
    except (TypeError, ValueError) as error:
        message = f"{shown(chosen)} is not a slice of numbers ({error}); {_SAMPLES_FORM}"
        raise SampleIndexError(message) from error


def check_named_once(choice: str | int | Sequence[int] | None) -> None:
    """Reject a layer that is named twice; ranges and ``last`` may overlap others."""
    if choice is None:
        return
    if isinstance(choice, str):
        bounds = _layer_ranges(choice)
        named = [low for low, high in bounds if low is not None and low == high]
    else:
        named = list(as_numbers(choice))
    repeated = [each for each in named if named.count(each) > 1]
    if repeated:
        message = f"layer {repeated[0]} is named more than once; name each layer once"
        raise LayerIndexError(message)


def choose_layers(
    choice: LayerChoice, available: Sequence[int], owner: str = "the model has"
) -> tuple[int, ...]:
    """The chosen layer numbers, out of those available, ascending, each once.

    `owner` begins the sentence of the error that lists the available ones.
    """
    if choice is None:
        return tuple(available)
    last = available[-1] if available else -1
    wanted: set[int] = set()
    if isinstance(choice, str):
        for low, high in _layer_ranges(choice):
            low, high = (last if each is None else each for each in (low, high))
            # A range that a typing error made huge must not fill the memory.
            wanted |= set(range(low, max(low, min(high, last + 1)) + 1))
    else:
        wanted = set(as_numbers(choice))
    for layer in sorted(wanted.difference(available)):
        message = (
            f"layer {layer} was asked for, but {owner} {len(available)} layers "
            f"({_listed(available)}); choose among these"
        )
        raise LayerIndexError(message)
    return tuple(sorted(wanted))


def choose_samples(choice: SampleChoice, num_samples: int) -> Sequence[int]:
    """The chosen indices out of `num_samples`, in the order of the choice."""
    every = range(num_samples)
    if choice is None:
        return every
    if isinstance(choice, str):
        choice = _parsed_samples(choice)
    if isinstance(choice, slice):
        return sliced(every, choice)
    indices = _indices(choice, num_samples)
    for each in indices:
        if not -num_samples <= each < num_samples:
            message = f"sample {each} was asked for, but there are {num_samples}, counted from 0"
            raise SampleIndexError(message)
    return tuple(every[each] for each in indices)


def _indices(choice: int | Iterable[int], num_samples: int) -> Sequence[int]:
    """Indices that a caller gave, or those that a mask of one bool per sample chooses."""
    # Arrays, tensors and columns of tables give Python's own numbers.
    plain = choice.tolist() if hasattr(choice, "tolist") else choice
    if not isinstance(plain, Iterable):
        return (index(plain),)
    values = list(plain)
    if not values or not all(isinstance(each, (bool, np.bool_)) for each in values):
        return [index(each) for each in values]
    if len(values) != num_samples:
        message = f"a mask of {len(values)} was given for {num_samples} samples"
        raise SampleIndexError(message)
    return [number for number, taken in enumerate(values) if taken]


def _layer_ranges(text: str) -> list[tuple[int | None, int | None]]:
    """First and last layer of every part; None stands for the last layer there is."""
    found = []
    for part in text.split(","):
        first, dash, end = (each.strip() for each in part.partition("-"))
        bounds = (first, end) if dash else (first, first)
        if not all(each == _LAST or _is_number(each) for each in bounds):
            message = f"{shown(part.strip())} is not a layer; {_LAYERS_FORM}"
            raise LayerIndexError(message)
        low, high = (None if each == _LAST else int(each) for each in bounds)
        if high is not None and (low is None or low > high):
            message = f"{shown(part.strip())} runs backwards; write the lower layer first"
            raise LayerIndexError(message)
        found.append((low, high))
    return found


def _is_number(text: str) -> bool:
    # `str.isdigit` takes superscripts, too, and `int` raises where a number is very long.
    return text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS


def _parsed_samples(text: str) -> slice | list[int]:
    try:
        if ":" in text:
            chosen = slice(*(int(part) if part.strip() else None for part in text.split(":")))
            range(0)[chosen]  # a step of 0 is an error
            return chosen
        return [int(part) for part in text.split(",")]
    except (ValueError, TypeError):
        message = f"{shown(text)} names no samples; {_SAMPLES_FORM}"
        raise SampleIndexError(message) from None


def _listed(numbers: Sequence[int]) -> str:
    if not numbers:
        return "none"
    if list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
