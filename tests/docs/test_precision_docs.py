"""What docs/precision.md says of tiers is run, and comes from what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from typing import TYPE_CHECKING, Any

import pytest
from test_labels_and_features import shell
from test_readme import ROOT, blocks

import h5traces
from h5traces.format.precision import TIERS

if TYPE_CHECKING:
    from pathlib import Path

BATCH = next((ROOT / "examples" / "legacy").glob("*.pkl.gz"))


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = spec_from_file_location("tiers", ROOT / "benchmarks" / "tiers.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["tiers"] = module
    # As where Python runs it.
    sys.path.append(str(ROOT / "benchmarks"))
    spec.loader.exec_module(module)
    return module


def test_commands_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / BATCH.name).write_bytes(BATCH.read_bytes())
    h5traces.convert(BATCH, tmp_path / "run.h5")
    monkeypatch.chdir(tmp_path)
    first, calibration = blocks("bash", "docs/precision.md")
    shell(first)
    names: dict[str, Any] = {}
    for code in blocks("python", "docs/precision.md"):
        exec(code, names)  # the code is ours, and running it is the test
    with h5traces.open("custom/") as archive:
        assert archive.metadata.precision == h5traces.Precision(step=0.2, attention_bits=8)
    assert names["hidden"].dtype == "float16"
    assert names["unrounded"].dtype == "float32"
    assert names["mean"].shape == (len(names["hidden"]),) * 2
    for path in (tmp_path / "archives").iterdir():
        path.unlink()
    shell(calibration)
    (path,) = (tmp_path / "archives").iterdir()
    with h5traces.open(path) as archive:
        assert archive.metadata.precision == TIERS["analysis"]
        assert archive.metadata.model_id == "tiny-llama-pydocs"


def test_tables_come_from_what_was_measured(benchmark: Any) -> None:
    stored = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    figures = {tier: benchmark.Figures(**each) for tier, each in stored.items()}
    guide = (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")
    table = benchmark.guide_table(figures)
    assert f"<!-- tiers -->\n{table}\n<!-- end of tiers -->" in guide
    for tier, each in figures.items():
        whole, seven = each.thousand_nbytes / 1e9, each.seven_nbytes / 1e9
        assert f"| `{tier}` | {whole:.2f} | {seven:.2f} |" in table
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sizes = [figures[tier] for tier in ("exact", "compact")]
    assert f"{sizes[0].thousand_nbytes / 1e9:.1f} GB in float16" in readme
    assert f"{sizes[1].seven_nbytes / 1e9:.2f} GB with seven layers" in readme
    about = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert benchmark.speed_table(figures) in about


def test_the_promised_gigabytes(benchmark: Any) -> None:
    """Of files, not of payloads; sizes do not depend on the machine."""
    stored = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    assert stored["compact"]["thousand_nbytes"] <= 2.5e9
    assert stored["compact"]["seven_nbytes"] <= 0.6e9


def test_the_benchmark_runs(tmp_path: Path) -> None:
    small = ("--samples", "3", "--distinct", "2", "--rounds", "1", "--layers", "2")
    command = ["benchmarks/tiers.py", *small, "--hidden", "64", "--heads", "2", "--float32"]
    done = subprocess.run(
        [sys.executable, *command, "-o", str(tmp_path / "tiers.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "| compact |" in done.stdout
    found = json.loads((tmp_path / "tiers.json").read_text())
    sizes = [found[tier]["thousand_nbytes"] for tier in ("exact", "fine", "analysis", "compact")]
    assert sizes == sorted(sizes, reverse=True)
