"""Choices of layers as people write them: ``0,5,10-12,last``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from h5traces.errors import LayerIndexError

if TYPE_CHECKING:
    from collections.abc import Iterable

_LAST = "last"


def layer_numbers(choice: str | Iterable[int] | None, num_layers: int) -> tuple[int, ...]:
    """Layer numbers, ascending.

    Parameters
    ----------
    choice
        0-based numbers, or text such as ``0,5,10-12,last``; None for all layers.
    num_layers
        Decoder blocks of the model.

    Raises
    ------
    LayerIndexError
        The model has no such layer, or the text is no choice of layers.
    """
    if choice is None:
        return tuple(range(num_layers))
    wanted = _parsed(choice, num_layers) if isinstance(choice, str) else set(choice)
    for layer in sorted(wanted):
        if not 0 <= layer < num_layers:
            message = (
                f"layer {layer} was asked for, but the model has {num_layers} layers "
                f"(0 to {num_layers - 1}); change the choice of layers"
            )
            raise LayerIndexError(message)
    if not wanted:
        message = f"no layer was chosen; expected numbers from 0 to {num_layers - 1}"
        raise LayerIndexError(message)
    return tuple(sorted(wanted))


def _parsed(text: str, num_layers: int) -> set[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, dash, end = (each.strip() for each in part.partition("-"))
        bounds = [
            num_layers - 1 if each == _LAST else int(each) if _is_number(each) else None
            for each in ((first, end) if dash else (first,))
        ]
        if any(each is None for each in bounds):
            message = (
                f"{part.strip()!r} is no layer; expected 0-based numbers, ranges and 'last', "
                "such as 0,5,10-12,last"
            )
            raise LayerIndexError(message)
        low, high = bounds[0], bounds[-1]
        if low is not None and high is not None:
            if low > high:
                message = f"{part.strip()!r} runs backwards; write the lower layer first"
                raise LayerIndexError(message)
            # A range that a typing error made huge must not fill the memory.
            found |= set(range(low, max(low, min(high, num_layers)) + 1))
    return found


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
