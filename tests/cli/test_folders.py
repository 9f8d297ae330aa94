"""Folders as people have them: what is read, what is not and why, names of every kind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run
from legacy_batches import PLAIN, assert_same, make_batch

import h5traces
from h5traces.errors import ConversionError
from h5traces.sources.opening import open_source

BATCH = make_batch("full_pkl")


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    folder = tmp_path / "traces"
    folder.mkdir()
    for number in range(2):
        batch = make_batch("full_pkl", num_samples=2, seed=number)
        (folder / f"run_batch_000{number}.pkl").write_bytes(pickle.dumps(batch))
    return folder


def converted(traces: Path, *options: Any, code: int = 0) -> tuple[dict[str, Any], Any]:
    """The report of a conversion as JSON, and what was printed."""
    out = f"{traces.parent}/out/"
    shutil.rmtree(out, ignore_errors=True)
    printed = run("convert", traces, "-o", out, "--json", *options, code=code)
    return json.loads(printed.stdout), printed


def names(leftovers: list[dict[str, str]]) -> list[str]:
    return [Path(each["path"]).name for each in leftovers]


# --- what is not read ---------------------------------------------------------------------------


def test_the_same_run_in_another_format_is_no_success(traces: Path) -> None:
    np.savez(traces / "run_batch_0002.npz", a=np.zeros(3))
    (traces / "run_batch_0003.tar").write_bytes(bytes(257) + b"ustar" + bytes(250))
    report, printed = converted(traces, code=1)
    assert [each["status"] for each in report["files"]] == ["converted", "converted", "failed"]
    (left,) = report["leftovers"]
    assert (Path(left["path"]).name, left["kind"]) == ("run_batch_0003.tar", "a tar file")
    assert "unpack it" in left["reason"]
    for name in ("run_batch_0002.npz", "run_batch_0003.tar"):
        assert f"{name}: " in printed.stderr
    assert report["ok"] is False


def test_many_files_are_no_wall_of_rows(traces: Path) -> None:
    one = pickle.dumps(make_batch("full_pkl", num_samples=1))
    for number in range(2, 24):
        (traces / f"run_batch_{number:04d}.pkl").write_bytes(one)
    (traces / "run_batch_0007.pkl").write_bytes(one[:-40])
    out = f"{traces.parent}/many/"
    printed = run("convert", traces, "-o", out, code=1)
    rows = [line for line in printed.stdout.splitlines() if line.startswith(("conv", "fail"))]
    assert len(rows) == 1
    assert rows[0].startswith("failed")
    assert "run_batch_0007" in rows[0]
    assert "23 archives not listed; --json lists all" in " ".join(printed.stdout.split())


def test_inspect_says_how_a_file_was_understood(tmp_path: Path) -> None:
    (sample,) = make_batch("full_pkl", num_samples=1)
    (tmp_path / "one.pkl").write_bytes(pickle.dumps(sample))
    (found,) = h5traces.inspect(tmp_path / "one.pkl")
    assert found.understood == ["a dict is one sample"]
    assert "understood: a dict is one sample" in run("inspect", tmp_path / "one.pkl").stdout


def test_the_weights_of_a_model_are_no_batch(traces: Path) -> None:
    model = traces / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}\n')
    header = json.dumps({"q.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    safetensors = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    for name in ("model.safetensors", "model-00001-of-00002.safetensors"):
        (model / name).write_bytes(safetensors)
    report, _ = converted(traces)
    assert len(report["files"]) == 2
    weights = [each for each in report["unrelated"] if each["kind"] == "weights of a model"]
    assert len(weights) == 2
    # Without a configuration, it may be of a run.
    (model / "config.json").unlink()
    converted(traces, code=1)


def test_what_belongs_to_no_run_is_a_note(traces: Path) -> None:
    (traces / "README.md").write_text("# How these were made\n\nBy a run.\n")
    (traces / "labels.csv").write_text("question_id,label\ntc_0,1\n")
    (traces / "config.json").write_text('{"layers": 32}\n')
    (traces / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    (traces / "run_batch_0000.json").write_text('{"samples": 2}\n')
    (traces / "run_batch_0000.log").write_text("step 1 of 2\nstep 2 of 2\n")
    (traces / "_SUCCESS").write_bytes(b"")
    report, printed = converted(traces)
    assert report["ok"] is True
    assert sorted(names(report["unrelated"])) == [
        "README.md",
        "_SUCCESS",
        "config.json",
        "labels.csv",
        "loss.png",
        "run_batch_0000.json",
        "run_batch_0000.log",
    ]
    kinds = {Path(each["path"]).name: each["kind"] for each in report["unrelated"]}
    assert "table" in kinds["labels.csv"]
    assert "JSON" in kinds["config.json"]
    assert "empty" in kinds["_SUCCESS"]
    assert "7 other files not read: README.md (" in printed.stderr


def test_a_pointer_or_a_web_page_in_place_of_a_batch_is_named(traces: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (traces / "run_batch_0002.pkl").write_bytes(pointer)
    (traces / "other.pkl").write_bytes(b"<!DOCTYPE html><html><body>Sign in</body></html>")
    (traces / "run_batch_0003.pkl").write_bytes(b"")
    report, printed = converted(traces, code=1)
    assert sorted(names(report["leftovers"])) == [
        "other.pkl",
        "run_batch_0002.pkl",
        "run_batch_0003.pkl",
    ]
    for words in ("git lfs pull", "web page", "empty (0 bytes)"):
        assert words in printed.stderr
    assert "damage" not in printed.stderr


def test_h5traces_own_files_are_a_note(traces: Path) -> None:
    run("convert", traces, "-o", f"{traces}/archives/")
    archive = traces / "archives" / "run_batch_0000.h5"
    run("features", archive, "--last-token", "-o", traces / "features.h5")
    run("calibrate", archive, "-o", traces / "scales.h5")
    ids = [each for each in h5traces.open(archive).ids if each]
    rows = ["question_id,bleurt_score", *(f"{each},0.5" for each in ids)]
    (traces / "scores.csv").write_text("\n".join(rows) + "\n")
    run("label", archive, traces / "scores.csv")
    (traces / "archives" / "x.h5.0a1b2c3d.part").write_bytes(b"half")
    report, _ = converted(traces)
    assert [each["status"] for each in report["files"]] == ["converted", "converted"]
    kinds = {Path(each["path"]).name: each["kind"] for each in report["unrelated"]}
    assert kinds["run_batch_0000.h5"] == "an archive of h5traces"
    assert "features" in kinds["features.h5"]
    assert "scales" in kinds["scales.h5"]
    assert {"run_batch_0000.h5.labels.json", "x.h5.0a1b2c3d.part"} <= kinds.keys()


def test_what_is_no_plain_file_never_hangs(traces: Path) -> None:
    os.mkfifo(traces / "run_batch_0002.pkl")
    os.mkfifo(traces / "progress")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(traces / "control"))
        (traces / "run_batch_0003.pkl").symlink_to("nowhere.pkl")
        (traces / "loop").symlink_to("loop")
        report, printed = converted(traces, code=1)
    assert sorted(names(report["leftovers"])) == ["run_batch_0002.pkl", "run_batch_0003.pkl"]
    kinds = {Path(each["path"]).name: each["kind"] for each in report["unrelated"]}
    assert kinds["progress"] == "a pipe"
    assert kinds["control"] == "a socket"
    assert kinds["loop"].startswith("a broken link")
    assert "a broken link to nowhere.pkl" in printed.stderr


def test_hidden_files_and_caches_are_named_and_not_read(traces: Path) -> None:
    (traces / "._run_batch_0000.pkl").write_bytes(b"\0\5\x16\7Mac OS X")
    (traces / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    for folder in (".git", "__pycache__", ".ipynb_checkpoints"):
        (traces / folder).mkdir()
        shutil.copy(traces / "run_batch_0000.pkl", traces / folder / "copy.pkl")
    report, _ = converted(traces)
    assert len(report["files"]) == 2
    assert sorted(names(report["unrelated"])) == [
        ".DS_Store",
        "._run_batch_0000.pkl",
        ".git",
        ".ipynb_checkpoints",
        "__pycache__",
    ]
    # As rsync names a file that it has not finished.
    (traces / ".run_batch_0002.pkl.Xa2b3C").write_bytes(b"half")
    report, _ = converted(traces, code=1)
    assert names(report["leftovers"]) == [".run_batch_0002.pkl.Xa2b3C"]


def test_links_to_files_are_read_and_links_to_folders_named(traces: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(traces / "run_batch_0000.pkl", elsewhere / "far.pkl")
    (traces / "near.pkl").symlink_to(elsewhere / "far.pkl")
    (traces / "sub").mkdir()
    (traces / "latest").symlink_to("sub")
    report, _ = converted(traces)
    assert len(report["files"]) == 3
    assert names(report["unrelated"]) == ["latest"]
    (traces / "more").symlink_to(elsewhere)
    report, printed = converted(traces, code=1)
    assert names(report["leftovers"]) == ["more"]
    assert "which is not followed; name that folder, too" in printed.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_named(traces: Path) -> None:
    (traces / "run_batch_0001.pkl").chmod(0)
    (traces / "sub").mkdir(mode=0)
    report, _ = converted(traces, code=1)
    assert sorted(names(report["leftovers"])) == ["run_batch_0001.pkl", "sub"]


def test_a_folder_without_traces_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here\n")
    printed = run("convert", tmp_path, "-o", f"{tmp_path}/out/", code=2)
    assert "holds no batch" in printed.stderr
    assert f"{tmp_path}/notes.txt is text" in printed.stderr


def test_a_glob_is_sorted_out_as_a_folder_is(traces: Path, tmp_path: Path) -> None:
    (traces / "README.md").write_text("# How\n")
    (traces / "sub").mkdir()
    shutil.copy(traces / "run_batch_0000.pkl", traces / "sub" / "deep.pkl")
    printed = run("convert", f"{traces}/*", "-o", f"{tmp_path}/a/")
    assert sorted(each.name for each in (tmp_path / "a").iterdir()) == [
        "run_batch_0000.h5",
        "run_batch_0001.h5",
    ]
    assert "2 other files not read: README.md (" in printed.stderr
    assert "sub (a folder)" in printed.stderr
    run("convert", f"{traces}/**", "-o", f"{tmp_path}/b/")
    assert len(list((tmp_path / "b").iterdir())) == 3


def test_many_archives_of_one_sample_get_a_hint(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    for number, trace in enumerate(BATCH[:4]):
        (folder / f"sample_{number}.pkl").write_bytes(pickle.dumps([trace]))
    printed = run("convert", folder, "-o", f"{tmp_path}/each/")
    assert "4 archives hold one sample each; --merge makes one archive of all" in printed.stderr
    printed = run("convert", folder, "-o", tmp_path / "all.h5", "--merge")
    assert "one sample each" not in printed.stderr
    assert_same(h5traces.load(tmp_path / "all.h5"), BATCH[:4])


def test_a_copy_in_a_merge_is_named(traces: Path, tmp_path: Path) -> None:
    shutil.copy(traces / "run_batch_0000.pkl", traces / "again.pkl")
    printed = run("convert", traces, "-o", tmp_path / "all.h5", "--merge", code=2)
    assert "again.pkl and" in printed.stderr
    assert "hold the same bytes" in printed.stderr
    assert not (tmp_path / "all.h5").exists()


# --- failures in Python -------------------------------------------------------------------------


def test_a_report_raises_what_failed(traces: Path, tmp_path: Path) -> None:
    report = h5traces.convert(traces, f"{tmp_path}/ok/")
    report.raise_for_errors()
    (traces / "run_batch_0001.pkl").write_bytes(pickle.dumps(BATCH)[:-100])
    (traces / "run_batch_0002.pkl.part").write_bytes(b"half")
    report = h5traces.convert(traces, f"{tmp_path}/failed/")
    assert not report.ok
    message = r"run_batch_0001\.pkl.*truncated.*run_batch_0002\.pkl\.part: is an unfinished"
    with pytest.raises(ConversionError, match=message):
        report.raise_for_errors()


# --- names --------------------------------------------------------------------------------------

ODD_NAMES = {
    "not UTF-8": os.fsdecode(b"caf\xe9_batch_0000"),
    "newline": "two\nlines",
    "escape": "red\x1b[31m",
    "dash": "-o",
    "spaces": "  a b  ",
    "long": "n" * 200,
    "markup": "[bold]x",
    "surrogates of its own": os.fsdecode("\u241bDCE9".encode()),
    "not UTF-8, with model": os.fsdecode(b"mod\xe8le_triviaqa_batch_0000"),
}


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
@pytest.mark.parametrize("merge", [False, True], ids=["each", "merge"])
def test_every_name_of_a_file(tmp_path: Path, name: str, merge: bool) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    source = folder / f"{name}.pkl"
    source.write_bytes(pickle.dumps(BATCH))
    out = tmp_path / "out"
    report = h5traces.convert(folder, f"{out}/", merge=merge)
    report.raise_for_errors()
    (target,) = out.iterdir()
    assert target.name == ("traces.h5" if merge else f"{name}.h5")
    with h5traces.open(target) as archive:
        assert archive.metadata.sources is not None
        assert archive.metadata.sources[0].name == source.name
        assert_same([trace.to_dict() for trace in archive], BATCH)
    assert h5traces.validate(target).ok
    assert h5traces.verify(target, against=source).ok
    run("convert", folder, "-o", f"{out}/", "--skip-existing", *(["--merge"] if merge else []))


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_every_name_in_every_command(tmp_path: Path, name: str) -> None:
    source = tmp_path / f"{name}.pkl"
    # Features of samples with NaN are an error.
    source.write_bytes(pickle.dumps([BATCH[0], BATCH[PLAIN]]))
    out = tmp_path / "out"
    printed = [run("convert", source, "-o", f"{out}/", *more) for more in ([], ["--overwrite"])]
    archive = out / f"{name}.h5"
    for command in ("inspect", "ls", "validate", "verify", "seal"):
        printed.append(run(command, archive))
    printed.append(run("inspect", archive, "--json"))
    printed.append(run("inspect", source))
    printed.append(run("repack", archive, "-o", f"{tmp_path}/small/", "--layers", 0))
    printed.append(run("merge", archive, "-o", tmp_path / "merged.h5"))
    printed.append(run("split", archive, "-o", f"{tmp_path}/shards/", "-n", 4))
    printed.append(run("export", archive, "-o", tmp_path / "back.pkl"))
    printed.append(run("features", archive, "--last-token", "-o", tmp_path / "features.h5"))
    printed.append(run("salvage", archive, "-o", f"{tmp_path}/saved/"))
    printed.append(run("calibrate", archive, "-o", tmp_path / "scales.h5"))
    for each in printed:
        assert "\x1b" not in each.output
        each.output.encode()
    with h5traces.open(tmp_path / "merged.h5") as merged:
        assert merged.metadata.sources is not None
        assert merged.metadata.sources[0].name == source.name


# --- opening archives ---------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["", "/*.h5", "/**/*.h5"])
def test_a_folder_with_other_files_of_h5traces_opens(traces: Path, pattern: str) -> None:
    folder = traces.parent / "archives"
    run("convert", traces, "-o", f"{folder}/")
    archive = folder / "run_batch_0000.h5"
    run("features", archive, "--last-token", "-o", folder / "features.h5")
    run("calibrate", archive, "-o", folder / "scales.h5")
    (folder / "run.h5.0a1b2c3d.part").write_bytes(b"half")
    (folder / "next.h5.spool").mkdir()
    (folder / "next.h5.spool" / "00000000.sample").write_bytes(b"")
    hidden = folder / "._run_batch_0000.h5"
    hidden.write_bytes(b"\0\5\x16\7Mac OS X")
    with pytest.warns(UserWarning, match=r"skipped, as no archives: .*features\.h5 is of"):
        found = h5traces.open(f"{folder}{pattern}")
    assert len(found) == 4
    found.close()


def test_a_merge_does_not_begin_anew_for_every_file_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    for number, each in enumerate(make_batch("full_pkl", num_samples=12)):
        trace = pickle.dumps([each])
        (folder / f"s_{number:02d}.pkl").write_bytes(trace if number % 3 else trace[:-50])
    opened: list[str] = []

    def note(path: Any, *arguments: Any) -> Any:
        opened.append(Path(path).name)
        return open_source(path, *arguments)

    monkeypatch.setattr("h5traces.rewriting.convert_jobs.open_source", note)
    report = h5traces.convert(folder, tmp_path / "all.h5", merge=True)
    assert opened == [f"s_{number:02d}.pkl" for number in range(12)]
    (file,) = report.files
    assert file.num_samples == 8
    assert str(file.error).count("truncated") == 4
    with h5traces.open(tmp_path / "all.h5") as archive:
        found = [each.name for each in archive.metadata.sources or ()]
        assert found == [f"s_{number:02d}.pkl" for number in range(12) if number % 3]
        places = [trace.metadata.source for trace in archive]
        assert [place.file for place in places if place] == list(range(8))
    # The archive lacks sources that are named, so it is not kept for a finished one.
    printed = run(
        "convert", folder, "-o", tmp_path / "all.h5", "--merge", "--skip-existing", code=2
    )
    assert "s_00.pkl, s_03.pkl, s_06.pkl, s_09.pkl are not in it" in printed.stderr


# --- commands that read archives and sources ----------------------------------------------------


def test_inspect_and_calibrate_find_files_by_content(traces: Path, tmp_path: Path) -> None:
    (traces / "run_batch_0001.pkl").rename(traces / "renamed.data")
    (traces / "README.md").write_text("# How\n")
    (traces / "run_batch_0002.npz").write_bytes(b"PK\3\4 no longer a zip file")
    run("convert", traces / "run_batch_0000.pkl", "-o", traces / "a.h5")
    with pytest.warns(UserWarning, match=r"^not read: \S*/run_batch_0002.npz: is [^;]*; [^;]*$"):
        inspected = h5traces.inspect(traces)
    found = [Path(each.path).name for each in inspected]
    assert found == ["a.h5", "renamed.data", "run_batch_0000.pkl"]
    (traces / "run_batch_0002.npz").unlink()
    printed = run("inspect", traces, "--json")
    assert [Path(each["path"]).name for each in json.loads(printed.stdout)] == found
    run("calibrate", traces, "-o", tmp_path / "scales.h5", "--model-id", "m")
    for path in traces.iterdir():
        if path.name != "README.md":
            path.unlink()
    printed = run("inspect", traces, code=2)
    assert "holds no batch" in printed.stderr
    assert "README.md is text" in printed.stderr


def test_what_many_files_share_is_said_once(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    for number in range(6):
        batch = make_batch("final_cut", seed=number)
        (folder / f"run_batch_000{number}.pkl").write_bytes(pickle.dumps(batch))
    printed = run("convert", folder, "-o", f"{tmp_path}/out/")
    (line,) = [each for each in printed.stderr.splitlines() if "350 MB bug" in each]
    assert "run_batch_0002.pkl and 3 more: " in line
