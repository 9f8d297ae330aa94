"""The same command gives the same bytes, and an archive's id comes from what is in it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from legacy_batches import make_batch, write_batch

import h5traces

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    return write_batch(tmp_path / "batch.pkl", make_batch("final_full", num_samples=3))


def archive_id(path: Path) -> str:
    with h5traces.open(path) as archive:
        return archive.metadata.archive_id


@pytest.mark.parametrize("tier", ["exact", "analysis"])
def test_the_same_command_gives_the_same_bytes(
    batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: Any
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1764400000")
    paths = [tmp_path / f"{number}.h5" for number in range(2)]
    for path in paths:
        h5traces.convert(batch, path, precision=tier)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with h5traces.open(paths[0]) as archive:
        assert archive.metadata.created == "2025-11-29T07:06:40Z"


def test_an_id_tells_samples_and_options_apart(batch: Path, tmp_path: Path) -> None:
    found = {}
    for name, options in {
        "first": {},
        "again": {},
        "wide": {"precision": h5traces.PrecisionOptions(dtype="auto")},
        "some": {"layers": [0]},
        "named": {"model_id": "another"},
    }.items():
        h5traces.convert(batch, tmp_path / f"{name}.h5", **options)
        found[name] = archive_id(tmp_path / f"{name}.h5")
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", found[name])
    assert found["first"] == found["again"]
    assert len(set(found.values())) == 4
    write_batch(batch, make_batch("final_full", num_samples=3, seed=1))
    h5traces.convert(batch, tmp_path / "other.h5")
    assert archive_id(tmp_path / "other.h5") not in found.values()


def test_the_time_of_a_source_is_not_what_is_in_it(batch: Path, tmp_path: Path) -> None:
    h5traces.convert(batch, tmp_path / "before.h5")
    batch.touch()
    h5traces.convert(batch, tmp_path / "after.h5")
    assert archive_id(tmp_path / "before.h5") == archive_id(tmp_path / "after.h5")
