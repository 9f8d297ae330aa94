"""The fields of a trace as named arrays, numbers and text, for formats that hold nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.archive.trace import LayerSequence
from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.format.dtypes import TypedArray
from h5traces.format.text import utf8
from h5traces.format.values import tagged_json

if TYPE_CHECKING:
    from h5traces.archive.trace import Trace

# A field with this ending is a document of JSON, as extra fields are in archives (SPEC.md).
JSON_ENDING: Final = ".json"
_LARGEST: Final = 2**63


@dataclass(slots=True)
class PlainFields:
    """What of a sample is arrays, numbers or text, by name, and which fields are not.

    Attributes
    ----------
    named
        `TypedArray` for layers, else numpy arrays, numbers, text, or lists of text.
    left_out
        Fields of other values, or of names that no format holds, or that are taken.
    """

    named: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any) -> None:
        """Add a value, or note that it is left out."""
        if name in self.named or "\0" in name or utf8(name) != name:
            self.left_out.append(name)
        else:
            self.named[name] = value


def plain_fields(trace: Trace) -> PlainFields:
    """The fields of a trace.

    All layers of a kind are one array, or, where its axes could be mistaken or layers differ, one
    array each with a name such as ``layers.5.hidden_states``, as `h5traces.convert` reads them.

    Raises
    ------
    ConversionError
        A kind holds generation steps, which are no such array.
    """
    found = PlainFields()
    for key in trace.fields:
        value = trace._value(key, "numpy")
        if isinstance(value, LayerSequence):
            for name, layers in _named_layers(layers_of(trace, value), value).items():
                found.add(name, layers)
        elif is_plain(value):
            found.add(key, value)
        else:
            add_as_json(found, key, value)
    return found


def is_plain(value: Any) -> bool:
    """Whether a value is an array of numbers or text, a number, a text, or a list of texts."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.kind in "biufcSU"
    if type(value) is int:
        return -_LARGEST <= value < _LARGEST
    if type(value) is list:
        return bool(value) and all(type(each) is str for each in value)
    return type(value) in (bool, float, str)


def add_as_json(found: PlainFields, key: str, value: Any) -> None:
    """Add another value as a document of JSON, or note that it is left out."""
    try:
        found.add(key + JSON_ENDING, ascii_json(tagged_json(value)))
    except ConversionError:
        found.left_out.append(key)


def ascii_json(value: Any) -> str:
    """One line of JSON, which keeps lone surrogates where UTF-8 does not hold them."""
    return json.dumps(value, separators=(",", ":"))


def layers_of(trace: Trace, sequence: LayerSequence) -> list[TypedArray]:
    """All stored arrays of a kind, in order; ConversionError for generation steps."""
    found = [trace._stored.typed_layer(sequence.kind, name) for name in sequence._stored_names]
    arrays = [each for each in found if isinstance(each, TypedArray)]
    if len(arrays) < len(found):
        message = (
            f"{trace._stored.place}: field {sequence.kind!r} holds generation steps, which are not "
            "one array; export to torch or pickle"
        )
        raise ConversionError(message)
    return arrays


def _named_layers(arrays: list[TypedArray], sequence: LayerSequence) -> dict[str, TypedArray]:
    kind, names = sequence.kind, sequence._stored_names
    if not arrays:
        return {}
    if _can_be_stacked(arrays, sequence):
        return {kind: TypedArray(np.stack([each.values for each in arrays]), arrays[0].dtype)}
    if any(map(layout.is_position, names)) or kind not in layout.KINDS:
        return {f"{kind}_{number}": each for number, each in enumerate(arrays)}
    numbers = map(layout.parse_layer_name, names)
    return {
        "embedding" if number is None else f"layers.{number}.{kind}": each
        for number, each in zip(numbers, arrays, strict=True)
    }


def _can_be_stacked(arrays: list[TypedArray], sequence: LayerSequence) -> bool:
    """Whether one array says the same: all layers from the first on, and axes nobody mistakes."""
    if len({(each.shape, each.dtype) for each in arrays}) > 1 or len(arrays) < len(sequence):
        return False
    numbers = [each for each in sequence.layers if each is not None]
    tokens = arrays[0].shape[0]
    is_clear = sequence.kind != layout.HIDDEN_STATES or abs(len(arrays) - tokens) > 1
    return is_clear and numbers == list(range(len(numbers)))
