"""Every verb takes every kind of source, whatever its file is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from legacy_batches import make_batch
from safetensors.numpy import save_file

import h5traces
from h5traces.extract import estimate_from_files
from h5traces.graph import TraceGraphDataset

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::h5traces.errors.StoredStateWarning")


def in_torch(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: in_torch(each) for key, each in value.items()}
    return [in_torch(each) for each in value] if isinstance(value, list) else value


def stacked(sample: dict[str, Any]) -> dict[str, Any]:
    """Named arrays of a sample."""
    kinds = {key: np.stack(sample[key]) for key in ("hidden_states", "attentions")}
    return {**kinds, "tokens": np.asarray(sample["tokens"])}


WRITERS: dict[str, Callable[[Path], object]] = {
    "torch": lambda path: torch.save(in_torch(make_batch("full_pkl")), path),
    "torch-old": lambda path: torch.save(
        in_torch(make_batch("full_pkl")), path, _use_new_zipfile_serialization=False
    ),
    "safetensors": lambda path: save_file(stacked(make_batch("full_pkl")[0]), path),
    "npz": lambda path: path.write_bytes(npz(stacked(make_batch("full_pkl")[0]))),
    "npz-mapping": lambda path: path.write_bytes(npz(by_id(make_batch("full_pkl")))),
    "hdf5-mapping": lambda path: write_hdf5(path, by_id(make_batch("full_pkl"))),
    "parquet": lambda path: pd.DataFrame(
        [
            {key: value.tolist() for key, value in stacked(each).items()}
            for each in make_batch("full_pkl")
        ]
    ).to_parquet(path),
}
MAPPING = """
[fields.hidden_states]
name = "{id}/hidden_states"
axes = "layer token hidden"
[fields.attentions]
name = "{id}/attentions"
axes = "layer head query key"
[fields.tokens]
name = "{id}/tokens"
"""


def by_id(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Named arrays of several samples."""
    return {
        f"q{index}/{name}": value
        for index, sample in enumerate(samples)
        for name, value in stacked(sample).items()
    }


def write_hdf5(path: Path, arrays: dict[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file[name] = value


def npz(arrays: dict[str, Any]) -> bytes:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", ["run.data", "run.pkl"])
def test_every_verb_takes_it(tmp_path: Path, kind: str, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / name
    WRITERS[kind](path)
    reading = h5traces.ReadingOptions()
    if kind.endswith("-mapping"):
        (tmp_path / "mapping.toml").write_text(MAPPING)
        reading = h5traces.ReadingOptions(mapping=tmp_path / "mapping.toml")
    count = len(h5traces.load(path, reading=reading))
    (inspection,) = h5traces.inspect(path, reading=reading)
    assert inspection.num_samples == count
    assert inspection.container == kind.partition("-")[0]
    archive = tmp_path / "run.h5"
    assert h5traces.convert(path, archive, reading=reading).ok
    assert all(each.ok for each in h5traces.verify(archive, against=path, reading=reading))
    assert len(h5traces.open(archive)) == count
    scales = h5traces.calibrate(path, tmp_path / "scales.h5", reading=reading)
    assert scales.num_samples == count
    estimated = estimate_from_files(path, count, reading=reading)
    assert "measured" in {row.basis for row in estimated.rows}
    graphs, expected = TraceGraphDataset(path, reading=reading), TraceGraphDataset(archive)
    assert len(graphs) == len(expected) > 0
    assert torch.equal(graphs[0].x.float(), expected[0].x.float())


def test_folders_hold_archives_and_sources(tmp_path: Path) -> None:
    WRITERS["torch"](tmp_path / "batch_0.pt")
    h5traces.convert(tmp_path / "batch_0.pt", tmp_path / "batch_0.h5")
    WRITERS["npz"](tmp_path / "batch_1.npz")
    (tmp_path / "README.md").write_text("# Traces\n")
    found = h5traces.inspect(tmp_path)
    assert [each.container for each in found] == ["archive", "torch", "npz"]
    (tmp_path / "batch_2.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"not read: .*batch_2.pt: is empty \(0 bytes\)"):
        assert len(h5traces.inspect(tmp_path)) == 3


def test_a_folder_without_traces_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Traces\n")
    with pytest.raises(FileNotFoundError, match="holds no batch"):
        h5traces.inspect(tmp_path)


def test_load_of_a_folder_gives_all_samples_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for index in range(3):
        sample = {**stacked(make_batch("full_pkl")[0]), "index": np.array([index])}
        save_file(sample, folder / f"cmpl-{index}.safetensors")
        (folder / f"cmpl-{index}.safetensors.lock").touch()
    found = h5traces.load(folder, container="numpy")
    assert [each["question_id"] for each in found] == ["cmpl-0", "cmpl-1", "cmpl-2"]
    assert [int(each["index"][0]) for each in found] == [0, 1, 2]
    torch_folder = tmp_path / "torch"
    torch_folder.mkdir()
    for index, sample in enumerate(make_batch("full_pkl")):
        torch.save(in_torch(sample), torch_folder / f"{index}.pt")
    found = h5traces.load(torch_folder)
    assert [each["question_id"] for each in found] == [
        each["question_id"] for each in make_batch("full_pkl")
    ]
    archives = tmp_path / "archives"
    archives.mkdir()
    h5traces.convert(torch_folder, archives)
    assert len(h5traces.load(archives)) == len(found)
    (archives / "9.npz").write_bytes(npz(stacked(make_batch("full_pkl")[0])))
    with pytest.raises(h5traces.errors.ConversionError, match=r"archives \(0\.h5\) and .*9\.npz"):
        h5traces.load(archives)


def test_load_names_what_it_does_not_read(tmp_path: Path) -> None:
    WRITERS["torch"](tmp_path / "batch_0.pt")
    (tmp_path / "batch_1.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"not read: .*batch_1\.pt: is empty"):
        h5traces.load(tmp_path)
    (tmp_path / "batch_0.pt").unlink()
    (tmp_path / "batch_1.pt").rename(tmp_path / "README.md")
    with pytest.raises(FileNotFoundError, match="holds no batch"):
        h5traces.load(tmp_path)
