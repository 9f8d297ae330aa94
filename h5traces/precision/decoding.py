"""Stored integers back into hidden states and attention weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.dtypes import CARRIERS, TypedArray
from h5traces.errors import CorruptArchiveError, UnsupportedEncodingError
from h5traces.precision.channel_steps import from_steps
from h5traces.precision.encoding import CHANNEL_STEPS, FLOAT16_ROUNDED, SQUARE_ROOT, VERSION
from h5traces.precision.square_root import from_levels

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from h5traces.dtypes import FloatType
    from h5traces.precision.scales import ChannelScale
    from h5traces.schema.attributes import Attrs

    Exceptions = NDArray[np.float64]

_STORED_TYPES: Final = {CHANNEL_STEPS: ("uint8", "uint16"), SQUARE_ROOT: ("uint8",)}
_MOST_LEVELS: Final = 255


def is_encoded(attrs: Attrs) -> bool:
    """Whether stored values have to be restored before they mean anything.

    Raises
    ------
    UnsupportedEncodingError
        This release does not know how.
    """
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
) -> TypedArray:
    """The array that stored integers stand for.

    Parameters
    ----------
    stored
        As it lies in the file.
    attrs
        Attributes of its dataset.
    scale
        Gives the scale of a path such as ``/scales/hidden_states/layer_005``.
    exceptions
        Gives the layer's exceptions: float64 ``(n, 2)``, flat index and value.
    unrounded
        Whether to give float32 where the source was float16; the formulas are exact in it.

    Raises
    ------
    CorruptArchiveError
        Attributes, scale or exceptions do not fit the array.
    UnsupportedEncodingError
        This release does not know the encoding.
    """
    if not is_encoded(attrs):
        message = "the array is stored as it is, and has nothing to be restored"
        raise CorruptArchiveError(message)
    name = str(attrs["encoding"])
    dtype = "float32" if unrounded else str(attrs.get("restored_dtype"))
    if dtype not in ("float16", "float32") or stored.dtype.name not in _STORED_TYPES[name]:
        message = (
            f"is of type {stored.dtype.name} and restored_dtype {attrs.get('restored_dtype')!r}; "
            f"expected {' or '.join(_STORED_TYPES[name])}, and float16 or float32"
        )
        raise CorruptArchiveError(message)
    as_half = dtype == "float16"
    if name == CHANNEL_STEPS:
        values = _from_steps(stored, attrs, scale, as_half=as_half)
    else:
        values = from_levels(stored, _number(attrs, "levels", _MOST_LEVELS), as_half=as_half)
    _put_back(values, attrs, exceptions)
    restored: FloatType = "float16" if as_half else "float32"
    return TypedArray(values, restored)


def _from_steps(
    stored: NDArray[Any], attrs: Attrs, scale: Callable[[str], ChannelScale], *, as_half: bool
) -> NDArray[Any]:
    found = scale(str(attrs.get("scales")))
    if stored.ndim != 2 or stored.shape[1] != len(found.step):
        message = f"has the shape {stored.shape}, its scale {len(found.step)} channels"
        raise CorruptArchiveError(message)
    largest = np.iinfo(stored.dtype).max
    zero_point = _number(attrs, "zero_point", largest)
    spacing = _number(attrs, "spacing", largest)
    return from_steps(stored, found, zero_point, spacing, as_half=as_half)


def _number(attrs: Attrs, name: str, largest: int) -> int:
    value = attrs.get(name)
    if not isinstance(value, int) or not 1 <= value <= largest:
        message = f"attribute {name!r} is {value!r}, expected a number from 1 to {largest}"
        raise CorruptArchiveError(message)
    return value


def _put_back(values: NDArray[Any], attrs: Attrs, exceptions: Callable[[], Exceptions]) -> None:
    count = attrs.get("num_exceptions", 0)
    if not count:
        return
    table = exceptions()
    index = table[:, 0]
    if len(table) != count or not ((index >= 0) & (index < values.size)).all():
        message = (
            f"lists {count} exceptions; the table of exceptions has {len(table)} that are of this "
            "layer, or lie outside it"
        )
        raise CorruptArchiveError(message)
    with np.errstate(over="ignore", invalid="ignore"):
        values.reshape(-1)[index.astype(np.int64)] = table[:, 1].astype(
            CARRIERS["float16" if values.dtype.itemsize == 2 else "float32"]
        )
