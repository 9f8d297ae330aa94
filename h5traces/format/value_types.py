"""Python's further types among the extra fields: each is a name, and plain content to make it of.

``schema/SPEC.md``, section Extra fields, has the same table. The content consists of values that
have an encoding, these types included; `make` raises ValueError, TypeError or ArithmeticError on
content that does not fit.
"""

from __future__ import annotations

import argparse
import datetime
import types
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# What a defaultdict may make: nothing else can be called for a missing key.
FACTORIES: Final[dict[str, Callable[[], Any]]] = {
    each.__name__: each for each in (list, dict, set, tuple, int, float, str, bool)
}
# Of the numbers that a fraction or decimal is made of; arithmetic on longer ones takes long.
MAX_NUMBER_NBYTES: Final = 1024
MAX_NUMBER_CHARS: Final = 2500


@dataclass(frozen=True, slots=True)
class ValueType:
    """A type of Python by its name in archives.

    Attributes
    ----------
    name
        In archives.
    says
        What the content is, for SPEC.md.
    type
        Values of exactly this type are stored so.
    content
        What a value is made of, as a value that has an encoding.
    make
        The value, of its content.
    """

    name: str
    says: str
    type: type
    content: Callable[[Any], Any]
    make: Callable[[Any], Any]


def plain_content(value: Any) -> tuple[ValueType, Any] | None:
    """How a value is stored, and its content; None for a type that is not in the table."""
    kind = BY_TYPE.get(type(value))
    if kind is None:
        if type(value) is np.ndarray and value.dtype.kind == "O":
            kind = BY_NAME["object-array"]
        else:
            return None
    return kind, kind.content(value)


def with_content(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with its content changed; `value` itself if its type is not in the table."""
    found = plain_content(value)
    return value if found is None else found[0].make(change(found[1]))


# --- content, and values of it -------------------------------------------------------------------


def _in_order(value: set[Any] | frozenset[Any]) -> list[Any]:
    # A set has another order in every process; an archive should not.
    return sorted(value, key=lambda each: (type(each).__name__, repr(each)))


def _datetime(value: datetime.datetime | datetime.time) -> Any:
    if value.tzinfo is not None and type(value.tzinfo) is not datetime.timezone:
        message = (
            f"a {type(value).__name__} with the time zone {value.tzinfo} has no encoding; store "
            "its isoformat(), or convert it with astimezone(datetime.timezone.utc)"
        )
        raise ValueError(message)
    return [value.isoformat(), 1] if value.fold else value.isoformat()


def _from_iso(kind: Any) -> Callable[[Any], Any]:
    def make(content: Any) -> Any:
        text, fold = content if isinstance(content, list) else (content, 0)
        return kind.fromisoformat(text).replace(fold=fold)

    return make


def decimal_of(text: Any) -> Decimal:
    """The decimal that a text of bounded length says."""
    if type(text) is not str or len(text) > MAX_NUMBER_CHARS:
        message = f"a decimal is made of {str(text)[:40]!r}, expected a text of a number"
        raise ValueError(message)
    return Decimal(text)


def fraction_of(numerator: Any, denominator: Any) -> Fraction:
    """The fraction of two ints of bounded length."""
    for each in (numerator, denominator):
        if type(each) is not int or each.bit_length() > 8 * MAX_NUMBER_NBYTES:
            message = "a fraction is not made of two ints of bounded length"
            raise ValueError(message)
    return Fraction(numerator, denominator)


def _timedelta(days: int, seconds: int, microseconds: int) -> datetime.timedelta:
    return datetime.timedelta(days, seconds, microseconds)


def namespace_of(kind: Callable[[], Any], content: Any) -> Any:
    """A namespace with the attributes of a dict."""
    made = kind()
    vars(made).update(_checked_dict(content))
    return made


def default_dict_of(factory: Any, content: Any) -> defaultdict[Any, Any]:
    """A defaultdict; its factory is a name of `FACTORIES`, or None."""
    return defaultdict(None if factory is None else FACTORIES[factory], _checked_dict(content))


def _factory_name(value: defaultdict[Any, Any]) -> str | None:
    factory: Any = value.default_factory
    if factory is not None and FACTORIES.get(getattr(factory, "__name__", "")) is not factory:
        message = (
            f"a defaultdict that makes {factory!r} has no encoding; expected one that makes "
            f"{', '.join(FACTORIES)}, or store dict(value)"
        )
        raise ValueError(message)
    return None if factory is None else str(factory.__name__)


def _checked_dict(content: Any) -> dict[Any, Any]:
    if type(content) is not dict:
        message = f"found {type(content).__name__}, expected a dict"
        raise TypeError(message)
    return content


def _checked_list(content: Any) -> list[Any]:
    if type(content) is not list:
        message = f"found {type(content).__name__}, expected a list"
        raise TypeError(message)
    return content


def object_array(shape: Any, values: list[Any], order: Any = "C") -> NDArray[Any]:
    """An array of objects; `values` in the order of memory."""
    array = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        array[index] = value
    return array.reshape(tuple(shape), order=order)


def _path(kind: type, local: type) -> ValueType:
    def make(content: Any) -> Any:
        try:
            return local(content)
        except NotImplementedError:  # a path of the other system
            return kind(content)

    return ValueType(local.__name__, "text", local, str, make)


TABLE: Final = (
    ValueType(
        "set", "list, in any order", set, _in_order, lambda content: set(_checked_list(content))
    ),
    ValueType(
        "frozenset",
        "list, in any order",
        frozenset,
        _in_order,
        lambda content: frozenset(_checked_list(content)),
    ),
    ValueType(
        "deque",
        "list of the maximal length, or null, and the list of items",
        deque,
        lambda value: [value.maxlen, list(value)],
        lambda content: deque(_checked_list(content[1]), content[0]),
    ),
    ValueType("OrderedDict", "dict", OrderedDict, dict, lambda c: OrderedDict(_checked_dict(c))),
    ValueType("Counter", "dict", Counter, dict, lambda content: Counter(_checked_dict(content))),
    ValueType(
        "defaultdict",
        "list of what it makes (`list`, `dict`, `set`, `tuple`, `int`, `float`, `str`, `bool`), or "
        "null, and the dict",
        defaultdict,
        lambda value: [_factory_name(value), dict(value)],
        lambda content: default_dict_of(*content),
    ),
    ValueType(
        "SimpleNamespace",
        "dict of the attributes",
        types.SimpleNamespace,
        lambda value: dict(vars(value)),
        lambda content: namespace_of(types.SimpleNamespace, content),
    ),
    ValueType(
        "Namespace",
        "dict of the attributes (of argparse)",
        argparse.Namespace,
        lambda value: dict(vars(value)),
        lambda content: namespace_of(argparse.Namespace, content),
    ),
    ValueType("PurePosixPath", "text", PurePosixPath, str, PurePosixPath),
    ValueType("PureWindowsPath", "text", PureWindowsPath, str, PureWindowsPath),
    _path(PurePosixPath, PosixPath),
    _path(PureWindowsPath, WindowsPath),
    ValueType(
        "datetime",
        "text of ISO 8601; where Python's `fold` is 1, the list of the text and 1",
        datetime.datetime,
        _datetime,
        _from_iso(datetime.datetime),
    ),
    ValueType("time", "as `datetime`", datetime.time, _datetime, _from_iso(datetime.time)),
    ValueType(
        "date",
        "text of ISO 8601",
        datetime.date,
        datetime.date.isoformat,
        datetime.date.fromisoformat,
    ),
    ValueType(
        "timedelta",
        "list of days, seconds, microseconds",
        datetime.timedelta,
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda content: _timedelta(*content),
    ),
    ValueType("Decimal", "text", Decimal, str, decimal_of),
    ValueType(
        "Fraction",
        "list of numerator and denominator",
        Fraction,
        lambda value: [value.numerator, value.denominator],
        lambda content: fraction_of(*content),
    ),
    ValueType("UUID", "text", UUID, str, UUID),
    ValueType(
        "complex",
        "list of two floats",
        complex,
        lambda value: [value.real, value.imag],
        lambda content: complex(*map(float, content)),
    ),
    ValueType(
        "range",
        "list of start, stop, step",
        range,
        lambda value: [value.start, value.stop, value.step],
        lambda content: range(*content),
    ),
    ValueType(
        "slice",
        "list of start, stop, step",
        slice,
        lambda value: [value.start, value.stop, value.step],
        lambda content: slice(*content),
    ),
    ValueType(
        "object-array",
        "list of the list of lengths and the list of values, in C order: a numpy array of objects",
        # Its type is not enough to tell: see `plain_content`.
        type(None),
        lambda value: [list(value.shape), value.ravel().tolist()],
        lambda content: object_array(content[0], _checked_list(content[1])),
    ),
)
BY_NAME: Final = {each.name: each for each in TABLE}
BY_TYPE: Final = {each.type: each for each in TABLE if each.name != "object-array"}
