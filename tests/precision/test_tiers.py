"""Every tier of every layout, written, read, cut and rewritten as exact archives are."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
from attention import attention
from coding import typed
from comparing import TIERS, assert_within_bounds, without_footer
from legacy_batches import LAYOUTS, assert_same, make_archive, write_batch, write_layout

import h5traces
from h5traces.checking.salvage import salvage
from h5traces.checking.seal import seal
from h5traces.errors import (
    ArchiveError,
    ArgumentError,
    H5TracesError,
    HeadsNotStoredError,
    LayerIndexError,
    LossyArchiveError,
    LossyWarning,
    OptionError,
    PrecisionError,
)
from h5traces.fidelity import compare
from h5traces.format.precision import Precision
from h5traces.format.record import LayerArray, SourcePosition
from h5traces.meaning.records import to_record
from h5traces.rewriting.export import export
from h5traces.rewriting.repack import repack
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import hdf5_end
from h5traces.writing.archive_writer import ArchiveWriter
from h5traces.writing.calibrate import calibrate
from h5traces.writing.options import PrecisionOptions, TargetOptions

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, HIDDEN, HEADS, TOKENS = 4, 16, 4, 20

# Reading through HDF5 is what some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*reading through HDF5")


def batch(num_samples: int = 5, seed: int = 0, **change: Any) -> list[dict[str, Any]]:
    """Traces with massive activations and values that are not finite."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(num_samples):
        hidden = rng.standard_normal((LAYERS, TOKENS, HIDDEN)).astype(np.float16)
        hidden[:, 0] *= 200
        hidden[2, 3, 5] = 3000
        if number == 1:
            hidden[1, 2, 4:6] = np.nan, -np.inf
        found.append(
            {
                "hidden_states": list(hidden),
                "attentions": list(attention(rng, HEADS, TOKENS) for _ in range(LAYERS)),
                "tokens": rng.integers(0, 99, TOKENS),
                "tokens_decoded": [f"t{each}" for each in range(TOKENS)],
                "question_id": f"q{seed}_{number}",
                "prompt_length": 8,
                **change,
            }
        )
    return found


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same source at every tier, and exact."""
    folder = tmp_path_factory.mktemp("shelf")
    source = write_batch(folder / "source.pkl", batch())
    for tier in ("exact", *TIERS):
        report = h5traces.convert(source, folder / f"{tier}.h5", precision=tier)
        assert report.ok, report.files[0].error
    return folder


def stored(path: Path) -> dict[str, np.ndarray]:
    """Every dataset below samples and scales, as it lies in the file."""
    found = {}
    with h5py.File(path) as file:
        for group in {"samples", "scales"} & set(file):
            file[group].visititems(
                lambda name, each, group=group: (
                    found.__setitem__(f"{group}/{name}", each[()])
                    if isinstance(each, h5py.Dataset)
                    else None
                )
            )
    return found


def integers(path: Path) -> dict[str, np.ndarray]:
    """The datasets of `stored` that are layers, tables of exceptions, or scales."""
    kinds = ("hidden_states", "attentions", "attention_mean")
    return {
        name: values
        for name, values in stored(path).items()
        if name.startswith("scales") or name.split("/")[2] in kinds
    }


def assert_same_stored(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        assert found[name].tobytes() == values.tobytes(), name


# --- writing and reading ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tier_of_every_layout(tmp_path: Path, layout: str) -> None:
    source = write_layout(tmp_path, layout)
    exact = tmp_path / "exact.h5"
    assert h5traces.convert(source, exact).ok
    plain = h5traces.open(exact)
    for tier in ("fine", "compact", "native"):
        lossy = tmp_path / f"{tier}.h5"
        report = h5traces.convert(source, lossy, precision=tier)
        assert report.ok, report.files[0].error
        assert h5traces.validate(lossy).ok
        assert h5traces.verify(lossy, against=source).ok
        for path in (lossy, without_footer(lossy)):
            met = assert_within_bounds(path, exact)
        assert_within_bounds(lossy, exact, lossy_dtype="float32")
        in_steps = layout.startswith("step_")
        if tier == "native":
            assert met <= {
                "hidden_states float16-rounded",
                "attentions float16-rounded",
                "attention_mean float16-rounded",
            }
        elif in_steps:
            assert met == {"hidden_states exact", "attentions exact"}
            kept = [each for each in report.files[0].warnings if "stored in float16" in each]
            assert [each.partition("the tier asks: ")[2] for each in kept] == [
                "attentions: holds generation steps",
                "hidden_states: holds generation steps",
            ]
        else:
            assert "hidden_states channel-steps" in met
            assert "attention_mean sqrt-uint8" in met
            heads = tier != "compact" and layout != "container_dict"
            assert ("attentions sqrt-uint8" in met) == heads
        for trace, expected in zip(h5traces.open(lossy), plain, strict=True):
            found = trace.to_dict()
            averaged = tier == "compact" and not in_steps
            renamed = {"attentions": "attention_mean"} if averaged else {}
            assert list(found) == [renamed.get(key, key) for key in expected]
            for key in set(expected) - {"hidden_states", "attentions", "attention_mean"}:
                assert_same(found[key], expected[key], key)


@pytest.mark.parametrize("tier", TIERS)
def test_bounds_through_the_footer_and_through_hdf5(shelf: Path, tier: str) -> None:
    lossy, exact = shelf / f"{tier}.h5", shelf / "exact.h5"
    bare = without_footer(lossy)
    for path in (lossy, bare):
        for dtype in ("float16", "float32"):
            met = assert_within_bounds(path, exact, lossy_dtype=dtype)
    expected = {
        "fine": {
            "hidden_states channel-steps",
            "attentions sqrt-uint8",
            "attention_mean sqrt-uint8",
        },
        "compact": {"hidden_states channel-steps", "attention_mean sqrt-uint8"},
        "native": {"hidden_states float16-rounded", "attentions float16-rounded"},
    }
    assert met == expected.get(tier, expected["fine"])
    for one, other in zip(h5traces.open(lossy), h5traces.open(bare), strict=True):
        assert_same(one.to_dict(), other.to_dict())


def test_tiers_are_as_small_as_they_are_coarse(tmp_path: Path) -> None:
    source = write_batch(tmp_path / "source.pkl", batch(30))
    sizes = []
    for tier in ("exact", "fine", "analysis", "compact"):
        h5traces.convert(source, tmp_path / f"{tier}.h5", precision=tier)
        with h5traces.open(tmp_path / f"{tier}.h5") as archive:
            sizes.append(
                sum(
                    size
                    for trace in archive
                    for path in trace._stored.objects
                    for _, size in trace._stored.ranges(path)
                )
            )
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 3


def test_the_archive_says_what_it_lost(shelf: Path) -> None:
    for tier in TIERS:
        metadata = h5traces.open(shelf / f"{tier}.h5").metadata
        assert metadata.precision == Precision.of(tier)  # type: ignore[arg-type]
        assert metadata.precision is not None
        assert metadata.precision.tier == tier
        assert metadata.is_lossless is False
        with h5py.File(shelf / f"{tier}.h5") as file:
            # What old releases cannot decode they must refuse; rounded floats they can read.
            assert bool(json.loads(file.attrs["required_features"])) == (tier != "native")
            assert json.loads(file.attrs["precision"])
    assert h5traces.open(shelf / "exact.h5").metadata.is_lossless


def test_layers_are_read_in_the_type_that_is_asked_for(shelf: Path) -> None:
    short = h5traces.open(shelf / "fine.h5")
    wide = h5traces.open(shelf / "fine.h5", lossy_dtype="float32")
    for kind in ("hidden_states", "attentions", "attention_mean"):
        one, other = short[0][kind][1], wide[0][kind][1]
        assert (one.dtype, other.dtype) == (np.float16, np.float32)
        assert np.array_equal(one, other.astype(np.float16))
        assert not np.array_equal(one, other)
    native = h5traces.open(shelf / "native.h5", lossy_dtype="float32")
    assert native[0]["hidden_states"][0].dtype == np.float16


def test_float32_beyond_float16_stays_float32_within_its_bound(tmp_path: Path) -> None:
    made = batch()
    for each in made:
        each["hidden_states"] = [
            array.astype("f4") * np.float32(1e4) for array in each["hidden_states"]
        ]
    source = write_batch(tmp_path / "wide.pkl", made)
    for tier in ("exact", "fine", "compact", "native"):
        report = h5traces.convert(source, tmp_path / f"{tier}.h5", precision=tier)
        assert report.ok, report.files[0].error
        met = assert_within_bounds(tmp_path / f"{tier}.h5", tmp_path / "exact.h5")
        name = "exact" if tier in ("exact", "native") else "channel-steps"
        assert f"hidden_states {name}" in met
        assert h5traces.open(tmp_path / f"{tier}.h5")[0]["hidden_states"][1].dtype == np.float32
        assert h5traces.verify(tmp_path / f"{tier}.h5", against=source).ok


@pytest.mark.parametrize("tokens", [0, 1])
def test_next_to_no_tokens(tmp_path: Path, tokens: int) -> None:
    made = batch(2)
    short = {
        "hidden_states": [np.ones((tokens, HIDDEN), np.float16)] * LAYERS,
        "attentions": [np.ones((HEADS, tokens, tokens), np.float16)] * LAYERS,
        "tokens": np.arange(tokens),
        "question_id": "short",
    }
    source = write_batch(tmp_path / "short.pkl", [short, *made])
    assert h5traces.convert(source, tmp_path / "exact.h5").ok
    for tier in TIERS:
        report = h5traces.convert(source, tmp_path / f"{tier}.h5", precision=tier)
        assert report.ok, report.files[0].error
        assert_within_bounds(tmp_path / f"{tier}.h5", tmp_path / "exact.h5")
    alone = write_batch(tmp_path / "alone.pkl", [short])
    report = h5traces.convert(alone, tmp_path / "alone.h5", precision="fine")
    assert report.ok
    assert h5traces.open(tmp_path / "alone.h5")[0]["hidden_states"][0].shape == (tokens, HIDDEN)


# --- heads that are not there ----------------------------------------------------------------


def test_heads_of_a_compact_archive(shelf: Path) -> None:
    archive = h5traces.open(shelf / "compact.h5")
    trace = archive[2]
    message = r"compact\.h5.*not stored \(tier compact\).*attention_mean"
    with pytest.raises(HeadsNotStoredError, match=message):
        trace["attentions"]
    with pytest.raises(HeadsNotStoredError, match=message):
        trace.layer(0, "attentions")
    with pytest.raises(HeadsNotStoredError, match=message):
        archive.read([0, 1], kinds=["hidden_states", "attentions"])
    assert list(archive.read([0])[0]) == ["hidden_states", "attention_mean"]
    assert isinstance(HeadsNotStoredError("x"), (KeyError, LossyArchiveError))
    assert "attentions" not in trace
    assert trace.get("attentions") is None
    assert trace.get("attentions", 7) == 7
    assert "attention_mean" in trace
    assert len(trace["attention_mean"]) == LAYERS
    assert trace["attention_mean"][0].shape == (TOKENS, TOKENS)
    found = archive.read([0], kinds=["hidden_states", "attention_mean"])[0]
    assert np.array_equal(found["attention_mean"][1], archive[0]["attention_mean"][1])
    again = pickle.loads(pickle.dumps(HeadsNotStoredError("no heads; attention_mean")))
    assert str(again) == "no heads; attention_mean"


def test_the_mean_beside_the_heads_is_that_of_the_exact_heads(shelf: Path) -> None:
    """Not that of the heads as they come back."""
    compact, fine = (h5traces.open(shelf / f"{tier}.h5") for tier in ("compact", "fine"))
    for one, other in zip(compact, fine, strict=True):
        for layer in range(LAYERS):
            assert np.array_equal(one["attention_mean"][layer], other["attention_mean"][layer])


def test_a_missing_layer_is_another_matter(shelf: Path) -> None:
    trace = h5traces.open(shelf / "compact.h5")[0]
    with pytest.raises(LayerIndexError, match="layer 9 of attention_mean"):
        trace.layer(9, "attention_mean")
    with pytest.raises(KeyError) as error:
        h5traces.open(shelf / "exact.h5")[0]["attention_heads"]
    assert not isinstance(error.value, HeadsNotStoredError)


# --- choosing --------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["fine", "compact"])
def test_selected_layers(shelf: Path, tier: str) -> None:
    archive = h5traces.open(shelf / f"{tier}.h5")
    chosen = archive.select(layers=[1, 3])
    for one, other in zip(chosen, archive, strict=True):
        assert one["hidden_states"].layers == (1, 3)
        for number, layer in enumerate((1, 3)):
            assert_same(one["hidden_states"][number], other.layer(layer))
            assert_same(one["attention_mean"][number], other.layer(layer, "attention_mean"))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces that hold what goes into the first block, too."""
    folder = tmp_path_factory.mktemp("embedded")
    with ArchiveWriter(folder / "exact.h5") as writer:
        for number, item in enumerate(batch(4, seed=3)):
            record = to_record(item, source=SourcePosition(file=0, position=number))
            states = record.layered["hidden_states"]
            values = 7 * np.random.default_rng(number).standard_normal((TOKENS, HIDDEN))
            values[3, 5] = np.inf if number == 2 else 5000
            first = LayerArray(name="embedding", array=typed(values.astype(np.float16)))
            layered = {
                **record.layered,
                "hidden_states": replace(states, arrays=(first, *states.arrays)),
            }
            writer.append(record.model_copy(update={"layered": layered}))
    return folder


@pytest.mark.parametrize("tier", TIERS)
def test_the_embedding_is_a_layer_like_others(embedded: Path, tmp_path: Path, tier: str) -> None:
    exact, lossy = embedded / "exact.h5", tmp_path / f"{tier}.h5"
    repack(exact, lossy, precision=tier)
    repack(lossy, tmp_path / "subset.h5", layers=[2])
    for path in (lossy, tmp_path / "subset.h5"):
        assert_within_bounds(path, exact)
        assert h5traces.validate(path).ok, h5traces.validate(path).problems
        assert h5traces.verify(path, deep=True).ok
        for one, other in zip(h5traces.open(path), h5traces.open(exact), strict=True):
            assert np.array_equal(np.isinf(one.embedding), np.isinf(other.embedding))
            assert not np.array_equal(one.embedding, other.embedding)
        if tier != "native":
            with h5py.File(path) as file:
                assert "embedding" in file["scales/hidden_states"]
                table = file["samples/00000002/hidden_states/exceptions"][:]
                assert (table[:, 0] == -1).sum() == 1


def test_an_archive_survives_pickling(shelf: Path) -> None:
    archive = h5traces.open(shelf / "compact.h5", lossy_dtype="float32")
    archive[0]["hidden_states"][0]
    again = pickle.loads(pickle.dumps(archive))
    found = again[1]["hidden_states"][2]
    assert found.dtype == np.float32
    assert_same(found, archive[1]["hidden_states"][2])


def test_lossless_archives_only(shelf: Path) -> None:
    for tier in TIERS:
        with pytest.raises(LossyArchiveError, match=rf"{tier}\.h5: is not lossless: {tier}"):
            h5traces.open(shelf / f"{tier}.h5", lossless=True)
    assert len(h5traces.open(shelf / "exact.h5", lossless=True)) == 5


def test_exact_and_lossy_shards_do_not_mix(shelf: Path, tmp_path: Path) -> None:
    for tier in ("compact", "native"):
        with pytest.raises(ArchiveError, match=rf"{tier}.*exact|exact.*{tier}"):
            h5traces.open([shelf / "exact.h5", shelf / f"{tier}.h5"])
    with pytest.raises(ArchiveError, match=r"analysis.*fine"):
        h5traces.open([shelf / "fine.h5", shelf / "analysis.h5"])
    # Shards with scales of their own go together.
    other = make_archive(tmp_path, batch(3, seed=7), name="other.pkl", tier="fine")
    both = h5traces.open([shelf / "fine.h5", other])
    assert len(both) == 8
    assert_same(both[6].to_dict(), h5traces.open(other)[1].to_dict())


# --- leaving ---------------------------------------------------------------------------------


def test_a_pickle_cannot_say_what_it_lost(shelf: Path, tmp_path: Path) -> None:
    with pytest.warns(LossyWarning, match=r"out\.pkl: holds less than its source.*fine"):
        export(shelf / "fine.h5", tmp_path / "out.pkl")
    with (tmp_path / "out.pkl").open("rb") as file:
        found = pickle.load(file)
    for one, other in zip(found, h5traces.open(shelf / "fine.h5"), strict=True):
        assert_same(one, other.to_dict())
    # An exact archive gives its pickle without a word.
    export(shelf / "exact.h5", tmp_path / "exact.pkl")


def test_plain_floats_say_what_they_lost(shelf: Path, tmp_path: Path) -> None:
    with pytest.warns(LossyWarning, match=r"plain\.h5: holds less than its source did"):
        export(shelf / "compact.h5", tmp_path / "plain.h5")
    archive = h5traces.open(tmp_path / "plain.h5")
    assert archive.metadata.precision is None
    assert archive.metadata.earlier_precisions == (Precision.of("compact"),)
    assert archive.metadata.is_lossless is False
    with pytest.raises(LossyArchiveError, match="compact"):
        h5traces.open(tmp_path / "plain.h5", lossless=True)
    for one, other in zip(archive, h5traces.open(shelf / "compact.h5"), strict=True):
        for mine, theirs in zip(one["hidden_states"], other["hidden_states"], strict=True):
            assert np.array_equal(mine, theirs, equal_nan=True)
    with h5py.File(tmp_path / "plain.h5") as file:
        assert file["samples/00000000/hidden_states/layer_000"].dtype == np.float32
        assert "scales" not in file
    assert h5traces.validate(tmp_path / "plain.h5").ok


# --- rewriting -------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
def test_chunks_are_copied_as_they_are(shelf: Path, tmp_path: Path, tier: str) -> None:
    source = shelf / f"{tier}.h5"
    report = repack(source, tmp_path / "copy.h5")
    assert report.copied
    assert_same_stored(stored(tmp_path / "copy.h5"), stored(source))
    assert h5traces.open(tmp_path / "copy.h5").metadata.precision == Precision.of(tier)  # type: ignore[arg-type]
    repack(source, tmp_path / "parts.h5", target=TargetOptions(shard_samples=2))
    parts = sorted(tmp_path.glob("parts-*.h5"))
    assert len(parts) == 3
    repack(parts, tmp_path / "whole.h5")
    assert_same_stored(stored(tmp_path / "whole.h5"), stored(source))
    for path in (tmp_path / "whole.h5", *parts):
        assert h5traces.validate(path).ok
        assert h5traces.verify(path, deep=True).ok


@pytest.mark.parametrize("tier", TIERS)
def test_a_subset_of_layers_keeps_scales_and_exceptions_of_its_own(
    shelf: Path, tmp_path: Path, tier: str
) -> None:
    target = tmp_path / "subset.h5"
    assert repack(shelf / f"{tier}.h5", target, layers=[1, 2], samples=[3, 1]).copied
    assert h5traces.validate(target).ok, h5traces.validate(target).problems
    assert h5traces.verify(target, deep=True).ok
    if tier != "native":
        with h5py.File(target) as file:
            assert sorted(file["scales/hidden_states"]) == ["layer_001", "layer_002"]
            assert set(file["samples/00000001/hidden_states/exceptions"][:, 0]) == {1, 2}
    found, source = h5traces.open(target), h5traces.open(shelf / f"{tier}.h5")
    for one, other in zip(found, (source[3], source[1]), strict=True):
        for layer in (1, 2):
            assert_same(one.layer(layer), other.layer(layer))


@pytest.mark.parametrize("codec", ["zstd"])
@pytest.mark.parametrize("tier", ["fine", "compact", "native"])
def test_another_codec_keeps_the_integers(
    shelf: Path, tmp_path: Path, tier: str, codec: str
) -> None:
    pytest.importorskip("hdf5plugin")
    repack(shelf / f"{tier}.h5", tmp_path / "other.h5", precision=PrecisionOptions(codec=codec))
    assert_same_stored(stored(tmp_path / "other.h5"), stored(shelf / f"{tier}.h5"))
    assert h5traces.open(tmp_path / "other.h5").metadata.codec == codec
    assert h5traces.verify(tmp_path / "other.h5", deep=True).ok
    repack(tmp_path / "other.h5", tmp_path / "back.h5", precision=PrecisionOptions(codec="gzip"))
    assert_same_stored(stored(tmp_path / "back.h5"), stored(shelf / f"{tier}.h5"))


def test_different_scales_do_not_go_into_one_archive(shelf: Path, tmp_path: Path) -> None:
    other = make_archive(tmp_path, batch(3, seed=7), name="other.pkl", tier="fine")
    with pytest.raises(ArchiveError, match=r"other\.h5 and .*fine\.h5 have different scales"):
        repack([shelf / "fine.h5", other], tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


def test_the_same_scales_do(shelf: Path, tmp_path: Path) -> None:
    other = make_archive(
        tmp_path, batch(3, seed=7), name="other.pkl", tier="fine", scales=shelf / "fine.h5"
    )
    assert repack([shelf / "fine.h5", other], tmp_path / "out.h5").copied
    merged = h5traces.open(tmp_path / "out.h5")
    assert len(merged) == 8
    assert_same(merged[6].to_dict(), h5traces.open(other)[1].to_dict())


def test_rewriting_an_exact_archive_is_converting_its_source(shelf: Path, tmp_path: Path) -> None:
    for tier in TIERS:
        repack(shelf / "exact.h5", tmp_path / f"{tier}.h5", precision=tier)
        assert_same_stored(integers(tmp_path / f"{tier}.h5"), integers(shelf / f"{tier}.h5"))


def test_losses_add_up_and_are_told(shelf: Path, tmp_path: Path) -> None:
    with pytest.warns(LossyWarning, match=r"fine\.h5: holds fine.*becomes compact.*add up"):
        repack(shelf / "fine.h5", tmp_path / "twice.h5", precision="compact")
    archive = h5traces.open(tmp_path / "twice.h5")
    assert archive.metadata.earlier_precisions == (Precision.of("fine"),)
    assert archive.metadata.precision == Precision.of("compact")
    assert h5traces.validate(tmp_path / "twice.h5").ok
    # Edges are those of the mean that was stored beside the heads, once more at the same levels.
    for one, other in zip(archive, h5traces.open(shelf / "exact.h5"), strict=True):
        for mean, heads in zip(one["attention_mean"], other["attentions"], strict=True):
            expected = heads.astype("f4").mean(0) > np.float32(0.01)
            assert np.array_equal(mean > np.float32(0.01), expected)
    with pytest.warns(LossyWarning, match="fine.*compact"):
        export(tmp_path / "twice.h5", tmp_path / "twice.pkl")
    with pytest.raises(LossyArchiveError, match=r"twice\.h5: holds fine.*compact"):
        repack(tmp_path / "twice.h5", tmp_path / "never.h5", precision="exact")


def test_what_was_lost_is_not_had_back(shelf: Path, tmp_path: Path) -> None:
    for tier in TIERS:
        with pytest.raises(LossyArchiveError, match=rf"{tier}\.h5: holds {tier}.*made from"):
            repack(shelf / f"{tier}.h5", tmp_path / "out.h5", precision="exact")
    assert not (tmp_path / "out.h5").exists()


def test_the_same_tier_again_loses_nothing(shelf: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repack(shelf / "analysis.h5", tmp_path / "again.h5", precision="analysis").copied
    assert_same_stored(stored(tmp_path / "again.h5"), stored(shelf / "analysis.h5"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_tiers_go_with_float16_only(shelf: Path, tmp_path: Path, dtype: str) -> None:
    for tier in TIERS:
        with pytest.raises(PrecisionError, match=rf"{tier}.*not {dtype}"):
            h5traces.convert(
                shelf / "source.pkl",
                tmp_path / "out.h5",
                precision=PrecisionOptions(tier=tier, dtype=dtype),
            )
        with pytest.raises(PrecisionError, match=rf"{tier}.*not {dtype}"):
            repack(
                shelf / "exact.h5",
                tmp_path / "out.h5",
                precision=PrecisionOptions(tier=tier, dtype=dtype),
            )
    assert not (tmp_path / "out.h5").exists()


# --- damage ----------------------------------------------------------------------------------


def chunk_of(path: Path, dataset: str) -> tuple[int, int]:
    with h5py.File(path) as file:
        info = file[dataset].id.get_chunk_info(0)
    return info.byte_offset, info.size


def damaged(path: Path, target: Path, at: int, flip: int = 0x40) -> Path:
    data = bytearray(path.read_bytes())
    data[at] ^= flip
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("footer", [True, False])
@pytest.mark.parametrize("name", ["step", "offset", "sigma"])
def test_flipped_bytes_of_scales_are_found(
    shelf: Path, tmp_path: Path, name: str, footer: bool
) -> None:
    source = shelf / "fine.h5" if footer else without_footer(shelf / "fine.h5")
    start, size = chunk_of(source, f"scales/hidden_states/layer_001/{name}")
    rng = random.Random(name)
    for _ in range(12):
        at = start + rng.randrange(size)
        path = damaged(source, tmp_path / "damaged.h5", at, 1 << rng.randrange(8))
        report = h5traces.verify(path)
        assert not report.ok
        assert any("scales" in each.loc for each in report.problems)
        for trace in h5traces.open(path)[:2]:
            if name == "sigma":
                continue
            with pytest.raises(H5TracesError, match="scales/hidden_states/layer_001"):
                trace.layer(1)
        path.unlink()


def test_flipped_bytes_of_exceptions_are_found(shelf: Path, tmp_path: Path) -> None:
    start, size = chunk_of(shelf / "fine.h5", "samples/00000001/hidden_states/exceptions")
    path = damaged(shelf / "fine.h5", tmp_path / "damaged.h5", start + size // 2)
    report = h5traces.verify(path)
    assert [each.loc for each in report.problems] == ["/samples/00000001/hidden_states/exceptions"]
    with pytest.raises(H5TracesError, match=r"00000001.*exceptions"):
        h5traces.open(path)[1].layer(0)


@pytest.mark.parametrize("tier", ["fine", "compact", "native"])
def test_what_is_saved_of_a_damaged_archive_keeps_its_scales(
    shelf: Path, tmp_path: Path, tier: str
) -> None:
    start, size = chunk_of(shelf / f"{tier}.h5", "samples/00000002/hidden_states/layer_000")
    path = damaged(shelf / f"{tier}.h5", tmp_path / "damaged.h5", start + size // 2)
    report = salvage(path, tmp_path / "saved.h5")
    assert report.lost_samples == [2]
    saved, source = h5traces.open(tmp_path / "saved.h5"), h5traces.open(shelf / f"{tier}.h5")
    assert saved.metadata.precision == source.metadata.precision
    for one, index in zip(saved, (0, 1, 3, 4), strict=True):
        assert_same(one.to_dict(), source[index].to_dict())
    assert h5traces.validate(tmp_path / "saved.h5").ok
    with h5py.File(tmp_path / "saved.h5") as file:
        assert ("scales" in file) == (tier != "native")


def test_an_edit_is_sealed_again(shelf: Path, tmp_path: Path) -> None:
    path = tmp_path / "edited.h5"
    shutil.copy(shelf / "fine.h5", path)
    with h5py.File(path, "r+") as file:
        file["samples/00000000/hidden_states/layer_000"][0, 0] += 1
    assert not h5traces.verify(path, deep=True).ok
    (report,) = seal(path)
    assert not report.sealed
    assert report.edited == ["/samples/00000000/hidden_states/layer_000"]
    assert seal(path, accept_edits=True)[0].sealed
    archive = h5traces.open(path)
    assert hdf5_end(LocalFile(path)) < path.stat().st_size
    assert_same(archive[1].to_dict(), h5traces.open(shelf / "fine.h5")[1].to_dict())
    assert_same(archive[0].layer(1), h5traces.open(shelf / "fine.h5")[0].layer(1))


def edit(source: Path, target: Path, change: Any) -> Path:
    shutil.copy(source, target)
    with h5py.File(target, "r+") as file:
        change(file)
    return target


def kinds_of(path: Path) -> set[str]:
    report = h5traces.validate(path)
    assert not report.ok
    return {each.kind for each in report.problems}


LAYER = "samples/00000001/hidden_states/layer_001"


def drop(file: h5py.File, path: str) -> None:
    del file[path]


def shrink(file: h5py.File, path: str) -> None:
    values = file[path][:-1]
    digest = file[path].attrs["digest"]
    del file[path]
    file.create_dataset(path, data=values, chunks=values.shape, shuffle=True, compression="gzip")
    file[path].attrs["digest"] = digest


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda file: drop(file, "scales/hidden_states/layer_001/step"), "missing_scale"),
        (lambda file: drop(file, "scales/hidden_states/layer_001/sigma"), "missing_scale"),
        (lambda file: drop(file, "scales/hidden_states/layer_001"), "missing_scale"),
        (lambda file: drop(file, "scales"), "missing_scale"),
        (
            lambda file: drop(file, "samples/00000001/hidden_states/exceptions"),
            "missing_exceptions",
        ),
        (
            lambda file: file[LAYER].attrs.__setitem__("encoding_version", np.bytes_("9")),
            "unsupported_encoding",
        ),
        (
            lambda file: file[LAYER].attrs.__setitem__("encoding", np.bytes_("channel-stops")),
            "unsupported_encoding",
        ),
        (lambda file: file.attrs.__delitem__("precision"), "unmarked_loss"),
        (
            lambda file: [
                shrink(file, f"scales/hidden_states/layer_001/{name}")
                for name in ("step", "offset", "sigma")
            ],
            "scale_width",
        ),
        (lambda file: shrink(file, "scales/hidden_states/layer_001/offset"), "scale_width"),
    ],
)
def test_validation_finds(shelf: Path, tmp_path: Path, change: Any, kind: str) -> None:
    path = edit(shelf / "fine.h5", tmp_path / "edited.h5", change)
    assert kind in kinds_of(path)
    assert not h5traces.verify(path, deep=True).ok


@pytest.mark.parametrize(
    "change",
    [
        lambda file: drop(file, "scales/hidden_states/layer_001/step"),
        lambda file: drop(file, "scales"),
        lambda file: drop(file, "samples/00000001/hidden_states/exceptions"),
        lambda file: file[LAYER].attrs.__setitem__("encoding_version", np.bytes_("9")),
        lambda file: file[LAYER].attrs.__setitem__("num_exceptions", 10**9),
        lambda file: file[LAYER].attrs.__setitem__("spacing", 0),
        lambda file: file[LAYER].attrs.__setitem__("restored_dtype", np.bytes_("float64")),
        lambda file: file[LAYER].attrs.__setitem__("scales", np.bytes_("/samples")),
        lambda file: [
            shrink(file, f"scales/hidden_states/layer_001/{name}")
            for name in ("step", "offset", "sigma")
        ],
    ],
)
def test_reading_what_was_edited_ends_in_an_error_that_names_it(
    shelf: Path, tmp_path: Path, change: Any
) -> None:
    path = edit(shelf / "fine.h5", tmp_path / "edited.h5", change)
    with pytest.raises(ArchiveError, match=r"edited\.h5.*layer_001"):
        h5traces.open(path)[1].layer(1)


def test_an_edited_footer_is_found(shelf: Path, tmp_path: Path) -> None:
    source = shelf / "fine.h5"
    end = hdf5_end(LocalFile(source))
    rng = random.Random(0)
    for _ in range(20):
        at = rng.randrange(end, source.stat().st_size)
        path = damaged(source, tmp_path / "damaged.h5", at, 1 << rng.randrange(8))
        report = h5traces.validate(path)
        assert not report.ok or report.notes
        assert_same(h5traces.open(path)[0].to_dict(), h5traces.open(source)[0].to_dict())
        path.unlink()


def test_scales_of_an_archive_that_has_some_cannot_be_replaced(tmp_path: Path) -> None:
    write_batch(tmp_path / "batch.pkl", batch())
    h5traces.convert(tmp_path / "batch.pkl", tmp_path / "exact.h5")
    repack(tmp_path / "exact.h5", tmp_path / "fine.h5", precision="fine")
    with pytest.raises(PrecisionError, match=r"fine\.h5.*its own scales.*leave scales out"):
        repack(
            tmp_path / "fine.h5",
            tmp_path / "b.h5",
            precision=PrecisionOptions(tier="fine", scales=tmp_path / "fine.h5"),
        )
    assert not (tmp_path / "b.h5").exists()


def test_a_reference_that_lost_precision_is_named(tmp_path: Path) -> None:
    write_batch(tmp_path / "batch.pkl", batch())
    h5traces.convert(tmp_path / "batch.pkl", tmp_path / "exact.h5")
    repack(tmp_path / "exact.h5", tmp_path / "fine.h5", precision="fine")
    with pytest.warns(LossyWarning, match=r"fine\.h5: the reference lost precision itself"):
        compare(tmp_path / "fine.h5", tmp_path / "exact.h5")


@pytest.mark.parametrize(
    ("factor", "is_encoded"), [(1, True), (1.5, True), (4, False), (1e3, False)]
)
def test_scales_far_too_wide_are_not_used(tmp_path: Path, factor: float, is_encoded: bool) -> None:
    """The bound is stated in their sigma: it would promise nothing."""
    write_batch(tmp_path / "batch.pkl", batch())
    wide = [
        {**trace, "hidden_states": [each.astype("f4") * factor for each in trace["hidden_states"]]}
        for trace in batch()
    ]
    write_batch(tmp_path / "wide.pkl", wide)
    calibrate(tmp_path / "wide.pkl", tmp_path / "scales.h5")
    report = h5traces.convert(
        tmp_path / "batch.pkl",
        tmp_path / "a.h5",
        precision=PrecisionOptions(tier="analysis", scales=tmp_path / "scales.h5"),
    )
    with h5traces.open(tmp_path / "a.h5") as archive:
        reasons = {
            trace._stored.attrs("hidden_states/layer_000").get("kept_exact") for trace in archive
        }
    assert reasons == ({None} if is_encoded else {"its scale is far wider than its values"})
    warnings_of = " ".join(report.files[0].warnings)
    assert ("far wider than its values" in warnings_of) != is_encoded


def test_scales_without_use_are_refused(tmp_path: Path) -> None:
    write_batch(tmp_path / "batch.pkl", batch())
    calibrate(tmp_path / "batch.pkl", tmp_path / "scales.h5", model_id="org/Model")
    for tier in ("exact", "native"):
        with pytest.raises(PrecisionError, match="scales need a precision with quantisation steps"):
            h5traces.convert(
                tmp_path / "batch.pkl",
                tmp_path / "a.h5",
                precision=PrecisionOptions(tier=tier, scales=tmp_path / "scales.h5"),
            )
    other = {"precision": PrecisionOptions(tier="fine", scales=tmp_path / "scales.h5")}
    with pytest.raises(PrecisionError, match="on org/Model, the samples come from other/one"):
        h5traces.convert(tmp_path / "batch.pkl", tmp_path / "a.h5", model_id="other/one", **other)
    # The same, from a folder.
    h5traces.convert(tmp_path / "batch.pkl", tmp_path / "a.h5", model_id="/models/model", **other)


def test_a_mean_beside_the_heads_loses_nothing(tmp_path: Path) -> None:
    write_batch(tmp_path / "batch.pkl", batch())
    precision = Precision(head_mean="beside")
    h5traces.convert(tmp_path / "batch.pkl", tmp_path / "a.h5", precision=precision)
    with h5traces.open(tmp_path / "a.h5", lossless=True) as archive:
        assert archive.metadata.precision == precision
        assert archive[0]["attention_mean"][0].shape == (TOKENS, TOKENS)
        assert "lossy" not in repr(archive)


def test_default_kinds_are_what_is_stored(tmp_path: Path) -> None:
    write_batch(tmp_path / "batch.pkl", batch())
    h5traces.convert(tmp_path / "batch.pkl", tmp_path / "a.h5", precision="compact")
    with h5traces.open(tmp_path / "a.h5") as archive:
        (found,) = archive.read([0], layers=[1])
        assert list(found) == ["hidden_states", "attention_mean"]
        assert "compact (lossy)" in repr(archive)


@pytest.mark.parametrize("dtype", ["float64", "f4", None, np.float32])
def test_other_types_of_reading_are_refused(tmp_path: Path, dtype: Any) -> None:
    write_batch(tmp_path / "batch.pkl", batch())
    h5traces.convert(tmp_path / "batch.pkl", tmp_path / "a.h5")
    with pytest.raises((OptionError, ArgumentError), match="expected 'float16' or 'float32'"):
        h5traces.open(tmp_path / "a.h5", lossy_dtype=dtype)


def test_what_is_cast_from_a_lossy_archive_says_so(tmp_path: Path) -> None:
    write_batch(tmp_path / "batch.pkl", batch())
    h5traces.convert(tmp_path / "batch.pkl", tmp_path / "a.h5", precision="fine")
    with pytest.warns(LossyWarning, match="earlier_precisions"):
        repack(tmp_path / "a.h5", tmp_path / "b.h5", precision=PrecisionOptions(dtype="float32"))
    with pytest.warns(LossyWarning, match="earlier_precisions"):
        export(tmp_path / "a.h5", tmp_path / "c.h5")
    for name in ("b.h5", "c.h5"):
        with h5traces.open(tmp_path / name) as archive:
            assert archive.metadata.is_lossless is False
        with pytest.raises(LossyArchiveError, match=r"had lost precision before.*fidelity"):
            h5traces.verify(tmp_path / name, against=tmp_path / "batch.pkl")
    report = h5traces.verify(tmp_path / "a.h5", against=tmp_path / "batch.pkl")
    assert report.ok
    assert any("encoded as fine" in note for note in report.notes)
