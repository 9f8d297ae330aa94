"""What is usual in a channel is found whatever else is in it, and lies in files as it should."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import subprocess
import zlib
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from legacy_batches import grouped, make_archive, write_batch, write_layout

import h5traces
from h5traces.errors import (
    ArchiveExistsError,
    CorruptArchiveError,
    H5TracesError,
    NotAnArchiveError,
    PrecisionError,
    TargetError,
)
from h5traces.format.precision import Precision
from h5traces.precision.scales import ChannelAccumulator
from h5traces.writing.calibrate import calibrate, load_calibration
from h5traces.writing.options import PrecisionOptions

if TYPE_CHECKING:
    from pathlib import Path

WIDTH = 24


def states(seed: int, num_samples: int = 40, tokens: int = 30) -> list[np.ndarray]:
    """Hidden states of which the sigma of channel k is 1 + k, and the middle 10 k."""
    rng = np.random.default_rng(seed)
    channel = np.arange(WIDTH)
    return [
        (10 * channel + (1 + channel) * rng.standard_normal((tokens, WIDTH))).astype(np.float16)
        for _ in range(num_samples)
    ]


def measured(samples: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    accumulator = ChannelAccumulator()
    for each in samples:
        accumulator.add(each)
    found = accumulator.statistics()
    return found.center, found.sigma


def assert_usual(samples: list[np.ndarray], rel: float = 0.08) -> None:
    center, sigma = measured(samples)
    channel = np.arange(WIDTH)
    assert sigma == pytest.approx(1 + channel, rel=rel)
    assert np.abs(center - 10 * channel).max() < rel * WIDTH
    assert center.dtype == sigma.dtype == np.float32


def test_plain_numbers() -> None:
    assert_usual(states(0))


@pytest.mark.parametrize("every", [1, 3])
def test_the_first_position_and_massive_activations_do_not_count(every: int) -> None:
    samples = states(1)
    for each in samples[::every]:
        each[0] = 30_000
        each[::9, 5] = -6000
        each[4, 7] = 65504
    assert_usual(samples)


def test_one_token_is_all_there_is_of_short_samples() -> None:
    rows = np.concatenate(states(2))
    assert_usual([row[None] for row in rows])


def test_a_token_with_a_value_that_is_not_finite_does_not_count() -> None:
    samples = states(3)
    for number, each in enumerate(samples):
        each[3, number % WIDTH] = [np.nan, np.inf, -np.inf][number % 3]
    assert_usual(samples)
    accumulator = ChannelAccumulator()
    for each in samples:
        accumulator.add(each)
    assert accumulator.num_not_finite == len(samples)
    assert accumulator.num_tokens == len(samples) * 28


def test_dead_channels_get_a_sigma_that_is_small_and_not_zero() -> None:
    samples = states(4)
    for each in samples:
        each[:, 3] = 0
        each[:, 9] = 7.5
    center, sigma = measured(samples)
    assert center[3] == 0
    assert center[9] == 7.5
    assert (sigma[[3, 9]] == pytest.approx(np.median(sigma) / 4096, rel=1e-3)) is True
    alive = np.delete(np.arange(WIDTH), [3, 9])
    assert sigma[alive] == pytest.approx(1 + alive, rel=0.08)


def test_a_dead_layer_is_stored_without_loss(tmp_path: Path) -> None:
    dead = {"hidden_states": [np.full((9, 6), 0.1, np.float16)] * 2, "tokens": np.arange(9)}
    path = make_archive(tmp_path, [dead] * 3, tier="compact")
    for found in h5traces.open(path)[1]["hidden_states"]:
        assert np.array_equal(found, dead["hidden_states"][0])


def test_channels_beyond_float16() -> None:
    """bfloat16 models have some; their archives hold such layers as float32."""
    samples = [each.astype(np.float32) * 1e5 for each in states(5)]
    center, sigma = measured(samples)
    channel = np.arange(WIDTH)
    assert sigma == pytest.approx(1e5 * (1 + channel), rel=0.08)
    assert np.abs(center / 1e5 - 10 * channel).max() < 2


def test_numbers_at_the_end_of_float32() -> None:
    numbers = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    _, sigma = measured([numbers * np.float32(1e30)])
    assert sigma == pytest.approx(1e30, rel=0.2)
    ends = np.where(numbers > 0, np.float32(3.4e38), np.float32(-3.4e38))
    for found in measured([ends]):
        assert np.isfinite(found).all()


ALL = np.concatenate(states(6, 30))


@given(st.integers(0, 2**32), st.lists(st.integers(2, 400), min_size=1, max_size=30))
@settings(max_examples=25)
def test_any_order_and_any_chunks_give_nearly_the_same(seed: int, sizes: list[int]) -> None:
    """The first tokens only tell where the median is; what counts as unusual hardly changes."""
    rows = np.random.default_rng(seed).permutation(ALL)
    accumulator = ChannelAccumulator()
    start = number = 0
    while start < len(rows):
        # A first token that must not count goes before every chunk.
        chunk = rows[start : start + sizes[number % len(sizes)]]
        accumulator.add(np.concatenate([np.full((1, WIDTH), 9e3, np.float16), chunk]))
        start, number = start + len(chunk), number + 1
    assert accumulator.num_tokens == len(ALL)
    found, (center, sigma) = accumulator.statistics(), measured([ALL[:1], *([ALL])])
    assert found.sigma == pytest.approx(sigma, rel=0.01)
    assert np.abs((found.center - center) / sigma).max() < 0.01


def test_chunks_of_the_same_order_give_the_same_sums() -> None:
    """To the last bits of float64."""
    marked = np.concatenate([ALL[:1], ALL])
    whole = measured([marked])
    parts = [np.concatenate([ALL[:1], part]) for part in np.array_split(ALL[256:], 7)]
    for found, expected in zip(measured([marked[:257], *parts]), whole, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


# --- files ---------------------------------------------------------------------------------------


def batch(seed: int = 0, num_samples: int = 8, width: int = WIDTH, **change: Any) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "hidden_states": [
                rng.normal(size=(12, width)).astype(np.float16) * np.float16(1 + layer)
                for layer in range(3)
            ],
            "attentions": [np.tril(rng.random((2, 12, 12))).astype(np.float16) for _ in range(3)],
            "tokens": rng.integers(0, 99, 12),
            "question_id": f"q{seed}_{number}",
            **change,
        }
        for number in range(num_samples)
    ]


@pytest.fixture
def scales(tmp_path: Path) -> Path:
    write_batch(tmp_path / "some.pkl", batch())
    calibrate(tmp_path / "some.pkl", tmp_path / "scales.h5")
    return tmp_path / "scales.h5"


def test_a_file_of_scales_goes_there_and_back(scales: Path, tmp_path: Path) -> None:
    found = load_calibration(scales)
    assert sorted(found.layers) == [f"hidden_states/layer_{layer:03d}" for layer in range(3)]
    assert found.record is not None
    assert (found.record.num_samples, found.record.num_tokens) == (8, 88)
    assert found.record.sources == ("some.pkl",)
    archive = make_archive(tmp_path, batch(), name="whole.pkl")
    report = calibrate(archive, tmp_path / "again.h5", samples=5)
    assert report.num_samples == 5
    calibrate(archive, tmp_path / "again.h5", overwrite=True)
    again = load_calibration(tmp_path / "again.h5")
    for path, each in found.layers.items():
        assert np.array_equal(each.center, again.layers[path].center)
        assert np.array_equal(each.sigma, again.layers[path].sigma)


def test_h5py_reads_it(scales: Path) -> None:
    with h5py.File(scales) as file:
        assert file.attrs["format"] == b"h5traces-scales"
        group = file["scales/hidden_states/layer_002"]
        assert sorted(group) == ["center", "sigma"]
        assert group["sigma"].dtype == np.float32
        assert group["sigma"][:] == pytest.approx(3, rel=0.35)
        assert int(file["scales"].attrs["num_tokens"]) == 88


@pytest.mark.h5tools
def test_h5dump_reads_it(scales: Path) -> None:
    found = subprocess.run(
        ["h5dump", "-d", "/scales/hidden_states/layer_000/sigma", str(scales)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    numbers = re.findall(r"\d+\.\d+", found.split("DATA {")[1].split("}")[0])
    expected = load_calibration(scales).layers["hidden_states/layer_000"].sigma
    assert np.array(numbers, float) == pytest.approx(expected, rel=1e-4)


def test_other_layers_are_left_out(tmp_path: Path) -> None:
    write_batch(tmp_path / "some.pkl", batch())
    report = calibrate(tmp_path / "some.pkl", tmp_path / "scales.h5", layers=[0, 2])
    assert report.layers == ["hidden_states/layer_000", "hidden_states/layer_002"]


def test_widths_that_differ_name_file_and_sample(tmp_path: Path) -> None:
    write_batch(tmp_path / "odd.pkl", [*batch(0, 2), *batch(1, 1, width=7)])
    with pytest.raises(PrecisionError, match=r"odd\.pkl: sample 2: .* 7 wide.*24") as error:
        calibrate(tmp_path / "odd.pkl", tmp_path / "scales.h5")
    assert "one model" in str(error.value)
    assert not (tmp_path / "scales.h5").exists()


@pytest.mark.parametrize("layout", ["step_min", "step_full"])
def test_generation_steps_have_no_axis_of_tokens_to_measure(tmp_path: Path, layout: str) -> None:
    source = write_layout(tmp_path, layout)
    with pytest.raises(PrecisionError, match=rf"{source.name}: .*nothing to measure"):
        calibrate(source, tmp_path / "scales.h5")


def test_samples_without_hidden_states_are_nothing_to_measure(tmp_path: Path) -> None:
    source = write_batch(tmp_path / "none.pkl", batch(hidden_states=[]))
    with pytest.raises(PrecisionError, match=r"none\.pkl: 8 samples .*nothing to measure"):
        calibrate(source, tmp_path / "scales.h5")


def test_tokens_that_are_not_finite_are_nothing_to_measure(tmp_path: Path) -> None:
    broken = [np.full((4, 3), np.nan, np.float16)] * 3
    write_batch(tmp_path / "nan.pkl", batch(0, 2, hidden_states=broken))
    with pytest.raises(PrecisionError, match=r"nan\.pkl: .*layer_000: .*not *finite"):
        calibrate(tmp_path / "nan.pkl", tmp_path / "scales.h5")


def test_several_models_are_refused(tmp_path: Path) -> None:
    for model in ("llama", "gemma"):
        make_archive(tmp_path, batch(), name=f"{model}.pkl", model_id=model)
    paths = [tmp_path / "llama.h5", tmp_path / "gemma.h5"]
    with pytest.raises(PrecisionError, match=r"several models: .*llama.*gemma"):
        calibrate(paths, tmp_path / "scales.h5")
    report = calibrate(paths, tmp_path / "scales.h5", samples=8)
    assert report.model_id == "llama"


def test_nothing_is_overwritten(scales: Path, tmp_path: Path) -> None:
    before = scales.read_bytes()
    with pytest.raises(ArchiveExistsError, match="overwrite=True"):
        calibrate(tmp_path / "some.pkl", scales)
    assert scales.read_bytes() == before
    calibrate(tmp_path / "some.pkl", tmp_path / "new.h5", dry_run=True)
    assert not (tmp_path / "new.h5").exists()


# --- taking scales from files --------------------------------------------------------------------


def convert(tmp_path: Path, scales: Path, **options: Any) -> None:
    write_batch(tmp_path / "in.pkl", batch(9))
    options.setdefault("tier", "analysis")
    h5traces.convert(tmp_path / "in.pkl", tmp_path / "out.h5", **grouped(scales=scales, **options))


def edited(path: Path, change: Any) -> Path:
    """A copy that h5py changed."""
    target = path.with_name("edited.h5")
    shutil.copy(path, target)
    with h5py.File(target, "r+") as file:
        change(file["scales/hidden_states/layer_001"])
    return target


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("link", ["same", "dots", "symlink", "hard link", "folder"])
def test_calibrate_never_writes_over_a_source(tmp_path: Path, link: str, overwrite: bool) -> None:
    write_batch(tmp_path / "some.pkl", batch())
    archive = tmp_path / "runs" / "scales.h5"
    archive.parent.mkdir()
    h5traces.convert(tmp_path / "some.pkl", archive)
    before = archive.read_bytes()
    target = tmp_path / "link.h5"
    if link == "symlink":
        target.symlink_to(archive)
    elif link == "hard link":
        target.hardlink_to(archive)
    else:
        target = {"same": archive, "folder": archive.parent}.get(
            link, tmp_path / "runs" / ".." / "runs" / "scales.h5"
        )
    with pytest.raises(TargetError, match="is one of the sources; name another output"):
        calibrate([tmp_path / "some.pkl", archive], target, overwrite=overwrite)
    assert archive.read_bytes() == before


def test_scales_of_an_archive_serve_another(tmp_path: Path) -> None:
    first = make_archive(tmp_path, batch(), name="first.pkl", tier="analysis")
    convert(tmp_path, first)
    with h5py.File(first) as one, h5py.File(tmp_path / "out.h5") as other:
        for layer in range(3):
            for name in ("step", "offset", "sigma"):
                path = f"scales/hidden_states/layer_{layer:03d}/{name}"
                assert np.array_equal(one[path], other[path])
        assert dict(one["scales"].attrs) == dict(other["scales"].attrs)


def test_scales_of_an_archive_make_other_steps(tmp_path: Path) -> None:
    first = make_archive(tmp_path, batch(), name="first.pkl", tier="compact")
    convert(tmp_path, first, tier="fine")
    with h5py.File(first) as one, h5py.File(tmp_path / "out.h5") as other:
        steps = [file["scales/hidden_states/layer_000/step"][:] for file in (one, other)]
    assert steps[1] / steps[0] == pytest.approx(0.02 / 0.4, rel=0.35)


def test_an_exact_archive_has_no_scales(tmp_path: Path) -> None:
    exact = make_archive(tmp_path, batch(), name="exact.pkl")
    with pytest.raises(PrecisionError, match=r"exact\.h5: holds no scales; .*calibrate"):
        convert(tmp_path, exact)


def test_what_is_no_file_of_scales(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("scales")
    with pytest.raises(NotAnArchiveError, match=r"text\.h5"):
        convert(tmp_path, tmp_path / "text.h5")
    with pytest.raises((FileNotFoundError, H5TracesError), match=r"nowhere\.h5"):
        convert(tmp_path, tmp_path / "nowhere.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = np.arange(3)
    with pytest.raises(H5TracesError, match=r"other\.h5"):
        convert(tmp_path, tmp_path / "other.h5")


def test_a_missing_array(scales: Path, tmp_path: Path) -> None:
    damaged = edited(scales, lambda group: group.__delitem__("sigma"))
    with pytest.raises(CorruptArchiveError, match=r"edited\.h5.*layer_001/sigma.*missing"):
        convert(tmp_path, damaged)


def put(group: h5py.Group, name: str, values: np.ndarray) -> None:
    del group[name]
    group.create_dataset(name, data=values, chunks=values.shape, shuffle=True, compression="gzip")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("sigma", np.ones(5, "f4"), "24 and 5 channels"),
        ("sigma", np.ones(WIDTH, "f8"), "float64.*expected float32"),
        ("sigma", np.ones((WIDTH, 1), "f4"), "expected float32"),
        ("sigma", np.full(WIDTH, np.nan, "f4"), "finite"),
        ("sigma", np.full(WIDTH, -1, "f4"), "not negative"),
        ("center", np.full(WIDTH, np.inf, "f4"), "finite"),
    ],
)
def test_arrays_that_are_no_scales(
    scales: Path, tmp_path: Path, name: str, values: np.ndarray, message: str
) -> None:
    damaged = edited(scales, lambda group: put(group, name, values))
    with pytest.raises(CorruptArchiveError, match=rf"edited\.h5.*layer_001.*{message}"):
        convert(tmp_path, damaged)
    assert not (tmp_path / "out.h5").exists()


def test_flipped_bytes_in_a_file_of_scales(scales: Path, tmp_path: Path) -> None:
    """Each is found but those in the bits that fill the stream's last byte and change no value."""
    with h5py.File(scales) as file:
        dataset = file["scales/hidden_states/layer_001/sigma"].id
        info = dataset.get_chunk_info(0) if dataset.get_num_chunks() else None
    assert info is not None
    data = bytearray(scales.read_bytes())
    damaged = tmp_path / "damaged.h5"
    chunk = slice(info.byte_offset, info.byte_offset + info.size)
    values = zlib.decompress(data[chunk])
    num_same = 0
    for at, bit in itertools.product(range(chunk.start, chunk.stop), (0x01, 0x10, 0x80)):
        data[at] ^= bit
        damaged.write_bytes(data)
        with contextlib.suppress(zlib.error):
            # zlib's own word, which covers the values by a checksum.
            if zlib.decompress(data[chunk]) == values:
                num_same += 1
                data[at] ^= bit
                continue
        data[at] ^= bit
        with pytest.raises(CorruptArchiveError, match=r"damaged\.h5"):
            load_calibration(damaged)
    assert num_same <= 3


def test_another_width_than_the_layers(scales: Path, tmp_path: Path) -> None:
    write_batch(tmp_path / "in.pkl", batch(9, width=10))
    report = h5traces.convert(
        tmp_path / "in.pkl",
        tmp_path / "out.h5",
        precision=PrecisionOptions(scales=scales, tier="analysis"),
    )
    assert not report.ok
    assert re.search(r"layer_000.*10 wide.*24.*calibrate", str(report.files[0].error))
    assert not (tmp_path / "out.h5").exists()


def test_scales_of_another_model(tmp_path: Path) -> None:
    source = write_batch(tmp_path / "llama2_chat_7B_triviaqa_batch_0000.pkl", batch())
    calibrate(source, tmp_path / "scales.h5")
    with pytest.raises(PrecisionError, match=r"llama2_chat_7B.*gemma"):
        convert(tmp_path, tmp_path / "scales.h5", model_id="gemma")


def test_layers_without_scales_stay_exact_and_are_named(tmp_path: Path) -> None:
    write_batch(tmp_path / "some.pkl", batch())
    calibrate(tmp_path / "some.pkl", tmp_path / "scales.h5", layers=[0])
    write_batch(tmp_path / "in.pkl", batch(9))
    report = h5traces.convert(
        tmp_path / "in.pkl",
        tmp_path / "out.h5",
        precision=PrecisionOptions(scales=tmp_path / "scales.h5", tier="compact"),
    )
    assert report.ok
    assert any("has no scale" in each and "16" in each for each in report.files[0].warnings)
    trace = h5traces.open(tmp_path / "out.h5")[0]
    assert trace._stored.attrs("hidden_states/layer_001")["kept_exact"] == "has no scale"
    assert np.array_equal(trace.layer(1), batch(9)[0]["hidden_states"][1])
    assert not np.array_equal(trace.layer(0), batch(9)[0]["hidden_states"][0])


@pytest.mark.parametrize("step", [0, -0.1, 1e-4, 5, float("nan"), float("inf")])
def test_steps_that_cannot_be(step: float) -> None:
    with pytest.raises(PrecisionError, match="step"):
        Precision.of("exact", step=step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"attention_bits": bits}, "attention_bits") for bits in (5, 6, 7)),
        ({"mantissa_bits": 0}, "mantissa_bits"),
        ({"mantissa_bits": 10}, "mantissa_bits"),
        ({"head_mean": "some"}, "head_mean"),
        ({"head_mean": "only", "attention_bits": 8}, "beside"),
    ],
)
def test_parameters_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PrecisionError, match=message):
        Precision.of("exact", **change)
    with pytest.raises(PrecisionError, match="expected one of exact, fine, analysis"):
        Precision.of("best")  # type: ignore[arg-type]


def test_the_report_is_json(tmp_path: Path) -> None:
    write_batch(tmp_path / "some.pkl", batch())
    report = calibrate(tmp_path / "some.pkl", tmp_path / "scales.h5")
    found = json.loads(json.dumps(report.as_dict()))
    assert found["hidden_size"] == WIDTH
    assert found["num_tokens"] == 88
