"""The benchmark suite runs as a whole, with tiny arrays, and its report is complete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from child_processes import REAL_HOME

from h5traces.storage.codecs import ArrayCodec

REPOSITORY = Path(__file__).resolve().parents[2]
RIVALS = (
    "pickle",
    "pickle + gzip 6",
    "numpy.savez_compressed",
    "torch.save",
    "safetensors",
    "stock h5py gzip 4 + shuffle",
    "stock h5py gzip 4 + shuffle, one chunk per array",
    "h5py + hdf5plugin zstd 3 + shuffle",
    "h5py + hdf5plugin blosc2 zstd 5",
    "zarr 3",
)
OURS = (
    *(
        f"h5traces {codec}, {how}"
        for codec in get_args(ArrayCodec)
        for how in ("1 thread", "all cores")
    ),
    "h5traces gzip, read by stock h5py",
)
COLUMNS = (
    "bytes per sample",
    "bits per value",
    "of the entropy",
    "write MB/s, wall",
    "write MB/s, CPU",
    "read MB/s, wall",
    "read MB/s, CPU",
    "one random (sample, layer), ms",
    "peak RSS writing, MB",
    "peak RSS reading, MB",
)
CASES = (
    "igzip inflates the .pkl.gz",
    "gzip + pickle.load",
    "convert .pkl.gz --no-verify",
    "convert .pkl.gz --verify",
    "convert .pkl --no-verify",
    "convert .pkl --verify",
    "one layer of every sample from the archive",
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    work = tmp_path_factory.mktemp("work") / "made where it is missing"
    command = [sys.executable, "benchmarks/run.py", "--scale", "tiny"]
    done = subprocess.run(
        [*command, "-o", str(folder), "--work", str(work)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(work.iterdir()) == []
    return folder


@pytest.fixture(scope="module")
def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def tables(output: Path) -> dict[str, list[list[str]]]:
    """All tables of the report, as lists of cells by heading."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in (output / "results.md").read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            found.setdefault(heading, []).append([cell.strip() for cell in line.split("|")[1:-1]])
    return found


def test_a_file_is_no_folder_to_work_in(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    command = [sys.executable, "benchmarks/run.py", "--work", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.endswith(f"--work: {path} is no folder and cannot become one: File exists")


def test_formats_table_has_every_row_and_column(results, tables):
    assert list(results["formats"]) == [*OURS, *RIVALS]
    for heading in ("Formats, synthetic samples", "Formats, shipped real activations"):
        header, _, *rows = tables[heading]
        rows = rows[: len(OURS) + len(RIVALS)]
        wanted = COLUMNS if "synthetic" in heading else COLUMNS[:8]
        assert set(wanted) <= set(header)
        assert [row[0] for row in rows] == [*OURS, *RIVALS]
        for row in rows:
            assert len(row) == len(header)
            if results["formats"][row[0]]:
                assert all(row[header.index(name)] for name in COLUMNS[5:8])


def test_other_tables_have_every_row(tables):
    assert {"copying memory, one core"} <= {row[0] for row in tables["Limits"]}
    assert set(CASES) <= {row[0] for row in tables["Convert, and read one layer"]}
    for heading in ("Ratios", "Growth", "Distance to the limits", "Predictions"):
        assert len(tables[heading]) > 4
    opened = {row[0] for row in tables["Open and count 4 samples"]}
    assert {"h5traces gzip, 1 thread", "stock h5py gzip 4 + shuffle", "pickle + gzip 6"} <= opened


def test_targets_are_all_judged(tables):
    verdicts = {row[0]: row[3] for row in tables["Targets"][2:]}
    assert len(tables["Targets"][2:]) == 16
    # Of arrays as tiny as these no plugin codec need be as small as the default.
    judged = {text: each for text, each in verdicts.items() if "plugin" not in text}
    judged.pop("the same with 1 thread")
    assert set(judged.values()) <= {"yes", "**no**"}


def test_match_of_synthetic_data_is_computed(results, tables):
    section = results["sections"]["match"]
    for data in ("as_benchmarked", "equal_lengths"):
        for kind in ("hidden_states", "attentions"):
            for ours, theirs in section[data][kind].values():
                assert 0 < ours <= 16
                assert 0 < theirs <= 16
    assert len(tables["How well the synthetic data match real ones"]) == 2 + 8


def test_report_says_that_data_are_synthetic(output):
    text = (output / "results.md").read_text()
    assert "not measurements of Llama-2" in text
    assert str(REAL_HOME) not in text


def test_plots_are_drawn_where_matplotlib_is_installed(output, results):
    drawn = {path.name for path in (output / "plots").glob("*.png")}
    wanted = {"throughput.png", "size.png", "conversion.png", "growth.png"}
    assert drawn == (wanted if results["plots"] else set())
