"""A small valid archive to attack, and the tools to take it apart and to forge its footer."""

from __future__ import annotations

import json
import pickle
import zlib
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import xxhash

import h5traces
from h5traces.storage import footer
from h5traces.storage.files import LocalFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKENS, HIDDEN, HEADS = 6, 8, 2
SAMPLE = "samples/00000000"


def batch() -> list[dict[str, Any]]:
    """Two traces with a field of every encoding."""
    random = np.random.default_rng(5)
    return [
        {
            "hidden_states": [random.normal(size=(TOKENS, HIDDEN)).astype("f2") for _ in range(2)],
            "attentions": [random.random((HEADS, TOKENS, TOKENS)).astype("f2") for _ in range(2)],
            "tokens": np.arange(TOKENS),
            "tokens_decoded": list("abcdef"),
            "question": "why?",
            "question_id": f"q{number}",
            "label": number,
            "config": {"nested": [1, "two", (3,)], "big": 2**70},
            "mixed": [np.arange(3), {"inner": np.float32(1.5)}],
            "names": np.array(["x", "yy"]),
            "flags": np.array([True, False]),
            "raw": b"\x00\x01",
        }
        for number in range(2)
    ]


def write(path: Path) -> None:
    """The archive at `path`."""
    source = path.with_suffix(".pkl")
    with source.open("wb") as file:
        pickle.dump(batch(), file)
    report = h5traces.convert(source, path)
    assert report.ok
    source.unlink()


def edit(path: Path, change: Callable[[h5py.File], None]) -> None:
    """Let `change` alter the HDF5 part; HDF5 cuts the footer off."""
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        change(file)


def footer_of(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The directory of an archive's footer as JSON, and the raw bytes of its columns."""
    file = LocalFile(path)
    directory = footer.read_directory(file)
    tables = footer.FooterTables(file, directory)
    columns = {name: tables.column(name).tobytes() for name in footer.COLUMNS}
    document = {
        "archive": directory.archive,
        "kinds": directory.kinds,
        "num_samples": directory.num_samples,
        "num_objects": directory.num_objects,
        "types": directory.types,
        "codecs": directory.codecs,
        "metadata_checksum": directory.metadata_checksum,
    }
    return document, columns


def seal(
    path: Path,
    document: dict[str, Any],
    columns: dict[str, bytes],
    *,
    claims: dict[str, int] | None = None,
    directory: bytes | None = None,
    directory_raw_nbytes: int | None = None,
) -> None:
    """Put a footer with right checksums behind the HDF5 part, whatever it tells.

    Parameters
    ----------
    path
        The archive, with or without a footer.
    document, columns
        As `footer_of` gives them.
    claims
        Raw sizes to declare for columns instead of their own.
    directory
        Raw bytes of the directory, instead of `document`.
    directory_raw_nbytes
        Size to declare for them.
    """
    end = footer.hdf5_end(LocalFile(path))
    blocks, table, position = [], {}, 0
    for name, raw in columns.items():
        itemsize = np.dtype(footer.COLUMNS.get(name, "u1")).itemsize
        planes = np.frombuffer(raw, np.uint8)
        if len(raw) % itemsize == 0:
            planes = planes.reshape(-1, itemsize).T.reshape(-1)
        stored = zlib.compress(planes.tobytes(), 9)
        claimed = (claims or {}).get(name, len(raw))
        table[name] = [position, len(stored), claimed, xxhash.xxh3_64_intdigest(stored)]
        blocks.append(stored)
        position += len(stored)
    raw = directory or json.dumps({**document, "columns": table}).encode()
    stored = zlib.compress(raw, 9)
    raw_nbytes = len(raw) if directory_raw_nbytes is None else directory_raw_nbytes
    checksum = xxhash.xxh3_64_intdigest(stored)
    head = footer.TRAILER.pack(position, len(stored), raw_nbytes, end, checksum, 1, 0)
    tail = footer.TRAILER_END.pack(xxhash.xxh3_64_intdigest(head), footer.MAGIC)
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(b"".join([*blocks, stored, head, tail]))


def column(columns: dict[str, bytes], name: str) -> np.ndarray:
    """A writable copy of a column."""
    return np.frombuffer(columns[name], dtype=footer.COLUMNS[name]).copy()
