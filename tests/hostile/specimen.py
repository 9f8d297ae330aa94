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
from h5traces.storage import footer, footer_rows
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


# Of the first row: its four counts, its columns and the attributes of the sample.
ROW = ("counts", *footer_rows.COLUMNS, "sample_attrs")
DTYPES = {"counts": "<u4"} | {name: dtype for name, (dtype, *_) in footer_rows.COLUMNS.items()}
# All parts of a footer but its directory.
PARTS = (*ROW, *footer.COLUMNS, "other_rows")


def footer_of(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The directory of an archive's footer as JSON, and the raw bytes of its `PARTS`."""
    file = LocalFile(path)
    directory = footer.read_directory(file)
    tables = footer.FooterTables(file, directory)
    row, *others = (each._raw for each in tables.rows())
    counts = footer_rows.COUNTS.unpack_from(row)
    parts, position = {"counts": row[:16]}, 16
    for name, (dtype, which, times) in footer_rows.COLUMNS.items():
        nbytes = counts[which] * times * np.dtype(dtype).itemsize
        parts[name] = row[position : position + nbytes]
        position += nbytes
    parts["sample_attrs"] = row[position:]
    parts |= {name: footer_rows.encoded_json(tables.column(name)) for name in footer.COLUMNS}
    parts["other_rows"] = b"".join(len(each).to_bytes(4, "little") + each for each in others)
    document = {
        "archive": directory.archive,
        "kinds": directory.kinds,
        "num_samples": directory.num_samples,
        **({"has_scales": 1} if directory.has_scales else {}),
        "types": directory.types,
        "codecs": directory.codecs,
        "metadata_checksum": directory.metadata_checksum,
    }
    return document, parts


def rows_of(parts: dict[str, bytes]) -> list[bytes]:
    """The raw bytes of all rows."""
    rows = [b"".join(parts.get(name, b"") for name in ROW)]
    others = parts.get("other_rows", b"")
    while others:
        length = int.from_bytes(others[:4], "little")
        rows.append(others[4 : 4 + length])
        others = others[4 + length :]
    return rows


def seal(
    path: Path,
    document: dict[str, Any],
    parts: dict[str, bytes],
    *,
    claims: dict[str, int] | None = None,
    places: Callable[[np.ndarray], np.ndarray | None] | None = None,
    groups: Callable[[list[list[int]]], object] | None = None,
    directory: bytes | None = None,
    directory_raw_nbytes: int | None = None,
) -> None:
    """Put a footer with right checksums after the HDF5 part, whatever it tells.

    Parameters
    ----------
    path
        The archive, with or without a footer.
    document, parts
        As `footer_of` gives them.
    claims
        Raw sizes to declare for columns, or with the name ``row`` for the first row.
    places, groups
        Change the table of the group, and the directory's list of groups.
    directory
        Raw bytes of the directory, instead of `document`.
    directory_raw_nbytes
        Size to declare for them.
    """
    end = footer.hdf5_end(LocalFile(path))
    claims = claims or {}
    raws = rows_of(parts)
    rows = [zlib.compress(raw, 9) for raw in raws]
    table = np.array(
        [
            (len(row), len(raw), xxhash.xxh3_64_intdigest(row))
            for row, raw in zip(rows, raws, strict=True)
        ],
        footer.ROW_PLACE,
    )
    table["raw_nbytes"][0] = claims.get("row", len(raws[0]))
    changed = places(table) if places is not None else None
    stored_table = (table if changed is None else changed).tobytes()
    blocks = [stored_table, *rows]
    listed = [[sum(map(len, blocks)), xxhash.xxh3_64_intdigest(stored_table)]]
    position, columns = listed[0][0], {}
    if groups is not None:
        groups(listed)
    for name in (*footer.COLUMNS, *(each for each in parts if each not in PARTS)):
        if name not in parts:
            continue
        stored = zlib.compress(parts[name], 9)
        claimed = claims.get(name, len(parts[name]))
        columns[name] = [position, len(stored), claimed, xxhash.xxh3_64_intdigest(stored)]
        blocks.append(stored)
        position += len(stored)
    raw = directory or json.dumps({"groups": listed, **document, "columns": columns}).encode()
    stored = zlib.compress(raw, 9)
    raw_nbytes = len(raw) if directory_raw_nbytes is None else directory_raw_nbytes
    checksum = xxhash.xxh3_64_intdigest(stored)
    head = footer.TRAILER.pack(position, len(stored), raw_nbytes, end, checksum, 1, 0)
    tail = footer.TRAILER_END.pack(xxhash.xxh3_64_intdigest(head), footer.MAGIC)
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(b"".join([*blocks, stored, head, tail]))


def column(parts: dict[str, bytes], name: str) -> np.ndarray:
    """A writable copy of a column of the first row, or of its counts."""
    return np.frombuffer(parts[name], dtype=DTYPES[name]).copy()
