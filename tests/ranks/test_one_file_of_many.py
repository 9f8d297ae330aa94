"""Shards of `repack`, tables of features and catalogues that several ranks make together."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from child_processes import start_process
from legacy_batches import make_batch, write_batch

import h5traces
from h5traces.errors import ArchiveError, ArchiveExistsError, OptionError, TargetError
from h5traces.features import extract_features
from h5traces.features import sharing as feature_sharing
from h5traces.rewriting import cataloguing
from h5traces.writing.options import TargetOptions

SHARDS = TargetOptions(shard_samples=3)


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    # So that small runs have several parts.
    monkeypatch.setattr(feature_sharing, "_BLOCK_SAMPLES", 3)
    monkeypatch.setattr(cataloguing, "_SHARDS_OF_A_PART", 1)
    for number in range(5):
        batch = make_batch("full_pkl", num_samples=2, seed=number)
        h5traces.convert(
            write_batch(tmp_path / f"b{number}.pkl", batch), f"{tmp_path}/in/"
        ).raise_for_errors()
    return tmp_path / "in"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.h5"))}


@pytest.mark.parametrize("tier", [None, "analysis"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_repacked_shards_do_not_depend_on_ranks(
    archives: Path, tmp_path: Path, size: int, tier: Any
) -> None:
    chosen: Any = {"precision": tier, "target": SHARDS, "samples": [9, 0, 1, 2, 3, 4, 5]}
    alone = h5traces.repack(archives, f"{tmp_path}/alone/", **chosen)
    reports = [
        h5traces.repack(archives, f"{tmp_path}/many/", rank=rank, world_size=size, **chosen)
        for rank in (*reversed(range(size)), 0)
    ]
    # All batches have the same ids, so generation indices count over shards.
    assert contents(tmp_path / "many") == contents(tmp_path / "alone")
    assert len(contents(tmp_path / "many")) == len(alone.targets) == 3
    assert sum(each.num_samples for each in reports) == alone.num_samples == 7
    found = h5traces.collect(tmp_path / "many")
    assert found.ok
    assert (found.status.num_items, found.num_samples) == (3, 7)


def test_ranks_of_repack_need_shards_and_one_plan(archives: Path, tmp_path: Path) -> None:
    shared: Any = {"rank": 0, "world_size": 2}
    with pytest.raises(OptionError, match="ranks share the shards of a result"):
        h5traces.repack(archives, f"{tmp_path}/out/", **shared)
    with pytest.raises(TargetError, match="is one file, which ranks cannot share"):
        h5traces.repack(archives, tmp_path / "out.h5", target=SHARDS, **shared)
    h5traces.repack(archives, f"{tmp_path}/out/", target=SHARDS, **shared)
    with pytest.raises(TargetError, match=r"planned otherwise: .*layers is"):
        h5traces.repack(archives, f"{tmp_path}/out/", layers=[0], target=SHARDS, **shared)
    report = h5traces.collect(tmp_path / "out")
    assert not report.ok
    assert report.missing == ["shard 1", "shard 3"]
    (tmp_path / "out" / "in-00001.h5").write_bytes((archives / "b0.h5").read_bytes())
    (tmp_path / "out" / "traces-00001.h5").write_bytes((archives / "b0.h5").read_bytes())
    with pytest.raises(ArchiveExistsError, match=r"00001\.h5 exists and holds something else"):
        h5traces.repack(archives, f"{tmp_path}/out/", target=SHARDS, rank=1, world_size=2)


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".parquet"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_rows_of_features_do_not_depend_on_ranks(
    archives: Path, tmp_path: Path, size: int, suffix: str
) -> None:
    names = ["last_token", "attention_entropy"]
    chosen: Any = {"pca": 2, "allow_nan": True}
    alone, many = tmp_path / f"alone{suffix}", tmp_path / f"many{suffix}"
    extract_features(archives, alone, names, **chosen)
    reports = [
        extract_features(archives, many, names, rank=rank, world_size=size, **chosen)
        for rank in (*reversed(range(size)), 0)
    ]
    if suffix == ".npz":
        # A zip archive has times of its own.
        with np.load(alone) as one, np.load(many) as other:
            assert one.files == other.files
            assert all(np.array_equal(one[each], other[each]) for each in one.files)
    else:
        assert many.read_bytes() == alone.read_bytes()
    assert [each.is_written for each in reports][-2:] == [True, True]
    assert sum(each.is_written for each in reports) == 2
    assert h5traces.status(many).ok
    assert not list(tmp_path.glob(f"many{suffix}.run/part-*"))


def test_a_table_is_not_there_before_all_ranks_were(archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.h5"
    report = extract_features(archives, out, ["last_token"], rank=0, world_size=2, allow_nan=True)
    assert not report.is_written
    assert not out.exists()
    assert h5traces.status(out).missing == [1]
    with pytest.raises(TargetError, match="names is"):
        extract_features(archives, out, ["mean"], rank=1, world_size=2, allow_nan=True)
    with pytest.raises(OptionError, match="overwrite=True does not go with rank"):
        extract_features(
            archives,
            out,
            ["mean"],
            target=TargetOptions(overwrite=True),
            rank=1,
            world_size=2,
        )
    # Another number of ranks goes on.
    for rank in range(3):
        extract_features(archives, out, ["last_token"], rank=rank, world_size=3, allow_nan=True)
    with h5py.File(out) as file:
        assert file["features/last_token"].shape[0] == 10
    with pytest.raises(ArchiveExistsError, match="not of this run"):
        extract_features(archives, out, ["mean"], rank=0, world_size=1, allow_nan=True)
    out.unlink()
    extract_features(archives, out, ["mean"], rank=0, world_size=1, allow_nan=True)
    with h5py.File(out) as file:
        assert list(file["features"]) == ["mean"]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_catalogue_does_not_depend_on_ranks(archives: Path, tmp_path: Path, size: int) -> None:
    h5traces.index(archives, archives / "alone.parquet")
    out = archives / "many.parquet"
    reports = [
        h5traces.index(archives, out, rank=rank, world_size=size)
        for rank in (*reversed(range(size)), 0)
    ]
    assert out.read_bytes() == (archives / "alone.parquet").read_bytes()
    assert sum(each.num_read for each in reports) == 5
    assert h5traces.open(out).ids == h5traces.open(archives).ids
    # A shard came: the ranks bring the catalogue up to date.
    batch = make_batch("full_pkl", num_samples=2, seed=9)
    h5traces.convert(write_batch(tmp_path / "b9.pkl", batch), f"{archives}/")
    reports = [h5traces.index(archives, out, rank=rank, world_size=size) for rank in range(size)]
    assert reports[-1].is_written
    assert sum(each.num_read for each in reports) == 1
    assert len(h5traces.open(out)) == 12


def test_a_part_of_empty_shards_ends_no_rank(archives: Path, tmp_path: Path) -> None:
    """Each shard is a part here; those without samples come first, between others, and last."""
    for name in ("a", "b2_empty", "z"):
        h5traces.repack(archives / "b1.h5", archives / f"{name}.h5", samples=[])
    h5traces.index(archives, archives / "alone.parquet")
    out = archives / "many.parquet"
    for _ in range(2):
        reports = [h5traces.index(archives, out, rank=rank, world_size=3) for rank in range(3)]
        assert reports[-1].is_written
        assert out.read_bytes() == (archives / "alone.parquet").read_bytes()
    with pytest.raises(ArchiveError, match="the shards hold no samples"):
        h5traces.index(archives / "a.h5", tmp_path / "empty.parquet", rank=0, world_size=1)


def test_ranks_that_are_killed_at_random_lose_nothing(archives: Path, tmp_path: Path) -> None:
    """Separate processes, whose blocks are of the usual size: only their kills matter here."""
    chance = random.Random(0)
    tool = str(Path(sys.executable).with_name("h5traces"))

    def start(rank: int, out: str, *command: str) -> Any:
        ranks = ["--rank", str(rank), "--world-size", "2"]
        return start_process([tool, *command, str(archives), "-o", f"{tmp_path}/{out}", *ranks])

    for out, *command in (
        ("f.h5", "features", "--last-token", "--allow-nan"),
        ("out/", "repack", "--shard-samples", "3"),
    ):
        started = [start(rank, out, *command) for rank in range(2)]
        for each in started:
            time.sleep(chance.uniform(0.5, 1.5))
            each.kill()
            each.communicate()
        for rank in range(2):
            each = start(rank, out, *command)
            _, errors = each.communicate()
            assert each.returncode == 0, errors
    h5traces.repack(archives, f"{tmp_path}/alone/", target=SHARDS)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    extract_features(archives, tmp_path / "alone.h5", ["last_token"], allow_nan=True)
    assert (tmp_path / "f.h5").read_bytes() == (tmp_path / "alone.h5").read_bytes()
    assert not list(tmp_path.rglob("*.part"))
