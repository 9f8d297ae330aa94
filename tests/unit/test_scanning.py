"""One pass over a file finds what looking at every chunk by itself finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from h5traces.errors import CorruptArchiveError
from h5traces.format.digests import chunk_checksum
from h5traces.storage import scanning
from h5traces.storage.files import LocalFile
from h5traces.storage.scanning import metadata_checksum, scan

if TYPE_CHECKING:
    from pathlib import Path

SPAN = 64


@pytest.fixture(autouse=True)
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of bytes, so that small files have many."""
    monkeypatch.setattr(scanning, "SPAN_NBYTES", SPAN)


def table(spans: list[tuple[int, int]], data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The chunk table of parts of a file."""
    return (
        np.array([start for start, _ in spans], dtype=np.int64),
        np.array([size for _, size in spans], dtype=np.int64),
        np.array(
            [chunk_checksum(data[max(0, start) :][: max(0, size)]) for start, size in spans],
            dtype=np.uint64,
        ),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scanned")


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 150), st.integers(0, 300)), max_size=12),
    st.integers(0, 400),
    st.data(),
)
def test_chunks_and_gaps_are_found_as_one_by_one(
    folder: Path, runs: list[tuple[int, int]], behind: int, data: st.DataObject
) -> None:
    spans, position = [], 0
    for gap, size in runs:
        spans.append((position + gap, size))
        position += gap + size
    stored = np.random.default_rng(len(runs)).bytes(position + behind)
    path = folder / "file"
    path.write_bytes(stored)
    # In any order, as a file lists them.
    spans = data.draw(st.permutations(spans))
    offsets, sizes, checksums = table(spans, stored)
    wrong = sorted(data.draw(st.sets(st.sampled_from(range(len(spans))))) if spans else [])
    for row in wrong:
        checksums[row] ^= np.uint64(1)
    file = LocalFile(path)
    seen: list[tuple[int, int]] = []
    found = scan(
        file,
        (offsets, sizes, checksums),
        len(stored),
        workers=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert found.damaged == wrong
    assert found.metadata_checksum == metadata_checksum(file, offsets, sizes, len(stored))
    if stored:
        assert seen[-1] == (len(stored), len(stored))


@pytest.mark.parametrize(
    "spans",
    [
        [(-1, 4), (10, 5)],
        [(10, 5), (1000, 1)],
        [(10, 5), (990, 11)],
        [(10, 5), (0, 1 << 62)],
        [(10, 5), ((1 << 63) - 1, 1)],
        [(10, 5), (20, -3)],
    ],
)
def test_what_lies_outside_is_damaged(tmp_path: Path, spans: list[tuple[int, int]]) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(250)) * 4)
    found = scan(LocalFile(path), table(spans, path.read_bytes()), 1000)
    assert found.damaged == [spans.index(each) for each in spans if each != (10, 5)]


def test_overlapping_chunks_are_compared_all_the_same(tmp_path: Path) -> None:
    path, data = tmp_path / "file", np.random.default_rng(0).bytes(1000)
    path.write_bytes(data)
    spans = [(10, 500), (20, 30), (400, 200), (10, 500), (5, 1)]
    assert scan(LocalFile(path), table(spans, data), 1000).damaged == []


def test_an_empty_table_leaves_metadata_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    found = scan(LocalFile(path), table([], b""), 1000)
    assert found.metadata_checksum == xxhash.xxh3_64_intdigest(b"x" * 1000)


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    with pytest.raises(CorruptArchiveError, match="the file ends at 100"):
        scan(LocalFile(path), table([], b""), 1000)
