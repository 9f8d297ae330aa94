"""The table of a sample's values that are no steps or levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from h5traces.format.attributes import Attrs

# Layer, flat index in it, and value.
EXCEPTION_COLUMNS: Final = 3


def num_exceptions(layers: Iterable[Attrs]) -> int:
    """Rows that the table of a kind must have, by what the attributes of its layers say."""
    counts = (each.get("num_exceptions", 0) for each in layers)
    return sum(each for each in counts if isinstance(each, int) and each > 0)
