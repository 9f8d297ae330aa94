"""The values of an item: a finite tree of known types, and how many bytes it takes."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.format.values import TorchValue
from h5traces.sources.pickle.calls import Marker, Unsupported, type_name
from h5traces.sources.pickle.plain import DICTS, LEAVES, NAMESPACES
from h5traces.sources.pickle.source import RejectedError, contradict, reject

if TYPE_CHECKING:
    from h5traces.sources.pickle.source import PickleLimits

# Of an array, list or dict that later items may refer to.
_SPARE_NBYTES: Final = 256 << 10
SPARE_VALUES: Final = 4096

_SIMPLE: Final = frozenset({type(None), bool, int, float})
_TEXTS: Final = frozenset({str, bytes, bytearray})
_SEQUENCES: Final = frozenset({list, tuple, deque, set, frozenset})
_CONTAINERS: Final = _SEQUENCES.union(DICTS, NAMESPACES)
KNOWN_LEAVES: Final = _SIMPLE | _TEXTS | LEAVES | {np.ndarray, TorchValue}


class TouchedError(RejectedError):
    """The pickle uses an item that was handed out; it may have been a part of the item."""


def check_item(item: Any, limits: PickleLimits) -> int:
    """Check that an item is a finite tree of known types, and return its bytes.

    A pickle of a hundred bytes can hold a list that contains itself, or tuples that share their
    halves and unfold to 2**100 leaves.
    """
    level = [item]
    nbytes = 0
    num_values = 0
    for _ in range(limits.max_depth + 1):
        inner = []
        for container in level:
            values = _children(container)
            num_values += len(values)
            if num_values > limits.max_item_opcodes:
                reject(
                    f"an item unfolds to more than {limits.max_item_opcodes:,} values; if the "
                    f"file is trusted, raise PickleLimits(max_item_opcodes=...)"
                )
            kinds = set(map(type, values))
            if kinds <= _SIMPLE:
                nbytes += 64 * len(values)
                continue
            for value in values:
                kind = type(value)
                if kind is str:
                    nbytes += 64 + len(value)
                elif has_children(value):
                    inner.append(value)
                elif kind in KNOWN_LEAVES:
                    nbytes += leaf_nbytes(value)
                elif kind is Marker:
                    raise touched(value)
                elif kind is Unsupported:
                    place = _place_of(item, value)
                    contradict(f"{place} is {value.what}, which no trace holds; {value.remedy}")
                else:
                    reject(f"an item holds {type_name(value)}, which no trace holds")
        if not inner:
            return nbytes
        level = inner
    reject(
        f"an item contains itself or is nested deeper than {limits.max_depth} levels; if the "
        f"file is trusted, raise PickleLimits(max_depth=...)"
    )


def _place_of(item: Any, wanted: Any) -> str:
    """Where in an item a value is, such as ``field 'hidden_states', index 3``."""
    level: list[tuple[str, Any]] = [("", item)]
    while level:
        inner = []
        for place, container in level:
            named = type(container) in DICTS
            for key, value in container.items() if named else enumerate(_children(container)):
                here = f"{place}, {'key' if named else 'index'} {key!r}"
                if value is wanted:
                    return here.removeprefix(", ").replace("key", "field", 1)
                if has_children(value):
                    inner.append((here, value))
        level = inner
    return "a value"


def has_children(value: Any) -> bool:
    """Whether a value is a container."""
    kind = type(value)
    return kind in _CONTAINERS or bool(kind is np.ndarray and value.dtype.kind == "O")


def _children(value: Any) -> Any:
    """The values in a container, which has a length."""
    kind = type(value)
    if kind in DICTS:
        return value.values()
    if kind in NAMESPACES:
        return vars(value).values()
    return value.ravel() if kind is np.ndarray else value


def leaf_nbytes(value: Any) -> int:
    """Bytes of a value that is none."""
    if type(value) is np.ndarray:
        return value.nbytes
    if type(value) is TorchValue:
        return value.data.nbytes
    return 64 + (len(value) if isinstance(value, (str, bytes, bytearray)) else 0)


def spare_nbytes(value: Any) -> int | None:
    """Bytes of a value that may be kept for later items; None for one that is too large."""
    if not has_children(value):
        nbytes = leaf_nbytes(value) if type(value) in KNOWN_LEAVES else _SPARE_NBYTES + 1
        return nbytes if nbytes <= _SPARE_NBYTES else None
    nbytes, num_values = 0, 0
    inner = [value]
    while inner:
        values = _children(inner.pop())
        num_values += 1 + len(values)
        if num_values > SPARE_VALUES:
            return None
        # Most containers are lists of words, and tuples of numbers.
        kinds = set(map(type, values))
        if kinds <= _SIMPLE:
            nbytes += 64 * len(values)
            continue
        if kinds == {str}:
            nbytes += 64 * len(values) + sum(map(len, values))
            values = ()
        for each in values:
            if has_children(each):
                inner.append(each)
            elif type(each) in KNOWN_LEAVES:
                nbytes += leaf_nbytes(each)
            else:
                return None
        if nbytes > _SPARE_NBYTES:
            return None
    return nbytes + 64 * num_values


def touched(marker: Marker) -> TouchedError:
    """The error for a marker in the place of a value."""
    message = f"the pickle uses the {marker.what} as a value, which no pickler of a batch does"
    return TouchedError(message)
