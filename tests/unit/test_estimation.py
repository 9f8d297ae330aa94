"""Forecasts: exact where they can be, and near where they estimate."""

from __future__ import annotations

import pytest

from h5traces.errors import ExtractionError, LayerIndexError
from h5traces.extract import ModelShape
from h5traces.extract.estimate import estimate, spread
from h5traces.extract.sizes import STATED_RATES, Forecast, Rates
from h5traces.format.precision import EXACT, Precision
from h5traces.writing.options import PrecisionOptions

LLAMA2_7B = ModelShape(num_layers=32, hidden_size=4096, num_heads=32)


def test_raw_sizes_are_exact():
    """15,058,944 bytes: 32 layers of 43 x 4096 and 32 x 43 x 43 values of 2 bytes."""
    found = estimate(LLAMA2_7B, [43])
    rows = {row.name: row for row in found.rows}
    assert rows["raw float16"].sample_nbytes == 15_058_944
    assert rows["raw float32"].per_thousand == 2 * 15_058_944_000
    assert rows["raw float16"].basis == "computed"
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
    assert [row.precision for row in found.rows[2:4] + found.rows[-2:]] == [EXACT] * 2 + [own] * 2
    assert found.rows[-2].sample_nbytes < 0.5 * found.rows[2].sample_nbytes
    assert found.as_dict()["rows"][-1]["precision"] == {
        "step": 0.2,
        "attention_bits": 8,
        "head_mean": "none",
    }


@pytest.mark.parametrize(("dtype", "codec"), [("float32", "gzip"), ("bfloat16", "gzip")])
def test_tiers_go_with_float16(dtype, codec):
    options = PrecisionOptions(dtype=dtype, codec=codec)
    assert len(estimate(LLAMA2_7B, 43, precision=options).rows) == 4


def test_without_attentions_tiers_have_no_head_mean():
    found = estimate(LLAMA2_7B, [43], kinds=["hidden_states"])
    sizes = {row.name: row.sample_nbytes for row in found.rows}
    assert sizes["tier compact"] == pytest.approx(
        32 * (43 * 4096 * 3.44 / 8 + 760) + 4500, rel=0.01
    )


def test_attentions_grow_with_the_square_of_each_length():
    shape = ModelShape(num_layers=1, hidden_size=10, num_heads=2)
    assert shape.num_values([10, 30], ["hidden_states", "attentions"]) == {
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
    assert {row.basis for row in found.rows} == {"computed", "estimated"}


def test_all_layers_are_listed_once():
    shape = ModelShape(num_layers=2, hidden_size=8, num_heads=2)
    assert len(estimate(shape, [10], layers=(0, 1)).rows) == 3 + 4


@pytest.mark.parametrize(("dtype", "codec"), [("auto", "gzip"), ("float16", "zstd")])
def test_what_only_a_pilot_can_tell(dtype, codec):
    with pytest.raises(ExtractionError, match=f"for dtype {dtype} with codec {codec}; .*pilot"):
        estimate(LLAMA2_7B, 43, precision=PrecisionOptions(dtype=dtype, codec=codec))


def test_stated_rates_lie_below_the_raw_bits():
    for dtype, bits in (("float16", 16), ("bfloat16", 16), ("float32", 32)):
        assert all(0 < each < bits for each in STATED_RATES[dtype].bits.values())


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(1, (0,)), (2, (0, 1)), (6, (0, 2, 5)), (32, (0, 5, 10, 15, 20, 25, 31))],
)
def test_a_spread_has_the_first_and_the_last(num_layers, expected):
    assert spread(num_layers) == expected


@pytest.mark.parametrize(("layers", "listed"), [("0,3-last", "0,3,4,5"), ([4, 1], "1,4")])
def test_a_subset_of_ones_own(layers, listed):
    shape = ModelShape(num_layers=6, hidden_size=8, num_heads=2)
    assert estimate(shape, 10, layers=layers).rows[3].name.endswith(f", layers {listed}")


def test_a_layer_that_is_not_there():
    with pytest.raises(LayerIndexError, match=r"layer 32 was asked for, .* \(0 to 31\)"):
        estimate(LLAMA2_7B, 43, layers="0,32")


def forecast(kinds=("hidden_states",), **options):
    return Forecast(
        shape=ModelShape(num_layers=4, hidden_size=100, num_heads=2),
        layers=(0, 3),
        kinds=kinds,
        lengths=(10,) * 8,
        precision=PrecisionOptions(**options),
    )


def test_a_forecast_counts_a_waiting_shard():
    """13.7 bits of 1000 values and 500 bytes in each of two layers, and 4500 bytes."""
    found = forecast()
    nbytes = 2 * (1000 * 13.7 / 8 + 500) + 4500
    assert found.sample_nbytes == pytest.approx(nbytes)
    assert found.needed_nbytes(0, None) == pytest.approx(16 * nbytes)
    assert found.needed_nbytes(5, 2) == pytest.approx((3 + 2) * nbytes)
    assert found.needed_nbytes(99, 100) == pytest.approx(8 * nbytes)
    assert found.as_dict()["mean_seq_len"] == 10


def test_samples_of_a_forecast_wait_without_quantisation():
    plain, compact = forecast(), forecast(tier="compact")
    assert compact.sample_nbytes < 0.8 * plain.sample_nbytes
    assert compact.needed_nbytes(0, 4) == pytest.approx(
        8 * compact.sample_nbytes + 4 * plain.sample_nbytes
    )


def test_a_forecast_without_known_rates_takes_those_of_float32():
    assert forecast(dtype="auto", codec="zstd").rates == forecast(dtype="float32").rates
    both = forecast(kinds=("hidden_states", "attentions"))
    assert both.sample_nbytes > forecast().sample_nbytes
