"""The file of labels beside an archive: whoever puts it there can neither hang nor fill a reader.

Every opening of an archive looks for it, so what lies there is met by programs that never asked for
labels.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from legacy_batches import make_archive, make_batch

import h5traces
from h5traces.archive.labels import largest_sidecar
from h5traces.checking.validate import validate
from h5traces.errors import (
    ArgumentError,
    CorruptArchiveError,
    H5TracesError,
    OptionError,
    SchemaError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BATCH = make_batch("full_pkl")
IDS = [each["question_id"] for each in BATCH]
MAX_SECONDS = 10  # of a processor; what takes longer hangs
MAX_EXTRA_NBYTES = 50 << 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    table = folder / "scores.csv"
    rows = "".join(f"{each},0.{number}\n" for number, each in enumerate(IDS))
    table.write_text(f"question_id,bleurt_score\n{rows}", encoding="utf-8")
    archive = make_archive(folder, BATCH, name="run.pkl")
    h5traces.label(archive, table)
    return archive


@pytest.fixture
def archive(made: Path, tmp_path: Path) -> Path:
    for path in made.parent.glob("run.h5*"):
        shutil.copy(path, tmp_path)
    return tmp_path / "run.h5"


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """A hang ends with an error instead of the test run."""

    def stop(*_: Any) -> None:
        message = "hangs"
        raise TimeoutError(message)

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def sidecar(archive: Path) -> Path:
    return Path(f"{archive}.labels.json")


def edited(archive: Path, **changes: Any) -> None:
    document = json.loads(sidecar(archive).read_text(encoding="utf-8"))
    sidecar(archive).write_text(json.dumps({**document, **changes}), encoding="utf-8")


def rejected(archive: Path, expected: str, kind: type[H5TracesError] = CorruptArchiveError) -> None:
    """Every way to open it ends at once, in little memory, with an error that names the file."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for way in (
        h5traces.open,
        lambda path: h5traces.open(path, labels=path.parent),
        lambda path: h5traces.open(path.parent),
        h5traces.load,
        lambda path: h5traces.repack(path, path.with_name("copy.h5")),
    ):
        start = time.process_time()
        with pytest.raises(kind, match=expected) as caught:
            way(archive)
        assert str(sidecar(archive)) in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert time.process_time() - start < MAX_SECONDS
    (problem,) = validate(archive).problems
    assert problem.kind == "wrong_labels"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < MAX_EXTRA_NBYTES
    assert h5traces.open(archive, labels=False).labels == (None,) * len(BATCH)


# --- what is not a regular file -------------------------------------------------------------------


def a_pipe(place: Path) -> None:
    os.mkfifo(place)


def a_folder(place: Path) -> None:
    place.mkdir()


def a_socket(place: Path) -> None:
    here = Path.cwd()
    os.chdir(place.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(place.name)
    finally:
        os.chdir(here)


def a_link_to_labels(place: Path) -> None:
    place.symlink_to("real.json")


def a_link_to_an_endless_device(place: Path) -> None:
    place.symlink_to("/dev/zero")


def a_link_to_a_terminal(place: Path) -> None:
    place.symlink_to("/dev/tty")


def a_link_to_a_pipe(place: Path) -> None:
    os.mkfifo(place.with_name("pipe"))
    place.symlink_to("pipe")


def a_link_to_itself(place: Path) -> None:
    place.symlink_to(place.name)


def a_link_to_nothing(place: Path) -> None:
    place.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (a_pipe, "is not a regular file"),
        (a_folder, "is a folder"),
        (a_socket, "is not a regular file"),
        (a_link_to_labels, "is a symbolic link"),
        (a_link_to_an_endless_device, "is a symbolic link"),
        (a_link_to_a_terminal, "is a symbolic link"),
        (a_link_to_a_pipe, "is a symbolic link"),
        (a_link_to_itself, "is a symbolic link"),
        (a_link_to_nothing, "is a symbolic link"),
    ],
)
def test_what_is_no_regular_file(
    archive: Path, build: Callable[[Path], None], expected: str
) -> None:
    sidecar(archive).rename(archive.with_name("real.json"))
    build(sidecar(archive))
    rejected(archive, f"{expected}; expected|{expected}, expected a file of labels")


def test_labels_are_not_written_through_a_link(archive: Path) -> None:
    victim = archive.with_name("victim")
    victim.write_bytes(b"mine")
    sidecar(archive).unlink()
    sidecar(archive).symlink_to(victim)
    table = archive.with_name("scores.csv")
    rows = "".join(f"{each},0.1\n" for each in IDS)
    table.write_text(f"question_id,bleurt_score\n{rows}", encoding="utf-8")
    with pytest.raises(H5TracesError, match="exists"):
        h5traces.label(archive, table)
    h5traces.label(archive, table, target=h5traces.TargetOptions(overwrite=True))
    assert victim.read_bytes() == b"mine"
    assert not sidecar(archive).is_symlink()
    assert h5traces.open(archive).labels == (1,) * len(BATCH)


# --- what is too large, or of another archive -----------------------------------------------------


def test_more_than_the_archive_can_have(archive: Path) -> None:
    with sidecar(archive).open("r+b") as file:
        file.truncate(64 << 30)  # a hole, as far as the disk is concerned
    rejected(archive, f"has more than {largest_sidecar(len(BATCH))} bytes")


def test_labels_too_large_for_a_sidecar_are_not_written(tmp_path: Path) -> None:
    batch = [{**each, "question_id": f"{each['question_id']}{'x' * 50_000}"} for each in BATCH]
    archive = make_archive(tmp_path, batch, name="run.pkl")
    rows = "".join(f"{each['question_id']},0.1\n" for each in batch)
    table = tmp_path / "scores.csv"
    table.write_text(f"question_id,bleurt_score\n{rows}", encoding="utf-8")
    with pytest.raises(SchemaError, match=r"write them into a new archive \(output='...'\)"):
        h5traces.label(archive, table)
    assert not list(tmp_path.glob("*.json*"))
    h5traces.label(archive, table, output=tmp_path / "labelled.h5")
    assert h5traces.open(tmp_path / "labelled.h5").labels == (1,) * len(BATCH)


@pytest.mark.parametrize("column", ["ordinals", "sample_ids", "labels"])
def test_another_archive_is_named_before_its_columns(archive: Path, column: str) -> None:
    edited(archive, archive_id="b18c9463-2e4c-46c3-9dff-5af61d48716a", **{column: ["x", -1] * 9000})
    rejected(archive, "holds labels of the archive b18c9463", SchemaError)


@pytest.mark.parametrize("number", [0, 5, 7, 2**62, "6", None, True, [6]])
def test_another_number_of_samples(archive: Path, number: Any) -> None:
    edited(archive, num_samples=number)
    rejected(archive, "num_samples is .* has 6", SchemaError)


@pytest.mark.parametrize("number", [3, ["x"] * 9000, {"a": "x" * 60_000}, "\ud800", None])
def test_an_archive_id_of_another_type(archive: Path, number: Any) -> None:
    edited(archive, archive_id=number)
    rejected(archive, "holds labels of the archive", SchemaError)


# --- columns that are wrong all along -------------------------------------------------------------

MANY = 10_000  # as many as there is room for
COLUMNS: dict[str, dict[str, Any]] = {
    "ordinals below 0": {"ordinals": [-1] * MANY},
    "ordinals that are none": {"ordinals": [None] * (MANY // 2)},
    "ordinals with a fraction": {"ordinals": [0.5] * MANY},
    "ordinals without an end": {"ordinals": list(range(MANY // 2))},
    "labels beyond 64 bits": {"labels": [2**64] * (MANY // 8)},
    "labels that are lists": {"labels": [[]] * MANY},
    "labels as text": {"labels": ["1"] * MANY},
    "ids that are numbers": {"sample_ids": [1] * MANY},
    "scores that are none": {"scores": {"bleurt": [None] * (MANY // 2)}},
    "scores that are lists": {"scores": {"bleurt": [[]] * MANY}},
    "scores that are not columns": {"scores": [1] * MANY},
    "many scores": {"scores": {f"{number}": 1 for number in range(MANY // 4)}},
    "many fields": {f"{number}": 1 for number in range(MANY // 4)},
    "columns as objects": {"ordinals": {f"{number}": 1 for number in range(MANY // 4)}},
}


@pytest.mark.parametrize("name", COLUMNS)
def test_the_first_wrong_element_ends_it(archive: Path, name: str) -> None:
    edited(archive, **COLUMNS[name])
    assert sidecar(archive).stat().st_size <= largest_sidecar(len(BATCH))
    rejected(archive, "ordinals|labels|sample_ids|scores|Extra inputs", SchemaError)


@pytest.mark.parametrize(
    "field", ["ordinals", "sample_ids", "labels", "scores", "classes", "source"]
)
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_nesting(archive: Path, field: str, brackets: str) -> None:
    edited(archive, **{field: "HERE"})
    text = sidecar(archive).read_text(encoding="utf-8")
    for depth in (100, 900, 5000):
        opening = brackets[0] if brackets == "[]" else '{"a":'
        deep = f"{opening * depth}1{brackets[1] * depth}"
        sidecar(archive).write_text(text.replace('"HERE"', deep), encoding="utf-8")
        rejected(archive, "labels.json", H5TracesError)


@pytest.mark.parametrize("number", ["1" * 5000, "-" + "9" * 60_000, "1e999", "NaN", "Infinity"])
def test_numbers(archive: Path, number: str) -> None:
    for field in ("ordinals", "labels", "threshold", "num_samples"):
        shutil.copy(sidecar(archive), archive.with_name("kept"))
        edited(archive, **{field: "HERE"})
        text = sidecar(archive).read_text(encoding="utf-8").replace('"HERE"', number)
        sidecar(archive).write_text(text, encoding="utf-8")
        rejected(archive, "labels.json", H5TracesError)
        shutil.move(archive.with_name("kept"), sidecar(archive))


def test_millions_of_wrong_labels_take_no_time(tmp_path: Path) -> None:
    """An archive of many samples has room for many; its own reader must not pay for each."""
    code = f"""
import json, resource, sys, time
from pathlib import Path
from types import SimpleNamespace
from h5traces.archive.labels import read_sidecar
from h5traces.errors import SchemaError

place = Path({str(tmp_path / "labels.json")!r})
own = dict(archive_id="b18c9463-2e4c-46c3-9dff-5af61d48716a", num_samples=1_000_000)
document = dict(format="h5traces-labels", format_version="1.0", generator="x",
                created="2026-11-22T15:28:31Z", ordinals=[-1] * 1_000_000,
                sample_ids=["a"] * 1_000_000, labels=[0.5] * 1_000_000, scores={{}}, **own)
place.write_text(json.dumps(document))
del document
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
try:
    read_sidecar(place, Path("run.h5"), SimpleNamespace(**own))
except SchemaError as error:
    print(len(str(error)), time.process_time() - start)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    length, seconds = done.stdout.split()
    assert int(length) < 1000
    assert float(seconds) < MAX_SECONDS


# --- where labels are not looked for --------------------------------------------------------------


@pytest.mark.parametrize("labels", ["https://127.0.0.1:9/labels/", "s3://bucket/labels"])
def test_labels_are_not_fetched_from_servers(archive: Path, labels: str) -> None:
    with pytest.raises(OptionError, match="is on a server; expected a folder on disk"):
        h5traces.open(archive, labels=labels)


@pytest.mark.parametrize("labels", ["nowhere", "run.h5.labels.json", 3, True])
def test_a_folder_of_labels_that_is_none(archive: Path, labels: Any) -> None:
    named = str(archive.with_name(labels)) if isinstance(labels, str) else labels
    with pytest.raises((OptionError, ArgumentError), match="folder"):
        h5traces.open(archive, labels=named)
