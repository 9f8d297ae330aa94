"""Damage and full disks end in the right data or in a clear error, never in wrong numbers."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from legacy_batches import assert_same, make_archive, make_batch, write_batch

import h5traces
from h5traces.checking.seal import seal
from h5traces.checking.validate import validate
from h5traces.errors import (
    CorruptArchiveError,
    H5TracesError,
    NotAnArchiveError,
    StoredStateWarning,
)
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import ROW_PLACE, TRAILER_NBYTES, read_directory
from h5traces.writing.options import TargetOptions

if TYPE_CHECKING:
    from pathlib import Path

BATCH = [
    {**trace, "more": {"list": [1, np.arange(3)], "none": None}}
    for trace in make_batch("full_pkl", num_samples=6)
]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("intact"), BATCH)


def parts_of_footer(path: Path) -> dict[str, tuple[int, int]]:
    """Start and end of tables, rows and columns, of the directory and of the trailer's fields."""
    directory = read_directory(LocalFile(path))
    start, end = directory.hdf5_nbytes, path.stat().st_size
    parts = {
        name: (start + column.offset, start + column.offset + column.nbytes)
        for name, column in directory.columns.items()
    }
    table_nbytes = len(BATCH) * ROW_PLACE.itemsize
    parts["table of a group"] = start, start + table_nbytes
    parts["rows"] = start + table_nbytes, start + directory.group_starts[1]
    parts["directory"] = max(last for _, last in parts.values()), end - TRAILER_NBYTES
    for number in range(TRAILER_NBYTES // 8):
        first = end - TRAILER_NBYTES + 8 * number
        parts[f"trailer word {number}"] = first, first + 8
    return parts


PARTS = [
    "table of a group",
    "rows",
    "ids",
    "names",
    "attrs",
    "directory",
    *(f"trailer word {number}" for number in range(8)),
]


def test_every_part_of_the_footer_is_tried(intact: Path) -> None:
    assert set(PARTS) == set(parts_of_footer(intact))


@pytest.mark.parametrize("part", PARTS)
def test_damaged_footer(intact: Path, tmp_path: Path, part: str) -> None:
    data, path = intact.read_bytes(), tmp_path / "damaged.h5"
    start, end = parts_of_footer(intact)[part]
    assert start < end
    rng = np.random.default_rng(start)
    for position in sorted({start, end - 1, int(rng.integers(start, end))}):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = h5traces.load(path)
        assert_same(found, BATCH)
        if part != "ids":
            # Whoever asks for no id reads none.
            assert [each.category for each in caught] == [StoredStateWarning]
            assert "h5traces seal" in str(caught[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StoredStateWarning)
            archive = h5traces.open(path)
            assert archive.ids == tuple(f"tc_{number}" for number in range(6))
            assert_same(archive[3]["attentions"][1], BATCH[3]["attentions"][1])
            assert archive.read([4], layers=[2])[0]["hidden_states"][0].shape == (
                BATCH[4]["hidden_states"][2].shape
            )
        assert any("index" in note for note in validate(path).notes) or not validate(path).ok
    assert seal(path)[0].sealed
    assert_same(h5traces.load(path), BATCH)


def without_footer(data: bytes, path: Path) -> bytes:
    return data[: read_directory(LocalFile(path)).hdf5_nbytes]


@pytest.mark.parametrize("footer", [True, False])
@pytest.mark.parametrize("name", ["hidden_states/layer_001", "attentions/layer_002", "tokens"])
def test_damaged_chunk_names_sample_and_layer(
    intact: Path, tmp_path: Path, name: str, footer: bool
) -> None:
    data, path = intact.read_bytes(), tmp_path / "damaged.h5"
    with h5traces.open(intact) as archive:
        chunks = archive[4]._stored.entry(name).chunks
    assert chunks is not None
    start, size = chunks.offsets[0], chunks.sizes[0]
    kept = data if footer else without_footer(data, intact)
    # Not the first bytes: deflate ignores some bits of a block's header.
    for position in (start + size // 3, start + size // 2, start + size - 1):
        damaged = bytearray(kept)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StoredStateWarning)
            archive = h5traces.open(path)
            place = re.escape(f"{path}: /samples/00000004/{name}")
            with pytest.raises(CorruptArchiveError, match=f"{place}: chunk 0 of .* is damaged"):
                archive[4].to_dict()
            # All the rest is there.
            assert_same(archive[3].to_dict(), BATCH[3])
            if name.startswith("hidden"):
                assert_same(archive[4]["hidden_states"][0], BATCH[4]["hidden_states"][0])
        with pytest.raises(CorruptArchiveError, match="damaged"):
            seal(path)


def test_flipped_bits_anywhere_never_give_other_data(intact: Path, tmp_path: Path) -> None:
    data, path = intact.read_bytes(), tmp_path / "damaged.h5"
    hdf5 = without_footer(data, intact)
    rng = np.random.default_rng(1)
    outcomes = set()
    for kept in (data, hdf5):
        for position in rng.choice(len(hdf5), 40, replace=False).tolist():
            damaged = bytearray(kept)
            damaged[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", StoredStateWarning)
                try:
                    found = h5traces.load(path)
                except H5TracesError as error:
                    outcomes.add(type(error))
                else:
                    assert_same(found, BATCH)
                    outcomes.add(None)
                validate(path)  # must end, whatever it says
    assert {None, CorruptArchiveError} <= outcomes


def test_truncated_files(intact: Path, tmp_path: Path) -> None:
    data, path = intact.read_bytes(), tmp_path / "truncated.h5"
    end_of_hdf5 = len(without_footer(data, intact))
    for length in (0, 1, 8, 47, 48, 100, 512, 4096, end_of_hdf5 // 2, end_of_hdf5 - 1):
        path.write_bytes(data[:length])
        for read in (h5traces.open, h5traces.load, seal):
            with pytest.raises(
                (NotAnArchiveError, CorruptArchiveError), match=re.escape(str(path))
            ):
                read(path)
        assert not validate(path).ok
    for length in (end_of_hdf5, end_of_hdf5 + 1, len(data) - TRAILER_NBYTES, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.warns(StoredStateWarning, match="index"):
            found = h5traces.load(path)
        assert_same(found, BATCH)
        assert validate(path).ok


def test_bytes_behind_the_footer(intact: Path, tmp_path: Path) -> None:
    path = tmp_path / "longer.h5"
    path.write_bytes(intact.read_bytes() + b"x")
    with pytest.warns(StoredStateWarning, match="no index"):
        found = h5traces.load(path)
    assert_same(found, BATCH)


@pytest.mark.parametrize("content", [b"", b"x", b"not HDF5 at all" * 100, b"\x80\x04."])
def test_files_that_are_no_archive(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.h5"
    path.write_bytes(content)
    with pytest.raises(NotAnArchiveError, match=r"is .*, not an archive|not an HDF5 file"):
        h5traces.open(path)
    assert [each.kind for each in validate(path).problems] == ["not_an_archive"]


def test_an_hdf5_file_of_another_program(tmp_path: Path) -> None:
    import h5py

    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["data"] = np.arange(3)
    with pytest.raises(NotAnArchiveError, match="is HDF5, but no archive of h5traces"):
        h5traces.open(path)
    with pytest.raises(NotAnArchiveError, match="is HDF5, but no archive of h5traces"):
        seal(path)
    assert [each.kind for each in validate(path).problems] == ["not_an_archive"]


def test_missing_files(tmp_path: Path) -> None:
    for read in (h5traces.open, h5traces.load, validate):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "missing.h5")


# --- full disks ---------------------------------------------------------------------------------

# Beyond the limit the kernel kills the process, unless it is told to fail the write instead.
_LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv[:2] = ["h5traces"]
from h5traces.cli import main
main()
"""


def run_limited(limit: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _LIMITED, str(limit), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def incompressible(num_samples: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "hidden_states": [rng.standard_normal((40, 64)).astype(np.float16) for _ in range(4)],
            "attentions": [rng.random((4, 40, 40)).astype(np.float16) for _ in range(4)],
            "tokens": np.arange(40),
            "question_id": f"q{number}",
        }
        for number in range(num_samples)
    ]


def assert_clean_failure(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert "error:" in done.stderr


@pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.9, 0.999])
def test_full_disk_while_converting(tmp_path: Path, share: float) -> None:
    small, large = incompressible(1), incompressible(12)
    first = write_batch(tmp_path / "a.pkl", small)
    second = write_batch(tmp_path / "b.pkl", large)
    whole = make_archive(tmp_path / "whole", large).stat().st_size
    out = tmp_path / "out"
    limit = max(int(whole * share), 0)
    done = run_limited(limit, "convert", first, second, "-o", f"{out}/")
    assert_clean_failure(done)
    assert str(out / "b.h5") in done.stderr
    assert "File too large" in done.stderr
    left = {path.name for path in out.iterdir()}
    small_fits = make_archive(tmp_path / "small", small).stat().st_size <= limit
    assert left == ({"a.h5"} if small_fits else set())
    if small_fits:
        assert_same(h5traces.load(out / "a.h5"), small)
    # With room again, the same command finishes the work.
    report = h5traces.convert([first, second], f"{out}/", target=TargetOptions(skip_existing=True))
    assert [each.status for each in report.files] == [
        "skipped" if small_fits else "converted",
        "converted",
    ]
    assert_same(h5traces.load(out / "b.h5"), large)


def test_full_disk_keeps_the_file_that_was_to_be_replaced(tmp_path: Path) -> None:
    batch = incompressible(8)
    source = write_batch(tmp_path / "a.pkl", batch)
    before = make_archive(tmp_path, incompressible(2), name="a.pkl.gz")
    content = before.read_bytes()
    done = run_limited(len(content), "convert", source, "-o", before, "--overwrite")
    assert_clean_failure(done)
    assert before.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "a.pkl", "a.pkl.gz"]


@pytest.mark.parametrize("name", ["out.pkl", "out.pkl.gz", "out.h5"])
@pytest.mark.parametrize("limit", [0, 30_000])
def test_full_disk_while_exporting(tmp_path: Path, name: str, limit: int) -> None:
    archive = make_archive(tmp_path, incompressible(8))
    out = tmp_path / "out" / name
    out.parent.mkdir()
    assert_clean_failure(run_limited(limit, "export", archive, "-o", out))
    assert list(out.parent.iterdir()) == []


def test_full_disk_while_sealing_leaves_a_readable_archive(tmp_path: Path) -> None:
    batch = incompressible(4)
    archive = make_archive(tmp_path, batch)
    hdf5 = without_footer(archive.read_bytes(), archive)
    archive.write_bytes(hdf5)
    assert_clean_failure(run_limited(len(hdf5) + 100, "seal", archive))
    assert archive.read_bytes()[: len(hdf5)] == hdf5
    with pytest.warns(StoredStateWarning, match="index"):
        found = h5traces.load(archive)
    assert_same(found, batch)
    assert seal(archive)[0].sealed
    assert_same(h5traces.load(archive), batch)


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    source = write_batch(tmp_path / "a.pkl", BATCH)
    (tmp_path / "taken").write_text("a file")
    report = h5traces.convert(source, f"{tmp_path}/taken/deeper/")
    assert not report.ok
    assert report.files[0].status == "failed"
    assert str(tmp_path / "taken") in str(report.files[0].error)
    assert (tmp_path / "taken").read_text() == "a file"


def test_no_partial_file_is_left_when_a_batch_is_damaged(tmp_path: Path) -> None:
    source = write_batch(tmp_path / "a.pkl", incompressible(6))
    source.write_bytes(source.read_bytes()[:-20_000])
    out = tmp_path / "out"
    report = h5traces.convert(source, f"{out}/")
    assert not report.ok
    assert "truncated pickle" in str(report.files[0].error)
    assert list(out.iterdir()) == []
