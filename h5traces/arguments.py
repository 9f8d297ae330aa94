"""Checks the arguments of public functions against their annotations.

An argument of a wrong type then ends in one error that names it and says what was expected, not in
whatever a library says of it later. Annotations are read as text: a name that this module does not
know is not checked. What may be several values arrives as a list, whether it was given as an array,
as a generator or as another iterable.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
import itertools
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
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
    is_several
        Whether it is several values.
    convert
        What makes Python's own value of one.
    """

    words: str
    fits: Callable[[Any], bool]
    choices: tuple[object, ...] = ()
    is_several: bool = False
    convert: Callable[[Any], Any] = lambda value: value


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: arguments of a wrong type or name end in an ArgumentError, before the call."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = _checked_call(function, args, kwargs)
        return function(*bound.args, **bound.kwargs)

    return call


def checked_options(options: Options) -> Options:
    """Decorator of a dataclass: the same for its fields, when one is made."""
    options.__init__ = checked(options.__init__)  # type: ignore[misc]
    return options


def _checked_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    signature, kinds = _specification(function)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(_wrong_call(function, signature, kwargs, error)) from None
    for name, value in bound.arguments.items():
        kind = kinds.get(name)
        if kind is not None:
            bound.arguments[name] = check_argument(name, value, kind)
    return bound


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
    name = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
    named = [each for each in signature.parameters if each != "self"]
    unknown = next((each for each in kwargs if each not in named), None)
    close = difflib.get_close_matches(unknown or "", named, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{name}() {error}; {hint}it takes {', '.join(named)}"


def check_argument(name: str, value: Any, kinds: tuple[_Kind, ...]) -> Any:
    """The value, if it is of one of the kinds; several values in a list.

    Raises
    ------
    ArgumentError
        It has another type.
    OptionError
        It has the type, and is none of the few values, or not in the range, that are allowed.
    """
    given = value
    fitting = next((kind for kind in kinds if kind.fits(value)), None)
    if fitting is None and any(kind.is_several for kind in kinds):
        value = _listed(name, value, keys=not _takes_sources(kinds))
        fitting = next((kind for kind in kinds if kind.fits(value)), None)
    if fitting is not None:
        plain = fitting.convert(value)
        _check_range(name, plain)
        return plain
    value = given
    texts = value if isinstance(value, (list, tuple)) else [value]
    # Of the right type, and none of the few that there are.
    is_choice = any(kind.choices for kind in kinds) and all(isinstance(each, str) for each in texts)
    error = OptionError if is_choice else ArgumentError
    message = f"{name} is {shown(value)}, expected {_expected(kinds)}{_hint(value, kinds)}"
    raise error(message)


def _expected(kinds: tuple[_Kind, ...]) -> str:
    """What to say was expected."""
    if _takes_sources(kinds):
        words = ["the name of a file, a glob or a folder"]
        words += ["or a list of these"] if any(kind.is_several for kind in kinds) else []
        return ", ".join(words)
    words = [kind.words for kind in kinds if kind.words]
    choices = [repr(each) for kind in kinds if not kind.is_several for each in kind.choices]
    if choices:
        words.append(f"one of {', '.join(choices)}" if len(choices) > 2 else " or ".join(choices))
    # Who passes something does not need to hear that nothing would do.
    *others, last = [each for each in dict.fromkeys(words) if each != _NONE.words] or words
    return f"{', '.join(others)} or {last}" if others else last


def _takes_sources(kinds: tuple[_Kind, ...]) -> bool:
    """Whether the kinds are files to read: several, or also on servers."""
    words = {kind.words for kind in kinds}
    return _PATH.words in words and len(words & {_LISTED_PATHS, _ADDRESS}) > 0


def shown(value: object) -> str:
    """A value as messages show it: short, with its type where that does not show."""
    try:
        text = repr(value)
    except Exception:  # of the user's own class
        text = "…"
    text = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
    is_plain = value is None or isinstance(value, (bool, int, float, str, bytes))
    return text if is_plain else f"{text} ({type(value).__name__})"


def _hint(value: object, kinds: tuple[_Kind, ...]) -> str:
    first = value[0] if isinstance(value, list) and value else value
    if not _takes_sources(kinds):
        return ""
    if isinstance(first, bytes):
        return "; os.fsdecode makes text of a name in bytes"
    if isinstance(first, Mapping):
        return "; h5traces.create writes samples that lie in memory"
    return ""


def _listed(name: str, value: Any, *, keys: bool) -> Any:
    """A list of what an array, a generator or the like holds; other values as they are.

    With `keys`, those of a mapping; where sources are named, a mapping is a sample by mistake.
    """
    if isinstance(value, (str, bytes, bytearray, list, tuple)):
        return value
    if isinstance(value, Mapping) and not keys:
        return value
    try:
        if hasattr(value, "tolist"):
            # Of numpy, torch, pandas: numbers of Python, or one for an array without axes.
            return value.tolist()
        if not isinstance(value, Iterable):
            return value
        found = list(itertools.islice(value, _MOST_LISTED + 1))
    except Exception as error:  # of the user's own class, or out of memory
        message = f"{name} is {shown(value)}, which cannot be read: {error!r:.200}"
        raise ArgumentError(message) from error
    if len(found) > _MOST_LISTED:
        message = f"{name} has more than {_MOST_LISTED:,} values; take fewer, or a slice"
        raise OptionError(message)
    return found


def _check_range(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        return
    least = _LEAST.get(name, -_MOST)
    if not least <= value <= _MOST:
        message = f"{name} is {shown(value)}, expected "
        message += f"at least {least}" if value < least else f"at most {_MOST:,}"
        raise OptionError(message)


def as_position(position: object, what: str) -> int:
    """A number that indexes a sequence; ArgumentError for anything else."""
    if not _is_integer(position):
        message = f"{what} is indexed by whole numbers, not {shown(position)}"
        raise ArgumentError(message)
    return operator.index(position)  # type: ignore[arg-type]


_LONGEST_SHOWN: Final = 80
# Of counts, by the name that they have everywhere.
_LEAST: Final = {
    "workers": 1,
    "num_samples": 1,
    "calibration_samples": 1,
    "batch_size": 1,
    "num_components": 1,
    "max_new_tokens": 0,
    "threads": 0,
    "prefetch": 1,
    "attempts": 1,
    "max_parallel": 1,
    "seed": 0,
    "epoch": 0,
    "num_nodes": 0,
}
_MOST: Final = (1 << 63) - 1
_MOST_LISTED: Final = 10_000_000


def _is_flag(value: object) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")


def _is_integer(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except Exception:  # a TypeError, or one of the user's own class
        return False
    return True


def _is_number(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:
        # An integer beyond all floats.
        return False


def _has(name: str, value: object) -> bool:
    try:
        return not isinstance(value, type) and hasattr(value, name)
    except Exception:  # of the user's own class
        return False


def _is_array(ndim: int, value: Any) -> bool:
    """Whether a value is an array of numpy, of numbers, with this many axes."""
    return (
        any(
            each.__module__ == "numpy" and each.__name__ == "ndarray"
            for each in type(value).__mro__
        )
        and value.ndim == ndim
        and value.dtype.kind in "fiu"
    )


def is_name(value: object) -> bool:
    """Whether a value names a file; bytes do not."""
    if not isinstance(value, (str, os.PathLike)):
        return False
    try:
        found = os.fspath(value)
        # Names that are not UTF-8 hold other surrogates, which can be encoded.
        return isinstance(found, str) and b"\0" not in os.fsencode(found)
    except Exception:  # of the user's own class, or a surrogate that stands for no byte
        return False


def _float(value: Any) -> float:
    """A number of Python; integers stay what they are, but for those that no float is."""
    return value if isinstance(value, int) and abs(value) < _MOST else float(value)


def _is_iterable(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray, type))


def _is_several(value: object, kinds: tuple[_Kind, ...]) -> bool:
    """Whether a value is a list of a kind; other iterables become one first."""
    # A text is several of itself: kinds="hidden_states".
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, (list, tuple)):
        return False
    return all(any(kind.fits(each) for kind in kinds) for each in several)


_LISTED_PATHS: Final = "a list of names"
_ADDRESS: Final = "a RemotePath"
_NONE: Final = _Kind("None", lambda value: value is None)
_PATH: Final = _Kind("the name of a file or folder", is_name)
_INTEGER: Final = _Kind("a whole number", _is_integer, convert=operator.index)
_FLAG: Final = _Kind("True or False", _is_flag, convert=bool)
_TEXT: Final = _Kind("text", lambda value: isinstance(value, str))
_KNOWN: Final = {
    "None": _NONE,
    "bool": _FLAG,
    "int": _INTEGER,
    "float": _Kind("a number", _is_number, convert=_float),
    "str": _TEXT,
    "slice": _Kind("a slice", lambda value: isinstance(value, slice)),
    "PathLike": _PATH,
    "Path": _PATH,
    # Of torch, and two protocols of its datasets.
    "dtype": _Kind("a type of torch", lambda value: str(type(value)) == "<class 'torch.dtype'>"),
    "device": _Kind("a device", lambda value: str(type(value)) == "<class 'torch.device'>"),
    # Of features.
    "States": _Kind("an array (tokens, hidden)", functools.partial(_is_array, 2)),
    "Weights": _Kind("an array (heads, queries, keys)", functools.partial(_is_array, 3)),
    "ShardedDataset": _Kind("a dataset of h5traces", functools.partial(_has, "shard_numbers")),
    "HasAxes": _Kind("a dataset of h5traces", functools.partial(_has, "axes")),
}
_PLURALS: Final = {
    _PATH.words: "names",
    _INTEGER.words: "whole numbers",
    _TEXT.words: "texts",
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
        "Tensor",
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
    "ExportFormat": "h5traces.rewriting.export",
    "FirstState": "h5traces.meaning.options",
    "Foreign": "h5traces.writing.options",
    "HeadMean": "h5traces.format.precision",
    "HeadReduction": "h5traces.graph.edges",
    "Kind": "h5traces.extract.options",
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
    # A mask, too.
    "SampleChoice": "str | slice | int | Iterable[int | bool] | None",
    "ReportProgress": "Callable[[int, int], None]",
    "SampleIds": "str | Sequence[str] | None",
    "SampleCount": "int | Literal['all']",
    "Source": "PathLike | RemotePath",
}


@functools.cache
def kinds_of(annotation: str) -> tuple[_Kind, ...] | None:
    """What an annotation allows; None if a part of it is not known."""
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
        return (_callback(node.slice),)
    if name == "Mapping":
        return (_Kind("a mapping", lambda value: isinstance(value, Mapping)),)
    if name in _SEVERAL:
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        inside = _kinds(parts[0])
        if inside is None:
            # Of anything, such as batches of a loader, which are read one by one.
            return (_Kind("an iterable", _is_iterable),)
        fits = functools.partial(_is_several, kinds=inside)
        choices = inside[0].choices
        if choices:
            words = f"some of {', '.join(map(repr, choices))}"
        else:
            words = f"a list of {_PLURALS.get(inside[0].words, 'names')}"
        return (_Kind(words, fits, choices, is_several=True),)
    return None


def _callback(node: ast.expr) -> _Kind:
    """A function, of as many arguments as its annotation says."""
    taken = node.elts[0] if isinstance(node, ast.Tuple) and node.elts else None
    count = len(taken.elts) if isinstance(taken, ast.List) else None

    def fits(value: Any) -> bool:
        if not callable(value) or count is None:
            return callable(value)
        try:
            inspect.signature(value).bind(*range(count))
        except TypeError:
            return False
        except ValueError:
            # Some functions written in C do not tell.
            return True
        return True

    words = "a function" if count is None else f"a function of {count} argument{'s' * (count != 1)}"
    return _Kind(words, fits)


def _literals(node: ast.expr) -> tuple[object, ...]:
    found = ast.literal_eval(node)
    return found if isinstance(found, tuple) else (found,)
