"""Chunks and footer tell the same as the arrays and the HDF5 file they were made of."""

from __future__ import annotations

import math
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from legacy_batches import (
    LAYOUTS,
    as_dicts,
    assert_same,
    make_archive,
    make_batch,
    native,
    write_layout,
)
from strategies import extra_fields

import h5traces
from h5traces.archive.footer_store import FooterStore
from h5traces.archive.hdf5_store import Hdf5Store
from h5traces.archive.whole_file import stored_sizes
from h5traces.checking.seal import seal
from h5traces.checking.validate import validate
from h5traces.format.entries import ChunkTable, ObjectEntry, stored_type_of
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.storage import arrays as grid
from h5traces.storage.arrays import encode_array, read_array
from h5traces.storage.codecs import CODECS
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import hdf5_end
from h5traces.writing.options import PrecisionOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager

shapes = npst.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=9)


@given(shapes, st.sampled_from([1, 2, 4, 8]), st.integers(1, 400))
@settings(max_examples=400)
def test_grid_covers_every_element_once(
    shape: tuple[int, ...], itemsize: int, target_nbytes: int
) -> None:
    chunk = grid.chunk_shape(shape, itemsize, target_nbytes)
    assert all(1 <= size <= max(1, length) for size, length in zip(chunk, shape, strict=True))
    assert math.prod(chunk) * itemsize <= max(itemsize, target_nbytes)
    seen = np.zeros(shape, dtype=int)
    offsets = list(grid.chunk_offsets(shape, chunk))
    assert len(offsets) == grid.num_chunks(shape, chunk)
    for offset in offsets:
        seen[grid.chunk_slices(offset, shape, chunk)] += 1
    assert np.all(seen == 1)


@given(shapes, st.integers(1, 60))
@settings(max_examples=200)
def test_cut_pieces_make_the_array_again(shape: tuple[int, ...], target_nbytes: int) -> None:
    array = np.arange(1, math.prod(shape) + 1, dtype="<u4").reshape(shape)
    chunk = grid.chunk_shape(shape, array.itemsize, target_nbytes)
    assembled = np.zeros_like(array)
    for offset in grid.chunk_offsets(shape, chunk):
        piece = grid.cut(array, offset, chunk)
        where = grid.chunk_slices(offset, shape, chunk)
        inside = tuple(slice(0, length) for length in assembled[where].shape)
        assert piece.shape == chunk
        assert piece.flags.c_contiguous
        assembled[where] = piece[inside]
        piece = piece.copy()
        piece[inside] = 0
        assert not piece.any()
    assert_same(assembled, array)


def test_small_arrays_are_one_chunk_and_large_ones_nearly_equal_tiles() -> None:
    assert grid.chunk_shape((43, 4096), 2) == (43, 4096)
    assert grid.chunk_shape((1000, 4096), 2) == (500, 4096)
    assert grid.chunk_shape((32, 1000, 1000), 2) == (2, 1000, 1000)
    assert grid.chunk_shape((32, 4096, 4096), 2) == (1, 512, 4096)
    assert grid.chunk_shape((0, 5), 2) == (1, 5)


class Bytes:
    """A file in memory."""

    name = "memory"

    def __init__(self, data: bytes) -> None:
        self.data = data

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self.read_at(offset, len(out))

    def read_at(self, offset: int, nbytes: int) -> bytes:
        return self.data[offset : offset + nbytes]

    def prefetched(self, ranges: Iterable[tuple[int, int]]) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.parametrize("codec", sorted(CODECS))
@given(data=st.data(), target_nbytes=st.sampled_from([16, 100, 1 << 22]))
@settings(max_examples=40)
def test_encoded_arrays_read_back(codec: str, data: Any, target_nbytes: int) -> None:
    dtypes = ["<f2", "<u2", "<f4", "<f8"]
    if codec in ("gzip", "deflate"):
        # The others hold floating-point arrays only.
        dtypes += ["<i8", "u1", "S3"]
    dtype = data.draw(st.sampled_from(dtypes))
    array = data.draw(npst.arrays(dtype, shapes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid.chunk_shape, "__defaults__", (target_nbytes,))
        encoded = encode_array(array, codec)
    file, offsets = b"\0", []
    for chunk in encoded.chunks:
        offsets.append(len(file))
        file += chunk
    table = ChunkTable(
        tuple(offsets), tuple(len(chunk) for chunk in encoded.chunks), encoded.checksums
    )
    entry = ObjectEntry("x", {}, stored_type_of(array), encoded.shape, encoded.chunk, codec, table)
    found = read_array(Bytes(file), entry, DEFAULT_LIMITS)
    assert_same(found, array)
    assert found.flags.writeable
    assert found.flags.c_contiguous


def stores(path: Path) -> Iterator[tuple[Any, Any]]:
    """Pairs of what footer and HDF5 tell of the same file; fails where they cannot be paired."""
    footer = FooterStore(LocalFile(path), DEFAULT_LIMITS)
    hdf5 = Hdf5Store(path, DEFAULT_LIMITS)
    assert footer.root_attrs == hdf5.root_attrs
    assert footer.kinds == hdf5.kinds
    assert footer.num_samples == hdf5.num_samples
    assert stored_sizes(footer) == stored_sizes(hdf5)
    for index in range(footer.num_samples):
        left, right = footer.sample(index), hdf5.sample(index)
        assert left.ordinal == right.ordinal == index
        assert left.attrs == right.attrs == footer.sample_attrs(index) == hdf5.sample_attrs(index)
        assert list(left.objects) == list(right.objects)
        for path_ in left.objects:
            yield (footer, left, left.objects[path_]), (hdf5, right, right.objects[path_])


def assert_stores_agree(path: Path) -> int:
    """Compare every entry and value; the number of chunks seen."""
    num_chunks = 0
    for (footer, left, listed), (hdf5, right, stored) in stores(path):
        assert listed.path == stored.path
        assert listed.attrs == stored.attrs
        assert (listed.dtype, listed.shape, listed.chunk) == (
            stored.dtype,
            stored.shape,
            stored.chunk,
        )
        if listed.is_group:
            assert stored.is_group
            continue
        assert listed.codec == stored.codec
        assert listed.chunks.offsets == stored.chunks.offsets
        assert listed.chunks.sizes == stored.chunks.sizes
        assert stored.chunks.checksums is None
        assert listed.raw_nbytes == stored.raw_nbytes
        assert listed.stored_nbytes == stored.stored_nbytes
        num_chunks += len(listed.chunks.offsets)
        assert_same(footer.read(left, listed.path), hdf5.read(right, stored.path))
    return num_chunks


@pytest.mark.parametrize("policy", ["auto", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_footer_and_hdf5_tell_the_same(tmp_path: Path, layout: str, policy: Any) -> None:
    source = write_layout(tmp_path, layout, make_batch(layout, dtype="float32-from-bfloat16"))
    target = tmp_path / "archive.h5"
    assert h5traces.convert(source, target, precision=PrecisionOptions(dtype=policy)).ok
    assert assert_stores_agree(target) > 20


@given(extra_fields)
@settings(max_examples=12)
def test_footer_and_hdf5_tell_the_same_of_extra_fields(fields: dict[str, Any]) -> None:
    trace = {"hidden_states": [np.ones((2, 3), np.float16)], **fields}
    with tempfile.TemporaryDirectory() as folder:
        assert assert_stores_agree(make_archive(Path(folder), [trace, trace])) >= 2


@pytest.mark.parametrize("layout", ["full_pkl", "final_cut", "step_clean", "container_dict"])
def test_arrays_of_many_chunks(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(layout, dtype="float32-from-float16")
    source = write_layout(tmp_path, layout, batch)
    assert h5traces.convert(
        source, tmp_path / "one.h5", precision=PrecisionOptions(dtype="auto")
    ).ok
    monkeypatch.setattr(grid.chunk_shape, "__defaults__", (50,))
    assert h5traces.convert(
        source, tmp_path / "many.h5", precision=PrecisionOptions(dtype="auto")
    ).ok
    many, one = (assert_stores_agree(tmp_path / name) for name in ("many.h5", "one.h5"))
    assert many > one + 15
    expected = [native(trace) for trace in as_dicts(batch)]
    assert_same(h5traces.load(tmp_path / "many.h5"), expected)
    assert validate(tmp_path / "many.h5").ok
    # How an array is cut is not content.
    with (
        h5traces.open(tmp_path / "one.h5") as left,
        h5traces.open(tmp_path / "many.h5") as right,
    ):
        assert [each.metadata.digest for each in left] == [each.metadata.digest for each in right]


def test_arrays_larger_than_a_chunk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    batch = [
        {
            "hidden_states": [rng.standard_normal((1100, 2050)).astype(np.float16)],
            "attentions": [rng.random((3, 1100, 1100)).astype(np.float16)],
            "tokens": np.arange(1100),
            "bytes": rng.integers(0, 256, (3, 2_000_001), dtype=np.uint8),
            "text": "x\u00e9" * 3_000_000,
        }
    ]
    target = make_archive(tmp_path, batch)
    with h5traces.open(target) as archive:
        trace = archive[0]
        for path, num_chunks in (
            ("hidden_states/layer_000", 2),
            ("attentions/layer_000", 3),
            ("extra/bytes", 2),
        ):
            chunks = trace._stored.entry(path).chunks
            assert chunks is not None
            assert len(chunks.offsets) == num_chunks, path
        assert_same(trace.to_dict(), batch[0])
    assert_stores_agree(target)
    assert validate(target).ok


@pytest.mark.parametrize("layout", ["full_pkl", "step_min", "container_dict"])
def test_sealing_tells_what_the_writer_told(tmp_path: Path, layout: str) -> None:
    target = make_archive(tmp_path, make_batch(layout))
    written = FooterStore(LocalFile(target), DEFAULT_LIMITS)
    expected = [dict(written.sample(index).objects) for index in range(6)]
    end = hdf5_end(LocalFile(target))
    before = target.read_bytes()
    target.write_bytes(before[:end])
    assert seal(target, dry_run=True)[0].sealed is False
    assert target.stat().st_size == end
    (report,) = seal(target)
    assert (report.sealed, report.edited, report.num_samples) == (True, [], 6)
    assert target.read_bytes()[:end] == before[:end]
    assert_stores_agree(target)
    sealed = FooterStore(LocalFile(target), DEFAULT_LIMITS)
    # The checksums of the chunks, which HDF5 does not know, included.
    assert [dict(sealed.sample(index).objects) for index in range(6)] == expected
    once = target.read_bytes()
    assert seal(target)[0].sealed
    assert target.read_bytes() == once
