"""What docs/fidelity.md shows is run as it stands there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from test_labels_and_features import shell
from test_readme import ROOT, blocks

import h5traces
from h5traces.fidelity.states import DEAD, TIE
from h5traces.fidelity.weights import SMALLEST

if TYPE_CHECKING:
    from pathlib import Path


def test_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = next((ROOT / "examples" / "legacy").glob("*.pkl.gz"))
    h5traces.convert(batch, tmp_path / "run.h5")
    monkeypatch.chdir(tmp_path)
    (commands,) = blocks("bash", "docs/fidelity.md")
    shell(commands)
    document = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    (code,) = blocks("python", "docs/fidelity.md")
    exec(code, names)  # the code is ours, and running it is the test
    report = names["report"]
    assert document == {**report.as_dict(), "exceeding": []}
    # Half a unit of 8 bits.
    assert report.kind("hidden_states").total.max_relative == pytest.approx(2**-8, rel=0.05)
    assert 0 < report.kind("attentions").total.num_flips


def test_the_constants_are_those_of_the_code() -> None:
    assert (DEAD, TIE, SMALLEST) == (2**-12, 1e-6, 2**-24)
    text = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    for each in ("2⁻¹²", "10⁻⁶", "2⁻²⁴"):
        assert each in text
