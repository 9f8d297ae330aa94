"""Forged footers: every checksum is right, and what they tell is not.

The HDF5 part is untouched, so a reader that refuses such a footer may go on through HDF5 and give
what is stored there. What it must not do is believe the footer.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from attack import Attack, register
from specimen import ROW, column, footer_of, seal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ATTACKS: list[Attack] = []
MiB = 1 << 20

# Reading either goes through HDF5 and is right, or ends in an error.
FALLS_BACK = None
LIES = "the index"


def forged(
    name: str,
    change: Any,
    *,
    error: str | None = None,
    problem: str | None = LIES,
    **options: Any,
) -> None:
    """An attack that changes directory, columns or first row of the footer, and seals it again."""

    def build(path: Path) -> None:
        document, columns = footer_of(path)
        changed = change(document, columns)
        seal(path, document, columns, **options, **(changed or {}))

    register(ATTACKS, error, problem=problem, name=f"footer-{name}", may_fall_back=True)(build)


def values(name: str, change: Any) -> Any:
    """A change of one column's array."""

    def apply(_document: Any, columns: dict[str, bytes]) -> None:
        found = column(columns, name)
        changed = change(found)
        columns[name] = (found if changed is None else changed).tobytes()

    return apply


def filled(name: str, value: int) -> Any:
    return values(name, lambda found: found.fill(value))


def key(name: str, value: Any) -> Any:
    def apply(document: dict[str, Any], _columns: Any) -> None:
        document[name] = value

    return apply


def raw_column(name: str, raw: bytes) -> Any:
    def apply(_document: Any, columns: dict[str, bytes]) -> None:
        columns[name] = raw

    return apply


def dropped(name: str) -> Any:
    def apply(_document: Any, columns: dict[str, bytes]) -> None:
        del columns[name]

    return apply


# --- sizes, offsets and shapes ---------------------------------------------------------------

IMPOSSIBLE = "impossible|takes .* bytes; the limit|the index"
forged("negative-dims", filled("object_dims", -5), error=IMPOSSIBLE)
forged("huge-dims", filled("object_dims", 1 << 40), error=IMPOSSIBLE)
forged("overflowing-dims", filled("object_dims", 1 << 62), error=IMPOSSIBLE)
forged("zero-chunk-dims", filled("object_chunk_dims", 0), error=IMPOSSIBLE)
forged("negative-chunk-dims", filled("object_chunk_dims", -1), error=IMPOSSIBLE)
forged("huge-chunk-dims", filled("object_chunk_dims", 1 << 40), error="limit is|impossible")
forged("too-many-dims", filled("object_ndim", 255), error="impossible|the index")
forged("no-dims", filled("object_ndim", 0), error="chunks|bytes|the index")
forged("chunk-outside-the-file", filled("chunk_gap", 1 << 40), error="outside the file|the index")
forged("chunk-before-the-file", filled("chunk_gap", -(1 << 40)), error="outside the|the index")
forged("overflowing-offsets", filled("chunk_gap", (1 << 63) - 1), error="outside the|damaged")
forged("negative-chunk-sizes", filled("chunk_nbytes", -8), error="outside the|the index")
forged("huge-chunk-sizes", filled("chunk_nbytes", 1 << 50), error="outside the file|the index")
forged("chunk-of-no-bytes", filled("chunk_nbytes", 0), error="outside|cannot hold|checksum")
forged("no-chunks", filled("object_num_chunks", 0), error="0 chunks are stored, expected|index")
forged("too-many-chunks", filled("object_num_chunks", 4_000_000_000), error="chunks|the index")
# A quick validate reads no arrays; verify does.
forged("wrong-checksums", filled("chunk_checksum", 0), error="checksum does not fit", problem=None)


def exchanged(found: np.ndarray) -> None:
    found[:2] = found[1::-1]


def same_chunk(document: dict[str, Any], columns: dict[str, bytes]) -> None:
    """All chunks are the first one."""
    del document
    sizes, sums = column(columns, "chunk_nbytes"), column(columns, "chunk_checksum")
    gaps = column(columns, "chunk_gap")
    gaps[1:] = -sizes[0]
    sizes[:], sums[:] = sizes[0], sums[0]
    for name, found in (("chunk_nbytes", sizes), ("chunk_checksum", sums), ("chunk_gap", gaps)):
        columns[name] = found.tobytes()


forged("one-chunk-for-all", same_chunk, error="damaged|holds|index|impossible|escape|UTF-8|hold")


def amplified(document: dict[str, Any], columns: dict[str, bytes]) -> None:
    """A million rows of one chunk: 1 kB that would be read as gigabytes."""
    count = 50_000
    sizes, sums = column(columns, "chunk_nbytes"), column(columns, "chunk_checksum")
    chunks, dims = column(columns, "object_num_chunks"), column(columns, "object_dims")
    gaps, ndim = column(columns, "chunk_gap"), column(columns, "object_ndim")
    row = int(np.flatnonzero(chunks)[0])
    chunks[row] = count
    dims[int(ndim[:row].sum())] *= count
    columns["object_num_chunks"], columns["object_dims"] = chunks.tobytes(), dims.tobytes()
    columns["chunk_nbytes"] = np.concatenate([np.full(count, sizes[0]), sizes[1:]]).tobytes()
    columns["chunk_checksum"] = np.concatenate([np.full(count, sums[0]), sums[1:]]).tobytes()
    again = np.full(count - 1, -sizes[0])
    columns["chunk_gap"] = np.concatenate([gaps[:1], again, gaps[1:]]).tobytes()
    del document


forged("one-chunk-50000-times", amplified, error="overlap in a file|the index")

# --- types, codecs and names -----------------------------------------------------------------

for name, types in {
    "objects": "object",
    "void": "V8",
    "unknown": "quaternion",
    "wide-text": "text:999999999",
    "wider-text": "text:9999999999",
    "date": "M8[s]",
    "longdouble": "longdouble",
}.items():

    def change(document: dict[str, Any], _columns: Any, types: str = types) -> None:
        document["types"] = [each and types for each in document["types"]]

    forged(f"type-{name}", change, error="type|larger than|the index|chunks")

forged("no-types", key("types", []), error=LIES)
forged("numbers-as-types", key("types", [1] * 50), error="type|index")
forged("types-out-of-range", filled("object_type", 65535), error=LIES)
forged("codecs-out-of-range", filled("object_codec", 255), error=LIES)
forged("names-out-of-range", filled("object_name", 4_000_000_000), error=LIES)
forged("attrs-out-of-range", filled("object_attrs", 4_000_000_000), error=LIES)
forged("unknown-codec", key("codecs", ["rot13"] * 20), error="codec 'rot13' is unknown|index")
for codec in ("lz4", "blosc2", "bitshuffle-lz4", "bitshuffle-zstd"):
    change = key("codecs", ["", *[codec] * 20])
    forged(f"codec-{codec}", change, error=f"codec '{codec}' is unknown|index")
# The chunks are zlib streams.
forged("codec-zstd", key("codecs", ["", *["zstd"] * 20]), error="damaged|cannot hold|index")
forged("all-names-alike", filled("object_name", 0), error="not stored|index|shape|field")
forged(
    "duplicate-names",
    raw_column("names", b'["a"' + b',"a"' * 99 + b"]"),
    error="index|stored",
)
forged("no-names", raw_column("names", b"[]"), error=LIES)


def one_sample_more(document: dict[str, Any], columns: dict[str, bytes]) -> None:
    """The group fits; only who asks for the last sample learns that there is none."""
    document["num_samples"] += 1
    columns["other_rows"] += (16).to_bytes(4, "little") + bytes(16)
    columns["ids"] = b'[["q0","q1",null],[0,0,null]]'


forged("one-sample-more", one_sample_more, error="sample 2 is missing, as there are 2")
forged("no-checksums", raw_column("chunk_checksum", b""), error="index|chunks are stored")
forged("names-are-numbers", raw_column("names", b"[1,2,3]"), error=LIES)
forged("names-are-an-object", raw_column("names", b'{"a":1}'), error="index|stored")
forged("names-are-a-number", raw_column("names", b"7"), error=LIES)
forged("attrs-are-numbers", raw_column("attrs", b"[1,2,3]"), error=LIES)
forged("attrs-are-null", raw_column("attrs", b"null"), error=LIES)
forged("attrs-nest", raw_column("attrs", b'[{"a":{"b":[]}}]'), error="index|encoding|sequence")
forged("sample-attrs-are-a-list", raw_column("sample_attrs", b"[" * 2000), error=LIES)
forged("sample-attrs-of-no-bytes", raw_column("sample_attrs", b""), error=LIES)
for number, what in enumerate(("objects", "axes", "chunks", "bytes")):
    for name, count in (("no", 0), ("one-more", None), ("too-many", 4_000_000_000)):

        def change(found: np.ndarray, number: int = number, count: int | None = count) -> None:
            found[number] = found[number] + 1 if count is None else count

        forged(f"{name}-{what}", values("counts", change), error=LIES)


def axes_for_chunks(document: dict[str, Any], columns: dict[str, bytes]) -> None:
    """The size of the row fits, its columns do not: 48 bytes are three axes and two chunks."""
    del document
    counts = column(columns, "counts")
    counts[1:3] += np.array([3, -2], np.int64).astype("u4")
    columns["counts"] = counts.tobytes()


forged("axes-for-chunks", axes_for_chunks, error=LIES)


def no_objects(document: dict[str, Any], columns: dict[str, bytes]) -> None:
    del document
    for name in ROW:
        columns[name] = b"" if name not in ("counts", "sample_attrs") else columns[name]
    columns["counts"] = bytes(12) + columns["counts"][12:]


forged("a-sample-without-objects", no_objects, error="not stored|index")

# --- counts and columns ----------------------------------------------------------------------

for name, count in {
    "huge": 10**18,
    "negative": -1,
    "float": 2.5,
    "text": "two",
    "of-300-digits": 10**300,
}.items():
    # A footer without a directory is not used: no problem, but a note.
    forged(f"{name}-num-samples", key("num_samples", count), error="the index", problem=None)
for name in ("names", "attrs", "ids", "chunk_nbytes"):
    forged(f"{name}-missing", dropped(name), error=LIES)
forged("columns-empty", filled("chunk_nbytes", 0), error="outside|hold|index|checksum")
for name in ("names", "attrs", "ids", "row"):
    forged(f"{name}-claims-1-gib", lambda *_: None, claims={name: 1 << 30}, error=LIES)
    forged(f"{name}-claims-nothing", lambda *_: None, claims={name: 0}, error=LIES)
    if name != "row":
        forged(f"{name}-claims-2-to-62", lambda *_: None, claims={name: 1 << 62}, error=LIES)
        forged(f"{name}-claims-less-than-nothing", lambda *_: None, claims={name: -8}, error=LIES)
        forged(f"{name}-is-a-bomb", raw_column(name, bytes(16 * MiB)), error=LIES)
for name in ("object_dims", "sample_attrs", "object_name"):
    forged(f"{name}-is-a-bomb", raw_column(name, bytes(16 * MiB)), error=LIES)
forged("bomb-of-128-mib", raw_column("object_dims", bytes(128 * MiB)), error=LIES)
forged("unknown-column", raw_column("x", b"abc"), problem=None)

# --- groups and ids --------------------------------------------------------------------------


def place(name: str, column: str, change: Callable[[np.ndarray], object], **options: Any) -> None:
    """The table of the group says otherwise where its rows lie."""

    def apply(table: np.ndarray) -> None:
        table[column] = change(table[column].astype(np.uint64))

    forged(f"rows-{name}", lambda *_: None, places=apply, error=LIES, **options)


place("of-no-bytes", "nbytes", lambda found: found * 0)
place("longer", "nbytes", lambda found: found + 1)
place("of-4-gb", "nbytes", lambda found: found * 0 + (1 << 32) - 1)
place("exchanged", "nbytes", lambda found: found[::-1])
place("one-for-both", "nbytes", lambda found: [found.sum(), *(found[1:] * 0)])
place("of-another-size", "raw_nbytes", lambda found: found + 1)
place("of-wrong-checksums", "checksum", lambda found: found ^ np.uint64(1))
forged("table-too-short", lambda *_: None, places=lambda table: table[:1], error=LIES)
forged("table-too-long", lambda *_: None, places=lambda table: table[[0, 1, 1]], error=LIES)

for name, groups in {
    "none": [],
    "numbers": [1, 2],
    "of-three": [[1, 2, 3]],
    "negative": [[-5, 0]],
    "huge": [[1 << 62, 0]],
    "two": [[100, 0], [100, 0]],
    "text": "groups",
}.items():
    forged(f"groups-{name}", key("groups", groups), problem=None)
forged(
    "group-shorter", lambda *_: None, groups=lambda found: found[0].__setitem__(0, 10), error=LIES
)
forged(
    "group-of-wrong-checksum",
    lambda *_: None,
    groups=lambda found: found[0].__setitem__(1, 0),
    error=LIES,
)
for name, ids in {
    "exchanged": b'[["q1","q0"],[0,0]]',
    "alike": b'[["q0","q0"],[0,0]]',
    "other": b'[["q7","q8"],[0,0]]',
    "too-few": b'[["q0"],[0]]',
    "too-many": b'[["q0","q1","q2"],[0,0,0]]',
    "of-two-lengths": b'[["q0","q1"],[0]]',
    "numbers": b"[[0,1],[0,0]]",
    "generations-are-text": b'[["q0","q1"],["0","0"]]',
    "a-number": b"3",
    "an-object": b"{}",
}.items():
    # Reading whole samples does not look at ids.
    forged(f"ids-{name}", raw_column("ids", ids))

# --- documents -------------------------------------------------------------------------------

DEEP_JSON = b"[" * 100_000
for name in ("names", "attrs", "ids"):
    forged(f"{name}-nests", raw_column(name, DEEP_JSON), error=LIES)
    forged(f"{name}-nests-whole", raw_column(name, DEEP_JSON + b"]" * 100_000), error=LIES)
    forged(f"{name}-huge-number", raw_column(name, b"[" + b"9" * 100_000 + b"]"), error=LIES)
    forged(f"{name}-not-utf-8", raw_column(name, b'["\xff\xfe"]'), error=LIES)


def directory(name: str, raw: bytes, **options: Any) -> None:
    forged(f"directory-{name}", lambda *_: None, directory=raw, problem=None, **options)


directory("nests", DEEP_JSON)
directory("nests-whole", b'{"archive":' + DEEP_JSON + b"]" * 100_000 + b"}")
directory("is-a-list", b"[]")
directory("is-no-json", b"{")
directory("of-a-huge-number", b'{"num_samples":' + b"9" * 100_000 + b"}")
directory("is-a-bomb", b"[" + b"0," * (8 * MiB) + b"0]")
directory("claims-256-mib", b"{}", directory_raw_nbytes=256 * MiB)
directory("claims-2-to-62", b"{}", directory_raw_nbytes=1 << 62)
directory("of-nan", json.dumps({"num_samples": float("nan")}).encode())


def root(name: str, error: str, **attrs: Any) -> None:
    def change(document: dict[str, Any], _columns: Any) -> None:
        document["archive"] = {**document["archive"], **attrs}

    forged(f"root-{name}", change, error=error, problem=None)


root("format", "not an h5traces archive|index", format=["h5traces"])
root("nested", "layers|index", layers={"a": 1})
root("complete", "not finished|complete|index", complete=None)
root("version", "format version|index", format_version={"1": 0})
forged("kinds-are-a-list", key("kinds", [1]), problem=None)
forged("kinds-are-numbers", key("kinds", {"hidden_states": 1}), problem=None)
forged("archive-is-a-list", key("archive", [1]), problem=None)
