"""Every value comes back within what its encoding promises, whatever it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from coding import (
    assert_same_class,
    assert_same_values,
    bits,
    encoded,
    restored,
    scale_from,
    scale_of,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from h5traces.format.precision import COARSEST_STEP, FINEST_STEP, TIERS, Precision
from h5traces.precision.channel_steps import StepFormat, to_steps
from h5traces.precision.encoding import EncodedLayer

if TYPE_CHECKING:
    from h5traces.precision.scales import ChannelScale

steps = st.one_of(
    st.sampled_from([FINEST_STEP, 0.02, 0.0787, 0.0788, 0.1, 0.2, 0.4, 1.0, COARSEST_STEP]),
    st.floats(FINEST_STEP, COARSEST_STEP),
)
# Weights of up to 1 are rounded to float32, three times; a root changes half as much as its square.
FLOAT32_ROUNDING = 3 * 2.0**-25


def half_spacing(values: np.ndarray) -> np.ndarray:
    """The most that rounding to float16 changes."""
    with np.errstate(all="ignore"):
        return np.spacing(np.abs(values).astype(np.float16)).astype(np.float64) / 2


def assert_within(values: np.ndarray, layer: EncodedLayer, scale: ChannelScale, c: float) -> None:
    """Fail unless a layer in steps keeps its promise in both types that it is read in."""
    if layer.kept_exact is not None:
        assert "encoding" not in layer.attrs
        assert np.array_equal(bits(layer.values), bits(values))
        return
    bound = c / 2 * scale.sigma.astype(np.float64)
    assert layer.attrs["max_error_sigma"] == c / 2
    for unrounded in (False, True):
        found = restored(layer, scale, unrounded=unrounded)
        assert found.dtype == (np.float32 if unrounded else values.dtype)
        assert_same_class(found, values)
        finite = np.isfinite(values)
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(found.astype(np.float64) - values.astype(np.float64))
        assert (error <= bound)[finite].all(), (error - bound)[finite].max()
        if layer.exceptions is not None:
            at = layer.exceptions[:, 0].astype(np.int64)
            assert_same_values(found.reshape(-1)[at], values.reshape(-1)[at])


def anything(shape: tuple[int, ...], dtype: str) -> st.SearchStrategy[np.ndarray]:
    """Floats of any bits: NaN, infinities, subnormals."""
    width = {"float16": 16, "float32": 32}[dtype]
    return hnp.arrays(dtype, shape, elements=st.floats(width=width))  # type: ignore[arg-type]


@st.composite
def layers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Values of one layer and what it is calibrated on: normal numbers with odd ones among them."""
    dtype = draw(st.sampled_from(["float16", "float32"]))
    width = draw(st.integers(1, 6))
    tokens = draw(st.sampled_from([0, 1, 2, 17, 90]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scales = draw(
        hnp.arrays("f8", width, elements=st.sampled_from([0, 1e-8, 1e-6, 1e-3, 1, 30, 2e4, 1e6]))
    )
    centers = draw(
        hnp.arrays("f8", width, elements=st.sampled_from([0, 1e-7, 0.1, 7.3, -900, 6e4, -1e6]))
    )
    made = []
    for count, unlike in ((tokens, draw(st.sampled_from([0.01, 1, 1, 300]))), (40, 1)):
        numbers = centers + scales * unlike * rng.standard_normal((count, width))
        if dtype == "float16":
            numbers = np.clip(numbers, -65504, 65504)
        made.append(numbers.astype(dtype))
    values = made[0]
    odd = anything((4,), dtype)
    for at in draw(st.lists(st.integers(0, max(0, values.size - 1)), max_size=4)):
        if values.size:
            values.reshape(-1)[at] = draw(odd)[0]
    return values, made[1]


@given(layers(), steps)
@settings(max_examples=400)
def test_steps_hold_for_every_value(drawn: tuple[np.ndarray, np.ndarray], c: float) -> None:
    values, others = drawn
    scale = scale_of([others], c)
    assert_within(values, encoded(values, Precision(step=c), scale=scale), scale, c)


@given(st.data(), steps, st.sampled_from(["float16", "float32"]))
@settings(max_examples=300)
def test_steps_hold_for_any_statistics(data: st.DataObject, c: float, dtype: str) -> None:
    """As if calibrated on anything whatever."""
    width = data.draw(st.integers(1, 5))
    finite = st.floats(-65504, 65504, width=32)
    center = data.draw(hnp.arrays("f4", width, elements=finite))
    sigma = data.draw(hnp.arrays("f4", width, elements=st.floats(0, 65504, width=32)))
    scale = scale_from(center, sigma, c)
    # Near the middle, so that not all are exceptions.
    away = data.draw(
        hnp.arrays("f8", (40, width), elements=st.floats(-12, 12) | st.sampled_from([0.5, 1e3]))
    )
    with np.errstate(over="ignore"):
        values = (center + away * np.maximum(sigma, scale.step)).astype(dtype)
    assert_within(values, encoded(values, Precision(step=c), scale=scale), scale, c)


@pytest.mark.parametrize("c", [0.001, 0.02, 0.1, 0.4, 1.0, 4.0])
@pytest.mark.parametrize("sigma", [1e-7, 1e-4, 0.03, 1.7, 800.0, 3e4])
def test_steps_hold_for_every_float16(c: float, sigma: float) -> None:
    """All 65,536 of them, in channels of several centers; too many are exceptions for an archive.

    What lies near the middle of some channel is not, so that both are looked at.
    """
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    centers = np.array([0, 1, -0.3, 1000, 65504], np.float32)
    scale = scale_from(centers, np.full(5, sigma), c)
    values = np.ascontiguousarray(np.broadcast_to(every[:, None], (1 << 16, 5)))
    stored, beyond = to_steps(values, scale, c)
    form = StepFormat.of(c)
    attrs = {
        "encoding": "channel-steps",
        "encoding_version": "1",
        "scales": "/scales/hidden_states/layer_000",
        "zero_point": form.zero_point,
        "spacing": form.spacing,
        "max_error_sigma": c / 2,
        "restored_dtype": "float16",
        **({"exceptions": "x", "num_exceptions": beyond.size} if beyond.size else {}),
    }
    pairs = np.stack([beyond, values.reshape(-1)[beyond].astype(np.float64)], axis=1)
    layer = EncodedLayer(stored, form.dtype, values.nbytes, attrs, pairs)
    assert_within(values, layer, scale, c)


@given(layers(), steps, st.permutations([0, 1, 2]))
@settings(max_examples=200)
def test_any_order_of_float64_gives_the_same_float32(
    drawn: tuple[np.ndarray, np.ndarray], c: float, order: list[int]
) -> None:
    values, others = drawn
    scale = scale_of([others], c)
    layer = encoded(values, Precision(step=c), scale=scale)
    if layer.kept_exact is not None:
        return
    found = restored(layer, scale, unrounded=True)
    zero, spacing = layer.attrs["zero_point"], layer.attrs["spacing"]
    step, offset = scale.step.astype(np.float64), scale.offset.astype(np.float64)
    terms = [layer.values * (step / spacing), -zero * step / spacing, offset]
    mine = (terms[order[0]] + terms[order[1]] + terms[order[2]]).astype(np.float32)
    if layer.exceptions is not None:
        at = layer.exceptions[:, 0].astype(np.int64)
        mine.reshape(-1)[at] = layer.exceptions[:, 1]
    assert np.array_equal(mine == found, ~np.isnan(found))


@pytest.mark.parametrize("name", ["fine", "analysis", "compact"])
def test_what_was_calibrated_has_few_exceptions(name: str) -> None:
    """Else the bound would hold for the reason that all values are listed."""
    rng = np.random.default_rng(1)
    c = TIERS[name].step  # type: ignore[index]
    assert c is not None
    sigma = np.exp(rng.normal(size=64))
    values = (rng.normal(size=(1000, 64)) * sigma).astype(np.float16)
    scale = scale_of([(rng.normal(size=(400, 64)) * sigma).astype(np.float16)], c)
    layer = encoded(values, Precision(step=c), scale=scale)
    assert layer.kept_exact is None
    assert layer.attrs.get("num_exceptions", 0) < values.size / 1000
    assert scale.step == pytest.approx(c * sigma, rel=0.3)
    error = np.abs(restored(layer, scale).astype(np.float64) - values) / scale.sigma
    assert error.max() > 0.4 * c


def test_a_coarse_step_does_not_make_a_value_infinite() -> None:
    """The nearest number of steps may lie beyond what float16 holds."""
    values = np.array([[65504.0], [-65504.0], [0.0], [60000.0]] * 30, np.float16)
    for c in (0.4, 1.0, 4.0):
        for sigma in (3e3, 1e4, 3e4):
            scale = scale_from(np.zeros(1), np.full(1, sigma), c)
            layer = encoded(values, Precision(step=c), scale=scale)
            assert_within(values, layer, scale, c)


# --- square roots --------------------------------------------------------------------------


def assert_levels(values: np.ndarray) -> None:
    precision = Precision(attention_bits=8)
    layer = encoded(values, precision, kind="attentions")
    if layer.kept_exact is not None:
        assert np.array_equal(bits(layer.values), bits(values))
        return
    exact = restored(layer, unrounded=True).astype(np.float64)
    short = restored(layer)
    assert short.dtype == np.float16
    with np.errstate(invalid="ignore"):
        weights = (values >= 0) & (values <= 1)
    roots = np.abs(np.sqrt(exact[weights]) - np.sqrt(values[weights].astype(np.float64)))
    assert roots.max(initial=0) <= 0.5 / 255 + FLOAT32_ROUNDING
    rounding = np.abs(short[weights].astype(np.float64) - exact[weights])
    assert (rounding <= half_spacing(exact[weights])).all()
    for found in (short, exact):
        assert_same_values(found[~weights], values[~weights])
    assert np.array_equal(bits(short[~weights]), bits(values[~weights]))


def test_levels_hold_for_every_float16() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):
        weights = every[(every >= 0) & (every <= 1)]
    others = every[np.isnan(every) | (every < 0) | (every > 1)]
    for start in range(0, others.size, 900):
        part = np.concatenate([weights, others[start : start + 900]])
        assert (
            encoded(part.reshape(1, 1, -1), Precision(attention_bits=8), kind="attentions").attrs[
                "encoding"
            ]
            == "sqrt-uint8"
        )
        assert_levels(part.reshape(1, 1, -1))


@given(st.data())
@settings(max_examples=150)
def test_levels_hold_for_anything(data: st.DataObject) -> None:
    shape = (2, *data.draw(st.sampled_from([(0, 0), (1, 1), (5, 5)])))
    values = np.random.default_rng(data.draw(st.integers(0, 2**32))).random(shape)
    values = values.astype(np.float16)
    if values.size:
        at = data.draw(st.lists(st.integers(0, values.size - 1), max_size=3))
        values.reshape(-1)[at] = data.draw(anything((len(at),), "float16"))
    assert_levels(values)


@given(hnp.arrays("f4", (20,), elements=st.floats(0, 1, width=32) | st.sampled_from([1e-40, 1e-8])))
def test_levels_of_means_in_float32(values: np.ndarray) -> None:
    """Head means are encoded from float32, so that rounding them does not come on top."""
    layer = encoded(values.reshape(4, 5), TIERS["compact"], kind="attention_mean")
    assert layer.attrs["levels"] == 255
    found = restored(layer, unrounded=True).astype(np.float64).reshape(-1)
    error = np.abs(np.sqrt(found) - np.sqrt(values.astype(np.float64)))
    assert error.max() <= 0.5 / 255 + FLOAT32_ROUNDING


# --- fewer mantissa bits ---------------------------------------------------------------------


@pytest.mark.parametrize("kept", range(1, 10))
def test_rounding_holds_for_every_float16(kept: int) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    layer = encoded(values, Precision(mantissa_bits=kept))
    found = layer.values
    assert found.dtype == np.float16
    assert layer.attrs["mantissa_bits"] == kept
    tiny = np.abs(values) < np.float16(2.0**-14)
    same = tiny | ~np.isfinite(values)
    assert np.array_equal(bits(found)[same], bits(values)[same])
    assert np.isfinite(found[~same]).all()
    wide = values[~same].astype(np.float64)
    error = np.abs(found[~same].astype(np.float64) - wide) / np.abs(wide)
    assert error.max() <= 2.0 ** -(kept + 1)
    assert error.max() > 2.0 ** -(kept + 2)
    assert not (bits(found)[~same] & ((1 << (10 - kept)) - 1)).any()
    again = encoded(found, Precision(mantissa_bits=kept)).values
    assert np.array_equal(bits(again), bits(found))
    # Nearest, ties to even, where that is finite.
    unit = 2.0 ** (np.floor(np.log2(np.abs(wide))) - kept)
    nearest = np.rint(wide / unit) * unit
    fits = np.abs(nearest) <= 65504
    assert np.array_equal(nearest[fits], found[~same].astype(np.float64)[fits])


@example(np.zeros((0, 3), np.float16), 5)
@given(anything((3, 4), "float16"), st.integers(1, 9))
def test_rounding_of_anything(values: np.ndarray, kept: int) -> None:
    found = encoded(values, Precision(mantissa_bits=kept)).values
    assert found.shape == values.shape
    assert_same_class(found, values)
    again = encoded(found, Precision(mantissa_bits=kept)).values
    assert np.array_equal(bits(again), bits(found))
