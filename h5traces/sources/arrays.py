"""Named arrays: what a mapping sees of a file, whatever its kind is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from h5traces.format.values import TorchValue
from h5traces.meaning.axes import data_of, with_data

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_MAX_DEPTH: Final = 16
_MAX_LIST_DEPTH: Final = 8


class NamedArray(Protocol):
    """An array that is read on demand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis; empty for one value, such as a text."""

    @property
    def dtype(self) -> str:
        """Type of its elements, for messages: ``float16``, ``text``."""

    def read(self, axis: int | None = None, index: int = 0) -> Any:
        """An array, `TorchValue`, text or number: all, or one element along an axis."""


# Contents of one part of a file, by name.
Group = Mapping[str, NamedArray]


class ArrayFile(ABC):
    """A file, or a folder that is one set, as groups of named arrays; a context manager.

    A table has one group per row, other files have one in all.

    Attributes
    ----------
    kind
        For messages and reports.
    has_rows
        Whether every group is a sample.
    understood
        Sentences for reports, such as of links that are not followed.
    """

    kind: str
    has_rows: bool = False
    understood: tuple[str, ...] = ()

    @abstractmethod
    def groups(self) -> Iterator[Group]:
        """Its groups, once."""

    @property
    @abstractmethod
    def progress(self) -> tuple[int, int]:
        """Bytes read so far, and the size of the file, both in bytes."""

    def release(self, nbytes: int = 0) -> None:  # noqa: B027  # most have none to give back
        """Give back memory of what was read before: `nbytes`, maybe of memory maps."""

    @abstractmethod
    def close(self) -> None:
        """Close the file; arrays that were read stay valid."""


class Held:
    """A value in memory, or in a memory map."""

    def __init__(self, value: Any) -> None:
        self._value = value

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an array; the length of a list; empty for other values."""
        if isinstance(self._value, (list, tuple)):
            return (len(self._value),)
        return data_of(self._value).shape if is_array(self._value) else ()

    @property
    def dtype(self) -> str:
        """Of an array; the type of other values."""
        return dtype_name(self._value)

    def read(self, axis: int | None = None, index: int = 0) -> Any:
        """The value, or an element of it along an axis."""
        return self._value if axis is None else element(self._value, axis, index)


class Loaded:
    """An array that a function loads, once, for its shape and its elements."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._held: Held | None = None

    @property
    def _now(self) -> Held:
        if self._held is None:
            self._held = Held(self._load())
        return self._held

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self._now.shape

    @property
    def dtype(self) -> str:
        """Of the array."""
        return self._now.dtype

    def read(self, axis: int | None = None, index: int = 0) -> Any:
        """The array, which is then released, or an element along an axis."""
        found = self._now.read(axis, index)
        if axis is None:
            self._held = None
        return found


def element(value: Any, axis: int, index: int) -> Any:
    """One element along an axis: a view of an array; of no axes, or of a list, a value."""
    if isinstance(value, (list, tuple)):
        return value[index]
    selected: Any = (*(slice(None),) * axis, index)
    found = data_of(value)[selected]
    if isinstance(found, np.ndarray):
        return with_data(value, found)
    return found.item() if isinstance(found, np.generic) else found


def dtype_name(value: Any) -> str:
    """Type of an array's elements, or of another value, for messages."""
    if isinstance(value, TorchValue):
        return value.dtype
    if isinstance(value, np.ndarray):
        return "text" if value.dtype.kind in "US" else value.dtype.name
    return "text" if isinstance(value, str) else type(value).__name__


def flattened(value: Any) -> dict[str, NamedArray]:
    """What nested dicts and lists hold, by names such as ``hidden_states/0``.

    Lists and tuples that hold no array stay whole.
    """
    found: dict[str, NamedArray] = {}
    _flatten(value, "", found, 0)
    return found


def _flatten(value: Any, name: str, found: dict[str, NamedArray], depth: int) -> None:
    items: Any = None
    if depth < _MAX_DEPTH and isinstance(value, dict):
        items = value.items()
    elif depth < _MAX_DEPTH and isinstance(value, (list, tuple)) and _holds_array(value, depth):
        items = enumerate(value)
    if items is None:
        found[name or "value"] = Held(value)
        return
    for key, each in items:
        _flatten(each, f"{name}/{key}" if name else str(key), found, depth + 1)


def _holds_array(value: Any, depth: int) -> bool:
    # In lists that people write, all elements are alike.
    first = value[0] if value else None
    if depth < _MAX_DEPTH and isinstance(first, (list, tuple)):
        return _holds_array(first, depth + 1)
    return is_array(first) or isinstance(first, dict)


def is_array(value: Any) -> bool:
    """Whether it is an array or a tensor."""
    return isinstance(value, (np.ndarray, TorchValue))


def as_array(value: Any) -> Any:
    """Lists of numbers, nested or not, as arrays: int64, or float32 where it keeps every number.

    None among floats is NaN, as pandas writes it. Lists of anything else, and those of unequal
    lengths, stay as they are.
    """
    if not isinstance(value, list) or not value or not _is_numeric(value, 0):
        return value
    try:
        found = np.asarray(value)
        if found.dtype == object and set(map(type, found.flat)) == {float, type(None)}:
            found = found.astype(np.float64)
    except (ValueError, OverflowError):
        return value
    return narrowed(found) if found.dtype.kind in "iufb" else value


def narrowed(array: NDArray[Any]) -> NDArray[Any]:
    """Numbers of float64 as float32 where that keeps every one."""
    if array.dtype != np.float64:
        return array
    with np.errstate(over="ignore"):
        small = array.astype(np.float32)
    return small if np.array_equal(small, array, equal_nan=True) else array


def _is_numeric(value: list[Any], depth: int) -> bool:
    first = value[0]
    if isinstance(first, list):
        return depth < _MAX_LIST_DEPTH and bool(first) and _is_numeric(first, depth + 1)
    return first is None or isinstance(first, (int, float))
