"""Plain and gzip files as byte streams, whole and damaged."""

from __future__ import annotations

import bz2
import gzip
import lzma
import threading
import zlib
from typing import TYPE_CHECKING

import pytest
import zstandard

from h5traces.errors import ConversionError, UnsafePickleError
from h5traces.sources import compressed as compressed_module
from h5traces.sources.pickle import source as source_module
from h5traces.sources.pickle.source import FileSource, MemorySource, PickleLimits, TruncatedError

if TYPE_CHECKING:
    from pathlib import Path

LIMITS = PickleLimits()
DATA = bytes(range(256)) * 20_000 + b"a line\nanother\n"


@pytest.fixture(params=["isal", "zlib"])
def inflater(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "zlib":
        monkeypatch.setattr(compressed_module, "_open_gzip", gzip.GzipFile)
    return request.param


def write(tmp_path: Path, data: bytes, *, name: str = "batch.pkl") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.usefixtures("inflater")
@pytest.mark.parametrize("compressed", [False, True])
def test_reads_exactly_what_is_asked_for(tmp_path: Path, compressed: bool) -> None:
    # The names say the opposite of what the files are: only the magic bytes count.
    name = "batch.pkl" if compressed else "batch.pkl.gz"
    data = gzip.compress(DATA, 1) if compressed else DATA
    path = write(tmp_path, data, name=name)
    with FileSource(path, LIMITS) as source:
        assert source.compression == ("gzip" if compressed else None)
        assert source.compressed_size == len(data)
        assert source.read(10) == DATA[:10]
        assert source.read_buffer(10) == bytearray(DATA[10:20])
        source.skip(3_000_000)
        assert source.inflated_bytes == 3_000_020
        assert source.read(2_000_000) == DATA[3_000_020:5_000_020]
        source.skip(len(DATA) - 5_000_020 - 15)
        assert source.readline(100) == b"a line"
        assert source.readline(100) == b"another"
        assert source.at_end()
        assert source.compressed_position == len(data)
        with pytest.raises(TruncatedError, match="5 bytes are declared and only 0 follow"):
            source.read(5)
        with pytest.raises(TruncatedError):
            source.read_buffer(5)
        with pytest.raises(TruncatedError):
            source.readline(5)
        with pytest.raises(TruncatedError):
            source.skip(5)


@pytest.mark.usefixtures("inflater")
def test_reads_several_gzip_members_and_padding(tmp_path: Path) -> None:
    path = write(tmp_path, gzip.compress(b"one") + gzip.compress(b"two") + bytes(10))
    with FileSource(path, LIMITS) as source:
        assert source.read(6) == b"onetwo"
        assert source.at_end()


def test_reads_blocks_larger_than_one_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "_BLOCK_NBYTES", 1 << 20)
    path = write(tmp_path, gzip.compress(DATA, 1))
    for method in ("read", "read_buffer"):
        with FileSource(path, LIMITS) as source:
            assert getattr(source, method)(len(DATA)) == DATA
        with (
            FileSource(path, LIMITS) as source,
            pytest.raises(TruncatedError, match="only"),
        ):
            getattr(source, method)(len(DATA) + 1)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("method", ["read", "read_buffer"])
def test_refuses_lengths_that_cannot_follow(tmp_path: Path, compressed: bool, method: str) -> None:
    path = write(tmp_path, gzip.compress(DATA, 1) if compressed else DATA)
    with FileSource(path, LIMITS) as source, pytest.raises(TruncatedError, match="declared"):
        getattr(source, method)(1 << 50)


@pytest.mark.usefixtures("inflater")
@pytest.mark.parametrize("cut", [1, 4, 8, 100])
def test_names_a_truncated_gzip_file(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, gzip.compress(DATA, 1)[:-cut], name="batch.pkl.gz.part")
    with (
        FileSource(path, LIMITS) as source,
        pytest.raises(ConversionError, match=r"batch\.pkl\.gz\.part: truncated gzip.*unfinished"),
    ):
        read_to_end(source)


@pytest.mark.usefixtures("inflater")
@pytest.mark.parametrize("offset", [-8, -1])
def test_names_a_corrupted_gzip_file(tmp_path: Path, offset: int) -> None:
    data = bytearray(gzip.compress(DATA, 1))
    data[offset] ^= 1
    path = write(tmp_path, bytes(data))
    with (
        FileSource(path, LIMITS) as source,
        pytest.raises(ConversionError, match=r"batch\.pkl: corrupted gzip file"),
    ):
        read_to_end(source)


@pytest.mark.usefixtures("inflater")
def test_names_a_gzip_file_damaged_in_the_middle(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(DATA, 1))
    data[2000:2100] = bytes(100)
    path = write(tmp_path, bytes(data))
    with (
        FileSource(path, LIMITS) as source,
        pytest.raises(ConversionError, match="gzip file"),
    ):
        read_to_end(source)


@pytest.mark.usefixtures("inflater")
def test_stops_a_gzip_bomb(tmp_path: Path) -> None:
    path = write(tmp_path, gzip.compress(bytes(4_000_000)))
    limits = PickleLimits(expansion_grace_nbytes=1_000_000)
    with (
        FileSource(path, limits) as source,
        pytest.raises(UnsafePickleError, match=r"gzip bomb.*max_expansion"),
    ):
        source.skip(4_000_000)
    assert open_and_skip(path, PickleLimits(expansion_grace_nbytes=4_000_000))
    assert open_and_skip(path, PickleLimits(expansion_grace_nbytes=1, max_expansion=2000))


def open_and_skip(path: Path, limits: PickleLimits) -> bool:
    with FileSource(path, limits) as source:
        source.skip(4_000_000)
        return source.at_end()


def read_to_end(source: FileSource) -> None:
    source.skip(len(DATA))
    source.at_end()


def test_can_be_read_in_a_thread(tmp_path: Path) -> None:
    path = write(tmp_path, gzip.compress(DATA, 1))
    found = []

    def read() -> None:
        with FileSource(path, LIMITS) as source:
            found.append(source.read(len(DATA)))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [DATA] * 3


def test_memory_source() -> None:
    source = MemorySource(b"abc\ndef")
    assert source.read(1) == b"a"
    assert source.readline(10) == b"bc"
    assert source.inflated_bytes == 4
    with pytest.raises(TruncatedError):
        source.read(4)


def test_missing_files_and_folders_are_os_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileSource(tmp_path / "none.pkl", LIMITS)
    with pytest.raises(OSError):  # noqa: PT011 - the class depends on the platform
        FileSource(tmp_path, LIMITS)


COMPRESSORS = {
    "gzip": gzip.compress,
    "zlib": zlib.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "zstd": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compressor_is_known_by_content(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, COMPRESSORS[name](DATA), name="batch.txt")
    with FileSource(path, LIMITS) as source:
        assert source.compression == name
        assert source.read(3_000_000) == DATA[:3_000_000]
        source.skip(1_000_000)
        assert source.read(len(DATA) - 4_000_000) == DATA[4_000_000:]
        assert source.at_end()
        assert source.compressed_position == path.stat().st_size


@pytest.mark.parametrize("name", sorted(set(COMPRESSORS) - {"lzma"}))
def test_every_compressor_may_write_several_streams(tmp_path: Path, name: str) -> None:
    compress = COMPRESSORS[name]
    path = write(tmp_path, b"".join(compress(DATA[at : at + 1_000_000]) for at in (0, 1_000_000)))
    with FileSource(path, LIMITS) as source:
        assert source.read(2_000_000) == DATA[:2_000_000]
        assert source.at_end()


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_cut_stream_of_any_compressor_is_truncated(tmp_path: Path, name: str) -> None:
    data = COMPRESSORS[name](DATA)
    path = write(tmp_path, data[: len(data) // 2])
    with FileSource(path, LIMITS) as source, pytest.raises(ConversionError, match="truncated"):
        read_cut(source)


def read_cut(source: FileSource) -> None:
    try:
        source.read(len(DATA))
    except TruncatedError as error:  # what zstd gives: it knows no end before its last frame
        raise source.truncated_error(str(error)) from error


@pytest.mark.parametrize("name", COMPRESSORS)
def test_bytes_that_follow_a_stream_are_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, COMPRESSORS[name](DATA) + b"a note after the end")
    said = "near compressed"
    with FileSource(path, LIMITS) as source, pytest.raises(ConversionError, match=said):
        read_to_end(source)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_bombs_of_any_compressor(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, COMPRESSORS[name](bytes(8 << 20)))
    limits = PickleLimits(expansion_grace_nbytes=1 << 20)
    with FileSource(path, limits) as source, pytest.raises(UnsafePickleError, match=f"{name} bomb"):
        source.read(7 << 20)
