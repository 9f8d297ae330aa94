"""What lies around: modules in the current folder, links and pipes where files are written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from legacy_batches import make_archive, make_batch

import h5traces
from h5traces.archive.footer_store import FooterStore
from h5traces.checking import seal as sealing
from h5traces.errors import CorruptArchiveError, ExtractionError, H5TracesError, RemoteError
from h5traces.extract.models import known_aliases
from h5traces.extract.questions import read_questions
from h5traces.extract.running import skipped_before
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import hdf5_end
from h5traces.storage.footer_rows import FooterError
from h5traces.storage.publish import remove_abandoned_parts
from h5traces.storage.remote.file import RangeCache
from h5traces.storage.remote.paths import ByteRange, RemotePath, Reply
from h5traces.torch_data import TraceDataset

ROOT = Path(__file__).parents[2]
BATCH = make_batch("full_pkl")
TAIL = Reply(b"tail", 1000, "v1")
# Names that Python or h5traces imports at some time.
MODULES = (
    "multiprocessing numpy h5py json pydantic xxhash socket tempfile typing zlib torch "
    "transformers tokenizers datasets hdf5plugin sitecustomize usercustomize h5traces"
).split()
TRAP = "from pathlib import Path\nPath({mark!r}).touch()\nraise ImportError('a trap')\n"


@pytest.fixture
def folder(tmp_path):
    """A folder of data with modules and a package of readers, all of which say if they are run."""
    place = tmp_path / "data"
    place.mkdir()
    make_archive(place, BATCH, name="a.pkl")
    shutil.copy(place / "a.pkl", place / "b.pkl")
    for name in (*MODULES, "evil"):
        (place / f"{name}.py").write_text(TRAP.format(mark=str(tmp_path / f"ran-{name}")))
    metadata = place / "evil-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[h5traces.sources]\nevil = evil:Reader\n")
    return place


def ran(tmp_path):
    return sorted(each.name for each in tmp_path.glob("ran-*"))


COMMANDS = {
    "convert": ["convert", "a.pkl", "b.pkl", "-o", "out/", "--workers", "2"],
    "inspect": ["inspect", "a.pkl", "a.h5"],
    "validate": ["validate", "--isolated", "a.h5"],
    "verify": ["verify", "a.h5", "--against", "a.pkl"],
    "extract": [
        "extract", "--model-id", str(ROOT / "examples" / "tiny-llama-pydocs"),
        "--dataset", str(ROOT / "examples" / "questions.jsonl"),
        "-n", "1", "--max-new-tokens", "2", "-o", "e.h5",
    ],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_nothing_in_the_current_folder_is_run(folder, tmp_path, command):
    """A data set may hold a file ``multiprocessing.py``."""
    program = Path(sys.executable).with_name("h5traces")
    done = subprocess.run([program, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ran(tmp_path) == []


def test_run_as_a_module(folder, tmp_path):
    """Python itself looks into the folder until h5traces runs; the rest is not imported from it."""
    for name in ("typing", "h5traces"):
        (folder / f"{name}.py").unlink()
    command = [sys.executable, "-m", "h5traces", *COMMANDS["convert"]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ran(tmp_path) == []


# --- links and pipes where files are expected -----------------------------------------------------


def spoiled(kind, path, victim):
    """Put a link to a victim, or a pipe, where a file is expected."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "hard link":
        os.link(victim, path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "device"])
@pytest.mark.timeout(30)
def test_the_lock_of_a_run_is_a_file_of_its_own(tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    spoiled(kind, tmp_path / "run.h5.spool" / "lock", victim)
    with pytest.raises(
        CorruptArchiveError, match=r"is not a lock that h5traces made; move .* away"
    ):
        h5traces.create(tmp_path / "run.h5")
    assert victim.read_text() == "precious"


@pytest.mark.timeout(30)
def test_a_run_is_written_into_no_other_folder(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "lock").write_text("precious")
    (tmp_path / "run.h5.spool").symlink_to(other)
    with pytest.raises(
        CorruptArchiveError, match=r"is not a lock that h5traces made; move .* away"
    ):
        h5traces.create(tmp_path / "run.h5")
    assert (other / "lock").read_text() == "precious"
    key = RangeCache(tmp_path / "cache", RemotePath("https://host/a.h5"), TAIL)._folder
    key.rmdir()
    key.symlink_to(other)
    with pytest.raises(RemoteError, match="is a link, expected a folder of a cache"):
        RangeCache(tmp_path / "cache", RemotePath("https://host/a.h5"), TAIL)
    assert [each.name for each in other.iterdir()] == ["lock"]


@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
@pytest.mark.timeout(30)
def test_what_is_no_part_file_is_not_cleaned_up(tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    part = tmp_path / "a.h5.01234567.part"
    spoiled(kind, part, victim)
    found = remove_abandoned_parts(tmp_path / "a.h5")
    # A pipe has no owner, and nothing is lost with it.
    assert found == ([part] if kind == "pipe" else [])
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.timeout(30)
def test_questions_are_a_file(tmp_path, kind):
    spoiled(kind, tmp_path / "q.jsonl", None)
    with pytest.raises(ExtractionError, match=r"q\.jsonl: is not a regular file"):
        read_questions(tmp_path / "q.jsonl")
    with (tmp_path / "huge.csv").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ExtractionError, match=r"huge\.csv: has more than .* bytes"):
        read_questions(tmp_path / "huge.csv")


@pytest.mark.timeout(30)
def test_an_archive_that_becomes_a_pipe_ends_an_epoch(tmp_path):
    path = make_archive(tmp_path, BATCH, name="a.pkl")
    dataset = TraceDataset(path, kinds="hidden_states")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(H5TracesError, match=r"not a regular file|was replaced"):
        dataset[0]


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.timeout(30)
def test_documents_beside_archives_are_files(tmp_path, kind, monkeypatch):
    spoiled(kind, tmp_path / "run.h5.spool" / "run.json", None)
    with pytest.raises(CorruptArchiveError, match=r"run\.json: is not a regular file"):
        h5traces.create(tmp_path / "run.h5")
    spoiled(kind, tmp_path / "b.h5.report.json", None)
    with pytest.raises(ExtractionError, match=r"report\.json: is not a regular file"):
        skipped_before(tmp_path / "b.h5")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    spoiled(kind, tmp_path / "h5traces" / "models.toml", None)
    with pytest.raises(ExtractionError, match=r"models\.toml: is not a regular file"):
        known_aliases()


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", '{"skipped": 3}', '{"skipped": [3]}'])
def test_a_report_that_is_none(tmp_path, text):
    (tmp_path / "b.h5.report.json").write_text(text)
    with pytest.raises(ExtractionError, match="is not the report of an extraction"):
        skipped_before(tmp_path / "b.h5")


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "device"])
@pytest.mark.parametrize("name", ["data", "ranges"])
@pytest.mark.timeout(30)
def test_a_cache_writes_into_no_other_file(tmp_path, kind, name):
    path = RemotePath("https://host/a.h5")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    cache = RangeCache(tmp_path / "cache", path, TAIL)
    spoiled(kind, cache._folder / name, victim)
    with pytest.raises(OSError, match=r"is not a file of a cache|Too many levels|No such device"):
        cache.keep({ByteRange(0, 4): b"evil"})
    assert cache.find(ByteRange(0, 4)) is None
    if name == "ranges" and kind in ("pipe", "device"):
        with pytest.raises(RemoteError, match="is not a regular file"):
            RangeCache(tmp_path / "cache", path, TAIL)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("change", ["link", "another file"])
def test_a_file_exchanged_while_it_is_sealed(tmp_path, monkeypatch, change):
    """The index of one file must not be written over the end of another."""
    path = make_archive(tmp_path, BATCH, name="a.pkl")
    with path.open("r+b") as file:
        file.truncate(hdf5_end(LocalFile(path)))
    victim = tmp_path / "victim"
    victim.write_bytes(path.read_bytes() + b"precious")

    def exchange():
        path.unlink()
        if change == "link":
            path.symlink_to(victim)
        else:
            shutil.copy(victim, path)

    appended = sealing._append
    monkeypatch.setattr(sealing, "_append", lambda *each: (exchange(), appended(*each)))
    with pytest.raises(H5TracesError, match="was replaced"):
        h5traces.seal(path)
    assert victim.read_bytes().endswith(b"precious")
    with pytest.raises(FooterError):
        FooterStore(LocalFile(victim), DEFAULT_LIMITS)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_at_the_target_is_replaced_not_followed(tmp_path, overwrite):
    source = make_archive(tmp_path, BATCH, name="a.pkl")
    victim, target = tmp_path / "victim", tmp_path / "new.h5"
    victim.write_text("precious")
    target.symlink_to(victim)
    options = h5traces.TargetOptions(overwrite=overwrite)
    if overwrite:
        h5traces.repack(source, target, target=options)
        assert not target.is_symlink()
        assert h5traces.verify(target).ok
    else:
        with pytest.raises(H5TracesError, match="exists"):
            h5traces.repack(source, target, target=options)
    assert victim.read_text() == "precious"
