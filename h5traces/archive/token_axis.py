"""What lies along the token axis of a sample's arrays: padding, prompt and answer.

All that reads archives asks here: features, datasets and graphs. ``docs/consumers.md`` has the
rules. The axis is that of tokens in states; of queries and of keys in attentions, whose queries are
the last ones of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from h5traces.errors import H5TracesError
from h5traces.format import layout
from h5traces.meaning.lengths import covered_tokens
from h5traces.meaning.padding import prompt_without_pads

if TYPE_CHECKING:
    from h5traces.archive.trace import Trace

# Of an axis.
Chosen = slice | NDArray[np.intp]
_ALL = slice(None)


class NoAnswerError(H5TracesError):
    """The answer cannot be cut out; what reads the archive says where."""


@dataclass(frozen=True, slots=True)
class TokenAxis:
    """The token axis of some arrays of a sample.

    Attributes
    ----------
    num_rows
        Length of the axis of tokens or queries.
    num_keys
        Length of the axis of keys; `num_rows` in states.
    mask
        Which keys are tokens and not padding, ``(num_keys,)``; None if all are.
    """

    num_rows: int
    num_keys: int
    mask: NDArray[np.bool_] | None

    @classmethod
    def of(cls, trace: Trace, axes: tuple[str, ...], shape: tuple[int, ...]) -> TokenAxis | None:
        """That of arrays with these axes and this shape; None if they have no tokens."""
        if "token" not in axes and "query" not in axes:
            return None
        num_rows = shape[axes.index("token" if "token" in axes else "query")]
        num_keys = shape[axes.index("key")] if "key" in axes else num_rows
        return cls(num_rows, num_keys, mask_of(trace.mask, num_keys))

    @property
    def _first(self) -> int:
        """The key that the first row belongs to."""
        return max(0, self.num_keys - self.num_rows)

    @property
    def row_mask(self) -> NDArray[np.bool_] | None:
        """Which rows are tokens and not padding; None if all are."""
        return None if self.mask is None else self.mask[self._first :]

    @property
    def rows(self) -> Chosen:
        """The rows that are tokens and not padding."""
        return _ALL if self.row_mask is None else np.flatnonzero(self.row_mask)

    @property
    def keys(self) -> Chosen:
        """The keys that are tokens and not padding."""
        return _ALL if self.mask is None else np.flatnonzero(self.mask)

    def tokens_of(self, rows: Chosen) -> Chosen:
        """The keys that rows belong to."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.num_rows)
            return slice(start + self._first, stop + self._first)
        return rows + self._first

    def prompt_len(self, trace: Trace, prompt_len: int | None = None) -> int:
        """How many of `keys` are the prompt's, by the stored length of the prompt or another.

        Raises
        ------
        NoAnswerError
            The length is not known or does not fit, or arrays do not belong to the tokens.
        """
        metadata = trace.metadata
        stated = metadata.prompt_len if prompt_len is None else prompt_len
        if stated is None:
            message = "the length of the prompt is not stored, so the answer cannot be cut out"
            raise NoAnswerError(message)
        num_tokens = metadata.seq_len if layout.TOKENS in trace._stored.objects else None
        if covered_tokens(num_tokens, self.num_keys) is None:
            message = (
                f"arrays of {self.num_keys} do not cover the {metadata.seq_len} stored tokens "
                f"(coverage {metadata.coverage!r}), so the answer cannot be cut out"
            )
            raise NoAnswerError(message)
        if not 0 <= stated <= metadata.seq_len:
            message = (
                f"a prompt of {stated} tokens does not fit a sequence of {metadata.seq_len}, so "
                "the answer cannot be cut out"
            )
            raise NoAnswerError(message)
        mask = trace.mask
        return stated if self.mask is None or mask is None else prompt_without_pads(stated, mask)

    def answer(self, trace: Trace, prompt_len: int | None = None) -> Chosen:
        """The rows of the answer's tokens; as `prompt_len`."""
        start = self.prompt_len(trace, prompt_len)
        if self.mask is None:
            return slice(max(0, start - self._first), self.num_rows)
        answer = np.flatnonzero(self.mask)[start:] - self._first
        return answer[answer >= 0]


def mask_of(mask: NDArray[np.bool_] | None, num_keys: int) -> NDArray[np.bool_] | None:
    """A sample's mask for this many keys; None if all are tokens, or it says nothing of them."""
    if mask is None or covered_tokens(len(mask), num_keys) is None or mask[:num_keys].all():
        return None
    return mask[:num_keys]
