"""Files get their final name whole, never in place of another one, and leave no leftovers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from legacy_batches import assert_same, make_archive, make_batch, write_batch

import h5traces
from h5traces.errors import ArchiveExistsError
from h5traces.storage.publish import LatchedFile, PartFile, remove_abandoned_parts
from h5traces.writing.options import TargetOptions

if TYPE_CHECKING:
    from pathlib import Path

    from h5traces.rewriting.reports import Progress


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.h5"
    part = PartFile(target)
    part.append(b"one ")
    part.append(b"two")
    assert not target.exists()
    (name,) = names(tmp_path)
    assert name.startswith("a.h5.")
    assert name.endswith(".part")
    part.publish()
    assert target.read_bytes() == b"one two"
    assert names(tmp_path) == ["a.h5"]


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_never_replaces_what_appeared_meanwhile(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "a.h5"
    part = PartFile(target)
    part.append(b"ours")
    if kind == "file":
        target.write_bytes(b"theirs")
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArchiveExistsError, match=r"a\.h5 exists; use overwrite=True"):
        part.publish()
    assert names(tmp_path) == ["a.h5"]
    if kind == "file":
        assert target.read_bytes() == b"theirs"
    assert not (tmp_path / "nowhere").exists()


def test_one_of_many_writers_wins(tmp_path: Path) -> None:
    target = tmp_path / "a.h5"
    parts = [PartFile(target) for _ in range(8)]
    start, won = threading.Barrier(len(parts)), []

    def publish(number: int, part: PartFile) -> None:
        part.append(b"%d" % number)
        start.wait()
        try:
            part.publish()
        except ArchiveExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=publish, args=each) for each in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert target.read_bytes() == b"%d" % won[0]
    assert names(tmp_path) == ["a.h5"]


def test_overwriting_replaces_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "a.h5"
    target.write_bytes(b"old")
    with target.open("rb") as reader:
        with PartFile(target) as part:
            part.append(b"new")
            assert target.read_bytes() == b"old"
            part.publish(overwrite=True)
        assert target.read_bytes() == b"new"
        assert reader.read() == b"old"
    assert names(tmp_path) == ["a.h5"]


def test_an_exception_deletes_the_part(tmp_path: Path) -> None:
    def fail() -> None:
        with PartFile(tmp_path / "a.h5") as part:
            part.append(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == []


def test_only_parts_without_an_owner_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "a[1].h5"
    owned = PartFile(target)
    owned.append(b"owned")
    stale = tmp_path / "a[1].h5.0123abcd.part"
    stale.write_bytes(b"stale")
    others = [
        tmp_path / "a1.h5.0123abcd.part",
        tmp_path / "a[1].h5.part",
        tmp_path / "a[1].h5.0123abcd.part.txt",
        tmp_path / "b.h5.0123abcd.part",
        tmp_path / "a[1].h5.notdigit.part",
    ]
    for other in others:
        other.write_bytes(b"other")
    assert remove_abandoned_parts(target) == [stale]
    assert not stale.exists()
    assert all(other.exists() for other in others)
    owned.publish()
    assert target.read_bytes() == b"owned"
    assert remove_abandoned_parts(target) == []


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PartFile(tmp_path / "missing" / "a.h5")


def test_a_latched_file_keeps_the_first_error_and_reads_what_it_could_not_write(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    descriptor = os.open(path, os.O_RDONLY)  # every write fails
    try:
        file = LatchedFile(descriptor)
        file.seek(4)
        assert file.write(b"abcd") == 4
        file.seek(14)
        assert file.write(b"xy") == 2
        assert isinstance(file.error, OSError)
        file.seek(0)
        assert file.read() == b"0123abcd89\0\0\0\0xy"
        with pytest.raises(OSError, match="Bad file descriptor"):
            file.raise_error()
        assert file.seek(-2, os.SEEK_END) == 14
        file.truncate(3)
        file.seek(0)
        assert file.read() == b"012"
    finally:
        os.close(descriptor)
    assert path.read_bytes() == b"0123456789"


# --- through convert ----------------------------------------------------------------------------

BATCH = make_batch("full_pkl")


def test_convert_refuses_an_existing_target(tmp_path: Path) -> None:
    target = make_archive(tmp_path, BATCH)
    before = target.read_bytes()
    report = h5traces.convert(tmp_path / "batch.pkl", target)
    assert not report.ok
    assert report.files[0].status == "failed"
    assert f"{target} exists; use overwrite=True" in str(report.files[0].error)
    assert target.read_bytes() == before
    assert names(tmp_path) == ["batch.h5", "batch.pkl"]


def test_convert_does_not_replace_a_target_that_appears_meanwhile(tmp_path: Path) -> None:
    source, target = write_batch(tmp_path / "a.pkl", BATCH), tmp_path / "a.h5"

    def appear(_: Progress) -> None:
        target.write_bytes(b"theirs")

    report = h5traces.convert(source, target, progress=appear)
    assert not report.ok
    assert f"{target} exists" in str(report.files[0].error)
    assert target.read_bytes() == b"theirs"
    assert names(tmp_path) == ["a.h5", "a.pkl"]


def test_overwriting_leaves_open_archives_alone(tmp_path: Path) -> None:
    target = make_archive(tmp_path, BATCH)
    other = make_batch("full_pkl", seed=1)
    with h5traces.open(target) as before:
        make_archive(tmp_path, other, overwrite=True)
        assert_same([trace.to_dict() for trace in before], BATCH)
    assert_same(h5traces.load(target), other)


_KILLED = """
import os, signal, sys
import h5traces
def stop(state):
    if state.num_samples >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
h5traces.convert(sys.argv[1], sys.argv[2], progress=stop)
"""


def test_a_killed_conversion_can_be_run_again(tmp_path: Path) -> None:
    source, out = write_batch(tmp_path / "a.pkl", BATCH), tmp_path / "out"
    command: list[Any] = [sys.executable, "-c", _KILLED, source, f"{out}/"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = names(out)
    assert left.endswith(".part")
    report = h5traces.convert(source, f"{out}/", target=TargetOptions(skip_existing=True))
    assert [each.status for each in report.files] == ["converted"]
    assert names(out) == ["a.h5"]
    assert_same(h5traces.load(out / "a.h5"), BATCH)
