"""Every chunk comes back through our decoder, zlib and its rivals, and stock HDF5."""

from __future__ import annotations

import dataclasses
import zlib
from unittest import mock

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h5traces.storage import deflate
from h5traces.storage import deflate as planes
from h5traces.storage.deflate import Engines

INSTALLED = Engines.installed()
ENGINES = {
    "installed": INSTALLED,
    "without kernels": dataclasses.replace(INSTALLED, native=None),
    "without isal": dataclasses.replace(INSTALLED, isal_zlib=None, igzip_lib=None, native=None),
    "without zlib-ng": dataclasses.replace(INSTALLED, zlib_ng=None, native=None),
    "zlib only": Engines(None, None, None),
}
ITEMSIZES = (1, 2, 3, 4, 8)


def plain_shuffle(raw: bytes, itemsize: int) -> bytes:
    """The shuffle filter in one line of numpy, sharing nothing with the package."""
    count = len(raw) // itemsize
    elements = np.frombuffer(raw, np.uint8)[: count * itemsize].reshape(count, itemsize)
    return elements.T.tobytes() + raw[count * itemsize :]


def assert_comes_back(raw: bytes, itemsize: int, engines: Engines) -> bytes:
    with mock.patch.object(deflate, "ENGINES", engines):
        stored = deflate.encode(raw, itemsize=itemsize)
        out = bytearray(len(raw))
        deflate.decode(stored, out, itemsize=itemsize)
    assert out == raw
    assert zlib.decompress(stored) == plain_shuffle(raw, itemsize)
    return stored


@st.composite
def chunks(draw: st.DrawFn) -> tuple[bytes, int]:
    """Bytes with noise, runs and repeats in any mixture, and an itemsize."""
    pieces = st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda value, count: bytes([value]) * count, st.integers(0, 255), st.integers(0, 3000)
        ),
        st.builds(lambda text, count: text * count, st.binary(max_size=40), st.integers(0, 300)),
        st.builds(
            lambda seed, count, spread: (
                np.random.default_rng(seed).normal(0, spread, count).astype(np.float16).tobytes()
            ),
            st.integers(0, 2**32),
            st.integers(0, 6000),
            st.floats(1e-6, 1e3),
        ),
    )
    return b"".join(draw(st.lists(pieces, max_size=5))), draw(st.sampled_from(ITEMSIZES))


@pytest.mark.parametrize("engines", ENGINES.values(), ids=ENGINES)
@given(chunk=chunks())
@settings(max_examples=60, deadline=None)
def test_any_bytes_come_back(engines: Engines, chunk: tuple[bytes, int]) -> None:
    assert_comes_back(*chunk, engines)


@given(raw=st.binary(max_size=100), itemsize=st.integers(1, 20))
def test_any_itemsize_comes_back_even_where_no_element_fits(raw: bytes, itemsize: int) -> None:
    assert_comes_back(raw, itemsize, INSTALLED)


@given(chunk=chunks())
@settings(max_examples=60, deadline=None)
def test_shuffle_is_that_of_plain_numpy(chunk: tuple[bytes, int]) -> None:
    raw, itemsize = chunk
    shuffled = planes.shuffle(np.frombuffer(raw, np.uint8), itemsize)
    assert shuffled.tobytes() == plain_shuffle(raw, itemsize)


def large_chunks() -> dict[str, tuple[bytes, int]]:
    rng = np.random.default_rng(20)
    heads = rng.dirichlet(np.full(150, 0.2), (8, 150))
    rows = rng.standard_normal((9, 4096)).astype(np.float16)
    return {
        "hidden states, float16": (
            rng.standard_normal((300, 4096)).astype(np.float16).tobytes(),
            2,
        ),
        "hidden states, float32": (
            rng.standard_normal((200, 4096)).astype(np.float32).tobytes(),
            4,
        ),
        "causal attentions": (np.tril(heads).astype(np.float16).tobytes(), 2),
        "repeated rows": (rows[rng.integers(0, 9, 100)].tobytes(), 2),
        "int64 tokens": (rng.integers(0, 32000, 300_000).tobytes(), 8),
        "zeros": (bytes(5_000_001), 2),
        "noise, odd length": (rng.bytes(3_000_003), 2),
        "noise, three bytes": (rng.bytes(2_000_000), 3),
        "one byte per element": (rng.bytes(2_000_000), 1),
    }


@pytest.mark.parametrize("engines", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("name", large_chunks())
def test_megabytes_come_back(name: str, engines: Engines) -> None:
    assert_comes_back(*large_chunks()[name], engines)


@given(chunk=chunks())
@settings(max_examples=60, deadline=None)
def test_other_libraries_inflate_it(chunk: tuple[bytes, int]) -> None:
    raw, itemsize = chunk
    stored = deflate.encode(raw, itemsize=itemsize)
    expected = plain_shuffle(raw, itemsize)
    if INSTALLED.isal_zlib:
        assert INSTALLED.isal_zlib.decompress(stored) == expected
    if INSTALLED.zlib_ng:
        assert INSTALLED.zlib_ng.decompress(stored) == expected


@pytest.mark.parametrize("name", large_chunks())
def test_libdeflate_inflates_it(name: str) -> None:
    libdeflate = pytest.importorskip("deflate")
    raw, itemsize = large_chunks()[name]
    stored = deflate.encode(raw, itemsize=itemsize)
    assert bytes(libdeflate.zlib_decompress(stored, len(raw))) == plain_shuffle(raw, itemsize)


@pytest.mark.parametrize("dtype", ["u1", "<f2", "<f4", "<f8", "<i8"])
@pytest.mark.parametrize("engines", ENGINES.values(), ids=ENGINES)
def test_stock_hdf5_reads_it(tmp_path, dtype: str, engines: Engines) -> None:
    rng = np.random.default_rng(21)
    values = (rng.standard_normal((70, 333)) * 50).astype(dtype)
    values[30:60] = np.tril(values[30:60])
    with mock.patch.object(deflate, "ENGINES", engines):
        stored = deflate.encode(values, itemsize=values.itemsize)
    path = tmp_path / "chunk.h5"
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        filters = {"shuffle": True, "compression": "gzip", "compression_opts": 6}
        dataset = file.create_dataset("x", values.shape, dtype, chunks=values.shape, **filters)
        dataset.id.write_direct_chunk((0, 0), stored)
    with h5py.File(path, "r") as file:
        assert file["x"].id.read_direct_chunk((0, 0)) == (0, stored)
        assert file["x"][...].tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", ["u1", "<f2", "<f4", "<f8"])
@pytest.mark.parametrize("engines", ENGINES.values(), ids=ENGINES)
def test_chunks_of_stock_hdf5_are_decoded(tmp_path, dtype: str, engines: Engines) -> None:
    values = (np.random.default_rng(22).standard_normal((70, 333)) * 50).astype(dtype)
    path = tmp_path / "chunk.h5"
    with h5py.File(path, "w") as file:
        filters = {"shuffle": True, "compression": "gzip"}
        file.create_dataset("x", data=values, chunks=values.shape, **filters)
    with h5py.File(path, "r") as file:
        _, stored = file["x"].id.read_direct_chunk((0, 0))
    out = np.zeros_like(values)
    with mock.patch.object(deflate, "ENGINES", engines):
        deflate.decode(stored, out, itemsize=out.itemsize)
    assert out.tobytes() == values.tobytes()
