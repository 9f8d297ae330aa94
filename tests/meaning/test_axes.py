"""Named axes and lengths: views in the order of the format, and which tokens positions cover."""

from __future__ import annotations

import numpy as np
import pytest

from h5traces.errors import ConversionError, OptionError
from h5traces.format.values import TorchValue
from h5traces.meaning.axes import Axes, layers_of, view
from h5traces.meaning.lengths import covered_tokens, is_one_less


def test_axes_are_parsed() -> None:
    assert Axes.parse("token layer hidden").names == ("token", "layer", "hidden")
    assert Axes.parse("Batch, layers,heads, queries, keys").names[1:] == (
        "layer",
        "head",
        "query",
        "key",
    )
    assert str(Axes.parse("layer token head_dim")) == "(layer, token, head_dim)"


@pytest.mark.parametrize("text", ["", "token token", "tokens token", "layer 3d", "a-b"])
def test_other_axes_are_rejected(text: str) -> None:
    with pytest.raises(OptionError, match="expected different names such as 'token layer hidden'"):
        Axes.parse(text)


def test_layers_of_an_engine_are_views() -> None:
    stacked = np.arange(5 * 3 * 2, dtype=np.float32).reshape(5, 3, 2)
    layers = layers_of(stacked, Axes.parse("tokens layers hidden"), "hidden_states")
    assert [each.shape for each in layers] == [(5, 2)] * 3
    for number, layer in enumerate(layers):
        np.testing.assert_array_equal(layer, stacked[:, number])
        assert layer.base is not None
        assert np.shares_memory(layer, stacked)


def test_layers_of_tensors_stay_tensors() -> None:
    bits = np.arange(24, dtype=np.uint16).reshape(1, 2, 3, 4)
    value = TorchValue(bits, "bfloat16")
    layers = layers_of(value, Axes.parse("batch layer token hidden"), "hidden_states")
    assert [(each.dtype, each.data.shape) for each in layers] == [("bfloat16", (3, 4))] * 2


def test_a_missing_token_axis_is_one_position() -> None:
    stacked = np.zeros((3, 4), np.float16)
    layers = layers_of(stacked, Axes.parse("layer hidden"), "hidden_states")
    assert [each.shape for each in layers] == [(1, 4)] * 3


def test_other_kinds_keep_their_order() -> None:
    values = np.zeros((3, 2, 5, 4), np.float16)
    layers = layers_of(values, Axes.parse("layer head token head_dim"), "heads")
    assert [each.shape for each in layers] == [(2, 5, 4)] * 3


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((4, 3, 5, 2), "batch layer token hidden", "has 4 on the batch axis, expected 1"),
        ((3, 5), "layer token hidden", r"shape \(3, 5\) has 2 axes, expected 3"),
        ((3, 5), "token hidden", "expected 'layer' and some of token, hidden"),
        ((3, 5, 2), "layer head hidden", "expected 'layer' and some of token, hidden"),
    ],
)
def test_contradictions_are_one_sentence(shape: tuple[int, ...], axes: str, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        layers_of(np.zeros(shape, np.float16), Axes.parse(axes), "hidden_states")


def test_a_view_and_back() -> None:
    values = np.random.default_rng(0).random((5, 1, 3, 2))
    source, target = ("token", "batch", "layer", "hidden"), ("layer", "token", "hidden")
    there = view(values, source, target, "x")
    np.testing.assert_array_equal(view(there, target, source, "x"), values)
    assert np.shares_memory(there, values)


@pytest.mark.parametrize(
    ("num_tokens", "num_positions", "expected"),
    [
        (None, 4, slice(0, 4)),
        (4, 4, slice(0, 4)),
        (5, 4, slice(0, 4)),
        (1, 1, slice(0, 1)),
        (1, 0, slice(0, 0)),
        (0, 0, slice(0, 0)),
        (2, 1, None),
        (9, 1, None),
        (6, 4, None),
        (4, 5, None),
    ],
)
def test_covered_tokens(num_tokens: int | None, num_positions: int, expected: slice | None) -> None:
    assert covered_tokens(num_tokens, num_positions) == expected
    one_less = expected is not None and num_tokens == num_positions + 1
    assert is_one_less(num_tokens, num_positions) == one_less
