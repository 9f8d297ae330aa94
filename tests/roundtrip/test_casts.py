"""Casts keep what they promise, and count what they change as plain numpy would."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from legacy_batches import assert_same, bits
from strategies import float_arrays

from h5traces.errors import ConversionError
from h5traces.format.dtypes import (
    CARRIERS,
    FLOAT_TYPES,
    CastCounts,
    TypedArray,
    bfloat16_to_float32,
    cast_for_storage,
    cast_values,
    count_not_finite,
    float32_to_bfloat16,
    same_bits,
)

LARGEST_BFLOAT16 = 0x7F7F


def native(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("="))


def is_exact(array: np.ndarray, dtype: str) -> bool:
    """Whether a trip through `dtype` gives every bit back, by plain numpy."""
    with np.errstate(all="ignore"):
        if dtype == "bfloat16":
            narrow = bfloat16_to_float32(reference_bfloat16(array))
        else:
            narrow = array.astype(dtype)
        return bits(native(array)) == bits(narrow.astype(native(array).dtype))


def reference_bfloat16(array: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of every value, ties to even: looked up among all of them."""
    positive = bfloat16_to_float32(np.arange(0x7F80, dtype=np.uint16)).astype(np.float64)
    # What would follow the largest one; halfway to it, rounding goes to infinity.
    ladder = np.append(positive, 2.0**128)
    numbers = array.astype(np.float64)
    magnitude = np.abs(numbers)
    upper = np.minimum(np.searchsorted(ladder, magnitude), len(ladder) - 1)
    lower = np.maximum(upper - 1, 0)
    middle = (ladder[lower] + ladder[upper]) / 2  # exact: nine bits in float64
    take_upper = (magnitude > middle) | ((magnitude == middle) & (upper % 2 == 0))
    found = np.where(take_upper, upper, lower).astype(np.uint16)
    found[np.isinf(numbers)] = 0x7F80
    found |= np.where(np.signbit(numbers), 0x8000, 0).astype(np.uint16)
    nan = np.isnan(numbers)
    found[nan] = float32_to_bfloat16(array[nan].astype(np.float32))
    return found


@given(float_arrays())
@settings(max_examples=300)
def test_auto_is_exact_and_narrowest(array: np.ndarray) -> None:
    source = TypedArray.of(array)
    result = cast_for_storage(source, policy="auto")
    back = cast_values(result.array, source.dtype)
    assert back.values.dtype == CARRIERS[source.dtype]
    assert bits(back.values) == bits(native(array))
    candidates = [name for name in ("float16", "bfloat16", "float32") if is_exact(array, name)]
    narrower = [name for name in candidates if CARRIERS[name].itemsize < array.dtype.itemsize]  # type: ignore[index]
    assert result.array.dtype == (narrower[0] if narrower else source.dtype)
    assert result.source_dtype == (source.dtype if narrower else None)
    assert result.cast_from is None
    assert result.counts.nonzero().keys() <= {"num_nan", "num_inf"}


@given(float_arrays())
@settings(max_examples=300)
def test_float16_is_what_numpy_makes_of_it(array: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        expected = array.astype(np.float16)
    result = cast_for_storage(TypedArray.of(array), policy="float16")
    overflow = np.isinf(expected) & np.isfinite(array)
    assert result.counts.num_overflow == np.count_nonzero(overflow)
    assert result.counts.num_nan == np.count_nonzero(np.isnan(array))
    assert result.counts.num_inf == np.count_nonzero(np.isinf(array))
    if overflow.any():
        assert result.array.dtype in ("float32", "float64")
        assert not np.any(np.isinf(result.array.values) & np.isfinite(array))
        return
    assert_same(result.array.values, expected.astype("<f2"))
    magnitude = np.abs(expected)
    subnormal = (magnitude > 0) & (magnitude < np.finfo(np.float16).smallest_normal)
    assert result.counts.num_to_zero == np.count_nonzero((magnitude == 0) & (array != 0))
    inexact = expected.astype(np.float64) != array.astype(np.float64)
    assert result.counts.num_to_subnormal == np.count_nonzero(subnormal & inexact)


@given(float_arrays())
@settings(max_examples=200)
def test_clipping_and_refusing_overflow(array: np.ndarray) -> None:
    source = TypedArray.of(array)
    with np.errstate(all="ignore"):
        plain = array.astype(np.float16)
    overflow = np.isinf(plain) & np.isfinite(array)
    clipped = cast_for_storage(source, policy="float16", on_overflow="clip")
    expected = np.where(overflow, np.copysign(np.float16(65504), plain), plain)
    assert_same(clipped.array.values, expected.astype("<f2"))
    assert clipped.counts.num_overflow == np.count_nonzero(overflow)
    if overflow.any():
        with pytest.raises(ConversionError, match=r"finite values lie beyond float16.*65504"):
            cast_for_storage(source, policy="float16", on_overflow="error")
    else:
        strict = cast_for_storage(source, policy="float16", on_overflow="error")
        assert_same(strict.array.values, plain.astype("<f2"))


@given(float_arrays())
@settings(max_examples=200)
def test_bfloat16_rounds_once_to_the_nearest(array: np.ndarray) -> None:
    found = cast_values(TypedArray.of(array), "bfloat16").values
    assert_same(found, reference_bfloat16(array))


@given(float_arrays(dtype="<f4"))
@settings(max_examples=200)
def test_bfloat16_rounds_as_torch_does(array: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    finite = array[~np.isnan(array)]
    expected = torch.from_numpy(finite.copy()).bfloat16().view(torch.int16).numpy()
    assert_same(float32_to_bfloat16(finite), expected.view(np.uint16))
    assert np.all(np.isnan(bfloat16_to_float32(float32_to_bfloat16(array[np.isnan(array)]))))


def test_every_bfloat16_survives_float32() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    numbers = bfloat16_to_float32(every)
    quiet = np.where(np.isnan(numbers), every | np.uint16(0x40), every)
    assert_same(float32_to_bfloat16(numbers), quiet.astype(np.uint16))
    torch = pytest.importorskip("torch")
    expected = torch.from_numpy(every.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert bits(numbers) == bits(expected)


def test_every_float16_survives_auto() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    assert_same(cast_for_storage(TypedArray.of(every), policy="auto").array.values, every)
    ordinary = every[~np.isnan(every)]
    wide = cast_for_storage(TypedArray.of(ordinary.astype(np.float64)), policy="auto")
    assert wide.array.dtype == "float16"
    assert_same(wide.array.values, ordinary)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_not_finite_values_are_counted(dtype: Any) -> None:
    numbers = np.array([np.nan, -np.nan, np.inf, -np.inf, 0, 1, -1, np.nan])
    array = cast_values(TypedArray.of(numbers), dtype)
    assert count_not_finite(array) == (3, 2)
    assert count_not_finite(TypedArray(array.values[4:7], dtype)) == (0, 0)


@given(float_arrays(), float_arrays())
def test_same_bits_is_stricter_than_equality(left: np.ndarray, right: np.ndarray) -> None:
    assert same_bits(left, left.copy())
    expected = native(left).dtype == native(right).dtype and (
        left.shape == right.shape and bits(native(left)) == bits(native(right))
    )
    assert same_bits(left, right) is expected
    assert not same_bits(np.array([0.0]), np.array([-0.0]))


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 5), min_size=1, max_size=4))
def test_counts_add_up(rows: list[tuple[int, ...]]) -> None:
    total = sum((CastCounts(*row) for row in rows), CastCounts())
    assert total == CastCounts(*(sum(column) for column in zip(*rows, strict=True)))
    assert all(total.nonzero().values())


def test_float64_beyond_float32_stays_float64() -> None:
    result = cast_for_storage(TypedArray.of(np.array([1e300, 1.0])), policy="float32")
    assert result.array.dtype == "float64"
    assert_same(result.array.values, np.array([1e300, 1.0]))
    assert result.counts.num_overflow == 1


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "S3", "longdouble"])
def test_other_types_are_refused(dtype: str) -> None:
    with pytest.raises(ConversionError, match="expected one of float16, bfloat16"):
        TypedArray.of(np.zeros(2, dtype))


def test_the_ladder_of_the_reference_is_all_of_bfloat16() -> None:
    numbers = bfloat16_to_float32(np.arange(LARGEST_BFLOAT16 + 1, dtype=np.uint16))
    assert all(low < high for low, high in pairwise(numbers.tolist()))
    assert numbers[-1] == np.float32(3.3895314e38)
