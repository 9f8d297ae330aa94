"""Every named attack, opened in every way there is.

Each must end in an error of ours that tells what is wrong, within a second of processor time and
300 MB of memory, or give exactly what the untouched archive gives. Files that another file's name
hides in are pipes nobody writes to: whoever opened one would hang.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import h5py
import hdf5_attacks
import numpy as np
import probe
import pytest
import specimen
from prober import ATTACKS, Prober
from specimen import SAMPLE, edit

import h5traces
from h5traces.checking.validate import validate
from h5traces.errors import HostileFileError
from h5traces.format.limits import ReadLimits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from attack import Attack

MAX_SECONDS = 10  # of a processor; what takes longer hangs
MAX_EXTRA_NBYTES = 300 << 20
MAX_WALL_SECONDS = 30  # a machine may be busy; a hang is longer
COMMANDS = [*probe.COMMANDS]
# Beside reading and validating, one other way opens each file, in turn; all of them do with
# H5TRACES_ALL_ROUTES=1, which takes minutes.
ALL_ROUTES = "H5TRACES_ALL_ROUTES" in os.environ
# Errors in modules that refuse too little so far; strict, so that a mended one shows.
AWAITED: frozenset[str] = frozenset()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("valid") / "archive.h5"
    specimen.write(path)
    return path


@pytest.fixture(scope="module")
def prober(archive: Path) -> Iterator[Prober]:
    # A copy, because the first call writes files beside it.
    copy = archive.with_name("warm.h5")
    shutil.copyfile(archive, copy)
    made = Prober(copy)
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(archive: Path) -> str:
    return probe.read(str(archive))


def routes_of(number: int) -> list[str]:
    if ALL_ROUTES:
        return [*probe.LIBRARY, *COMMANDS]
    by_number = [*COMMANDS, *["worker"] * len(COMMANDS)]
    return ["read", "validate", by_number[number % len(by_number)]]


def numbered(attacks: list[Attack]) -> list[Any]:
    marks = [pytest.mark.xfail(strict=True)]
    return [
        pytest.param(number, attack, id=attack.name, marks=marks if attack.name in AWAITED else [])
        for number, attack in enumerate(attacks)
    ]


@pytest.mark.parametrize(("number", "attack"), numbered(ATTACKS))
def test_attack_is_refused(
    tmp_path: Path, archive: Path, prober: Prober, expected: str, number: int, attack: Attack
) -> None:
    path = tmp_path / "archive.h5"
    shutil.copyfile(archive, path)
    attack.build(path)
    results = prober(path, routes_of(number))
    for route, result in results.items():
        assert result["outcome"] not in ("died", "escaped"), f"{route}: {result['message']}"
        assert "Traceback" not in result["message"], f"{route}: {result['message']}"
        assert result.get("code", 0) in (0, 1), route
        assert result["seconds"] < MAX_SECONDS, route
        assert result["wall"] < MAX_WALL_SECONDS, route
        assert result["extra_nbytes"] < MAX_EXTRA_NBYTES, route
    check_reading(attack, results["read"], expected)
    problems = results["validate"]["value"]
    if attack.problem is None:
        assert problems == []
    else:
        said = "; ".join(f"{each['loc']}: {each['message']}" for each in problems)
        assert re.search(attack.problem, said, re.DOTALL), said
    if "validate-command" in results:
        assert results["validate-command"]["code"] == (attack.problem is not None)


def check_reading(attack: Attack, result: dict[str, Any], expected: str) -> None:
    is_same = result.get("value") == expected
    if attack.error is None or (attack.may_fall_back and result["outcome"] == "ok"):
        assert is_same, result["message"]
        return
    assert result["outcome"] == "error"
    assert re.search(attack.error, result["message"], re.DOTALL), result["message"]


def test_commands_in_their_own_process(tmp_path: Path, archive: Path) -> None:
    """One attack through the real command line, which the others reach without starting Python."""
    path = tmp_path / "archive.h5"
    shutil.copyfile(archive, path)
    hdf5_attacks.external_storage(path)
    code = "from h5traces.cli import main; main()"
    for words in (["inspect", path], ["validate", path], ["repack", path, "-o", f"{path}.new.h5"]):
        command = [sys.executable, "-c", code, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1, (words, done.stderr)
        assert "external storage" in " ".join((done.stdout + done.stderr).split())
        assert "Traceback" not in done.stderr


def test_attack_list_is_of_distinct_files() -> None:
    names = [each.name for each in ATTACKS]
    assert len(names) == len(set(names))
    assert set(names) >= AWAITED


# --- what is not an attack -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (4, 8)},
        {"chunks": (4, 3), "shuffle": True},
        {"chunks": (4, 8), "fletcher32": True},
        {"chunks": (5, 3), "compression": "gzip", "shuffle": True, "fletcher32": True},
        {"chunks": (5, 3), "compression": "gzip", "fletcher32": True},
        {"chunks": (5, 3), "compression": "gzip"},
    ],
)
@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f8"])
def test_foreign_storage_reads_the_same_numbers(
    tmp_path: Path, archive: Path, options: dict[str, Any], dtype: str
) -> None:
    path, place = tmp_path / "archive.h5", f"{SAMPLE}/hidden_states/layer_000"
    shutil.copyfile(archive, path)
    values = np.arange(48).reshape(6, 8).astype(dtype)
    edit(path, lambda file: hdf5_attacks.put(file, place, values, **options))
    # Where archives could store it so, it is also noticed that these are other values.
    with pytest.warns(UserWarning, match="no index|do not fit their digest"):
        found = h5traces.open(path)[0]["hidden_states"][0]
    np.testing.assert_array_equal(found, values)
    assert found.dtype == np.dtype(dtype).newbyteorder("=")


def test_compact_storage_reads_the_same_numbers(tmp_path: Path, archive: Path) -> None:
    path = tmp_path / "archive.h5"
    shutil.copyfile(archive, path)

    def change(file: h5py.File) -> None:
        options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        options.set_layout(h5py.h5d.COMPACT)
        made = hdf5_attacks.low_level(file, hdf5_attacks.TOKENS, h5py.h5t.STD_I64LE, (6,), options)
        h5py.Dataset(made)[:] = np.arange(6) * 7

    edit(path, change)
    with pytest.warns(UserWarning, match="no index"):
        np.testing.assert_array_equal(h5traces.open(path)[0]["tokens"], np.arange(6) * 7)


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize(
    ("padding", "stored"),
    [(h5py.h5t.STR_NULLTERM, b"why\0me"), (h5py.h5t.STR_SPACEPAD, b"why   ")],
)
def test_text_of_another_padding_reads_the_same(
    tmp_path: Path, archive: Path, padding: int, stored: bytes, compression: str | None
) -> None:
    path, place = tmp_path / "archive.h5", f"{SAMPLE}/question"
    shutil.copyfile(archive, path)

    def change(file: h5py.File) -> None:
        type_id = h5py.h5t.C_S1.copy()
        type_id.set_size(len(stored))
        type_id.set_strpad(padding)
        options = hdf5_attacks.chunked((1,), *([1] if compression else []))
        made = hdf5_attacks.low_level(file, place, type_id, (1,), options)
        made.write_direct_chunk((0,), zlib.compress(stored) if compression else stored)
        sample = file[SAMPLE].id
        h5py.h5a.delete(sample, b"sample_id")
        attribute = h5py.h5a.create(sample, b"sample_id", type_id, h5py.h5s.create(h5py.h5s.SCALAR))
        attribute.write(np.array(stored, f"S{len(stored)}"), mtype=type_id)

    edit(path, change)
    with pytest.warns(UserWarning, match="no index"):
        trace = h5traces.open(path)[0]
    assert trace["question"] == "why"
    assert trace.metadata.sample_id == "why"


def test_large_and_many_attributes_are_read_once(tmp_path: Path, archive: Path) -> None:
    """Opening attributes by number took 11 seconds for a thousand of 10 kB."""
    path = tmp_path / "archive.h5"
    shutil.copyfile(archive, path)

    def change(file: h5py.File) -> None:
        for number in range(500):
            file[SAMPLE].attrs.create(f"x_{number}", np.zeros(1000, "u1"))

    edit(path, change)
    assert validate(path).problems == []


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({"max_array_nbytes": 50}, "takes 96 bytes; the limit is 50"),
        ({"max_chunk_nbytes": 50}, "take 96 bytes; the limit is 50"),
        ({"max_objects": 3}, "objects in the sample; the limit is"),
        ({"max_attributes": 1}, "attributes; the limit is 1"),
        ({"max_attribute_nbytes": 5}, "the limit is 5"),
        ({"max_depth": 0}, "nested deeper than 0 levels"),
        ({"max_samples": 1}, "there are 2 samples; the limit is 1"),
        ({"max_kinds": 1}, "objects in the root group; the limit is 1"),
    ],
)
def test_limits_are_options(
    tmp_path: Path, archive: Path, limits: dict[str, int], error: str
) -> None:
    path = tmp_path / "archive.h5"
    shutil.copyfile(archive, path)
    edit(path, lambda _: None)
    problems = validate(path, limits=ReadLimits(**limits)).problems
    assert any(error in each.message and each.kind == "hostile_file" for each in problems), problems


def test_limits_are_options_of_reading(archive: Path) -> None:
    opened = h5traces.open(archive, limits=ReadLimits(max_array_nbytes=10))
    # Whoever reads through the footer may fall back to HDF5 first, which warns.
    with warnings.catch_warnings(action="ignore"):
        with pytest.raises(HostileFileError, match="the limit is 10"):
            opened[0].to_dict()


@pytest.mark.parametrize("name", ["archive.h5", "batch.pkl", "batch.pkl.gz"])
def test_a_pipe_under_a_files_name_is_not_waited_for(tmp_path: Path, name: str) -> None:
    """In a folder of a stranger's; opening it would wait for a writer who never comes."""
    path = tmp_path / "theirs" / name
    path.parent.mkdir()
    os.mkfifo(path)
    code = """
import contextlib, sys
import h5traces
from h5traces.errors import H5TracesError
from h5traces.checking.isolated import validate_isolated
for use in (h5traces.open, h5traces.load, h5traces.verify, h5traces.validate, validate_isolated):
    for where in sys.argv[1:3]:
        with contextlib.suppress(H5TracesError, OSError):
            use(where)
with contextlib.suppress(H5TracesError):
    h5traces.convert(sys.argv[2], sys.argv[3])
h5traces.load(sys.argv[2])
"""
    command = [sys.executable, "-c", code, str(path.parent), str(path), str(tmp_path / "out.h5")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert f"{path}: is not a regular file" in done.stderr
