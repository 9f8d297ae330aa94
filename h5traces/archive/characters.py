"""Tokens of a sample by the characters of its texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.arguments import shown
from h5traces.errors import FieldNotFoundError, OptionError
from h5traces.format.kinds import CHAR_OFFSETS, PROMPT_TEXT, SPANS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

_ANSWER: Final = "generated_answer"
_QUESTION: Final = "question"
# What PyTorch's cross entropy ignores.
IGNORED: Final = -100


@dataclass(frozen=True)
class Characters:
    """The texts of a sample, by field; `place` is its name in messages."""

    fields: Mapping[str, Any]
    place: str

    def tokens_of(self, start: int, end: int, field: str) -> NDArray[np.intp]:
        """As `Trace.tokens_of`."""
        first, length = self._text(field)
        if not 0 <= start <= end <= length:
            message = (
                f"{self.place}: characters {start} to {end} lie outside of {field}, which has "
                f"{length}"
            )
            raise OptionError(message)
        return np.flatnonzero(self._overlapping(first + start, first + end))

    def labels(self, spans: Iterable[Any] | None, field: str, label: int) -> NDArray[np.int64]:
        """As `Trace.token_labels`."""
        first, length = self._text(field)
        in_text = self._overlapping(first, first + length)
        labels = np.where(in_text, 0, IGNORED).astype(np.int64)
        for span in self._field(SPANS) if spans is None else spans:
            labels[self.tokens_of(*span_of(span), field)] = label
        return labels

    def _overlapping(self, start: int, end: int) -> NDArray[np.bool_]:
        """Which tokens have one of these characters of prompt and answer."""
        offsets = np.asarray(self._field(CHAR_OFFSETS))
        found: NDArray[np.bool_] = (offsets[:, 0] < end) & (offsets[:, 1] > start)
        return found

    def _text(self, field: str) -> tuple[int, int]:
        """Where a text begins in prompt and answer, and its length in characters."""
        prompt = self._field(PROMPT_TEXT)
        if field == PROMPT_TEXT:
            return 0, len(prompt)
        if field not in (_ANSWER, _QUESTION):
            message = f"field is {shown(field)}, expected {_ANSWER}, {PROMPT_TEXT} or {_QUESTION}"
            raise OptionError(message)
        text = self._field(field)
        first = len(prompt) if field == _ANSWER else prompt.rfind(text)
        if first < 0:
            message = f"{self.place}: the prompt does not hold the question as it stands"
            raise OptionError(message)
        return first, len(text)

    def _field(self, name: str) -> Any:
        if name not in self.fields:
            message = (
                f"{self.place}: there is no field {name!r}; characters of tokens are known in "
                "archives that 'h5traces extract' wrote, spans where it was given them"
            )
            raise FieldNotFoundError(message)
        return self.fields[name]


def span_of(span: Any) -> tuple[int, int]:
    """The first character of a span, and the one after its last.

    Raises
    ------
    OptionError
        `span` is neither a pair of numbers nor a dict with ``start`` and ``end``.
    """
    found: Any = (span.get("start"), span.get("end")) if isinstance(span, dict) else span
    is_pair = isinstance(found, (list, tuple)) and len(found) == 2
    if not is_pair or any(type(each) is not int for each in found):
        message = (
            f"a span is {shown(span)}, expected its first character and the one after its last, "
            "as two numbers or as 'start' and 'end' of a dict"
        )
        raise OptionError(message)
    return found[0], found[1]
