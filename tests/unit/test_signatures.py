"""Files are known by their content, whatever their names say."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import struct
import tarfile
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
import torch
import zstandard
from legacy_batches import make_archive, make_batch

import h5traces
from h5traces.errors import ConversionError
from h5traces.sources.mapped import MappedFile
from h5traces.sources.opening import open_source, recognise, source_stem
from h5traces.sources.signatures import KINDS, identify
from h5traces.sources.zip_entries import ZipDirectory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BATCH = [{"hidden_states": [np.zeros((3, 2), np.float16)], "question_id": "q0"}]


def saved(write: Callable[[Any], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def zipped(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("batch.pkl"))
    return buffer.getvalue()


def safetensors(header: bytes = b"{}") -> bytes:
    return struct.pack("<Q", len(header)) + header


FILES: dict[str, tuple[str, bytes]] = {
    **{f"pickle-{p}": ("pickle", pickle.dumps(BATCH, protocol=p)) for p in range(6)},
    "pickle-dict-0": ("pickle", pickle.dumps({"traces": []}, protocol=0)),
    "torch": ("torch", saved(lambda to: torch.save(BATCH, to))),
    "torch-tensor": ("torch", saved(lambda to: torch.save(torch.zeros(3), to))),
    "torch-old": (
        "torch-old",
        saved(lambda to: torch.save(BATCH, to, _use_new_zipfile_serialization=False)),
    ),
    "torch-old-4": (
        "torch-old",
        saved(
            lambda to: torch.save(
                BATCH, to, _use_new_zipfile_serialization=False, pickle_protocol=4
            )
        ),
    ),
    "torchscript": ("torchscript", zipped(["m/data.pkl", "m/code/a.py", "m/constants.pkl"])),
    "npz": ("npz", saved(lambda to: np.savez(to, a=np.zeros(2), b=np.zeros(3)))),
    "npz-deflated": ("npz", saved(lambda to: np.savez_compressed(to, a=np.zeros(2)))),
    "npy": ("npy", saved(lambda to: np.save(to, np.zeros(2)))),
    "zip": ("zip", zipped(["batch.pkl"])),
    "zip-empty": ("zip", zipped([])),
    "office": ("office", zipped(["[Content_Types].xml", "xl/workbook.xml"])),
    "safetensors": ("safetensors", safetensors()),
    "tar": ("tar", tar()),
    "7z": ("7z", b"7z\xbc\xaf\x27\x1c" + bytes(30)),
    "parquet": ("parquet", b"PAR1" + bytes(30) + b"PAR1"),
    "arrow": ("arrow", b"ARROW1\0\0" + bytes(30)),
    "json": ("json", json.dumps(BATCH, default=np.ndarray.tolist, indent=1).encode()),
    "json-list": ("json", b'[{"a": 1}, {"a": 2}]'),
    "jsonl": ("jsonl", b'{"a": 1}\n{"a": 2}\n'),
    "csv": ("csv", b"question_id,label\nq0,1\n"),
    "csv-marked": ("csv", "\ufeffid;Größe\n1;2\n".encode()),
    "csv-capital": ("csv", b"Name,Label\nq0,1\n"),
    "text": ("text", b"Iteration 3: loss 0.1\n"),
    "text-log": ("text", b"[INFO] starting\n"),
    "git-lfs": (
        "git-lfs",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n",
    ),
    "git-annex": ("git-annex", b"/annex/objects/SHA256E-s1--00.pkl\n"),
    "html": ("html", b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>"),
    "xml": ("xml", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    "empty": ("empty", b""),
    "zeros": ("unknown", bytes(5000)),
    "numbers": ("unknown", np.random.default_rng(0).normal(size=999).astype("<f2").tobytes()),
}


@pytest.mark.parametrize("name", FILES)
def test_content_says_what_a_file_is(tmp_path: Path, name: str) -> None:
    kind, data = FILES[name]
    for suffix in (".pkl", ".pt", ".h5"):
        path = tmp_path / f"file{suffix}"
        path.write_bytes(data)
        assert identify(path).id == kind


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "zstd": lambda data: zstandard.ZstdCompressor().compress(data),
    "zlib": zlib.compress,
}


@pytest.mark.parametrize("packer", PACKERS)
def test_a_look_into_compressed_files(tmp_path: Path, packer: str) -> None:
    path = tmp_path / "file"
    for kind in ("pickle-4", "torch-old", "csv", "npy"):
        path.write_bytes(PACKERS[packer](FILES[kind][1]))
        found = identify(path)
        assert (found.id, found.compression) == (FILES[kind][0], packer)
        assert str(found) == f"{KINDS[FILES[kind][0]].what}, compressed by {packer}"
    # Blocks of what hardly compresses are long.
    path.write_bytes(PACKERS[packer](FILES["npy"][1] + np.random.default_rng(0).bytes(2_000_000)))
    assert (identify(path).id, identify(path).compression) == ("npy", packer)
    path.write_bytes(PACKERS[packer](bytes(100)))
    assert (identify(path).id, identify(path).compression) == (packer, None)


def test_a_compressed_file_that_is_cut_off_is_known(tmp_path: Path) -> None:
    path = tmp_path / "batch.pkl.gz"
    noise = np.random.default_rng(0).bytes(200_000)
    path.write_bytes(gzip.compress(pickle.dumps([noise]))[:-50_000])
    assert (identify(path).id, identify(path).compression) == ("pickle", "gzip")


def test_hdf5_is_ours_or_of_others(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, make_batch("full_pkl"))
    found = recognise(archive)
    assert (found.kind.id, found.is_ours, found.is_readable) == ("archive", True, False)
    scales = tmp_path / "scales.h5"
    h5traces.calibrate(archive, scales)
    assert identify(scales).id == "scales"
    for number, block in enumerate((0, 512, 2048)):
        path = tmp_path / f"other{number}.h5"
        with h5py.File(path, "w", userblock_size=block) as file:
            file["a"] = [1]
        assert (identify(path).id, identify(path).is_ours) == ("hdf5", False)


def test_a_database_and_folders(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    with sqlite3.connect(path) as database:
        database.execute("create table a (b)")
    assert identify(path).id == "sqlite"
    assert identify(tmp_path).id == "folder"
    (tmp_path / "dataset_info.json").write_text("{}")
    assert identify(tmp_path).id == "datasets-folder"


def test_pipes_and_missing_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConversionError, match="is not a regular file"):
        identify(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        identify(tmp_path / "missing")


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name][0] != "pickle"])
def test_what_is_not_read_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    path = tmp_path / "batch.pkl"
    path.write_bytes(FILES[name][1])
    if recognise(path).is_readable:
        return
    with pytest.raises(ConversionError) as caught:
        open_source(path)
    kind = KINDS[FILES[name][0]]
    assert str(caught.value) == f"{path}: is {kind.what}; {kind.remedy}"
    assert not any(word in str(caught.value) for word in ("damage", "corrupt", "delete"))


def test_every_kind_has_a_remedy() -> None:
    assert all(each.what and each.remedy and KINDS[each.id] is each for each in KINDS.values())


def test_stems() -> None:
    names = ("a.b.pkl.gz", "a.b.pt", "cmpl-0.safetensors", "x.jsonl.zst", "a.b", "a.gz", ".pkl")
    stems = ["a.b", "a.b", "cmpl-0", "x", "a.b", "a.gz", ".pkl"]
    assert [source_stem(each) for each in names] == stems


# --- the directory of zip files -------------------------------------------------------------------


def directory(path: Path) -> ZipDirectory:
    file = MappedFile(path)
    return ZipDirectory(file.read_at, file.nbytes, str(path))


@pytest.mark.parametrize("name", ["torch", "npz", "npz-deflated", "zip", "zip-empty", "office"])
def test_entries_are_those_of_zipfile(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(FILES[name][1])
    found = directory(path)
    with zipfile.ZipFile(path) as expected:
        assert list(found) == expected.namelist()
        for info in expected.infolist():
            entry = found.entry(info.filename)
            sizes = (info.compress_type, info.file_size, info.compress_size, info.CRC)
            assert (entry.method, entry.nbytes, entry.stored_nbytes, entry.crc) == sizes
            stored = path.read_bytes()[entry.start : entry.start + entry.stored_nbytes]
            content = stored if entry.method == 0 else zlib.decompress(stored, -15)
            assert content == expected.read(info)


def test_a_zip_file_of_64_bits(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with zipfile.ZipFile(path, "w") as file, file.open("a", "w", force_zip64=True) as entry:
        entry.write(b"content")
    assert directory(path).entry("a").nbytes == 7


def test_zip_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = FILES["npz"][1]
    path.write_bytes(data[:-30])
    with pytest.raises(ConversionError, match="is not complete"):
        directory(path)
    assert identify(path).id == "npz"
    end = data.rindex(b"PK\x05\x06")
    huge = bytearray(data)
    huge[end + 12 : end + 16] = struct.pack("<I", 0x7FFFFFFF)
    path.write_bytes(huge)
    with pytest.raises(ConversionError, match="are read; save it in several files"):
        directory(path)
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as file:
        file.writestr("a", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("a", b"2")
    path.write_bytes(twice.getvalue())
    with pytest.raises(ConversionError, match="two entries 'a'"):
        directory(path)
