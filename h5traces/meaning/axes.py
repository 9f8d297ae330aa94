"""Named axes of arrays, as a format or a user states them, and views with other axes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar, cast

import numpy as np

from h5traces.errors import ConversionError, OptionError
from h5traces.format import layout
from h5traces.format.values import TorchValue

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray

BATCH: Final = "batch"
LAYER: Final = "layer"
# Of nested sequences: the outer one has an item per generation step, the inner one per layer.
STEPS_FIRST: Final = ("step", LAYER)
# Axes that the package gives a meaning; every other name is that of a width, such as head_dim.
KNOWN_AXES: Final = (BATCH, LAYER, "token", "head", "query", "key", "hidden")
_SYNONYMS: Final = {
    **{f"{name}s": name for name in (LAYER, "token", "head", "key")},
    **{"queries": "query", "position": "token", "positions": "token", "sequence": "token"},
    **{"seq": "token", "seq_len": "token", "hidden_size": "hidden", "embedding_size": "hidden"},
}
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")

_Value = TypeVar("_Value", bound="NDArray[Any] | TorchValue")


@dataclass(frozen=True, slots=True)
class Axes:
    """Names of the axes of an array, outermost first.

    Attributes
    ----------
    names
        ``batch``, ``layer``, ``token``, ``head``, ``query``, ``key``, ``hidden``, or any other
        name for the width of a kind, such as ``head_dim``.
    """

    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Axes:
        """Axes of words such as ``"token layer hidden"``, separated by spaces or commas.

        Plural forms and ``position``, ``seq``, ``hidden_size`` are understood.

        Raises
        ------
        OptionError
            A word is not a name, or a name comes twice.
        """
        words = text.replace(",", " ").split()
        names = tuple(_SYNONYMS.get(word.lower(), word) for word in words)
        wrong = next((word for word in names if not _NAME.match(word)), None)
        if wrong is not None or not names or len(set(names)) < len(names):
            found = f"has {wrong!r}" if wrong is not None else f"is {text!r}"
            message = (
                f"axes {found}; expected different names such as 'token layer hidden', made of "
                f"{', '.join(KNOWN_AXES)} or a width's own name"
            )
            raise OptionError(message)
        return cls(names)

    def __str__(self) -> str:
        return f"({', '.join(self.names)})"


def layers_of(value: _Value, axes: Axes, kind: str) -> list[_Value]:
    """Every layer of an array whose axes are known, as views with the axes of `kind`.

    Parameters
    ----------
    value
        An array, also a memory map, or a `TorchValue`; nothing is copied.
    axes
        Its axes, with ``layer`` among them. A ``batch`` axis has length 1. Without a ``token``
        axis, the arrays hold one position.
    kind
        The field's name, such as ``hidden_states``: each view has the axes of `layout.KINDS`; for
        other names the remaining axes, in their order.

    Raises
    ------
    ConversionError
        The array has another number of axes or a batch of several, or the kind other axes.
    """
    rest = tuple(name for name in axes.names if name not in (BATCH, LAYER))
    definition = layout.KINDS.get(kind)
    wanted = definition.axes if definition else rest
    if LAYER not in axes.names or not set(rest) <= set(wanted):
        message = (
            f"field {kind!r}: axes are {axes}, expected 'layer' and some of "
            f"{', '.join(each for each in wanted if each != LAYER)}"
        )
        raise ConversionError(message)
    layered = view(value, axes.names, (LAYER, *wanted), f"field {kind!r}")
    return split(layered)


def view(value: _Value, source: Sequence[str], target: Sequence[str], place: str) -> _Value:
    """An array with the axes `source` as a view with the axes `target`.

    Axes that only `target` has get the length 1; those that only `source` has must have it.
    ConversionError, which begins with `place`, where they do not, or the array has other axes.
    """
    array = data_of(value)
    if array.ndim != len(source):
        message = (
            f"{place}: shape {array.shape} has {array.ndim} axes, expected {len(source)}: "
            f"({', '.join(source)})"
        )
        raise ConversionError(message)
    for name, length in zip(source, array.shape, strict=True):
        if name not in target and length != 1:
            message = (
                f"{place}: shape {array.shape} has {length} on the {name} axis, expected 1; "
                "store one dict per sequence"
            )
            raise ConversionError(message)
    kept = [name for name in source if name in target]
    array = array[tuple(slice(None) if name in target else 0 for name in source)]
    array = array.transpose([kept.index(name) for name in target if name in kept])
    missing = tuple(number for number, name in enumerate(target) if name not in kept)
    return with_data(value, np.expand_dims(array, missing) if missing else array)


def data_of(value: NDArray[Any] | TorchValue) -> NDArray[Any]:
    """The numpy array of an array or tensor."""
    return value.data if isinstance(value, TorchValue) else value


def with_data(value: _Value, data: NDArray[Any]) -> _Value:
    """Other numbers in the container of `value`."""
    if isinstance(value, TorchValue):
        return cast("_Value", TorchValue(data, value.dtype, value.container))
    return cast("_Value", data)


def split(value: _Value) -> list[_Value]:
    """Views along the first axis."""
    return [with_data(value, each) for each in data_of(value)]
