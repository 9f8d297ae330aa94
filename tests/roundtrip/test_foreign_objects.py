"""What other programs put into archives: reading goes on, rewriting keeps or drops it."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
from legacy_batches import assert_same, make_archive, make_batch
from typer.testing import CliRunner

import h5traces
from h5traces.cli.app import app
from h5traces.errors import OptionError, StoredStateWarning

if TYPE_CHECKING:
    from pathlib import Path

BATCH = make_batch("full_pkl", num_samples=3)
SAMPLE = "samples/00000001"
LAYER = f"{SAMPLE}/hidden_states/layer_000"


def put(path: str, value: Any, **options: Any) -> Any:
    return lambda file: file.create_dataset(path, data=value, **options)


def attribute(path: str, name: str, value: Any) -> Any:
    return lambda file: file[path].attrs.create(name, value)


TABLE = np.array([(1, 0.5), (2, 0.25)], dtype=[("layer", "i8"), ("score", "f4")])
# By what people do: the edit, and the path (with @ an attribute) that must be there afterwards.
FOREIGN: dict[str, tuple[Any, str]] = {
    "a probe in the root": (put("my_probe", np.arange(5.0)), "my_probe"),
    "groups in the root": (put("probes/layer_3/weights", np.eye(3)), "probes/layer_3/weights"),
    "an array in a sample": (put(f"{SAMPLE}/token_entropy", np.ones(4)), f"{SAMPLE}/token_entropy"),
    "text of any length": (put(f"{SAMPLE}/note", "seen, \u00e9"), f"{SAMPLE}/note"),
    "texts of any length": (put(f"{SAMPLE}/notes", ["a", "", "b" * 99]), f"{SAMPLE}/notes"),
    "a boolean mask": (put(f"{SAMPLE}/mask", np.array([True, False])), f"{SAMPLE}/mask"),
    "a table": (put(f"{SAMPLE}/table", TABLE), f"{SAMPLE}/table"),
    "a compressed array": (
        put(f"{SAMPLE}/big", np.zeros((300, 300)), compression="lzf", chunks=(100, 100)),
        f"{SAMPLE}/big",
    ),
    "nothing": (put(f"{SAMPLE}/none", h5py.Empty("f4")), f"{SAMPLE}/none"),
    "an array beside layers": (
        put(f"{SAMPLE}/hidden_states/mean", np.ones(8)),
        f"{SAMPLE}/hidden_states/mean",
    ),
    "a field without encoding": (put(f"{SAMPLE}/extra/foo", np.arange(3)), f"{SAMPLE}/extra/foo"),
    "beside the kinds": (put("kinds/mine", np.arange(3)), "kinds/mine"),
    "beside the index": (put("index/mine", np.arange(3)), "index/mine"),
    "an attribute of the root": (attribute("/", "author", "me"), "/@author"),
    "an attribute of a sample": (attribute(SAMPLE, "rating", 3), f"{SAMPLE}@rating"),
    "an attribute of a layer": (attribute(LAYER, "mean", 0.5), f"{LAYER}@mean"),
    "a list of texts": (attribute(SAMPLE, "tags", ["a", "b"]), f"{SAMPLE}@tags"),
}
USERS: dict[str, tuple[Any, str]] = {
    "a group in the root": (put("x_me/probe", np.arange(5.0)), "x_me/probe"),
    "in a sample": (put(f"{SAMPLE}/x_entropy", np.ones(4)), f"{SAMPLE}/x_entropy"),
    "texts": (put(f"{SAMPLE}/x_notes/all", ["a", "b"]), f"{SAMPLE}/x_notes/all"),
    "beside layers": (
        put(f"{SAMPLE}/attentions/x_mean", np.ones(3)),
        f"{SAMPLE}/attentions/x_mean",
    ),
    "of the root": (attribute("/", "x_author", "me"), "/@x_author"),
    "of a sample": (attribute(SAMPLE, "x_rating", 3), f"{SAMPLE}@x_rating"),
    "of a layer": (attribute(LAYER, "x_mean", 0.5), f"{LAYER}@x_mean"),
    "of a kind": (attribute("kinds/attentions", "x_note", "ok"), "kinds/attentions@x_note"),
}
EVERY = {**FOREIGN, **{f"own: {name}": each for name, each in USERS.items()}}


def value_at(path: Path, place: str) -> Any:
    """A dataset or attribute as h5py gives it; None if there is none."""
    where, _, name = place.partition("@")
    with h5py.File(path, "r") as file:
        if where not in file:
            return None
        value = file[where].attrs.get(name) if name else file[where][()]
    return value if isinstance(value, (bytes, str, h5py.Empty)) else np.asarray(value).tolist()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("whole"), BATCH)


@pytest.fixture
def edited(whole: Path, tmp_path: Path, name: str) -> Path:
    return edit(whole, tmp_path / "edited.h5", EVERY[name][0])


def edit(source: Path, path: Path, change: Any) -> Path:
    shutil.copyfile(source, path)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoredStateWarning)
        with h5traces.open(path) as archive:
            return [trace.to_dict() for trace in archive]


def check(path: Path) -> list[str]:
    """The archive's samples are whole; the notes of its validation."""
    assert_same(read(path), BATCH)
    (report,) = h5traces.validate(path)
    assert report.problems == []
    assert h5traces.verify(path, deep=True).ok
    return [each for each in report.notes if "has no index" not in each]


@pytest.mark.parametrize("name", EVERY)
def test_reading_goes_on_and_validate_names_it(edited: Path, name: str) -> None:
    notes = check(edited)
    if name.startswith("own"):
        assert notes == []
    else:
        path, _, attribute = EVERY[name][1].partition("@")
        (note,) = notes
        assert "is not of the format, and not read" in note
        assert (f"attribute {attribute!r}" if attribute else "object") in note
        assert path.strip("/").startswith(note.partition(":")[0].strip("/"))


@pytest.mark.parametrize("name", EVERY)
def test_seal_keeps_it_and_makes_the_index_anew(edited: Path, name: str) -> None:
    place = EVERY[name][1]
    before = value_at(edited, place)
    (report,) = h5traces.seal(edited)
    assert report.sealed
    assert report.edited == []
    assert bool(report.foreign) == (not name.startswith("own"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", StoredStateWarning)
        with h5traces.open(edited) as archive:
            assert len(archive) == len(BATCH)
    check(edited)
    assert value_at(edited, place) == before
    (again,) = h5traces.seal(edited)
    assert again.already_sealed


@pytest.mark.parametrize("sealed", [False, True], ids=["no index", "index"])
@pytest.mark.parametrize("name", EVERY)
def test_rewriting_keeps_it(edited: Path, tmp_path: Path, name: str, sealed: bool) -> None:
    if sealed:
        h5traces.seal(edited)
    place = EVERY[name][1]
    before = value_at(edited, place)
    assert before is not None
    warnings.simplefilter("ignore", StoredStateWarning)
    out = tmp_path / "out.h5"
    assert h5traces.repack(edited, out).warnings == []
    assert value_at(out, place) == before
    check(out)
    (report,) = h5traces.seal(out)
    assert report.already_sealed
    report = h5traces.salvage(edited, tmp_path / "saved.h5")
    assert (report.num_saved, report.lost, report.warnings) == (len(BATCH), [], [])
    assert value_at(tmp_path / "saved.h5", place) == before
    # A second time, from the copy; and encoded anew.
    h5traces.repack(out, tmp_path / "again.h5", precision=h5traces.PrecisionOptions(dtype="auto"))
    assert value_at(tmp_path / "again.h5", place) == before


@pytest.mark.parametrize("name", EVERY)
def test_rewriting_drops_it_if_told_so(edited: Path, tmp_path: Path, name: str) -> None:
    warnings.simplefilter("ignore", StoredStateWarning)
    place = EVERY[name][1]
    before = value_at(edited, place)
    h5traces.repack(edited, tmp_path / "out.h5", foreign="drop")
    h5traces.salvage(edited, tmp_path / "saved.h5", foreign="drop")
    for path in (tmp_path / "out.h5", tmp_path / "saved.h5"):
        assert value_at(path, place) == (before if name.startswith("own") else None)
        assert check(path) == []


def test_samples_take_theirs_with_them(whole: Path, tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        for number in range(3):
            file[f"samples/0000000{number}/x_number"] = number
        file["x_about"] = "all"

    path = edit(whole, tmp_path / "a.h5", change)
    h5traces.seal(path)
    h5traces.split(path, tmp_path / "s.h5", 2)
    assert [value_at(tmp_path / "s-00000.h5", f"samples/0000000{n}/x_number") for n in (0, 1)] == [
        0,
        1,
    ]
    assert value_at(tmp_path / "s-00001.h5", "samples/00000000/x_number") == 2
    assert value_at(tmp_path / "s-00001.h5", "x_about") == b"all"
    h5traces.repack(path, tmp_path / "r.h5", samples=[2, 0], layers=0)
    assert value_at(tmp_path / "r.h5", "samples/00000000/x_number") == 2
    report = h5traces.merge([tmp_path / "s-00000.h5", tmp_path / "s-00001.h5"], tmp_path / "m.h5")
    assert report.warnings == []
    assert value_at(tmp_path / "m.h5", "samples/00000002/x_number") == 2
    assert value_at(tmp_path / "m.h5", "x_about") == b"all"
    check(tmp_path / "m.h5")


def test_two_roots_with_one_name(whole: Path, tmp_path: Path) -> None:
    h5traces.split(whole, tmp_path / "s.h5", 2)
    for number, name in enumerate(("s-00000.h5", "s-00001.h5")):
        with h5py.File(tmp_path / name, "r+") as file:
            file["x_probe"] = np.full(3, number)
        h5traces.seal(tmp_path / name)
    report = h5traces.merge([tmp_path / "s-00000.h5", tmp_path / "s-00001.h5"], tmp_path / "m.h5")
    (warning,) = report.warnings
    assert "s-00001.h5: /x_probe: another source has a different object of this name" in warning
    assert value_at(tmp_path / "m.h5", "x_probe") == [0, 0, 0]


def test_what_cannot_be_copied_safely_is_named(whole: Path, tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        file[f"{SAMPLE}/x_soft"] = h5py.SoftLink("/samples/00000000/tokens")
        file[f"{SAMPLE}/x_far"] = h5py.ExternalLink("/etc/passwd", "/")
        file.create_dataset("x_reference", data=file.ref, dtype=h5py.ref_dtype)
        ragged = h5py.vlen_dtype(np.int64)
        file.create_dataset("x_ragged", (2,), dtype=ragged)[0] = [1, 2]
        virtual = h5py.VirtualLayout(shape=(3,), dtype="i8")
        virtual[:] = h5py.VirtualSource("other.h5", "x", shape=(3,))
        file.create_virtual_dataset("x_virtual", virtual)
        file["x_fine"] = 1

    path = edit(whole, tmp_path / "a.h5", change)
    (validation,) = h5traces.validate(path)
    assert {each.loc for each in validation.problems} == {
        f"/{SAMPLE}/x_soft",
        f"/{SAMPLE}/x_far",
        "/x_virtual",
    }
    assert_same(read(path), BATCH)
    h5traces.seal(path)
    report = h5traces.repack(path, tmp_path / "out.h5")
    (warning,) = report.warnings
    for name in ("x_soft", "x_far", "x_reference", "x_ragged", "x_virtual"):
        assert f"{name}: " in warning
    with h5py.File(tmp_path / "out.h5", "r") as file:
        assert [name for name in file if name.startswith("x_")] == ["x_fine"]
    check(tmp_path / "out.h5")


def test_an_edit_of_the_format_s_own_is_no_foreign_object(whole: Path, tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        file[SAMPLE].attrs["label"] = np.int64(7)

    path = edit(whole, tmp_path / "a.h5", change)
    assert not h5traces.verify(path).ok
    (report,) = h5traces.seal(path)
    assert report.edited == [f"/{SAMPLE}"]


def test_fields_may_begin_with_x(tmp_path: Path) -> None:
    batch = [{**BATCH[0], "x_mine": np.arange(3), "x_text": "own"}]
    path = make_archive(tmp_path, batch)
    assert_same(read(path), batch)
    h5traces.repack(path, tmp_path / "out.h5", foreign="drop")
    assert_same(read(tmp_path / "out.h5"), batch)


def test_the_command_line(whole: Path, tmp_path: Path) -> None:
    path = edit(whole, tmp_path / "a.h5", FOREIGN["a probe in the root"][0])
    run = CliRunner().invoke
    sealed = run(app, ["seal", str(path)])
    assert sealed.exit_code == 0
    assert "1 name not of the format, and kept: /my_probe" in sealed.stderr
    for choice, kept in (("keep", True), ("drop", False)):
        out = tmp_path / f"{choice}.h5"
        assert run(app, ["repack", str(path), "-o", str(out), "--foreign", choice]).exit_code == 0
        with h5py.File(out, "r") as file:
            assert ("my_probe" in file) == kept
    reports = json.loads(run(app, ["validate", str(path), "--json"]).stdout)
    assert any("my_probe" in each for each in reports[0]["notes"])
    with pytest.raises(OptionError, match="foreign is 'ask', expected 'keep' or 'drop'"):
        h5traces.repack(path, tmp_path / "b.h5", foreign="ask")  # type: ignore[arg-type]
