"""What a pickle may call, in general: names, unfinished values, and words for messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from h5traces.format.values import TorchValue
from h5traces.sources.pickle.source import reject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_SMALL_INT: Final = 1 << 63


class Meter(Protocol):
    """The running machine, as shims use it."""

    def charge(self, num_bytes: int) -> None:
        """Account for memory or work that a shim is about to create."""

    def load_storage(self, data: bytes) -> Any:
        """Read an embedded torch storage."""

    def read_raw(self, num_bytes: int) -> bytes:
        """Bytes that follow the opcode in the file, outside of any."""

    def load_nested(self) -> Any:
        """The value of a pickle that follows the opcode in the file."""

    def begin_object(self, items: dict[Any, Any]) -> None:
        """Take this dict for an object: it gets plain values only, and no state."""

    def check_keys(self, values: Iterable[Any], what: str) -> None:
        """Reject values that cannot be hashed in bounded time."""


@dataclass(frozen=True, eq=False)
class Shim:
    """A name that a pickle may use, and the function that replaces it."""

    name: str
    # None for what pickles only pass on.
    call: Callable[[Meter, tuple[Any, ...]], Any] | None = None
    # Of a storage type or a torch dtype.
    dtype: str | None = None


@dataclass(eq=False)
class Pending:
    """An array or dtype between its REDUCE and its BUILD.

    `slots` are the memo entries that must get the finished value.
    """

    what: str
    build: Callable[[Meter, Any], Any]
    slots: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A value that no trace can hold, until the field is known that holds it.

    Attributes
    ----------
    what
        What it is, after "is": ``a sparse tensor``.
    remedy
        What to do.
    """

    what: str
    remedy: str


@dataclass(frozen=True, eq=False)
class Marker:
    """A stack entry in place of a value that is not kept."""

    what: str


def type_name(value: Any) -> str:
    """The type of a value in words, for messages."""
    if isinstance(value, Shim):
        return f"the name {value.name}"
    if isinstance(value, Marker):
        return f"the {value.what}"
    if isinstance(value, Pending):
        return f"an unfinished {value.what}"
    if isinstance(value, TorchValue):
        return "a torch tensor"
    name = type(value).__name__
    return name if value is None else f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def plain_value(value: Any) -> Any:
    """The text of a torch dtype, as of a device; other values as they are."""
    if type(value) is Shim and value.dtype is not None and value.name.startswith("torch."):
        return value.name
    return value


def brief(value: Any) -> str:
    """A value in a few characters, for messages.

    Only flat values are shown: repr() of tuples that share their halves never ends.
    """
    if type(value) in (str, bytes):
        return repr(value[:40])
    if value is None or type(value) in (bool, int, float):
        return repr(value)[:40]
    return type_name(value)


def check_args(name: str, args: tuple[Any, ...], *counts: int) -> None:
    """Raise RejectedError unless a call has one of these numbers of arguments."""
    if len(args) not in counts:
        expected = " or ".join(str(count) for count in counts)
        reject(f"{name} is called with {len(args)} arguments, expected {expected}")


def is_small_int(value: Any) -> bool:
    """Whether it is an int of 64 bits; hashes of these cannot be chosen to collide."""
    return type(value) is int and -_SMALL_INT < value < _SMALL_INT
