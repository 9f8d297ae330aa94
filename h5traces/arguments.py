"""Checks the arguments of public functions against their annotations.

An argument of a wrong type then ends in one error that names it and says what was expected, not in
whatever a library says about it later. Annotations are read as they stand, as text: a name that
this module does not know is not checked.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar, get_args

from h5traces.errors import ArgumentError, OptionError

P = ParamSpec("P")
R = TypeVar("R")
Options = TypeVar("Options", bound=type)


class _Kind(NamedTuple):
    """What an annotation allows.

    Attributes
    ----------
    words
        What to call it.
    fits
        Whether a value is of the kind.
    choices
        The values allowed, where these are few.
    """

    words: str
    fits: Callable[[Any], bool]
    choices: tuple[object, ...] = ()


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: arguments of a wrong type or name end in an ArgumentError, before the call."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        _check_call(function, args, kwargs)
        return function(*args, **kwargs)

    return call


def checked_options(options: Options) -> Options:
    """Decorator of a dataclass: the same for its fields, when one is made."""
    options.__init__ = checked(options.__init__)  # type: ignore[misc]
    return options


def _check_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    signature, kinds = _specification(function)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(_wrong_call(function, signature, kwargs, error)) from None
    for name, value in bound.arguments.items():
        kind = kinds.get(name)
        if kind is not None:
            check_argument(name, value, kind)


@functools.cache
def _specification(
    function: Callable[..., Any],
) -> tuple[inspect.Signature, dict[str, tuple[_Kind, ...]]]:
    signature = inspect.signature(function)
    kinds = {}
    for each in signature.parameters.values():
        is_several = each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        found = None if is_several else kinds_of(each.annotation)
        if found is not None:
            kinds[each.name] = found
    return signature, kinds


def _wrong_call(
    function: Callable[..., Any],
    signature: inspect.Signature,
    kwargs: Mapping[str, Any],
    error: TypeError,
) -> str:
    name = function.__qualname__.removesuffix(".__init__")
    named = [each for each in signature.parameters if each != "self"]
    unknown = next((each for each in kwargs if each not in named), None)
    if unknown is None:
        return f"{name}(): {error}; its parameters: {', '.join(named)}"
    close = difflib.get_close_matches(unknown, named, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{name}() has no parameter {unknown!r}{hint} It has: {', '.join(named)}"


def check_argument(name: str, value: Any, kinds: tuple[_Kind, ...]) -> None:
    """Raise ArgumentError or OptionError if a value is of none of the kinds.

    OptionError where the type is right, and the value is none of the few that are allowed.
    """
    if any(kind.fits(value) for kind in kinds):
        _check_range(name, value)
        return
    choices = [each for kind in kinds for each in kind.choices]
    words = [kind.words for kind in kinds if not kind.choices]
    if choices:
        words.append(f"one of {', '.join(map(repr, choices))}")
    expected = " or ".join(dict.fromkeys(words))
    is_choice = isinstance(value, str) and any(isinstance(each, str) for each in choices)
    error = OptionError if is_choice else ArgumentError
    message = f"{name} is {shown(value)}, expected {expected}{_hint(value)}"
    raise error(message)


def shown(value: object) -> str:
    """A value as messages show it: short, with its type where that does not show."""
    try:
        text = repr(value)
    except Exception:  # of the user's own class
        text = "…"
    text = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
    is_plain = value is None or isinstance(value, (bool, int, float, str, bytes))
    return text if is_plain else f"{text} ({type(value).__name__})"


def _hint(value: object) -> str:
    if isinstance(value, bytes):
        return "; os.fsdecode makes text of a name in bytes"
    if isinstance(value, Iterator):
        return "; list(...) makes a list of it"
    return ""


def _check_range(name: str, value: object) -> None:
    least = _LEAST.get(name)
    if least is None or not _is_integer(value):
        return
    number = int(value)  # type: ignore[call-overload]
    if not least <= number <= _MOST:
        message = f"{name} is {number}, expected "
        message += f"at least {least}" if number < least else f"at most {_MOST:,}"
        raise OptionError(message)


_LONGEST_SHOWN: Final = 80
# Of counts, by the name that they have everywhere.
_LEAST: Final = {
    "workers": 1,
    "num_samples": 1,
    "shard_samples": 1,
    "calibration_samples": 1,
    "batch_size": 1,
    "num_components": 1,
    "max_new_tokens": 1,
    "threads": 0,
    "prefetch": 1,
    "window": 1,
    "attempts": 1,
    "max_parallel": 1,
    "num_replicas": 1,
    "rank": 0,
    "seed": 0,
    "epoch": 0,
}
_MOST: Final = (1 << 63) - 1


def _is_flag(value: object) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:
        # An integer beyond all floats.
        return False


def is_name(value: object) -> bool:
    """Whether a value names a file; bytes do not."""
    if isinstance(value, str):
        return "\0" not in value
    if not isinstance(value, os.PathLike):
        return False
    try:
        found = os.fspath(value)
    except Exception:  # of the user's own class
        return False
    return isinstance(found, str) and "\0" not in found


def _is_several(value: object, kinds: tuple[_Kind, ...] | None) -> bool:
    """Whether a value is several of a kind; what can be read only once is not looked into."""
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        return False
    if kinds is None or not isinstance(value, (list, tuple, set, frozenset, range)):
        return True
    return all(any(kind.fits(each) for kind in kinds) for each in value)


_NONE: Final = _Kind("None", lambda value: value is None)
_PATH: Final = _Kind("the name of a file or folder", is_name)
_INTEGER: Final = _Kind("a whole number", _is_integer)
_TEXT: Final = _Kind("text", lambda value: isinstance(value, str))
_KNOWN: Final = {
    "None": _NONE,
    "bool": _Kind("True or False", _is_flag),
    "int": _INTEGER,
    "float": _Kind("a number", _is_number),
    "str": _TEXT,
    "slice": _Kind("a slice", lambda value: isinstance(value, slice)),
    "PathLike": _PATH,
    "Path": _PATH,
    "ReportProgress": _Kind("a function", callable),
}
_SEVERAL: Final = frozenset({"Iterable", "Sequence", "list", "tuple", "set", "Collection"})
# Classes of options and the like, by the names that their instances' classes have.
_CLASSES: Final = frozenset(
    {
        "Archive",
        "CheckOptions",
        "Columns",
        "DatasetChoice",
        "ExtractOptions",
        "ExtractionMetadata",
        "GenerationOptions",
        "IsolationLimits",
        "LabelOptions",
        "Labels",
        "ModelChoice",
        "ModelShape",
        "PcaOptions",
        "Precision",
        "PrecisionOptions",
        "Rates",
        "ReadLimits",
        "ReadingOptions",
        "RemoteOptions",
        "RemotePath",
        "TargetOptions",
        "Tokens",
    }
)
# Aliases of types, by the module that has them.
_ALIASES: Final = {
    "AnswerCut": "h5traces.format.archive",
    "ArrayCodec": "h5traces.storage.codecs",
    "Compare": "h5traces.writing.options",
    "Container": "h5traces.archive.tensors",
    "DtypePolicy": "h5traces.format.dtypes",
    "EdgeDirection": "h5traces.graph.edges",
    "FirstState": "h5traces.meaning.options",
    "Foreign": "h5traces.writing.options",
    "HeadMean": "h5traces.format.precision",
    "HeadReduction": "h5traces.graph.edges",
    "HigherMeans": "h5traces.rewriting.label_table",
    "LastState": "h5traces.extract.options",
    "ModelDtype": "h5traces.extract.options",
    "NonFinite": "h5traces.torch_data.tensors",
    "OnNan": "h5traces.extract.options",
    "OverflowPolicy": "h5traces.format.dtypes",
    "Tier": "h5traces.format.precision",
    "TokenChoice": "h5traces.torch_data.tensors",
}
# Aliases of unions.
_UNIONS: Final = {
    "LayerChoice": "str | int | Iterable[int] | None",
    "SampleChoice": "str | slice | int | Iterable[int] | None",
    "SampleCount": "int | Literal['all']",
    "Source": "PathLike | RemotePath",
}


@functools.cache
def kinds_of(annotation: str) -> tuple[_Kind, ...] | None:
    """What an annotation allows; None where a part of it is not known."""
    if not isinstance(annotation, str):
        return None
    return _kinds(ast.parse(annotation, mode="eval").body)


def _kinds(node: ast.expr) -> tuple[_Kind, ...] | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left, right = _kinds(node.left), _kinds(node.right)
        return None if left is None or right is None else (*left, *right)
    if isinstance(node, ast.Constant):
        return (_NONE,) if node.value is None else None
    if isinstance(node, ast.Attribute):
        # os.PathLike
        return _named(node.attr)
    if isinstance(node, ast.Name):
        return _named(node.id)
    if isinstance(node, ast.Subscript):
        return _subscripted(node)
    return None


def _named(name: str) -> tuple[_Kind, ...] | None:
    if name in _KNOWN:
        return (_KNOWN[name],)
    if name in _UNIONS:
        return kinds_of(_UNIONS[name])
    if name in _CLASSES:
        return (_Kind(f"a {name}", functools.partial(_is_instance, name)),)
    if name in _ALIASES:
        return (_choice(get_args(getattr(importlib.import_module(_ALIASES[name]), name))),)
    return None


def _is_instance(name: str, value: object) -> bool:
    return any(each.__name__ == name for each in type(value).__mro__)


def _choice(values: tuple[object, ...]) -> _Kind:
    def fits(value: object) -> bool:
        return any(type(value) is type(each) and value == each for each in values)

    return _Kind("", fits, values)


def _subscripted(node: ast.Subscript) -> tuple[_Kind, ...] | None:
    name = ast.unparse(node.value).rpartition(".")[2]
    if name == "Literal":
        return (_choice(_literals(node.slice)),)
    if name == "PathLike":
        return (_PATH,)
    if name == "Callable":
        return (_Kind("a function", callable),)
    if name == "Mapping":
        return (_Kind("a mapping", lambda value: isinstance(value, Mapping)),)
    if name in _SEVERAL:
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        inside = _kinds(parts[0])
        of_what = "" if inside is None else f" of {inside[0].words or 'names'}"
        return (_Kind(f"several{of_what}", functools.partial(_is_several, kinds=inside)),)
    return None


def _literals(node: ast.expr) -> tuple[object, ...]:
    found = ast.literal_eval(node)
    return found if isinstance(found, tuple) else (found,)
