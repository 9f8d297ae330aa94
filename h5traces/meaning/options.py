"""How files of other programs are to be understood, where they do not say so themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from h5traces.arguments import checked_options
from h5traces.errors import OptionError

if TYPE_CHECKING:
    import os

FirstState = Literal["embedding", "block"]
FIRST_STATES: Final[tuple[FirstState, ...]] = get_args(FirstState)


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
    """

    first_state: FirstState | None = None
    keep_padding: bool = False
    mapping: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.first_state not in (None, *FIRST_STATES):
            message = f"first_state is {self.first_state!r}, expected 'embedding' or 'block'"
            raise OptionError(message)
