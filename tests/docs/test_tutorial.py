"""The tutorial runs as it stands, and its probe learns something."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from document_pages import ROOT, run_page

import h5traces

if TYPE_CHECKING:
    import pytest


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("agg")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/tutorial.md", "python", "bash")
    with h5traces.open("traced/") as traced:
        assert len(traced) == len(Path("questions.jsonl").read_text().splitlines()) > 80
        assert {trace["label"] for trace in traced} == {0, 1}
    accuracy = names["accuracy"]
    assert len(accuracy) == 6  # layers of the shipped model
    assert max(accuracy) > 0.8
    for name in ("map.png", "heads.png", "probe.png"):
        assert Path(name).read_bytes().startswith(b"\x89PNG")
