"""Stored floating-point types, and casts that count what they change.

numpy has no bfloat16: such values travel as their raw bits in uint16 arrays, beside the name of
their type, in a `TypedArray`.
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass, fields
from itertools import compress
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from h5traces.errors import ConversionError
from h5traces.format.limits import Scratch
from h5traces.format.native import NATIVE

if TYPE_CHECKING:
    from collections.abc import Mapping

FloatType = Literal["float16", "bfloat16", "float32", "float64"]
DtypePolicy = Literal["float16", "bfloat16", "float32", "auto"]
OverflowPolicy = Literal["float32", "error", "clip"]

AnyArray = NDArray[Any]

FLOAT_TYPES: Final[tuple[FloatType, ...]] = get_args(FloatType)
DTYPE_POLICIES: Final[tuple[DtypePolicy, ...]] = get_args(DtypePolicy)

# numpy dtype that carries each type's bits in memory.
CARRIERS: Final[dict[FloatType, np.dtype[Any]]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}
# By numpy's characters, whatever the byte order; names of dtypes take numpy 5 µs.
_BY_CHARACTER: Final[dict[str, FloatType]] = {"e": "float16", "f": "float32", "d": "float64"}
# Narrowest first: the order in which `auto` tries them.
_EXACT_CANDIDATES: Final[dict[FloatType, tuple[FloatType, ...]]] = {
    "float16": ("float16",),
    "bfloat16": ("float16", "bfloat16"),
    "float32": ("float16", "bfloat16", "float32"),
    "float64": ("float16", "bfloat16", "float32", "float64"),
}
_EXPONENT_MASKS: Final = {
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
    "float32": (np.uint32, 0x7F800000),
    "float64": (np.uint64, 0x7FF0000000000000),
}
_LARGEST: Final[dict[FloatType, float]] = {
    "float16": float(np.finfo(np.float16).max),
    "bfloat16": float.fromhex("0x1.fep127"),
    "float32": float(np.finfo(np.float32).max),
    "float64": float(np.finfo(np.float64).max),
}

# Numbers of types in compiled kernels.
KERNEL_KINDS: Final[dict[FloatType, int]] = {"float16": 0, "bfloat16": 1, "float32": 2}
# Values at a time, so that intermediate results stay in the processor's cache.
_BLOCK: Final = 1 << 16
# From this many values on, torch starts its own threads, which do not survive a fork.
_TORCH_BLOCK: Final = 1 << 14
_SCRATCH: Final = Scratch()


@dataclass(frozen=True, slots=True)
class TypedArray:
    """An array of any shape, and the name of its type; bfloat16 as the raw bits in uint16."""

    values: AnyArray
    dtype: FloatType

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.values.shape

    @classmethod
    def of(cls, values: AnyArray) -> TypedArray:
        """`values` with the type of their dtype, any byte order; ConversionError for no float."""
        name = _BY_CHARACTER.get(values.dtype.char)
        if name is None:
            message = (
                f"dtype is {values.dtype}, expected one of {', '.join(FLOAT_TYPES)}; "
                "cast the array before it is stored"
            )
            raise ConversionError(message)
        return cls(values, name)

    def load(self) -> TypedArray:
        """The array itself: it is in memory already."""
        return self

    def to_numpy(self) -> AnyArray:
        """Numbers that numpy can compute with: bfloat16 as float32 (exact), others unchanged."""
        if self.dtype == "bfloat16":
            return bfloat16_to_float32(self.values)
        return self.values


@dataclass(frozen=True, slots=True)
class CastCounts:
    """How many values of an array were not finite, or were changed by a cast.

    Attributes
    ----------
    num_nan, num_inf
        NaN and infinite values of the source; they are kept.
    num_overflow
        Finite values beyond the stored type: clipped, or the reason for a wider stored type.
    num_to_zero
        Values other than zero that became zero.
    num_to_subnormal
        Values that became subnormal numbers of the stored type and so lost precision.
    """

    num_nan: int = 0
    num_inf: int = 0
    num_overflow: int = 0
    num_to_zero: int = 0
    num_to_subnormal: int = 0

    def __add__(self, other: CastCounts) -> CastCounts:
        return CastCounts(*map(operator.add, self._values(), other._values()))

    def nonzero(self) -> dict[str, int]:
        """The counts that are not zero, by name."""
        counts = self._values()
        return dict(compress(zip(_COUNTS, counts, strict=True), counts)) if any(counts) else {}

    def _values(self) -> tuple[int, ...]:
        return (
            self.num_nan,
            self.num_inf,
            self.num_overflow,
            self.num_to_zero,
            self.num_to_subnormal,
        )


_COUNTS: Final = tuple(each.name for each in fields(CastCounts))
NO_COUNTS: Final = CastCounts()


@dataclass(frozen=True, slots=True)
class CastResult:
    """An array ready to be stored, C-contiguous and little-endian, and counts of changes."""

    array: TypedArray
    # The source's type where reading should cast back to it (policy ``auto``).
    source_dtype: FloatType | None
    # The source's type where the cast may have lost something.
    cast_from: FloatType | None
    counts: CastCounts
    # Values that casting back to `cast_from` does not give, bit for bit; None if unknown.
    num_changed: int | None = 0


def bfloat16_to_float32(bits: AnyArray) -> NDArray[np.float32]:
    """bfloat16 bits as numbers; exact, since bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16 values, ties to even; NaN stays a (quiet) NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding could carry a NaN's mantissa into the exponent and sign.
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        rounded = np.where(nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded)
    return rounded.astype(np.uint16)


def float32_to_float16(
    values: NDArray[np.float32], out: NDArray[np.float16] | None = None
) -> NDArray[np.float16]:
    """The nearest float16 values, ties to even, with numpy's bits and without its warnings.

    `values` are of any shape and byte order; `out` is C-contiguous, a new array by default.
    """
    values = np.ascontiguousarray(values, dtype="<f4")
    out = np.empty(values.shape, "<f2") if out is None else out
    if NATIVE is not None and not NATIVE.cast(values, 2, out, 0)[0]:
        return out
    # Five times as fast, but not worth importing; it may be half imported, or None.
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "from_numpy") or not values.flags.writeable:
        with np.errstate(all="ignore"):
            np.copyto(out, values, casting="unsafe")
        return out
    source, target = values.reshape(-1), out.reshape(-1)
    for start in range(0, source.size, _TORCH_BLOCK):
        part = slice(start, start + _TORCH_BLOCK)
        torch.from_numpy(target[part]).copy_(torch.from_numpy(source[part]))
    if np.isnan(source.max(initial=0)):
        # torch gives NaN other bits.
        nan = np.isnan(values)
        out[nan] = values[nan].astype(np.float16)
    return out


def float16_to_float32(
    values: NDArray[np.float16], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The same values, several times as fast as by numpy; `out` is C-contiguous."""
    values = np.ascontiguousarray(values, dtype="<f2")
    out = np.empty(values.shape, "<f4") if out is None else out
    if NATIVE is None or NATIVE.cast(values, 0, out, 2)[0]:
        np.copyto(out, values)
    return out


def widened(values: AnyArray) -> AnyArray:
    """float16 values as float32, others as they are."""
    return float16_to_float32(values) if values.dtype == np.float16 else values


class Cast(NamedTuple):
    """An array in another type, and counts of what changed."""

    array: TypedArray
    counts: CastCounts
    num_changed: int


def compiled_cast(array: TypedArray, dtype: FloatType) -> Cast | None:
    """A cast by compiled kernels; None without them, for float64, and with NaN."""
    source, target = KERNEL_KINDS.get(array.dtype), KERNEL_KINDS.get(dtype)
    if NATIVE is None or source is None or target is None:
        return None
    values = np.ascontiguousarray(array.values, dtype=CARRIERS[array.dtype])
    out = np.empty(values.shape, CARRIERS[dtype])
    num_nan, *counts, num_changed = NATIVE.cast(values, source, out, target)
    if num_nan:
        # Python knows which bits NaN gets.
        return None
    return Cast(TypedArray(out, dtype), CastCounts(0, *counts), num_changed)


def cast_values(array: TypedArray, dtype: FloatType) -> TypedArray:
    """`array` in another type by round-to-nearest-even: C-contiguous and little-endian."""
    if array.dtype == dtype:
        values = np.ascontiguousarray(array.values, dtype=CARRIERS[dtype])
        return array if values is array.values else TypedArray(values, dtype)
    compiled = compiled_cast(array, dtype)
    if compiled is not None:
        return compiled.array
    numbers = array.to_numpy()
    if (array.dtype, dtype) == ("float32", "float16"):
        return TypedArray(float32_to_float16(numbers), dtype)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if dtype == "bfloat16":
            if numbers.dtype.itemsize > 4:
                return TypedArray(_float64_to_bfloat16(numbers), dtype)
            return TypedArray(float32_to_bfloat16(numbers.astype(np.float32, copy=False)), dtype)
        return TypedArray(np.ascontiguousarray(numbers, dtype=CARRIERS[dtype]), dtype)


def _float64_to_bfloat16(numbers: AnyArray) -> NDArray[np.uint16]:
    """Rounds once: going through a nearest float32 would round twice.

    Truncating to float32 with a sticky last bit ("round to odd") keeps the second rounding right.
    """
    narrow = numbers.astype(np.float32)
    overflowed = np.isinf(narrow) & np.isfinite(numbers)
    too_large = (np.abs(narrow) > np.abs(numbers)) & ~overflowed
    toward_zero = np.where(too_large, np.nextafter(narrow, np.float32(0)), narrow)
    inexact = (toward_zero.astype(np.float64) != numbers) & np.isfinite(narrow)
    bits = toward_zero.astype(np.float32).view(np.uint32) | inexact.astype(np.uint32)
    return float32_to_bfloat16(bits.view(np.float32))


def read_type(attrs: Mapping[str, object], stored: str | None) -> str:
    """The type in which an array with these attributes is read, by the type it is stored in."""
    return str(attrs.get("source_dtype", attrs.get("restored_dtype", stored)))


def same_bits(a: AnyArray, b: AnyArray) -> bool:
    """Whether two arrays have the same shape, dtype and bits (NaN payloads and -0.0 included)."""
    if a.shape != b.shape or a.dtype.newbyteorder("=") != b.dtype.newbyteorder("="):
        return False
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    left = np.ascontiguousarray(a, dtype=a.dtype.newbyteorder("=")).view(unsigned)
    right = np.ascontiguousarray(b, dtype=b.dtype.newbyteorder("=")).view(unsigned)
    return bool(np.array_equal(left, right))


def count_not_finite(array: TypedArray) -> tuple[int, int]:
    """The number of NaN and of infinite values."""
    unsigned, mask = _EXPONENT_MASKS[array.dtype]
    native = np.ascontiguousarray(array.values, dtype=array.values.dtype.newbyteorder("="))
    if NATIVE is not None and array.dtype in KERNEL_KINDS:
        ((*_, num_nan, num_inf, _),) = NATIVE.store(((native, 0, b"", KERNEL_KINDS[array.dtype]),))
        return num_nan, num_inf
    bits: AnyArray = native.view(unsigned).ravel()
    exponents: AnyArray = _SCRATCH.take(bits.nbytes).view(unsigned)
    np.bitwise_and(bits, mask, out=exponents)
    if exponents.max(initial=0) < mask:
        return 0, 0
    special = exponents == mask
    total = int(np.count_nonzero(special))
    mantissa = unsigned((mask & -mask) - 1)
    num_nan = int(np.count_nonzero(bits[special] & mantissa))
    return num_nan, total - num_nan


def _count_changes(source: TypedArray, stored: TypedArray) -> list[int]:
    """Overflows, values gone to zero, values gone subnormal, of a cast to a narrower type.

    Only values with the lowest or highest exponent can be any of these, and they are found by
    their bits: numpy computes with float16 thirty times more slowly.
    """
    unsigned, mask = _EXPONENT_MASKS[stored.dtype]
    exponents = stored.values.view(unsigned) & unsigned(mask)
    extreme = (exponents == 0) | (exponents == unsigned(mask))
    before = TypedArray(source.values[extreme], source.dtype).to_numpy()
    after = TypedArray(stored.values[extreme], stored.dtype).to_numpy().astype(before.dtype)
    overflow = np.isinf(after) & np.isfinite(before)
    to_zero = (after == 0) & (before != 0)
    to_subnormal = (after != 0) & np.isfinite(after) & (after != before)
    return [int(np.count_nonzero(each)) for each in (overflow, to_zero, to_subnormal)]


def _count_changed(source: TypedArray, stored: TypedArray) -> int:
    """Values that casting back does not give, bit for bit."""
    unsigned, _ = _EXPONENT_MASKS[source.dtype]
    before = cast_values(source, source.dtype).values.reshape(-1)
    after = stored.values.reshape(-1)
    num_changed = 0
    for start in range(0, before.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        back = cast_values(TypedArray(after[part], stored.dtype), source.dtype).values
        differs = back.view(unsigned) != before[part].view(unsigned)
        num_changed += int(np.count_nonzero(differs))
    return num_changed


def _cast_exact(array: TypedArray) -> TypedArray:
    """The narrowest type that gives every bit of `array` back."""
    native = cast_values(array, array.dtype)
    for dtype in _EXACT_CANDIDATES[array.dtype]:
        compiled = compiled_cast(native, dtype) if dtype != array.dtype else None
        if compiled is not None:
            if not compiled.num_changed:
                return compiled.array
            continue
        stored = cast_values(native, dtype)
        if same_bits(cast_values(stored, array.dtype).values, native.values):
            return stored
    return native


def cast_for_storage(
    array: TypedArray, *, policy: DtypePolicy = "float16", on_overflow: OverflowPolicy = "float32"
) -> CastResult:
    """`array` in the type that the policy chooses, with a count of all that changed.

    Parameters
    ----------
    array
        The source, any shape.
    policy
        A stored type, or ``auto`` for the narrowest type that is exact for every value.
    on_overflow
        What to do with an array holding finite values beyond the stored type: store it in
        ``float32`` (or float64, where it needs that), raise an ``error``, or ``clip`` it to the
        largest finite value.
    """
    if policy != "auto" and policy != array.dtype:
        compiled = compiled_cast(array, policy)
        if compiled is not None and not compiled.counts.num_overflow:
            return CastResult(
                compiled.array, None, array.dtype, compiled.counts, compiled.num_changed
            )
    not_finite = CastCounts(*count_not_finite(array))
    if policy == "auto":
        stored = _cast_exact(array)
        source_dtype = array.dtype if stored.dtype != array.dtype else None
        return CastResult(stored, source_dtype, None, not_finite)
    stored = cast_values(array, policy)
    if stored.dtype == array.dtype:
        return CastResult(stored, None, None, not_finite)
    overflow, *lost = _count_changes(array, stored)
    if overflow:
        if on_overflow == "error":
            message = (
                f"{overflow} finite values lie beyond {policy} (largest: {_LARGEST[policy]:g}); "
                "pass on_overflow='float32' or 'clip', or dtype='float32' or 'auto'"
            )
            raise ConversionError(message)
        if on_overflow == "clip":
            stored = _clip(array, stored)
        else:
            stored = cast_values(array, "float32")
            beyond, *lost = _count_changes(array, stored)
            if beyond:
                stored, lost = cast_values(array, "float64"), [0, 0]
    counts = not_finite + CastCounts(0, 0, overflow, *lost)
    if stored.dtype == array.dtype:
        return CastResult(stored, None, None, counts)
    return CastResult(stored, None, array.dtype, counts, _count_changed(array, stored))


def _clip(source: TypedArray, stored: TypedArray) -> TypedArray:
    """`stored` with its overflows replaced by the largest finite value of their sign."""
    before, after = source.to_numpy(), stored.to_numpy()
    overflow = np.isinf(after) & np.isfinite(before)
    largest = np.where(overflow, np.copysign(_LARGEST[stored.dtype], before), after)
    return cast_values(TypedArray.of(largest.astype(before.dtype)), stored.dtype)
