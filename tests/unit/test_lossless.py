"""An archive says whether every bit of its source is in it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
from legacy_batches import write_batch

import h5traces
from h5traces.checking.inspect import inspect
from h5traces.errors import LossyArchiveError
from h5traces.format.archive import Cast, add_casts
from h5traces.rewriting.export import export
from h5traces.rewriting.repack import merge, repack
from h5traces.writing.options import PrecisionOptions

if TYPE_CHECKING:
    from pathlib import Path

KINDS = ("hidden_states", "attentions")
LAYERS, TOKENS, HIDDEN, HEADS = 2, 5, 8, 2
NUM_VALUES = 2 * LAYERS * (TOKENS * HIDDEN + HEADS * TOKENS * TOKENS)  # of two samples


def batch(dtype: str, *, exactly_half: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)

    def array(*shape: int) -> np.ndarray:
        values = random.uniform(0.25, 1, shape)
        return (values.astype(np.float16) if exactly_half else values).astype(dtype)

    return [
        {
            "question_id": f"q{seed}_{index}",
            "tokens": np.arange(TOKENS),
            "hidden_states": [array(TOKENS, HIDDEN) for _ in range(LAYERS)],
            "attentions": [array(HEADS, TOKENS, TOKENS) for _ in range(LAYERS)],
        }
        for index in range(2)
    ]


def changed(source: list[dict[str, Any]], dtype: str = "float16") -> int:
    """Values that a cast changes, counted by numpy."""
    arrays = [each for sample in source for kind in KINDS for each in sample[kind]]
    return sum(int((each.astype(dtype).astype(each.dtype) != each).sum()) for each in arrays)


def archive_of(folder: Path, source: Any, name: str = "a", **options: Any) -> Path:
    path = folder / f"{name}.h5"
    write_batch(folder / f"{name}.pkl", source)
    h5traces.convert(folder / f"{name}.pkl", path, precision=PrecisionOptions(**options))
    return path


def metadata_of(path: Path) -> Any:
    with h5traces.open(path) as archive:
        return archive.metadata


def test_random_float32_is_not_lossless_in_float16(tmp_path: Path) -> None:
    source = batch("float32")
    path = archive_of(tmp_path, source)
    found = metadata_of(path)
    assert 0 < changed(source) <= NUM_VALUES
    assert found.casts == (
        Cast(cast_from="float32", dtype="float16", num_arrays=8, num_changed=changed(source)),
    )
    assert found.is_lossless is False
    assert found.changes == f"cast float32 -> float16 changed {changed(source)} values"
    with pytest.raises(LossyArchiveError, match=rf"a\.h5: is not lossless: {found.changes};.*auto"):
        h5traces.open(path, lossless=True)
    with h5py.File(path) as file:
        attrs = [
            dict(each.attrs)
            for each in next(iter(file["samples"].values()))["hidden_states"].values()
        ]
    for layer, each in enumerate(attrs):
        array = source[0]["hidden_states"][layer]
        assert each["num_changed"] == (array.astype("f2").astype("f4") != array).sum()


def test_validate_adds_up_what_casts_changed(tmp_path: Path) -> None:
    source = batch("float32")
    path = archive_of(tmp_path, source)
    assert h5traces.validate(path).ok
    (cast,) = metadata_of(path).casts
    unchanged = cast.model_copy(update={"num_changed": 0}).model_dump()
    for casts, listed in (([unchanged], "8 arrays"), ([], "0 arrays")):
        with h5py.File(path, "r+") as file:
            file.attrs["casts"] = np.bytes_(json.dumps(casts))
        (found,) = h5traces.validate(path).problems
        assert (found.loc, found.kind) == ("/", "count_mismatch")
        assert found.message == (
            f"'casts' lists {listed} cast from float32 to float16 and 0 changed values; "
            f"the arrays' own attributes say 8 and {changed(source)} changed values"
        )
    with h5py.File(path, "r+") as file:
        del file.attrs["casts"]
    assert h5traces.validate(path).ok


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_float16_holds_is_lossless(tmp_path: Path, dtype: str) -> None:
    path = archive_of(tmp_path, batch(dtype, exactly_half=True))
    found = metadata_of(path)
    assert found.is_lossless is True
    assert found.changes == ""
    assert [each.num_changed for each in found.casts] == ([] if dtype == "float16" else [0])
    assert len(h5traces.open(path, lossless=True)) == 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_auto_is_lossless(tmp_path: Path, dtype: str) -> None:
    path = archive_of(tmp_path, batch(dtype), dtype="auto")
    found = metadata_of(path)
    assert (found.is_lossless, found.casts) == (True, ())


def test_a_wider_type_is_lossless(tmp_path: Path) -> None:
    found = metadata_of(archive_of(tmp_path, batch("float16"), dtype="float32"))
    assert found.is_lossless is True
    assert found.casts[0].num_changed == 0


def test_bfloat16(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = batch("float32")
    for sample in source:
        for kind in KINDS:
            sample[kind] = [torch.from_numpy(each).to(torch.bfloat16) for each in sample[kind]]
    # Eight bits fit into float16's eleven, unless the exponent is out of its range.
    assert metadata_of(archive_of(tmp_path, source, "near")).is_lossless is True
    source[1]["hidden_states"][0][2, 3] = 1e-30
    source[1]["hidden_states"][0][2, 4] = 2.0**-20
    far = metadata_of(archive_of(tmp_path, source, "far"))
    assert (far.is_lossless, far.casts[0].num_changed) == (False, 1)
    kept = metadata_of(archive_of(tmp_path, source, "kept", dtype="bfloat16"))
    assert (kept.is_lossless, kept.casts) == (True, ())


def test_special_values(tmp_path: Path) -> None:
    source = batch("float32", exactly_half=True)
    values = source[0]["hidden_states"][0]
    values[0, :4] = np.nan, np.inf, -np.inf, -0.0
    assert metadata_of(archive_of(tmp_path, source, "kept")).is_lossless is True
    # A NaN whose last bits float16 has no place for.
    values.view(np.uint32)[1, 0] = 0x7FC00001
    found = metadata_of(archive_of(tmp_path, source, "payload"))
    assert (found.is_lossless, found.casts[0].num_changed) == (False, 1)


def test_what_overflows(tmp_path: Path) -> None:
    source = batch("float32", exactly_half=True)
    source[0]["hidden_states"][0][0, :2] = 1e5, -1e6
    clipped = metadata_of(archive_of(tmp_path, source, "clipped", on_overflow="clip"))
    assert (clipped.is_lossless, clipped.casts[0].num_changed) == (False, 2)
    widened = metadata_of(archive_of(tmp_path, source, "widened"))
    assert widened.is_lossless is True


@pytest.mark.parametrize("tier", ["fine", "analysis", "compact", "native"])
def test_lossy_tiers(tmp_path: Path, tier: str) -> None:
    path = archive_of(tmp_path, batch("float16"), tier=tier)
    assert metadata_of(path).is_lossless is False
    with pytest.raises(LossyArchiveError, match=f"is not lossless: {tier}"):
        h5traces.open(path, lossless=True)


def test_a_mean_that_is_added_has_no_source(tmp_path: Path) -> None:
    precision = h5traces.Precision(head_mean="beside")
    found = metadata_of(archive_of(tmp_path, batch("float16"), tier=precision))
    assert (found.is_lossless, found.casts) == (True, ())


def test_copies_count_what_they_hold(tmp_path: Path) -> None:
    source, other = batch("float32"), batch("float32", exactly_half=True, seed=1)
    lossy, lossless = archive_of(tmp_path, source), archive_of(tmp_path, other, "b")
    merge([lossy, lossless], tmp_path / "both.h5")
    (cast,) = metadata_of(tmp_path / "both.h5").casts
    assert (cast.num_arrays, cast.num_changed) == (16, changed(source))
    repack(tmp_path / "both.h5", tmp_path / "good.h5", samples=[2, 3])
    assert metadata_of(tmp_path / "good.h5").is_lossless is True
    repack(tmp_path / "both.h5", tmp_path / "one.h5", samples=[1], layers=[0])
    first = [{kind: source[1][kind][:1] for kind in KINDS}]
    assert metadata_of(tmp_path / "one.h5").casts[0].num_changed == changed(first)


@pytest.mark.parametrize("dtype", ["float32", "auto", "bfloat16"])
def test_another_cast_does_not_hide_the_first(tmp_path: Path, dtype: Any) -> None:
    source = batch("float32")
    path = archive_of(tmp_path, source)
    repack(path, tmp_path / "again.h5", precision=PrecisionOptions(dtype=dtype))
    found = metadata_of(tmp_path / "again.h5")
    halves = [{kind: [each.astype("f2") for each in one[kind]] for kind in KINDS} for one in source]
    second = found.casts[0].num_changed - changed(source)
    assert found.is_lossless is False
    assert found.casts[0].cast_from == "float32"
    assert second == (0 if dtype != "bfloat16" else more_than_eight_bits(halves))
    assert h5traces.validate(tmp_path / "again.h5").ok
    if dtype == "auto":
        with h5traces.open(tmp_path / "again.h5") as archive:
            assert archive[0]["hidden_states"][0].dtype == np.float16


def more_than_eight_bits(halves: list[dict[str, Any]]) -> int:
    """float16 values between 0.25 and 1 that bfloat16 has no place for: three bits are cut."""
    return sum(
        int(np.count_nonzero(each.view("u2") & 0b111))
        for one in halves
        for arrays in one.values()
        for each in arrays
    )


def test_shards_add_up(tmp_path: Path) -> None:
    sources = [batch("float32", exactly_half=True), batch("float32", seed=1)]
    paths = [archive_of(tmp_path, source, f"s{n}") for n, source in enumerate(sources)]
    with h5traces.open(paths) as archive:
        (cast,) = archive.metadata.casts
        assert (cast.num_arrays, cast.num_changed) == (16, changed(sources[1]))
        assert archive.metadata.is_lossless is False
    with pytest.raises(LossyArchiveError, match=r"s1\.h5: is not lossless"):
        h5traces.open(paths, lossless=True)


def test_an_export_says_it_too(tmp_path: Path) -> None:
    source = batch("float32")
    export(archive_of(tmp_path, source), tmp_path / "plain.h5")
    found = metadata_of(tmp_path / "plain.h5")
    assert (found.is_lossless, found.casts[0].num_changed) == (False, changed(source))


def test_what_was_not_recorded_is_not_known(tmp_path: Path) -> None:
    path = archive_of(tmp_path, batch("float32"))
    old = metadata_of(path).model_copy(update={"casts": None})
    assert old.is_lossless is None
    assert old.changes == "the archive does not say what was cast"
    unknown = Cast(cast_from="float32", dtype="float16", num_arrays=1)
    known = Cast(cast_from="float32", dtype="float16", num_arrays=2, num_changed=3)
    both = old.model_copy(update={"casts": add_casts([unknown, known])})
    assert both.is_lossless is None
    assert both.changes == "cast float32 -> float16 changed an unknown number of values"
    assert str(add_casts([known, known])[0]) == "cast float32 -> float16 changed 6 values"


def test_inspect_shows_it(tmp_path: Path) -> None:
    source = batch("float32")
    (found,) = inspect(archive_of(tmp_path, source))
    facts = found.metadata
    assert facts["is_lossless"] is False
    assert facts["changes"] == f"cast float32 -> float16 changed {changed(source)} values"


def test_left_out_layers_are_named(tmp_path: Path) -> None:
    source = batch("float32", exactly_half=True)
    archive_of(tmp_path, source)
    report = h5traces.convert(tmp_path / "a.pkl", tmp_path / "one.h5", layers=1)
    assert report.files[0].is_lossless is True
    assert report.files[0].kept_layers == "1 of 2 layers"
    found = metadata_of(tmp_path / "one.h5")
    assert (found.kept_layers, found.missing_layers) == ("1 of 2 layers", (0,))
    whole = metadata_of(tmp_path / "a.h5")
    assert (whole.kept_layers, whole.missing_layers) == ("", ())
    every = h5traces.convert(tmp_path / "a.pkl", tmp_path / "every.h5", layers=[0, 1])
    assert every.files[0].kept_layers == ""
    repack(tmp_path / "a.h5", tmp_path / "fewer.h5", layers=[0])
    assert metadata_of(tmp_path / "fewer.h5").kept_layers == "1 of 2 layers"


def test_verify_says_what_is_only_in_the_source(tmp_path: Path) -> None:
    def notes(name: str) -> list[str]:
        report = h5traces.verify(tmp_path / f"{name}.h5", against=tmp_path / "a.pkl")
        assert report.ok
        *notes, not_compared = report.notes
        assert not_compared.startswith("not compared: values of ")
        return notes

    source = batch("float32")
    archive_of(tmp_path, source)
    start = f"2 samples compared with {tmp_path / 'a.pkl'}"
    cast = "compared after the cast to float16 ({} values changed); keep the source"
    assert notes("a") == [start, cast.format(changed(source))]
    options = PrecisionOptions(dtype="float32")
    h5traces.convert(tmp_path / "a.pkl", tmp_path / "same.h5", precision=options)
    assert notes("same") == [f"{start}: the archive is lossless"]
    h5traces.convert(tmp_path / "a.pkl", tmp_path / "one.h5", precision=options, layers=0)
    assert notes("one") == [start, "holds 1 of 2 layers: layer 1 is not stored; keep the source"]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_nan_in_bfloat16_keeps_its_bits_through_hdf5_too(tmp_path: Path, dtype: str) -> None:
    """HDF5's own conversion of bfloat16 gives NaN other bits; archives are read as stored."""
    source = batch("float32")
    states = source[0]["hidden_states"][0]
    states.view(np.uint32)[...] &= 0xFFFF0000  # what bfloat16 holds
    states.view(np.uint32)[0, :4] = [0x7FC00000, 0x7FC00000, 0xFFC00000, 0x71800000]
    path = archive_of(tmp_path, source, dtype=dtype)
    with h5traces.open(path) as archive:
        found = archive[0].to_dict()["hidden_states"][0]
        stored = archive[0]._stored.typed_layer("hidden_states", "layer_000")
    if dtype == "auto":
        assert found.tobytes() == states.tobytes()
    else:
        assert stored.dtype == "bfloat16"
    with h5py.File(path, "r+") as file:
        file.attrs["touched"] = 1
    with pytest.warns(UserWarning, match="index"), h5traces.open(path) as archive:
        again = archive[0]._stored.typed_layer("hidden_states", "layer_000")
    assert again.dtype == stored.dtype
    assert again.values.tobytes() == stored.values.tobytes()
