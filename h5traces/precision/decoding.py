"""Stored integers back into hidden states and attention weights."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import CorruptArchiveError, UnsupportedEncodingError
from h5traces.format import layout
from h5traces.format.dtypes import CARRIERS, TypedArray
from h5traces.format.native import NATIVE
from h5traces.precision.attention import LEVELS, from_levels
from h5traces.precision.channel_steps import from_steps, reaches_too_far
from h5traces.precision.encoding import (
    CHANNEL_STEPS,
    FLOAT16_ROUNDED,
    SQUARE_ROOT,
    VERSION,
    has_levels,
)
from h5traces.storage.kernels import Restoring
from h5traces.storage.plans import Restoration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from h5traces.format.document import Attrs
    from h5traces.format.dtypes import FloatType
    from h5traces.format.precision import Precision
    from h5traces.precision.scales import ChannelScale

    Exceptions = NDArray[np.float64]

_STORED_TYPES: Final = {CHANNEL_STEPS: ("uint8", "uint16"), SQUARE_ROOT: ("uint8",)}
_RESTORED_TYPES: Final = {CHANNEL_STEPS: ("float16", "float32"), SQUARE_ROOT: ("float16",)}
_MOST_LEVELS: Final = 255
_LARGEST: Final = {"uint8": 0xFF, "uint16": 0xFFFF}
# Of the table of exceptions: layer, flat index in it, and value.
EXCEPTION_COLUMNS: Final = 3
# Of attributes that messages quote.
_MOST_QUOTED: Final = 100


def is_encoded(attrs: Attrs) -> bool:
    """Whether stored values have to be decoded; UnsupportedEncodingError if not known how."""
    name, version = attrs.get("encoding"), attrs.get("encoding_version")
    if name is None:
        return False
    if version != VERSION or name not in (*_STORED_TYPES, FLOAT16_ROUNDED):
        message = (
            f"encoding {name!r} version {version!r} is unknown to this release; upgrade h5traces"
        )
        raise UnsupportedEncodingError(message)
    return name != FLOAT16_ROUNDED


def restored_type(stored_type: str, attrs: Attrs) -> str:
    """The type that an array is read in: its stored type, unless it is encoded."""
    return str(attrs.get("restored_dtype", stored_type)) if is_encoded(attrs) else stored_type


def decode(
    stored: NDArray[Any],
    attrs: Attrs,
    *,
    scale: Callable[[str], ChannelScale],
    exceptions: Callable[[], Exceptions],
    unrounded: bool = False,
    stored_type: str | None = None,
) -> TypedArray:
    """The array that stored integers, for which `is_encoded` holds, stand for.

    Floats of a `stored_type` of integers were restored before, as `restoration_of` says, and lack
    exceptions only.
    `scale` takes a path such as ``/scales/hidden_states/layer_005``. `exceptions` gives those of
    the layer: float64 ``(n, 2)``, flat index and value. With `unrounded`, what was float16 comes as
    float32, in which the formulas are exact.
    """
    for message in attribute_problems(stored_type or stored.dtype.name, attrs):
        raise CorruptArchiveError(message)
    as_half = not unrounded and attrs["restored_dtype"] == "float16"
    if stored.dtype.kind == "f":
        values = stored
    elif attrs["encoding"] == CHANNEL_STEPS:
        values = _from_steps(stored, attrs, scale, as_half=as_half)
    else:
        values = from_levels(stored, int(str(attrs["levels"])), as_half=as_half)
    _put_back(values, attrs, exceptions)
    restored: FloatType = "float16" if as_half else "float32"
    return TypedArray(values, restored)


# What the restoration of a layer depends on, but for its stored type and the values of its scale.
_DECIDING: Final = (
    "encoding",
    "encoding_version",
    "restored_dtype",
    "levels",
    "scales",
    "spacing",
    "zero_point",
)


def decoding_key(attrs: Attrs) -> tuple[Any, ...]:
    """Alike for layers of one archive and stored type that `restoration_of` restores alike."""
    return tuple(map(attrs.get, _DECIDING))


def restoration_of(
    stored_type: str,
    attrs: Attrs,
    scale: Callable[[str], ChannelScale],
    *,
    unrounded: bool = False,
) -> Restoration | None:
    """How the compiled kernels do what `decode` does, but for exceptions.

    None if there are none, for what is not encoded, and for what `decode` rejects.
    """
    if NATIVE is None or "encoding" not in attrs or not is_encoded(attrs):
        return None
    if any(attribute_problems(stored_type, attrs)):
        return None
    as_half = not unrounded and attrs["restored_dtype"] == "float16"
    dtype = CARRIERS["float16" if as_half else "float32"]
    if attrs["encoding"] == SQUARE_ROOT:
        how = Restoring.TABLE_OF_2_BYTES if as_half else Restoring.TABLE_OF_4_BYTES
        return Restoration(how, dtype, _levels_table(int(str(attrs["levels"])), as_half=as_half))
    found, spacing = scale(str(attrs["scales"])), int(str(attrs["spacing"]))
    if reaches_too_far(found, stored_type, spacing):
        return None
    how = Restoring.STEPS_TO_FLOAT16 if as_half else Restoring.STEPS_TO_FLOAT32
    table = found.step / np.float32(spacing), found.offset
    together = np.concatenate(table).astype("<f4").tobytes()
    return Restoration(how, dtype, together, len(found.step), int(str(attrs["zero_point"])))


@cache
def _levels_table(levels: int, *, as_half: bool) -> bytes:
    return from_levels(np.arange(256, dtype=np.uint8), levels, as_half=as_half).tobytes()


def is_stated(kind: str, attrs: Attrs, precision: Precision) -> bool:
    """Whether an array of a kind, of a known encoding, lost what `precision` says."""
    name = attrs["encoding"]
    if name == CHANNEL_STEPS:
        return precision.step is not None and attrs.get("max_error_sigma") == precision.step / 2
    if name == SQUARE_ROOT:
        return attrs.get("levels") == LEVELS and has_levels(kind, precision)
    return attrs.get("mantissa_bits") == precision.mantissa_bits


def attribute_problems(stored_type: str, attrs: Attrs) -> Iterator[str]:
    """Why an array with these attributes, for which `is_encoded` holds, cannot be decoded."""
    name = str(attrs["encoding"])
    restored = attrs.get("restored_dtype")
    if stored_type not in _STORED_TYPES[name] or restored not in _RESTORED_TYPES[name]:
        yield (
            f"is of type {stored_type} and restored_dtype {_quoted(restored)}; expected "
            f"{' or '.join(_STORED_TYPES[name])}, and {' or '.join(_RESTORED_TYPES[name])}"
        )
        return
    largest = _LARGEST[stored_type]
    bounds = {"zero_point": largest, "spacing": largest}
    for key, most in (bounds if name == CHANNEL_STEPS else {"levels": _MOST_LEVELS}).items():
        value = attrs.get(key)
        if not isinstance(value, int) or not 1 <= value <= most:
            yield f"attribute {key!r} is {_quoted(value)}, expected a number from 1 to {most}"
        elif key == "spacing" and value & (value - 1):
            yield f"attribute {key!r} is {value}, expected a power of two"
    link = attrs.get("scales")
    if name == CHANNEL_STEPS and not str(link).startswith(f"/{layout.SCALES_GROUP}/"):
        yield f"attribute 'scales' is {_quoted(link)}, expected a path below /{layout.SCALES_GROUP}"
    count = attrs.get("num_exceptions")
    if ("exceptions" in attrs) != (count is not None) or not (
        count is None or (isinstance(count, int) and count > 0)
    ):
        yield (
            f"attributes 'exceptions' and 'num_exceptions' are {_quoted(attrs.get('exceptions'))} "
            f"and {_quoted(count)}, expected the path of a table and a positive number, or neither"
        )


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_QUOTED else f"{text[:_MOST_QUOTED]}…"


def _from_steps(
    stored: NDArray[Any], attrs: Attrs, scale: Callable[[str], ChannelScale], *, as_half: bool
) -> NDArray[Any]:
    found = scale(str(attrs["scales"]))
    if stored.ndim != 2 or stored.shape[1] != len(found.step):
        message = f"has the shape {stored.shape}, its scale {len(found.step)} channels"
        raise CorruptArchiveError(message)
    zero_point, spacing = int(str(attrs["zero_point"])), int(str(attrs["spacing"]))
    if reaches_too_far(found, stored.dtype.name, spacing):
        message = f"its scale {_quoted(attrs['scales'])} has steps that float32 does not reach"
        raise CorruptArchiveError(message)
    return from_steps(stored, found, zero_point, spacing, as_half=as_half)


def _put_back(values: NDArray[Any], attrs: Attrs, exceptions: Callable[[], Exceptions]) -> None:
    count = attrs.get("num_exceptions", 0)
    if not count:
        return
    table = exceptions()
    with np.errstate(over="ignore", invalid="ignore"):
        index = table[:, 0].astype(np.int64)
        new = table[:, 1].astype(CARRIERS["float16" if values.dtype.itemsize == 2 else "float32"])
    if (
        len(table) != count
        or index.min() < 0
        or index.max() >= values.size
        or not np.array_equal(index, table[:, 0])
    ):
        message = (
            f"lists {count} exceptions; the table of exceptions has {len(table)} that are of this "
            "layer, or lie outside it"
        )
        raise CorruptArchiveError(message)
    values.reshape(-1)[index] = new


def num_exceptions(layers: Iterable[Attrs]) -> int:
    """Rows that the table of a kind must have, by what the attributes of its layers say."""
    counts = (each.get("num_exceptions", 0) for each in layers)
    return sum(each for each in counts if isinstance(each, int) and each > 0)
