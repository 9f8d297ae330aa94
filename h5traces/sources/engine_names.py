"""Names that trainers of draft models write side by side in one sample.

EAGLE and SpecForge save `input_ids`, `loss_mask`, the last `hidden_state` and `aux_hidden_state`,
states of several layers side by side, in files of torch.save that end in ``.ckpt``; speculators
saves a list `hidden_states`. Which layers the states are of, they do not say.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from h5traces.format import layout
from h5traces.format.values import TorchValue

_TOKENS: Final = "input_ids"
_MASK: Final = "loss_mask"
_LAST: Final = "hidden_state"
_ASIDE: Final = "aux_hidden_state"


def is_of_engine(item: Any) -> bool:
    """Whether a dict is a sample with these names, none of them of the legacy fields."""
    return (
        isinstance(item, dict)
        and _rank(item.get(_TOKENS)) > 0
        and layout.TOKENS not in item
        and (layout.HIDDEN_STATES in item) is not (_LAST in item)
        and (_rank(item.get(_LAST)) > 1 if _LAST in item else _MASK in item)
    )


def by_field(item: dict[Any, Any]) -> tuple[dict[Any, Any], list[str]]:
    """Such a sample with the names of fields, and sentences that say what became of it."""
    found, told = dict(item), [f"{_TOKENS!r} holds the tokens"]
    found[layout.TOKENS] = _native(_row(found.pop(_TOKENS)))
    if _LAST not in found:
        return found, told
    last = found.pop(_LAST)
    states, width = [last], _data(last).shape[-1]
    aside = found.get(_ASIDE)
    if _rank(aside) == _rank(last) and width and _fits(aside, last):
        count = _data(aside).shape[-1] // width
        states = [_columns(found[_ASIDE], width, index) for index in range(count)] + states
        del found[_ASIDE]
        told.append(
            f"{_ASIDE!r} holds {count} states side by side, {_LAST!r} the last one: these are the "
            "hidden states, in this order"
        )
    else:
        told.append(f"{_LAST!r} is the only hidden state")
    return {layout.HIDDEN_STATES: states, **found}, told


def _data(value: Any) -> Any:
    return value.data if isinstance(value, TorchValue) else value


def _rank(value: Any) -> int:
    data = _data(value)
    return data.ndim if isinstance(data, np.ndarray) else 0


def _fits(aside: Any, last: Any) -> bool:
    """Whether arrays differ in their last axis only, and one is a multiple of the other."""
    wide, narrow = _data(aside).shape, _data(last).shape
    return (
        wide[:-1] == narrow[:-1]
        and wide[-1] >= narrow[-1]
        and wide[-1] % narrow[-1] == 0
        and getattr(aside, "dtype", None) == getattr(last, "dtype", None)
    )


def _with_data(value: Any, data: Any) -> Any:
    if isinstance(value, TorchValue):
        return TorchValue(data, value.dtype, value.container)
    return data


def _columns(value: Any, width: int, index: int) -> Any:
    return _with_data(value, _data(value)[..., index * width : (index + 1) * width])


def _row(value: Any) -> Any:
    """The only row of a batch of one."""
    data = _data(value)
    return _with_data(value, data[0]) if data.ndim == 2 and len(data) == 1 else value


def _native(value: Any) -> Any:
    data = _data(value)
    return _with_data(value, data.astype(data.dtype.newbyteorder("="), copy=False))
