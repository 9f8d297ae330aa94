"""Which encoding an array gets, and what is recorded of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import PrecisionError
from h5traces.format import layout
from h5traces.format.kinds import ATTENTION_WINDOW, MODEL_KINDS, STATE_NORMS
from h5traces.format.precision import EXACT, Precision
from h5traces.precision import attention, channel_steps
from h5traces.precision.channel_steps import StepFormat

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.format.document import Attrs
    from h5traces.format.dtypes import TypedArray
    from h5traces.precision.scales import ScaleSet

CHANNEL_STEPS: Final = "channel-steps"
SQUARE_ROOT: Final = "sqrt-uint8"
FLOAT16_ROUNDED: Final = "float16-rounded"
VERSION: Final = "1"
STEPS_FORMULA: Final = "offset[channel] + (stored - zero_point) / spacing * step[channel]"
SQUARE_ROOT_FORMULA: Final = "(stored / levels) ** 2"

# Exceptions take some 60 bits each; with more of them float16 is as small.
_MOST_EXCEPTIONS: Final = 1 / 16
# Of the values, in sigma; about 1 where a scale fits. Below it, the scale is of something else, and
# the bound, which is stated in its sigma, would promise nothing.
_LEAST_SPREAD: Final = 0.4
_STATE_AXES: Final = 2
_NAMES: Final = {1: "uint8", 2: "uint16"}
# Kinds whose channels may go in steps.
STEPPED_KINDS: Final = tuple(
    kind for kind, each in MODEL_KINDS.items() if each.axes == ("token", "hidden")
)


def may_be_encoded(kind: str, definition: str | None) -> bool:
    """Whether a precision is about a kind: one that the format names, or that a model gave.

    Kinds of other sources are stored unchanged, whatever their name.
    """
    named = MODEL_KINDS.get(kind)
    is_of_model = named is not None and named.definition == definition and kind != STATE_NORMS
    return kind in layout.KINDS or is_of_model


@dataclass(frozen=True, slots=True, eq=False)
class EncodedLayer:
    """One layer's array as it is stored, and the attributes that a reader needs to restore it."""

    values: NDArray[Any]
    dtype: str
    source_nbytes: int
    attrs: Attrs = field(default_factory=dict)
    # Values that are stored as they are: float64 ``(n, 2)``, flat index in C order and value.
    exceptions: NDArray[np.float64] | None = None
    # Why the array is stored in float16 although the precision says otherwise.
    kept_exact: str | None = None


class Encoder:
    """Encodes the arrays of an archive; may be called from many threads.

    PrecisionError where hidden states go in steps and there are no `scales`.
    """

    def __init__(self, precision: Precision = EXACT, scales: ScaleSet | None = None) -> None:
        if precision.step is not None and scales is None:
            message = "steps of hidden states need scales; 'h5traces calibrate' measures them"
            raise PrecisionError(message)
        self.precision, self.scales = precision, scales

    def encode(
        self,
        kind: str,
        name: str,
        array: TypedArray,
        *,
        in_steps: bool = False,
        definition: str | None = None,
    ) -> EncodedLayer:
        """One layer's array, such as ``hidden_states`` and ``layer_005``.

        `array` comes as the tier ``exact`` would store it: float16, or float32 where float16 does
        not reach; with `in_steps`, generation steps lie side by side in it. PrecisionError where
        its scale is of another width. `definition` is that of a kind that the format does not name.
        """
        precision = self.precision
        if not may_be_encoded(kind, definition):
            return _exact(array)
        reason = "holds generation steps" if in_steps else None
        if kind in STEPPED_KINDS and precision.step is not None:
            reason = reason or self._unfit(kind, name, array)
            return _exact(array, reason) if reason else self._in_steps(kind, name, array)
        if has_levels(kind, precision):
            known = array.dtype == "float16" or self.takes_source(kind)
            reason = reason or (None if known else f"needs {array.dtype}")
            return _exact(array, reason) if reason else _square_root(kind, array)
        if precision.mantissa_bits is not None:
            reason = None if array.dtype == "float16" else f"needs {array.dtype}"
            return _exact(array, reason) if reason else _rounded(array, precision.mantissa_bits)
        # Heads that could be averaged do not come here.
        lacks_mean = kind == layout.ATTENTIONS and precision.head_mean == "only"
        return _exact(array, reason if lacks_mean else None)

    @property
    def is_plain(self) -> bool:
        """Whether every layer is stored as floats that need no decoding."""
        found = self.precision
        return (found.step, found.attention_bits, found.head_mean) == (None, None, "none")

    def takes_source(self, kind: str) -> bool:
        """Whether arrays of a kind are encoded as they come, not as float16 would hold them.

        Rounding a mean to float16 first could put it on the other side of a threshold.
        """
        return kind == layout.ATTENTION_MEAN and has_levels(kind, self.precision)

    def _unfit(self, kind: str, name: str, array: TypedArray) -> str | None:
        """Why an array cannot be stored in steps."""
        if len(array.shape) != _STATE_AXES:
            return f"has {len(array.shape)} axes"
        if array.dtype not in ("float16", "float32"):
            return f"needs {array.dtype}"
        assert self.scales is not None
        scale = self.scales.layers.get(f"{kind}/{name}")
        if scale is None:
            return "has no scale"
        if len(scale.step) != array.shape[1]:
            made_of = self.scales.record and self.scales.record.model_id
            message = (
                f"is {array.shape[1]} wide, its scale {len(scale.step)}"
                + (f" (of {made_of})" if made_of else "")
                + "; run 'h5traces calibrate' on samples of this model"
            )
            raise PrecisionError(message)
        return None

    def _in_steps(self, kind: str, name: str, array: TypedArray) -> EncodedLayer:
        assert self.scales is not None
        assert self.precision.step is not None
        path, step = f"{kind}/{name}", self.precision.step
        scale, form = self.scales.layers[path], StepFormat.of(step)
        if channel_steps.reaches_too_far(scale, form.dtype, form.spacing):
            return _exact(array, "has a scale that float32 does not reach")
        stored, beyond = channel_steps.to_steps(array.values, scale, step)
        if beyond.size > _MOST_EXCEPTIONS * array.values.size:
            return _exact(array, "too many values are exceptions")
        if stored.size and channel_steps.spread_of(stored, step) < _LEAST_SPREAD:
            return _exact(array, "its scale is far wider than its values")
        attrs: Attrs = {
            "encoding": CHANNEL_STEPS,
            "encoding_version": VERSION,
            "formula": STEPS_FORMULA,
            "scales": f"/{layout.SCALES_GROUP}/{path}",
            "zero_point": form.zero_point,
            "spacing": form.spacing,
            "max_error_sigma": step / 2,
            "restored_dtype": array.dtype,
        }
        return _encoded(stored, attrs, kind, array, beyond)


def has_levels(kind: str, precision: Precision) -> bool:
    """Whether arrays of a kind are stored on a square-root scale."""
    if kind == layout.ATTENTION_MEAN:
        return precision.attention_bits is not None or precision.head_mean != "none"
    is_of_heads = kind in (layout.ATTENTIONS, ATTENTION_WINDOW)
    return is_of_heads and precision.attention_bits is not None


def _square_root(kind: str, array: TypedArray) -> EncodedLayer:
    stored, beyond = attention.to_levels(array.values)
    if beyond.size > _MOST_EXCEPTIONS * array.values.size:
        return _exact(array, "too many values are not weights")
    attrs: Attrs = {
        "encoding": SQUARE_ROOT,
        "encoding_version": VERSION,
        "formula": SQUARE_ROOT_FORMULA,
        "levels": attention.LEVELS,
        "restored_dtype": "float16",
    }
    return _encoded(stored, attrs, kind, array, beyond)


def _encoded(
    stored: NDArray[Any], attrs: Attrs, kind: str, source: TypedArray, beyond: NDArray[np.int64]
) -> EncodedLayer:
    # numpy takes as long for a type's name as for all else here.
    name = _NAMES[stored.itemsize]
    if not beyond.size:
        return EncodedLayer(stored, name, source.values.nbytes, attrs)
    attrs["exceptions"] = f"{kind}/{layout.EXCEPTIONS_TABLE}"
    attrs["num_exceptions"] = beyond.size
    pairs = np.empty((beyond.size, 2))
    with np.errstate(invalid="ignore"):
        pairs[:, 0], pairs[:, 1] = beyond, source.values.reshape(-1)[beyond]
    return EncodedLayer(stored, name, source.values.nbytes, attrs, pairs)


def _rounded(array: TypedArray, mantissa_bits: int) -> EncodedLayer:
    attrs: Attrs = {
        "encoding": FLOAT16_ROUNDED,
        "encoding_version": VERSION,
        "mantissa_bits": mantissa_bits,
    }
    values = attention.rounded(array.values, mantissa_bits)
    return EncodedLayer(values, array.dtype, array.values.nbytes, attrs)


def _exact(array: TypedArray, reason: str | None = None) -> EncodedLayer:
    attrs: Attrs = {} if reason is None else {"kept_exact": reason}
    nbytes = array.values.nbytes
    return EncodedLayer(array.values, array.dtype, nbytes, attrs, kept_exact=reason)
