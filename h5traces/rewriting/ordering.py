"""Orders of the samples of several archives that do not depend on how they were divided."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Literal

from h5traces.arguments import shown
from h5traces.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace

Order = Literal["id", "source", "index"]
_NUMBER: Final = re.compile("([0-9]+)")


def ordered(archive: Archive, order: Order | None) -> list[int] | None:
    """Indices of all samples in an order; None for the stored order.

    Raises
    ------
    OptionError
        A sample does not record what it would be sorted by.
    """
    if order is None:
        return None
    if not isinstance(order, str) or order not in _KEYS:
        message = f"order is {shown(order)}, expected {', '.join(_KEYS)}"
        raise OptionError(message)
    of, missing = _KEYS[order]
    keys = []
    for trace in archive:
        key = of(trace)
        if key is None:
            message = f"order is {order!r}, but {trace._stored.place} {missing}; leave order out"
            raise OptionError(message)
        keys.append(key)
    return sorted(range(len(keys)), key=keys.__getitem__)


def _by_id(trace: Trace) -> Any:
    name = trace.metadata.sample_id
    if name is None:
        return None
    # q9 before q10.
    parts = [int(part) if n % 2 else part for n, part in enumerate(_NUMBER.split(name))]
    return parts, name, trace.metadata.generation_index or 0


def _by_source(trace: Trace) -> Any:
    place, sources = trace.metadata.source, trace._stored.file.metadata.sources
    if place is None or sources is None:
        return None
    return sources[place.file].name, place.position


def _by_index(trace: Trace) -> Any:
    extraction = trace.metadata.extraction
    return None if extraction is None else (extraction.row, trace.metadata.generation_index or 0)


_KEYS: Final[dict[str, tuple[Callable[[Trace], Any], str]]] = {
    "id": (_by_id, "has no id"),
    "source": (_by_source, "records no file that it was converted from"),
    "index": (_by_index, "records no row of a data set, as extracted samples do"),
}
