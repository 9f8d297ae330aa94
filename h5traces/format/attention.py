"""How attention weights follow from queries and keys: attributes of stored queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import numpy as np
from pydantic import Field

from h5traces.format.document import Document

if TYPE_CHECKING:
    from numpy.typing import NDArray

Mask = Literal["causal", "window", "chunk", "all"]

# Keys j that query i sees.
MASKS: Final[dict[Mask, str]] = {
    "causal": "j ≤ i",
    "window": "i - ``window`` < j ≤ i",
    "chunk": "j ≤ i, from the last multiple of ``window`` up to i on",
    "all": "all",
}


class AttentionRule(Document):
    """What makes attention weights of queries and keys."""

    mask: Annotated[Mask, Field(description="Which keys a query sees.")]
    window: Annotated[
        int | None, Field(ge=1, description="Number of keys, of the masks that need one.")
    ] = None
    scale: Annotated[
        float,
        Field(allow_inf_nan=False, description="Factor of the product of a query and a key."),
    ]
    soft_cap: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="Bound on scores, if any.")
    ] = None
    slopes: Annotated[
        tuple[Annotated[float, Field(allow_inf_nan=False)], ...] | None,
        Field(description="What each head adds to a score for every key further on (ALiBi)."),
    ] = None
    sinks: Annotated[
        tuple[float, ...] | None,
        Field(
            description="Score of each head's learned sink, which takes weight and is not a key."
        ),
    ] = None

    def seen(self, rows: NDArray[np.int64], num_keys: int) -> tuple[NDArray[np.int64], ...]:
        """The first key that each query sees, and the one after the last; both ``(queries,)``."""
        if self.mask == "all":
            return np.zeros_like(rows), np.full_like(rows, num_keys)
        first = np.zeros_like(rows)
        if self.mask == "window":
            first = np.maximum(0, rows + 1 - self.size)
        elif self.mask == "chunk":
            first = rows - rows % self.size
        return first, rows + 1

    @property
    def size(self) -> int:
        """The window; SchemaError is raised where the document is read without one."""
        assert self.window is not None
        return self.window

    def model_post_init(self, _context: Any) -> None:
        """Reject a mask without the window that it needs, and a window that nothing needs."""
        if (self.window is None) != (self.mask in ("causal", "all")):
            message = f"mask {self.mask!r} with window {self.window}"
            raise ValueError(message)


RULE_ATTRS: Final = frozenset(AttentionRule.model_fields)
