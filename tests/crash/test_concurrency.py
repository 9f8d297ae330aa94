"""Several processes on the same files: readers of what appears, two converters, many shards."""

from __future__ import annotations

import pickle
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from child_processes import start_process
from scenarios import is_same, item

import h5traces
from h5traces.errors import ArchiveExistsError, CorruptArchiveError
from h5traces.rewriting.repack import repack
from h5traces.writing.options import TargetOptions

if TYPE_CHECKING:
    import subprocess

SHARDS, FEW_FILES = 1000, 40
# What a process reads over and over while others publish; every archive that it sees is whole.
READER = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
from scenarios import is_same, item
import h5traces
from h5traces.errors import CorruptArchiveError
folder, seen, rounds = pathlib.Path(sys.argv[1]), set(), 0
while not (folder / "stop").exists():
    for path in folder.glob("*.h5"):
        try:
            with h5traces.open(path) as archive:
                for trace in archive:
                    assert is_same(trace.to_dict(), item(int(trace["question_id"][1:]))), path
                seen.add(path.name)
        except CorruptArchiveError as error:
            assert "was replaced since it was opened" in str(error), error
    rounds += 1
    (folder / "reading").touch()
print(len(seen), rounds)
"""


def batch(folder: Path, name: str, numbers: range) -> Path:
    path = folder / f"{name}.pkl"
    path.write_bytes(pickle.dumps([item(number) for number in numbers]))
    return path


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return start_process(command, cwd=Path(__file__).parent)


def test_readers_see_whole_archives_while_others_are_published_and_replaced(tmp_path: Path) -> None:
    sources = [
        batch(tmp_path, f"b{number}", range(4 * number, 4 * number + 4)) for number in (0, 1)
    ]
    out = tmp_path / "out"
    out.mkdir()
    reader = start(READER, out, Path(__file__).parent)
    while not (out / "reading").exists():
        assert reader.poll() is None, reader.communicate()
        time.sleep(0.01)
    for number in range(12):
        # The same names again and again, with one batch or the other.
        for name in ("one", "two"):
            target = out / f"{name}.h5"
            assert h5traces.convert(
                sources[number % 2], target, target=TargetOptions(overwrite=True)
            ).ok
    (out / "stop").touch()
    stdout, stderr = reader.communicate(timeout=60)
    assert reader.returncode == 0, stderr
    seen, rounds = map(int, stdout.split())
    assert seen == 2
    assert rounds > 2


def test_two_converters_on_one_target(tmp_path: Path) -> None:
    """One of them gets the name; the other says so, and what is there is whole."""
    sources = [
        batch(tmp_path, f"b{number}", range(4 * number, 4 * number + 4)) for number in (0, 1)
    ]
    out = tmp_path / "out.h5"
    code = "import sys; from h5traces.cli import main; sys.argv[0] = 'h5traces'; main()"
    processes = [start(code, "convert", source, "-o", out) for source in sources]
    said = [process.communicate(timeout=60)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 2], said
    assert "exists; use --overwrite" in " ".join(said[codes.index(2)].split())
    winner = codes.index(0)
    with h5traces.open(out) as archive:
        numbers = range(4 * winner, 4 * winner + 4)
        assert [is_same(t.to_dict(), item(n)) for t, n in zip(archive, numbers, strict=True)]
    assert h5traces.verify(out, deep=True).ok
    assert list(tmp_path.glob("*.part")) == []


def test_two_rewrites_of_one_target_in_threads(tmp_path: Path) -> None:
    source = tmp_path / "source.h5"
    assert h5traces.convert(batch(tmp_path, "b", range(4)), source).ok

    def rewrite(_number: int) -> bool:
        try:
            repack(source, tmp_path / "out.h5")
        except ArchiveExistsError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(rewrite, range(4))) == 1
    assert h5traces.verify(tmp_path / "out.h5", deep=True).ok


def test_many_shards_with_few_file_descriptors(tmp_path: Path) -> None:
    first = tmp_path / "shard-0000.h5"
    assert h5traces.convert(batch(tmp_path, "b", range(1)), first).ok
    for number in range(1, SHARDS):
        shutil.copyfile(first, tmp_path / f"shard-{number:04d}.h5")
    code = f"""
import resource, sys
sys.path.insert(0, sys.argv[2])
import h5traces
from scenarios import is_same, item
resource.setrlimit(resource.RLIMIT_NOFILE, ({FEW_FILES}, {FEW_FILES}))
with h5traces.open(sys.argv[1]) as archive:
    assert len(archive) == {SHARDS}
    expected = item(0)
    for index in (*range(0, {SHARDS}, 3), 0, {SHARDS - 1}):
        assert is_same(archive[index].to_dict(), expected), index
    found = archive.read(range({SHARDS}), layers=[1])
print(len(found))
"""
    process = start(code, tmp_path, Path(__file__).parent)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert int(stdout) > 0


def test_a_file_that_shrinks_under_a_reader_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    assert h5traces.convert(batch(tmp_path, "b", range(4)), path).ok
    archive = h5traces.open(path)
    with path.open("r+b") as file:
        file.truncate(600)
    with pytest.raises(CorruptArchiveError, match=r"out\.h5: the file ends at 600, .* truncated"):
        archive[3].to_dict()
