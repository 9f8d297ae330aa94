"""Tokens of a sample by the characters of its texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.arguments import shown
from h5traces.errors import FieldNotFoundError, OptionError
from h5traces.format.kinds import CHAR_OFFSETS, PROMPT_TEXT, SPANS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from h5traces.archive.trace import Trace

ANSWER: Final = "generated_answer"
_QUESTION: Final = "question"
# What PyTorch's cross entropy ignores.
IGNORED: Final = -100


def tokens_of(trace: Trace, start: int, end: int, field: str) -> NDArray[np.intp]:
    """As `Trace.tokens_of`."""
    first, length = _place(trace, field)
    if not 0 <= start <= end <= length:
        message = (
            f"{trace._stored.place}: characters {start} to {end} lie outside of {field}, which has "
            f"{length}"
        )
        raise OptionError(message)
    return np.flatnonzero(_overlapping(trace, first + start, first + end))


def token_labels(
    trace: Trace, spans: Iterable[Any] | None, field: str, label: int
) -> NDArray[np.int64]:
    """As `Trace.token_labels`."""
    first, length = _place(trace, field)
    labels = np.full(trace.metadata.seq_len, IGNORED, dtype=np.int64)
    labels[_overlapping(trace, first, first + length)] = 0
    for span in _field(trace, SPANS) if spans is None else spans:
        labels[tokens_of(trace, *span_of(span), field)] = label
    return labels


def span_of(span: Any) -> tuple[int, int]:
    """The first character of a span, and the one behind its last.

    Raises
    ------
    OptionError
        `span` is neither a pair of numbers nor a dict with ``start`` and ``end``.
    """
    found: Any = (span.get("start"), span.get("end")) if isinstance(span, dict) else span
    is_pair = isinstance(found, (list, tuple)) and len(found) == 2
    if not is_pair or any(type(each) is not int for each in found):
        message = (
            f"a span is {shown(span)}, expected its first character and the one behind its last, "
            "as two numbers or as 'start' and 'end' of a dict"
        )
        raise OptionError(message)
    return found[0], found[1]


def _overlapping(trace: Trace, start: int, end: int) -> NDArray[np.bool_]:
    """Which tokens have one of these characters of prompt and answer."""
    offsets = np.asarray(_field(trace, CHAR_OFFSETS))
    return (offsets[:, 0] < end) & (offsets[:, 1] > start)


def _place(trace: Trace, field: str) -> tuple[int, int]:
    """Where a text begins in prompt and answer, and its length in characters."""
    prompt = _field(trace, PROMPT_TEXT)
    if field == PROMPT_TEXT:
        return 0, len(prompt)
    if field not in (ANSWER, _QUESTION):
        message = f"field is {shown(field)}, expected {ANSWER}, {PROMPT_TEXT} or {_QUESTION}"
        raise OptionError(message)
    text = _field(trace, field)
    first = len(prompt) if field == ANSWER else prompt.rfind(text)
    if first < 0:
        message = f"{trace._stored.place}: the prompt does not hold the question as it stands"
        raise OptionError(message)
    return first, len(text)


def _field(trace: Trace, name: str) -> Any:
    if name not in trace:
        message = (
            f"{trace._stored.place}: there is no field {name!r}; characters of tokens are known "
            "in archives that 'h5traces extract' wrote, spans where it was given them"
        )
        raise FieldNotFoundError(message)
    return trace[name]
