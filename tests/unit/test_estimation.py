"""Forecasts: exact where they can be, and near where they estimate."""

from __future__ import annotations

import pytest

from h5traces.errors import ExtractionError, LayerIndexError
from h5traces.extract.estimate import (
    CLAIM_NBYTES,
    LLAMA2_7B,
    STATED_RATES,
    ModelShape,
    Rates,
    claim,
    estimate,
    num_values,
    spread,
)
from h5traces.extract.options import layer_numbers
from h5traces.format.precision import EXACT, Precision


def test_raw_sizes_are_exact():
    """15,058,944 bytes: 32 layers of 43 x 4096 and 32 x 43 x 43 values of 2 bytes."""
    found = estimate(LLAMA2_7B, [43])
    rows = {row.name: row for row in found.rows}
    assert rows["raw float16"].sample_nbytes == 15_058_944
    assert rows["raw float32"].per_thousand == 2 * 15_058_944_000
    assert rows["raw float16"].basis == "exact"
    assert [row.num_layers for row in found.rows[:4]] == [32, 32, 32, 7]
    assert found.rows[3].name.endswith("layers 0,5,10,15,20,25,31")


def test_tiers_are_listed_with_all_layers_and_with_some():
    found = estimate(LLAMA2_7B, [43])
    names = ["fine", "analysis", "compact", "native"]
    expected = [
        f"tier {name}{rest}" for name in names for rest in ("", ", layers 0,5,10,15,20,25,31")
    ]
    assert [row.name for row in found.rows[4:]] == expected
    sizes = {row.name: row.per_thousand / 1e9 for row in found.rows}
    assert 2.4 < sizes["tier compact"] < 2.6
    assert 4.4 < sizes["tier analysis"] < 5
    assert sizes["tier fine"] < sizes["archive, float16, gzip"]


def test_a_precision_of_ones_own_is_listed_beside_the_tiers():
    own = Precision(step=0.2, attention_bits=8)
    found = estimate(LLAMA2_7B, [43], precision=own)
    assert found.rows[-1].name.startswith("tier custom")
    exact = found.sample_nbytes(EXACT, 32)
    assert found.sample_nbytes(own, 32) == found.rows[-2].sample_nbytes < 0.5 * exact
    assert found.as_dict()["rows"][-1]["precision"] == {
        "step": 0.2,
        "attention_bits": 8,
        "head_mean": "none",
    }


@pytest.mark.parametrize(("dtype", "codec"), [("float32", "gzip"), ("bfloat16", "gzip")])
def test_tiers_go_with_float16(dtype, codec):
    assert len(estimate(LLAMA2_7B, [43], dtype=dtype, codec=codec).rows) == 4


def test_without_attentions_tiers_have_no_head_mean():
    found = estimate(LLAMA2_7B, [43], kinds=["hidden_states"])
    sizes = {row.name: row.sample_nbytes for row in found.rows}
    assert sizes["tier compact"] == pytest.approx(
        32 * (43 * 4096 * 3.44 / 8 + 610) + 3500, rel=0.01
    )


def test_the_claim_is_that_of_seven_layers_and_not_of_all():
    told = claim()
    assert told.all_layers_nbytes > 4 * CLAIM_NBYTES[1]
    assert told.seven_layers_nbytes == pytest.approx(told.all_layers_nbytes * 7 / 32, rel=0.01)
    assert told.compact_nbytes == pytest.approx(CLAIM_NBYTES[1], rel=0.02)
    assert told.compact_seven_layers_nbytes < 0.6e9


def test_attentions_grow_with_the_square_of_each_length():
    shape = ModelShape(num_layers=1, hidden_size=10, num_heads=2)
    assert num_values(shape, [10, 30], ["hidden_states", "attentions"]) == {
        "hidden_states": 200,
        "attentions": 1000,
    }


def test_one_kind_and_a_subset():
    shape = ModelShape(num_layers=4, hidden_size=8, num_heads=2)
    rates = Rates(bits={"hidden_states": 8}, array_nbytes=3, sample_nbytes=5, source="here")
    found = estimate(shape, [10], layers=(1, 2), kinds=["hidden_states"], rates=rates)
    assert [row.sample_nbytes for row in found.rows[:4]] == [
        4 * 320,
        2 * 320,
        83 * 4 + 5,
        83 * 2 + 5,
    ]
    assert found.as_dict()["rows"][3]["per_1000_nbytes"] == 171_000
    assert {row.basis for row in found.rows} == {"exact", "estimated"}


def test_all_layers_are_listed_once():
    shape = ModelShape(num_layers=2, hidden_size=8, num_heads=2)
    assert len(estimate(shape, [10], layers=(0, 1)).rows) == 3 + 4


@pytest.mark.parametrize(("dtype", "codec"), [("auto", "gzip"), ("float16", "zstd")])
def test_what_only_a_pilot_can_tell(dtype, codec):
    with pytest.raises(ExtractionError, match=f"for dtype {dtype} with codec {codec}; .*--pilot"):
        estimate(LLAMA2_7B, [43], dtype=dtype, codec=codec)


def test_stated_rates_lie_below_the_raw_bits():
    for dtype, bits in (("float16", 16), ("bfloat16", 16), ("float32", 32)):
        assert all(0 < each < bits for each in STATED_RATES[dtype].bits.values())


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(1, (0,)), (2, (0, 1)), (6, (0, 2, 5)), (32, (0, 5, 10, 15, 20, 25, 31))],
)
def test_a_spread_has_the_first_and_the_last(num_layers, expected):
    assert spread(num_layers) == expected


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, (0, 1, 2, 3)),
        ("last", (3,)),
        ("0, 2-last", (0, 2, 3)),
        ("3,0,0", (0, 3)),
        ([2, 1], (1, 2)),
        ("last-last", (3,)),
    ],
)
def test_choices_of_layers(choice, expected):
    assert layer_numbers(choice, 4) == expected


@pytest.mark.parametrize("choice", ["", "a", "1-", "-1", "0,,1", "²", "1-2-3", "4", "0-4"])
def test_choices_that_are_none(choice):
    with pytest.raises(LayerIndexError):
        layer_numbers(choice, 4)
