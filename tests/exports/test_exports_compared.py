"""`verify --against` an export: values decide, and not what they lie in."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import h5traces

if TYPE_CHECKING:
    from pathlib import Path

TARGETS = {"datasets": "d/", "parquet": "o.parquet", "torch": "o.pt"}


def converted(folder: Path) -> Path:
    (folder / "run.pkl").write_bytes(pickle.dumps(made()))
    assert h5traces.convert(folder / "run.pkl", folder / "run.h5").ok
    return folder / "run.h5"


def made() -> list[dict[str, Any]]:
    """Four samples of three blocks."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(4):
        size = 6 + index
        weights = np.tril(rng.random((3, 2, size, size))).astype(np.float16)
        sample = {
            "hidden_states": list(rng.normal(size=(3, size, 8)).astype(np.float16)),
            "attentions": list(weights),
            "tokens": np.arange(size),
            "question_id": f"q{index}",
        }
        found.append(sample)
    return found


@pytest.mark.parametrize("kind", sorted(TARGETS))
def test_an_export_has_the_same_values(tmp_path: Path, kind: str) -> None:
    archive = converted(tmp_path)
    target = str(tmp_path) + "/" + TARGETS[kind]
    h5traces.export(archive, target, to="datasets" if kind == "datasets" else None)
    (report,) = h5traces.verify(archive, against=target)
    assert report.ok, report
    assert "not a recorded source: values are the same, containers of 4 samples are not" in str(
        report.notes
    )


@pytest.mark.parametrize("field", ["hidden_states", "tokens", "question_id"])
@pytest.mark.parametrize("kind", ["parquet", "torch"])
def test_another_value_is_found(tmp_path: Path, kind: str, field: str) -> None:
    archive = converted(tmp_path)
    (tmp_path / "other").mkdir()
    samples = made()
    if field == "hidden_states":
        samples[3][field][1][2, 4] += 1
    elif field == "tokens":
        samples[3][field] = np.array(samples[3][field]) + (np.arange(len(samples[3][field])) == 5)
    else:
        samples[3][field] = "another"
    (tmp_path / "other" / "run.pkl").write_bytes(pickle.dumps(samples))
    h5traces.convert(tmp_path / "other" / "run.pkl", tmp_path / "other" / "run.h5")
    target = str(tmp_path / TARGETS[kind])
    h5traces.export(tmp_path / "other" / "run.h5", target)
    (report,) = h5traces.verify(archive, against=target)
    assert {each.kind for each in report.problems} == {"differs_from_source"}
    assert all("/samples/00000003" in each.loc for each in report.problems)


def test_the_recorded_source_is_compared_with_its_containers(tmp_path: Path) -> None:
    archive = converted(tmp_path)
    samples = [{**each, "hidden_states": tuple(each["hidden_states"])} for each in made()]
    (tmp_path / "run.pkl").write_bytes(pickle.dumps(samples))
    (report,) = h5traces.verify(archive, against=tmp_path / "run.pkl")
    assert not report.ok
