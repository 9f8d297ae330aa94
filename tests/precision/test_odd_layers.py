"""Layers that cannot be measured, or hardly: the others are encoded all the same."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import numpy as np
import pytest

import h5traces

if TYPE_CHECKING:
    from pathlib import Path

TOKENS, WIDTH = 20, 8


def converted(folder: Path, layers: list[np.ndarray], tier: str = "fine") -> Path:
    source, target = folder / "batch.pkl", folder / "batch.h5"
    items = [{"hidden_states": layers, "question_id": f"q{number}"} for number in range(2)]
    source.write_bytes(pickle.dumps(items))
    reading = h5traces.ReadingOptions(first_state="block")
    report = h5traces.convert(source, target, precision=tier, reading=reading)
    assert report.ok
    assert h5traces.verify(target, deep=True).ok
    return target


def kept_exact(path: Path) -> list[object]:
    with h5traces.open(path) as archive:
        trace = archive[0]
        paths = [f"hidden_states/layer_{layer:03d}" for layer in archive.layers]
        return [trace._stored.entry(each).attrs.get("kept_exact") for each in paths]


def normal() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(TOKENS, WIDTH)).astype("f2")


def test_a_channel_of_nan_keeps_only_its_own_layer_exact(tmp_path: Path) -> None:
    broken = normal()
    broken[:, 3] = np.nan
    path = converted(tmp_path, [broken, normal()])
    assert kept_exact(path) == ["has no scale", None]
    with h5traces.open(path) as archive:
        assert np.array_equal(archive[1].layer(0), broken, equal_nan=True)


def test_layers_without_channels(tmp_path: Path) -> None:
    path = converted(tmp_path, [np.zeros((TOKENS, 0), "f2")])
    with h5traces.open(path) as archive:
        assert archive[0].layer(0).shape == (TOKENS, 0)


@pytest.mark.parametrize("tier", ["fine", "compact"])
def test_values_at_the_end_of_float32(tmp_path: Path, tier: str) -> None:
    """Their scale reaches further than float32, so nothing could be restored with it."""
    values = normal().astype("f4") * np.float32(5e37)
    path = converted(tmp_path, [values], tier)
    assert kept_exact(path) == ["has a scale that float32 does not reach"]
    with h5traces.open(path) as archive:
        assert np.array_equal(archive[1].layer(0), values)


def test_closed_and_pickled_archives_hold_no_scales(tmp_path: Path) -> None:
    """There may be thousands of shards, each with scales of its own."""
    path = converted(tmp_path, [normal()])
    with h5traces.open(path) as archive:
        before = len(pickle.dumps(archive))
        values = archive[0].layer(0)
        assert len(pickle.dumps(archive)) == before
        archive.close()
        assert np.array_equal(archive[0].layer(0), values)
