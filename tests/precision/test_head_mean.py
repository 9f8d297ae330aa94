"""The mean over heads puts every edge of a graph on the side where torch's mean puts it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from attention import attention
from coding import encoded, restored, typed
from hypothesis import given, settings
from hypothesis import strategies as st

from h5traces.format.precision import TIERS
from h5traces.precision.attention import HeadMean

if TYPE_CHECKING:
    from h5traces.format.dtypes import TypedArray

THRESHOLD = 0.01
HEADS = [1, 2, 3, 5, 7, 8, 12, 16, 24, 31, 32, 40, 48, 63, 64]
# The float16 next to 0.01, and its neighbours.
NEAR = np.float16(THRESHOLD).view(np.uint16) + np.arange(-3, 4).astype(np.uint16)


class Stored:
    """An array as a record has it."""

    def __init__(self, values: np.ndarray) -> None:
        self._array = typed(values)
        self.shape, self.dtype = values.shape, self._array.dtype

    def load(self) -> TypedArray:
        return self._array


def mean_of(weights: np.ndarray) -> np.ndarray:
    """What the writer takes the mean to be."""
    return HeadMean(Stored(weights)).load().values


def flips(weights: np.ndarray) -> int:
    """Edges that are not where torch puts them, in both types that means are read in."""
    expected = torch.from_numpy(weights).float().mean(0).numpy() > np.float32(THRESHOLD)
    layer = encoded(mean_of(weights), TIERS["compact"], kind="attention_mean")
    assert layer.attrs["encoding"] == "sqrt-uint8"
    found = 0
    for unrounded in (False, True):
        mean = restored(layer, unrounded=unrounded)
        found += np.count_nonzero((mean > np.float32(THRESHOLD)) != expected)
        found += np.count_nonzero((mean.astype(np.float64) > THRESHOLD) != expected)
        found += np.count_nonzero((torch.from_numpy(mean) > THRESHOLD).numpy() != expected)
    return found


@pytest.mark.parametrize("heads", HEADS)
def test_no_edge_flips_in_attention_as_models_have_it(heads: int) -> None:
    """Sixteen hundred matrices for each number of heads."""
    rng = np.random.default_rng(heads)
    edges = 0
    for number in range(16):
        # Side by side: means know nothing of rows and columns.
        weights = attention(rng, heads, 10, matrices=100, sharpness=0.5 + number % 4)
        assert flips(weights) == 0
        edges += np.count_nonzero(weights.mean(0, dtype=np.float64) > THRESHOLD)
    assert edges > 10_000


@pytest.mark.parametrize("heads", HEADS)
def test_no_edge_flips_where_all_means_are_near_the_threshold(heads: int) -> None:
    """Twenty thousand entries for each number of heads, whose sums differ by single units."""
    rng = np.random.default_rng(heads)
    alike = rng.choice(NEAR, (heads, 100, 50)).view(np.float16)
    # One head makes up for the others, in units of the smallest float16.
    unlike = (rng.random((heads, 100, 150)) * 0.02 * rng.integers(0, 2, (heads, 100, 150))).astype(
        np.float16
    )
    missing = THRESHOLD * heads - unlike[1:].sum(0, dtype=np.float64)
    nudges = rng.integers(-3, 4, missing.shape) * 2.0**-24
    unlike[0] = np.clip(missing + nudges, 0, 1).astype(np.float16)
    weights = np.concatenate([alike, unlike], axis=2)
    assert flips(weights) == 0
    away = np.abs(weights.mean(0, dtype=np.float64) - THRESHOLD)
    assert np.count_nonzero(away < 1e-5) > 1000
    assert 0.02 < (weights.mean(0, dtype=np.float64) > THRESHOLD).mean() < 0.98


@given(
    st.integers(1, 64),
    st.lists(st.integers(0, 0x3C00), min_size=64, max_size=64),
    st.integers(-2, 2),
)
@settings(max_examples=300)
def test_no_edge_flips_at_whatever_weights(heads: int, words: list[int], nudge: int) -> None:
    weights = np.array(words[:heads], np.uint16).view(np.float16)
    others = weights[1:].sum(dtype=np.float64)
    if 0 <= THRESHOLD * heads - others <= 1:
        nearest = np.float16(THRESHOLD * heads - others).view(np.uint16)
        weights[0] = np.uint16(max(0, int(nearest) + nudge)).view(np.float16)
    assert flips(weights.reshape(heads, 1, 1)) == 0


def test_sums_near_the_threshold_are_exact_up_to_a_hundred_heads() -> None:
    """Why the order in which heads are added cannot flip an edge.

    Weights of float16 are multiples of 2^-24, and float32 holds all of these below 1. As long as
    0.01 times the heads is less than that, every partial sum of a mean near the threshold is exact.
    """
    rng = np.random.default_rng(0)
    weights = np.concatenate(
        [rng.choice(NEAR, (99, 20, 20)).view(np.float16), attention(rng, 99, 20)], axis=1
    )
    near = weights.sum(0, dtype=np.float64) < 1
    assert near.sum() > 400
    expected = weights.sum(0, dtype=np.float64)[near]
    for _ in range(20):
        shuffled = rng.permutation(weights, axis=0).astype(np.float32)
        total = np.zeros(near.shape, np.float32)
        for head in shuffled:
            total += head
        assert np.array_equal(total[near], expected)


@pytest.mark.parametrize("heads", [112, 128])
def test_beyond_a_hundred_heads_only_the_order_of_the_sum_can_flip_an_edge(heads: int) -> None:
    """Sums of 1.12 and 1.28 are rounded in float32, differently in every order.

    torch adds heads in several lanes, the writer one after the other. Of 20,000 entries made to
    lie around the threshold, a few get an edge from one and not from the other; each of these lies
    within 2 * 10^-9 of 0.01. The encoding adds nothing to that.
    """
    rng = np.random.default_rng(0)
    weights = (rng.random((heads, 100, 200)) * 0.02).astype(np.float16)
    missing = THRESHOLD * heads - weights[1:].sum(0, dtype=np.float64)
    weights[0] = np.clip(missing, 0, 1).astype(np.float16)
    ours = mean_of(weights) > np.float32(THRESHOLD)
    backwards = mean_of(weights[::-1]) > np.float32(THRESHOLD)
    torchs = torch.from_numpy(weights).float().mean(0).numpy() > np.float32(THRESHOLD)
    assert 0 < np.count_nonzero(ours != backwards) < 50
    away = np.abs(weights.mean(0, dtype=np.float64) - THRESHOLD)
    assert away[(ours != torchs) | (ours != backwards)].max() < 2e-9
    layer = encoded(mean_of(weights), TIERS["compact"], kind="attention_mean")
    assert np.array_equal(restored(layer) > np.float32(THRESHOLD), ours)


def test_the_mean_is_that_of_float16_whatever_the_source() -> None:
    """So that an archive of the mean and one of the heads give the same."""
    wide = np.random.default_rng(0).random((4, 9, 9)).astype(np.float32)
    assert np.array_equal(mean_of(wide), mean_of(wide.astype(np.float16)))
    assert mean_of(wide).dtype == np.float32


@pytest.mark.parametrize("shape", [(0, 3, 3), (1, 0, 0), (5, 1, 1)])
def test_means_of_next_to_nothing(shape: tuple[int, ...]) -> None:
    weights = np.full(shape, 0.25, np.float16)
    assert mean_of(weights).shape == shape[1:]
    assert not mean_of(weights).size or mean_of(weights)[0, 0] == (0.25 if shape[0] else 0)


def test_what_is_not_finite_stays_so() -> None:
    weights = np.full((2, 20, 2), 0.5, np.float16)
    weights[0, 0] = np.nan, np.inf
    layer = encoded(mean_of(weights), TIERS["compact"], kind="attention_mean")
    assert layer.attrs["num_exceptions"] == 2
    found = restored(layer)
    assert np.isnan(found[0, 0])
    assert np.isposinf(found[0, 1])
    assert found[1:] == pytest.approx(0.5, abs=0.003)
