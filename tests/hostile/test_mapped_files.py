"""Mappings, and files read by them, made to take memory or time, or to read other files."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
from legacy_batches import make_archive, make_batch

import h5traces
from h5traces.errors import ConversionError, H5TracesError
from h5traces.storage.trial import attempt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAX_SECONDS = 10  # of a processor; what takes longer hangs
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


def _with_texts(path: Path) -> int:
    """A file with texts; where the heap that holds them begins."""
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros((2, 3, 4), np.float32)
        file["texts"] = np.array(["abc", "defg"], dtype=h5py.string_dtype())
        file.attrs["note"] = "a note"
    return path.read_bytes().index(b"GCOL\1\0\0\0")


@pytest.mark.parametrize("nbytes", [0, 8, 1 << 40, (1 << 64) - 1])
@pytest.mark.timeout(30)
def test_damaged_heaps_of_texts(tmp_path: Path, nbytes: int) -> None:
    """HDF5 2.0 never ends where the free space of a heap has the size 0."""
    path = tmp_path / "a.h5"
    heap = _with_texts(path)
    (size,) = struct.unpack_from("<Q", path.read_bytes(), heap + 8)
    data = bytearray(path.read_bytes())
    at = heap + 16
    while struct.unpack_from("<H", data, at)[0]:
        at += 16 + -(-struct.unpack_from("<Q", data, at + 8)[0] // 8) * 8
    assert heap < at < heap + size
    struct.pack_into("<Q", data, at + 8, nbytes)
    path.write_bytes(data)
    for field in ("texts", "@note"):
        text = f'{ANY}[fields.question_id]\nname = "{field}"\n'
        assert f"heap of texts at byte {heap:,} is damaged" in rejected(path, text)


def test_sound_heaps_are_read(tmp_path: Path) -> None:
    _with_texts(tmp_path / "a.h5")
    mapping = tmp_path / "m.toml"
    mapping.write_text(f'{ANY}[fields.question_id]\nname = "@note"\n')
    (found,) = h5traces.load(tmp_path / "a.h5", reading=h5traces.ReadingOptions(mapping=mapping))
    assert found["question_id"] == "a note"
    assert list(found["texts"]) == ["abc", "defg"]


@pytest.mark.timeout(60)
def test_users_texts_in_a_damaged_heap_are_not_copied(tmp_path: Path) -> None:
    path = make_archive(tmp_path, make_batch("full_pkl"), name="a.pkl")
    with h5py.File(path, "r+") as file:
        file.attrs["x_note"] = "a note"
    h5traces.seal(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"GCOL\1\0\0\0") + 16
    struct.pack_into("<Q", data, at + 16 + 8 + 8, 0)
    path.write_bytes(data)
    report = h5traces.repack(path, tmp_path / "b.h5")
    assert "heap of texts" in " ".join(report.warnings)
    assert h5traces.verify(tmp_path / "b.h5").ok


def test_damaged_metadata_is_an_error_of_ours(tmp_path: Path) -> None:
    """Also where HDF5 meets it late, as it counts the chunks of a dataset."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file.create_dataset("x", data=np.zeros((20, 3, 4), "f4"), chunks=(1, 3, 4))
    data = bytearray(path.read_bytes())
    at = data.index(b"FAHD") + 8
    data[at] ^= 1
    path.write_bytes(data)
    assert "HDF5 cannot read it" in rejected(path, ANY)


@pytest.mark.parametrize("address", [None, 1 << 50])
def test_texts_of_gigabytes(tmp_path: Path, address: int | None) -> None:
    """HDF5 takes memory for as many bytes as a text is said to have, and looks for it then."""
    path = tmp_path / "a.h5"
    heap = _with_texts(path)
    data = path.read_bytes()
    for nbytes in (4, 6):
        place = struct.pack("<IQ", nbytes, heap)
        assert data.count(place) == 1
        data = data.replace(place, struct.pack("<IQ", 0xFFFFFF00, address or heap))
    path.write_bytes(data)
    for field in ("texts", "@note"):
        text = f'{ANY}[fields.question_id]\nname = "{field}"\n'
        assert "HDF5 cannot read it" in rejected(path, text)


def _segfault() -> dict[str, str]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def _endless() -> dict[str, str]:
    while True:
        pass


def _large() -> dict[str, str]:
    return {"x": str(len(bytearray(1 << 30)))}


def test_what_kills_the_library_kills_a_child(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    path.write_bytes(b"")
    with pytest.raises(ConversionError, match=r"a\.h5: .* does not survive .* \(SIGSEGV\)"):
        attempt(_segfault, path)
    with pytest.raises(ConversionError, match=r"\(SIGXCPU\)"):
        attempt(_endless, path)
    assert attempt(lambda: {"x": "y"}, path) == {"x": "y"}
    if sys.platform == "linux":
        assert attempt(_large, path) == {}
