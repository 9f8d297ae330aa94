"""Casts between float16 and float32 are numpy's own, to the bit."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from h5traces.format.dtypes import (
    TypedArray,
    cast_values,
    float16_to_float32,
    float32_to_float16,
)


def numpys(values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return values.astype(np.float16).view(np.uint16)


@pytest.fixture(autouse=True, params=["numpy", "torch"])
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch casts where it is loaded, else numpy."""
    found = pytest.importorskip("torch") if request.param == "torch" else None
    monkeypatch.setitem(sys.modules, "torch", found)


def test_every_float16_widens_exactly() -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    wide = cast_values(TypedArray(values, "float16"), "float32").values
    assert np.array_equal(wide.view(np.uint32), values.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("exponents", ["all", "of float16"])
def test_random_bits_narrow_as_numpy_does(exponents: str) -> None:
    bits = (
        np.random.default_rng(0).integers(0, 1 << 32, 3_000_001, dtype=np.uint64).astype(np.uint32)
    )
    if exponents == "of float16":
        bits = (bits & 0x8FFFFFFF) | 0x30000000
    values = bits.view(np.float32)
    assert np.array_equal(float32_to_float16(values).view(np.uint16), numpys(values))


@pytest.mark.parametrize("nudge", [-1, 0, 1])
def test_ties_and_their_neighbours_narrow_as_numpy_does(nudge: int) -> None:
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = ((finite[:-1] + finite[1:]) / 2).astype(np.float32)
    values = (middles.view(np.int32) + nudge).astype(np.int32).view(np.float32)
    for signed in (values, -values):
        assert np.array_equal(float32_to_float16(signed).view(np.uint16), numpys(signed))


def test_results_go_where_they_are_wanted() -> None:
    values = np.linspace(-3, 3, 70_000, dtype=np.float32).reshape(7, 10_000)
    out = np.empty(values.shape, np.float16)
    assert float32_to_float16(values, out) is out
    assert np.array_equal(out, values.astype(np.float16))


def test_read_only_and_scalar_arrays() -> None:
    values = np.array([1.5, np.nan, 1e6], np.float32)
    values.flags.writeable = False
    assert np.array_equal(float32_to_float16(values).view(np.uint16), numpys(values))
    assert float32_to_float16(np.array(0.1, ">f4")) == np.float16(0.1)
    assert float32_to_float16(np.empty((0, 3), np.float32)).shape == (0, 3)


def test_every_float16_widens_into_given_memory() -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for each in (values, values[np.isfinite(values)][::3]):  # without NaN, by the kernels
        out = np.empty(each.shape, np.float32)
        assert float16_to_float32(each, out) is out
        assert np.array_equal(out.view(np.uint32), each.astype(np.float32).view(np.uint32))
