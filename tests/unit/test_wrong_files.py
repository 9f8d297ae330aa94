"""``open`` and ``load`` of what they do not read: errors name what it is, and the right call."""

from __future__ import annotations

import gzip
import pickle
import re
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
from legacy_batches import make_archive, make_batch

import h5traces
from h5traces.errors import CorruptArchiveError, H5TracesError, NotAnArchiveError, OptionError

if TYPE_CHECKING:
    from pathlib import Path

PICKLE = pickle.dumps([{"hidden_states": []}])
CALLS = r"h5traces\.load reads it, and h5traces\.convert makes an archive of it"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    archive = make_archive(tmp_path, make_batch("full_pkl")[:2])
    h5traces.features.extract_features(archive, tmp_path / "features.h5", ["mean"])
    (tmp_path / "renamed.h5").write_bytes(PICKLE)
    (tmp_path / "packed.pkl.gz").write_bytes(gzip.compress(PICKLE))
    (tmp_path / "page.h5").write_text("<!DOCTYPE html><html>Sign in</html>")
    (tmp_path / "pointer.h5").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    (tmp_path / "empty.h5").touch()
    (tmp_path / "labels.csv").write_text("question_id,label\nq0,1\n")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file.attrs["model_id"] = "some/model"  # of variable length, as h5py writes text
        file.create_dataset("layer_0/inputs", data=np.zeros(3))
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "a.pkl").write_bytes(PICKLE)
    return tmp_path


OTHER_FILES = [
    ("batch.pkl", rf"is a pickle, not an archive; {CALLS}"),
    ("renamed.h5", rf"is a pickle, not an archive; {CALLS}"),
    ("packed.pkl.gz", rf"is a pickle, compressed by gzip, not an archive; {CALLS}"),
    ("page.h5", "is a web page, saved in place of the file, not an archive; .*download"),
    ("pointer.h5", "is a pointer of Git LFS.*git lfs pull"),
    ("empty.h5", r"is empty \(0 bytes\), not an archive"),
    ("labels.csv", "is a table of text, not an archive; 'h5traces label'"),
    ("foreign.h5", "is HDF5, but no archive of h5traces; "),
    ("features.h5", "is a file of features that h5traces wrote, not an archive.*h5py"),
]


@pytest.mark.parametrize(("name", "message"), OTHER_FILES)
def test_open_of_another_file(folder: Path, name: str, message: str) -> None:
    with pytest.raises(NotAnArchiveError, match=message) as caught:
        h5traces.open(folder / name)
    assert str(caught.value).startswith(str(folder / name))
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize(("name", "message"), OTHER_FILES)
def test_checks_of_another_file(folder: Path, name: str, message: str) -> None:
    before = (folder / name).read_bytes()
    for found in (h5traces.validate(folder / name), h5traces.verify(folder / name)):
        (problem,) = found.problems
        assert problem.kind == "not_an_archive"
        assert re.match(message, problem.message)
    with pytest.raises(NotAnArchiveError, match=message):
        h5traces.seal(folder / name)
    assert (folder / name).read_bytes() == before


def test_open_of_a_folder_without_archives(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"but 1 pickled batch; h5traces\.convert"):
        h5traces.open(folder / "pickles")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("page.h5", "is a web page"),
        ("labels.csv", "is a table of text; 'h5traces label'"),
        ("features.h5", "is a file of features"),
        ("empty.h5", "is empty"),
    ],
)
def test_load_of_another_file(folder: Path, name: str, message: str) -> None:
    with pytest.raises(H5TracesError, match=message):
        h5traces.load(folder / name)


def test_load_takes_files_for_what_they_are(folder: Path) -> None:
    assert h5traces.load(folder / "renamed.h5") == [{"hidden_states": []}]
    assert h5traces.load(folder / "pickles") == [{"hidden_states": []}]
    (folder / "batch.h5").rename(folder / "archive.bin")
    assert len(h5traces.load(folder / "archive.bin")) == 2
    with pytest.raises(NotAnArchiveError, match="is HDF5, but no archive"):
        h5traces.load(folder / "foreign.h5")


def test_what_may_be_a_damaged_archive_is_named_so(folder: Path) -> None:
    data = (folder / "batch.h5").read_bytes()
    for size in (40, 2000, len(data) // 2):
        (folder / "cut.h5").write_bytes(data[:size])
        for call in (h5traces.open, h5traces.load):
            with pytest.raises(CorruptArchiveError, match=r"cut\.h5"):
                call(folder / "cut.h5")


@pytest.mark.parametrize("value", [None, b"run.h5", 8, 1.5, {"a": 1}, [None]])
@pytest.mark.parametrize("call", [h5traces.open, h5traces.load])
def test_what_is_no_name(call: Any, value: Any) -> None:
    with pytest.raises(TypeError, match="expected the name of a file, a glob or a folder"):
        call(value)


def test_kinds_that_are_not_stored(folder: Path) -> None:
    archive = h5traces.open(folder / "batch.h5")
    for kind, why in (("attention_mean", "not stored"), ("mlp", "unknown")):
        with pytest.raises(OptionError, match=rf"kind '{kind}' is {why}; .* stores hidden"):
            archive.read(0, kinds=[kind])
