"""Shims of Python's own types: what makes sets, paths, dates, numbers and namespaces.

Every function builds the value itself of checked parts; none is what the pickle names.
"""

from __future__ import annotations

import argparse
import datetime
import re
import types
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from fractions import Fraction
from pathlib import PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import numpy as np

from h5traces.format.value_types import (
    FACTORIES,
    MAX_NUMBER_CHARS,
    decimal_of,
    fraction_of,
)
from h5traces.sources.pickle.calls import (
    Pending,
    Shim,
    brief,
    check_args,
    is_small_int,
    type_name,
)
from h5traces.sources.pickle.source import reject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from h5traces.sources.pickle.calls import Meter

# Made empty and filled by later opcodes; a pickler writes nothing else.
DICTS: Final = (dict, OrderedDict, defaultdict, Counter)
NAMESPACES: Final = (types.SimpleNamespace, argparse.Namespace)

_SALTED: Final = frozenset({str, bytes, type(None), bool})
# Their hashes can be chosen to collide, so that a set of many takes quadratic time.
_HASHABLE: Final = _SALTED | {
    *(
        int,
        float,
        complex,
        Decimal,
        Fraction,
        UUID,
        datetime.date,
        datetime.time,
        datetime.datetime,
    ),
    *(datetime.timedelta, PurePosixPath, PureWindowsPath, PosixPath, WindowsPath, range),
    *(set(np.sctypeDict.values()) - {np.void, np.object_}),
}
# Values without values inside, in items.
LEAVES: Final = _HASHABLE | {slice}
MAX_UNSALTED: Final = 10_000
_MAX_KEY_LEAVES: Final = 64
_MAX_KEY_DEPTH: Final = 4
_FRACTION: Final = re.compile(r"(-?\d+)(?:/(\d+))?")


def check_hashable(values: Iterable[Any], what: str) -> int:
    """How many of these could collide; RejectedError unless all are small values with a hash."""
    num_unsalted = 0
    for value in values:
        if type(value) not in _SALTED and not is_small_int(value):
            num_unsalted += 1
            _check_key(value, what, depth=0)
    return num_unsalted


def _check_key(value: Any, what: str, depth: int) -> int:
    """How many leaves a key has; deep and shared tuples would be hashed without end."""
    kind = type(value)
    if kind in (tuple, frozenset):
        if depth == _MAX_KEY_DEPTH:
            reject(f"{what} is a tuple of tuples, deeper than {_MAX_KEY_DEPTH} levels")
        num_leaves = 0
        for each in value:
            num_leaves += _check_key(each, what, depth + 1)
            if num_leaves > _MAX_KEY_LEAVES:
                reject(f"{what} is a tuple of more than {_MAX_KEY_LEAVES} values")
        return max(1, num_leaves)
    if kind is int and not is_small_int(value):
        reject(f"{what} is a larger int, expected one below 2**63")
    if kind not in _HASHABLE:
        reject(f"{what} is {type_name(value)}, expected text, a number, a date or a tuple of them")
    return 1


# --- containers ----------------------------------------------------------------------------------


def _values(name: str, args: tuple[Any, ...]) -> list[Any]:
    check_args(name, args, 0, 1)
    values = args[0] if args else []
    if type(values) not in (list, tuple):
        reject(f"{name} is called with {type_name(values)}, expected a list")
    return list(values)


def _set(meter: Meter, args: tuple[Any, ...]) -> set[Any]:
    values = _values("set", args)
    meter.charge(64 * len(values))
    meter.check_keys(values, "an element of a set")
    return set(values)


def _frozenset(meter: Meter, args: tuple[Any, ...]) -> frozenset[Any]:
    return frozenset(_set(meter, args))


def _deque(_meter: Meter, args: tuple[Any, ...]) -> deque[Any]:
    check_args("collections.deque", args, 0, 1, 2)
    if args and args[0] not in ((), []):
        reject("collections.deque is called with values, expected none: they follow")
    most = args[1] if len(args) == 2 else None
    if most is not None and (type(most) is not int or most < 0 or not is_small_int(most)):
        reject(f"collections.deque is called with a length of {brief(most)}")
    return deque(maxlen=most)


def _ordered_dict(_meter: Meter, args: tuple[Any, ...]) -> OrderedDict[Any, Any]:
    check_args("collections.OrderedDict", args, 0)
    return OrderedDict()


def _default_dict(_meter: Meter, args: tuple[Any, ...]) -> defaultdict[Any, Any]:
    check_args("collections.defaultdict", args, 0, 1)
    factory = args[0] if args else None
    if factory is None:
        return defaultdict(None)
    name = factory.name.rpartition(".")[2] if type(factory) is Shim else ""
    if name not in FACTORIES:
        reject(
            f"a defaultdict makes {type_name(factory)}, expected {', '.join(FACTORIES)}; save "
            f"dict(...) of it instead"
        )
    return defaultdict(FACTORIES[name])


def _counter(_meter: Meter, args: tuple[Any, ...]) -> Counter[Any]:
    check_args("collections.Counter", args, 0, 1)
    if args and type(args[0]) is not dict:
        reject(f"collections.Counter is called with {type_name(args[0])}, expected a dict")
    found: Counter[Any] = Counter()
    dict.update(found, args[0] if args else {})
    return found


def _namespace(kind: Callable[[], Any]) -> Callable[[Meter, tuple[Any, ...]], Any]:
    def make(_meter: Meter, args: tuple[Any, ...]) -> Any:
        check_args(kind.__name__, args, 0)
        return kind()

    return make


def fill_namespace(namespace: Any, state: Any) -> None:
    """Set the attributes of a namespace, as BUILD does."""
    if type(state) is not dict or not all(type(key) is str for key in state):
        reject(f"the state of a namespace is {type_name(state)}, expected a dict of names")
    vars(namespace).update(state)


# --- leaves --------------------------------------------------------------------------------------


def _path(kind: type, local: type) -> Callable[[Meter, tuple[Any, ...]], Any]:
    def make(meter: Meter, args: tuple[Any, ...]) -> Any:
        if not all(type(part) is str for part in args):
            reject(f"{local.__name__} is called with something else than the parts of a path")
        if any("\0" in part for part in args):
            reject("a path holds the character NUL")
        meter.charge(sum(map(len, args)))
        try:
            return local(*args)
        except NotImplementedError:  # a path of the other system
            return kind(*args)

    return make


def _dated(kind: Any, num_bytes: int) -> Callable[[Meter, tuple[Any, ...]], Any]:
    """date, time or datetime: of a few bytes that their constructors check, and a time zone."""

    def make(_meter: Meter, args: tuple[Any, ...]) -> Any:
        check_args(kind.__name__, args, 1, 2)
        if type(args[0]) is not bytes or len(args[0]) != num_bytes:
            reject(f"{kind.__name__} is called with {type_name(args[0])}, expected its bytes")
        if len(args) == 2 and type(args[1]) is not datetime.timezone:
            reject(
                f"a {kind.__name__} has {type_name(args[1])} for its time zone, expected "
                f"datetime.timezone"
            )
        return kind(*args)

    return make


def _timedelta(_meter: Meter, args: tuple[Any, ...]) -> datetime.timedelta:
    check_args("timedelta", args, 3)
    return datetime.timedelta(*_small_ints("timedelta", args))


def _timezone(_meter: Meter, args: tuple[Any, ...]) -> datetime.timezone:
    check_args("timezone", args, 1, 2)
    if type(args[0]) is not datetime.timedelta:
        reject(f"timezone is called with {type_name(args[0])}, expected a timedelta")
    return datetime.timezone(args[0])


def _small_ints(name: str, args: tuple[Any, ...]) -> tuple[int, ...]:
    for each in args:
        if type(each) is not int or not is_small_int(each):
            reject(f"{name} is called with {brief(each)}, expected a small int")
    return args


def _decimal(_meter: Meter, args: tuple[Any, ...]) -> Decimal:
    check_args("Decimal", args, 1)
    if type(args[0]) is not str or len(args[0]) > MAX_NUMBER_CHARS:
        reject(f"Decimal is called with {brief(args[0])}, expected the text of a number")
    return decimal_of(args[0])


def _fraction(_meter: Meter, args: tuple[Any, ...]) -> Any:
    check_args("Fraction", args, 1, 2)
    parts = args
    if len(args) == 1:
        text = args[0] if type(args[0]) is str and len(args[0]) <= MAX_NUMBER_CHARS else ""
        match = _FRACTION.fullmatch(text)
        if match is None:
            reject(f"Fraction is called with {brief(args[0])}, expected the text of a fraction")
        parts = (int(match[1]), int(match[2] or 1))
    return fraction_of(*parts)


def _uuid(_meter: Meter, args: tuple[Any, ...]) -> Pending:
    check_args("UUID", args, 0)
    return Pending("UUID", _finish_uuid)


def _finish_uuid(_meter: Meter, state: Any) -> UUID:
    number = state.get("int") if type(state) is dict else None
    if type(number) is not int:
        reject(f"the state of a UUID is {type_name(state)}, expected a dict with its int")
    return UUID(int=number)


def _complex(_meter: Meter, args: tuple[Any, ...]) -> complex:
    check_args("complex", args, 2)
    if not all(type(each) is float for each in args):
        reject("complex is called with something else than two floats")
    return complex(*args)


def _range(_meter: Meter, args: tuple[Any, ...]) -> range:
    check_args("range", args, 3)
    return range(*_small_ints("range", args))


def _slice(_meter: Meter, args: tuple[Any, ...]) -> slice:
    check_args("slice", args, 3)
    _small_ints("slice", tuple(each for each in args if each is not None))
    return slice(*args)


def _reconstructor(meter: Meter, args: tuple[Any, ...]) -> Any:
    """What protocols 0 and 1 write for a new object of a class."""
    check_args("_reconstructor", args, 3)
    kind, base, state = args
    if type(kind) is not Shim or kind.call is None or base is not OBJECT or state is not None:
        reject(f"_reconstructor is called with {type_name(kind)}, expected an allowed class")
    return kind.call(meter, ())


OBJECT: Final = Shim("object")
_BUILTINS: Final = ("builtins", "__builtin__")
_PATHLIB: Final = ("pathlib", "pathlib._local")


def _named() -> dict[tuple[str, str], Shim]:
    calls: tuple[tuple[tuple[str, ...], str, Any], ...] = (
        (_BUILTINS, "set", _set),
        (_BUILTINS, "frozenset", _frozenset),
        (_BUILTINS, "complex", _complex),
        (_BUILTINS, "range", _range),
        (("__builtin__",), "xrange", _range),
        (_BUILTINS, "slice", _slice),
        (("collections", "_collections"), "deque", _deque),
        (("collections",), "OrderedDict", _ordered_dict),
        (("collections",), "defaultdict", _default_dict),
        (("collections",), "Counter", _counter),
        (("types",), "SimpleNamespace", _namespace(types.SimpleNamespace)),
        (("argparse",), "Namespace", _namespace(argparse.Namespace)),
        (_PATHLIB, "PurePosixPath", _path(PurePosixPath, PurePosixPath)),
        (_PATHLIB, "PureWindowsPath", _path(PureWindowsPath, PureWindowsPath)),
        (_PATHLIB, "PosixPath", _path(PurePosixPath, PosixPath)),
        (_PATHLIB, "WindowsPath", _path(PureWindowsPath, WindowsPath)),
        (("datetime",), "datetime", _dated(datetime.datetime, 10)),
        (("datetime",), "date", _dated(datetime.date, 4)),
        (("datetime",), "time", _dated(datetime.time, 6)),
        (("datetime",), "timedelta", _timedelta),
        (("datetime",), "timezone", _timezone),
        (("decimal",), "Decimal", _decimal),
        (("fractions",), "Fraction", _fraction),
        (("uuid",), "UUID", _uuid),
        (("copyreg", "copy_reg"), "_reconstructor", _reconstructor),
    )
    named = {
        (module, name): Shim(f"{modules[0]}.{name}", call)
        for modules, name, call in calls
        for module in modules
    }
    # What a defaultdict may make; these are never called.
    for module in _BUILTINS:
        named |= {
            (module, name): Shim(f"builtins.{name}")
            for name in FACTORIES
            if (module, name) not in named
        }
        named[module, "object"] = OBJECT
    return named


PLAIN_NAMES: Final = _named()
