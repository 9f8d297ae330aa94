"""Mappings, and files read by them, made to take memory or time, or to read other files."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest

import h5traces
from h5traces.errors import H5TracesError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAX_SECONDS = 1.0  # of a processor, with making the file
MAX_EXTRA_NBYTES = 300 << 20
ANY = '[fields.hidden_states]\nname = "x"\naxes = "layer token hidden"\n'


def _external_link(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = h5py.ExternalLink("/etc/hostname", "/")


def _external_storage(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (2, 3, 4), "u1", external=[("/etc/passwd", 0, 24)])


def _virtual(path: Path) -> None:
    layout = h5py.VirtualLayout((2, 3, 4), "f4")
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "x", (2, 3, 4))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("x", layout)


def _never_written(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (1 << 20, 1 << 20, 64), "f4", chunks=(1, 1024, 64))


def _huge_chunks(path: Path) -> None:
    with h5py.File(path, "w") as file:
        made = file.create_dataset(
            "x", (2, 3, 4), "f4", chunks=(64, 2048, 1024), maxshape=(None,) * 3, compression="gzip"
        )
        made.id.write_direct_chunk((0, 0, 0), b"x\x9c\x03\x00\x00\x00\x00\x01")


def _plugin_filter(path: Path) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((2, 3, 4))
    plist.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, ())
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple((2, 3, 4))
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_FLOAT, space, plist)


def _circle(path: Path) -> None:
    with h5py.File(path, "w") as file:
        inner = file.create_group("a/b")
        inner["back"] = file["a"]
        file["soft"] = h5py.SoftLink("/soft")


def _deep(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("/".join("a" * 500))


HDF5: dict[str, Callable[[Path], object]] = {
    "external link": _external_link,
    "external storage": _external_storage,
    "virtual": _virtual,
    "never written": _never_written,
    "huge chunks": _huge_chunks,
    "plugin": _plugin_filter,
    "circle": _circle,
    "deep": _deep,
}


@pytest.fixture(autouse=True)
def limits() -> Any:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert used < MAX_EXTRA_NBYTES
    assert time.process_time() - start < MAX_SECONDS


def rejected(path: Path, text: str) -> str:
    mapping = path.with_name("m.toml")
    mapping.write_text(text)
    with pytest.raises(H5TracesError) as caught:
        h5traces.load(path, reading=h5traces.ReadingOptions(mapping=mapping))
    return str(caught.value)


@pytest.mark.parametrize("name", HDF5)
def test_hdf5(tmp_path: Path, name: str) -> None:
    HDF5[name](tmp_path / "a.h5")
    assert "a.h5" in rejected(tmp_path / "a.h5", ANY)


def test_patterns_do_not_explode(tmp_path: Path) -> None:
    arrays = {("a" * 900) + str(n): np.zeros(1) for n in range(300)}
    np.savez(tmp_path / "a.npz", **arrays)
    text = '[fields.hidden_states]\nname = "{id}aaaa{layer}b"\noptional = true\n'
    stars = f'ignore = ["{"*a" * 8}c"]\n'
    assert "neither hidden states" in rejected(tmp_path / "a.npz", stars + text)
    assert "more than 8 stars" in rejected(tmp_path / "a.npz", f'ignore = ["{"*a" * 50}"]\n{ANY}')
    assert "at most 300" in rejected(tmp_path / "a.npz", ANY.replace('"x"', f'"{"x" * 9999}"'))
    deep = "fields = " + "[" * 100_000
    assert "m.toml" in rejected(tmp_path / "a.npz", deep)
    assert "no mapping needs" in rejected(tmp_path / "a.npz", "#" * 300_000)


@pytest.mark.parametrize(
    "shape", ["[281474976710655, 281474976710655, 4]", "[0, 281474976710655, 9]", "[-1, 0]"]
)
def test_huge_shapes_of_raw_numbers(tmp_path: Path, shape: str) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(64))
    text = f'[array]\ndtype = "float32"\nshape = {shape}\n' + ANY.replace('"x"', '"array"')
    assert "bytes after an offset" in rejected(tmp_path / "a.bin", text)


def test_absurd_row_groups_of_parquet(tmp_path: Path) -> None:
    # A run of one value: 30 million numbers in a few bytes, in one row.
    code = f"""
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
values = pa.array(np.zeros(30_000_000))
column = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
pq.write_table(pa.table({{"x": column}}), {str(tmp_path / "a.parquet")!r}, compression="zstd")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "smaller row groups" in rejected(tmp_path / "a.parquet", ANY)


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/hostname", "", ".."])
def test_data_sets_name_files_in_their_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "ds"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    assert "expected files in its folder" in rejected(folder, ANY)


def test_data_sets_follow_no_links(tmp_path: Path) -> None:
    folder = tmp_path / "ds"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    (folder / "a.arrow").symlink_to("/etc/hostname")
    assert "symbolic link" in rejected(folder, ANY)
