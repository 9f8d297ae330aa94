"""Which tokens of a sequence are stored."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import numpy as np

from h5traces.arguments import shown
from h5traces.errors import ExtractionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALL: Final = "all"
SPANS: Final = "spans"
_PLACES: Final = (ALL, "prompt", "answer", "prompt_last", "last", SPANS)
_EVERY: Final = re.compile(r"every:([1-9][0-9]*)")


def check_tokens(tokens: str) -> None:
    """Reject a choice of tokens that there is not."""
    if tokens not in _PLACES and not _EVERY.fullmatch(tokens):
        message = f"tokens is {shown(tokens)}, expected {', '.join(_PLACES)} or every:N"
        raise ExtractionError(message)


def kept_tokens(
    tokens: str, prompt_len: int, length: int, in_spans: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """Places of the tokens that are kept, ascending; `in_spans` says which are in a span."""
    places = np.arange(length)
    every = _EVERY.fullmatch(tokens)
    if every:
        return places[:: int(every[1])]
    if tokens == SPANS:
        return places if in_spans is None else np.flatnonzero(in_spans)
    chosen = {
        ALL: slice(None),
        "prompt": slice(prompt_len),
        "answer": slice(prompt_len, None),
        "prompt_last": slice(prompt_len - 1, prompt_len),
        "last": slice(-1, None),
    }
    return places[chosen[tokens]]
