"""Reductions equal what plain loops and torch compute."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from h5traces.features import (
    last_token,
    lookback_ratio,
    max_pooled,
    mean_pooled,
    reductions,
    row_entropy,
    sink_mass,
)

RNG = np.random.default_rng(0)


def states(tokens: int = 7, hidden: int = 5, dtype: str = "float16") -> np.ndarray:
    return RNG.standard_normal((tokens, hidden)).astype(dtype)


def attention(heads: int = 3, tokens: int = 9, dtype: str = "float16") -> np.ndarray:
    """Causal attention as a model makes it."""
    scores = torch.from_numpy(RNG.standard_normal((heads, tokens, tokens)) * 2)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.numpy().astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_states_against_torch(dtype: str) -> None:
    array = states(dtype=dtype)
    tensor = torch.from_numpy(array).double()
    assert np.array_equal(last_token(array), array[-1].astype(np.float32))
    for start in (0, 3, 6):
        mean = tensor[start:].mean(0).float().numpy()
        np.testing.assert_allclose(mean_pooled(array, start), mean, rtol=1e-6)
        top = tensor[start:].amax(0).float().numpy()
        np.testing.assert_array_equal(max_pooled(array, start), top)
    assert {each.dtype for each in (last_token(array), mean_pooled(array), max_pooled(array))} == {
        np.dtype(np.float32)
    }


def test_means_of_long_float16_sequences_do_not_saturate() -> None:
    array = np.full((5000, 4), 60.0, dtype=np.float16)
    assert mean_pooled(array).tolist() == [60.0] * 4


def test_entropy_against_loops_and_torch() -> None:
    array = attention()
    expected = []
    for head in array.astype(np.float64):
        rows = []
        for row in head:
            weights = [value / row.sum() for value in row if value > 0]
            rows.append(-sum(value * math.log(value) for value in weights))
        expected.append(sum(rows) / len(rows))
    np.testing.assert_allclose(row_entropy(array), expected, rtol=1e-5)
    exact = torch.from_numpy(attention(dtype="float64"))
    by_torch = torch.distributions.Categorical(probs=exact).entropy().mean(-1)
    np.testing.assert_allclose(row_entropy(exact.numpy()), by_torch.numpy(), rtol=1e-5)
    # Nats: four equal weights have ln 4 of them.
    assert row_entropy(np.full((1, 1, 4), 0.25, np.float16))[0] == pytest.approx(math.log(4))


def test_entropy_of_long_sequences_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    array = attention(tokens=40)
    whole = row_entropy(array)
    for values in (1, 100, 1600, 3300):
        monkeypatch.setattr(reductions, "_BLOCK_VALUES", values)
        np.testing.assert_allclose(row_entropy(array), whole, rtol=1e-6)


def test_sink_mass_against_loops() -> None:
    array = attention()
    expected = [
        sum(float(row[0]) / float(row.astype(np.float64).sum()) for row in head[1:]) / 8
        for head in array
    ]
    np.testing.assert_allclose(sink_mass(array), expected, rtol=1e-5)
    # Where the front of the queries was cut off, none of them is the first token.
    cut = array[:, 4:]
    expected = [np.mean([row[0] / row.astype(np.float64).sum() for row in head]) for head in cut]
    np.testing.assert_allclose(sink_mass(cut), expected, rtol=1e-5)


@pytest.mark.parametrize("prompt_len", [1, 4, 8])
def test_lookback_against_its_definition(prompt_len: int) -> None:
    array = attention()
    expected = []
    for head in array.astype(np.float64):
        ratios = []
        for query in range(prompt_len, 9):
            context = sum(head[query][:prompt_len]) / prompt_len
            new = sum(head[query][prompt_len : query + 1]) / (query + 1 - prompt_len)
            ratios.append(context / (context + new))
        expected.append(np.mean(ratios))
    np.testing.assert_allclose(lookback_ratio(array, prompt_len), expected, rtol=1e-5)
    # Only the answer's rows count, so they are enough.
    np.testing.assert_allclose(
        lookback_ratio(array[:, prompt_len:], prompt_len), expected, rtol=1e-5
    )


def test_lookback_is_one_and_zero_at_its_ends() -> None:
    looks_back, looks_new = np.zeros((1, 4, 4)), np.zeros((1, 4, 4))
    looks_back[:, :, 0] = 1
    looks_new[:, range(4), range(4)] = 1
    assert lookback_ratio(looks_back, 2).tolist() == [1.0]
    assert lookback_ratio(looks_new, 2).tolist() == [0.0]


@pytest.mark.parametrize("prompt_len", [0, 9, 12])
def test_no_answer_or_no_prompt_gives_nan(prompt_len: int) -> None:
    assert np.isnan(lookback_ratio(attention(), prompt_len)).all()


def test_nothing_gives_nan_and_never_zero() -> None:
    empty = np.zeros((0, 5), np.float16)
    for reduced in (last_token(empty), mean_pooled(empty), max_pooled(empty)):
        assert np.isnan(reduced).all()
        assert reduced.shape == (5,)
    assert np.isnan(mean_pooled(states(), 7)).all()
    assert np.isnan(max_pooled(states(), 9)).all()
    for shape in ((3, 0, 0), (3, 1, 0)):
        assert np.isnan(sink_mass(np.zeros(shape, np.float16))).all()
    assert np.isnan(row_entropy(np.zeros((3, 0, 0), np.float16))).all()
    # One token looks at nothing but itself.
    assert np.isnan(sink_mass(np.ones((3, 1, 1), np.float16))).all()
    masked = attention()
    masked[1, 4] = 0
    assert np.isnan(row_entropy(masked)).tolist() == [False, True, False]


def test_nan_goes_through() -> None:
    array, weights = states(), attention()
    array[-1, 2] = np.nan
    weights[1, -1, 3] = np.nan
    assert np.isnan(last_token(array)).tolist() == [False, False, True, False, False]
    assert np.isnan(mean_pooled(array))[2]
    assert np.isnan(max_pooled(array))[2]
    for reduced in (row_entropy(weights), sink_mass(weights), lookback_ratio(weights, 2)):
        assert np.isnan(reduced).tolist() == [False, True, False]
