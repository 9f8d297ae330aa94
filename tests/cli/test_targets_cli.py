"""Where commands write: the rule for outputs, and that no command replaces what it reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import run
from legacy_batches import make_archive, make_batch, write_batch

import h5traces

BATCH = make_batch("full_pkl")
MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama-pydocs"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an archive, its batch, a table of scores and questions."""
    folder = tmp_path_factory.mktemp("made")
    archive = make_archive(folder, BATCH)
    run("calibrate", archive, "-o", folder / "scales.h5")
    ids = [each for each in h5traces.open(archive).ids if each is not None]
    rows = ["question_id,bleurt_score", *(f"{each},0.5" for each in dict.fromkeys(ids))]
    (folder / "scores.csv").write_text("\n".join(rows))
    (folder / "questions.jsonl").write_text('{"question": "Why?"}\n')
    return folder


# What every writing command reads, and the command with its output at {out}.
WRITING = {
    "convert": ("batch.pkl", ["convert", "{in}", "-o", "{out}"]),
    "convert --merge": ("batch.pkl", ["convert", "{in}", "-o", "{out}", "--merge"]),
    "convert --scales": (
        "scales.h5",
        ["convert", "{folder}/batch.pkl", "-o", "{out}", "--tier", "fine", "--scales", "{in}"],
    ),
    "repack": ("batch.h5", ["repack", "{in}", "-o", "{out}"]),
    "merge": ("batch.h5", ["merge", "{in}", "-o", "{out}"]),
    "split": ("batch.h5", ["split", "{in}", "-n", "1000", "-o", "{out}"]),
    "export": ("batch.h5", ["export", "{in}", "-o", "{out}"]),
    "salvage": ("batch.h5", ["salvage", "{in}", "-o", "{out}"]),
    "calibrate": ("batch.h5", ["calibrate", "{in}", "-o", "{out}"]),
    "calibrate a batch": ("batch.pkl", ["calibrate", "{in}", "-o", "{out}"]),
    "label": ("batch.h5", ["label", "{in}", "{folder}/scores.csv", "--partial", "-o", "{out}"]),
    "label a table": (
        "scores.csv",
        ["label", "{folder}/batch.h5", "{in}", "--partial", "-o", "{out}"],
    ),
    "features": ("batch.h5", ["features", "{in}", "--last-token", "-o", "{out}"]),
    "extract": (
        "questions.jsonl",
        ["extract", "--model-id", str(MODEL), "--dataset", "{in}", "-o", "{out}"],
    ),
}
# Where an output names a source: the same path, or a link to it in either direction.
WAYS = ("same", "symbolic", "hard", "symbolic source")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WRITING)
def test_no_command_replaces_its_source(made: Path, tmp_path: Path, name: str, way: str) -> None:
    file_name, words = WRITING[name]
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    source = folder / file_name
    # A name that the command may write, in so far as there is one.
    output = source if way == "same" else folder / "out.h5"
    if name == "split":
        output = folder / "out.h5"
    given = source
    # The first shard of out.h5 is out-00000.h5.
    linked = folder / "out-00000.h5" if name == "split" else output
    if way == "same" and name == "split":
        given = source = source.rename(linked)
    elif way == "symbolic":
        linked.symlink_to(source)
    elif way == "hard":
        linked.hardlink_to(source)
    elif way == "symbolic source":
        given = folder / f"link-{file_name}"
        source = source.rename(linked)
        given.symlink_to(source)
    before = source.read_bytes()
    names = {"in": given, "out": output, "folder": folder}
    overwrite = [] if name == "extract" else ["--overwrite"]
    for options in ([], overwrite):
        found = run(*(each.format(**names) for each in words), *options, code=2)
        assert str(linked) in found.stderr or str(output) in found.stderr
        assert source.read_bytes() == before
        assert not list(folder.glob("*.part"))


def test_a_name_without_a_suffix_is_an_error(made: Path, tmp_path: Path) -> None:
    archive = made / "batch.h5"
    for words in (
        ["repack", archive],
        ["merge", archive],
        ["split", archive, "-n", 2],
        ["salvage", archive],
        ["convert", made / "batch.pkl"],
        ["calibrate", archive],
    ):
        found = run(*words, "-o", tmp_path / "small", code=2)
        assert f"for a new folder write {tmp_path}/small/" in found.stderr
    assert not list(tmp_path.iterdir())


def test_a_slash_makes_a_folder(made: Path, tmp_path: Path) -> None:
    run("split", made / "batch.h5", "-n", 4, "-o", f"{tmp_path}/shards/")
    assert (tmp_path / "shards" / "batch-00000.h5").exists()
    run("merge", tmp_path / "shards", "-o", f"{tmp_path}/merged/")
    run("repack", made / "batch.h5", "-o", tmp_path / "merged")
    assert {each.name for each in (tmp_path / "merged").iterdir()} == {"batch.h5", "traces.h5"}
    run("export", made / "batch.h5", "-o", f"{tmp_path}/exported/")
    assert h5traces.load(tmp_path / "exported" / "batch.pkl.gz")


# --- the same thing twice -----------------------------------------------------------------------


def test_an_archive_is_not_merged_twice(made: Path, tmp_path: Path) -> None:
    archive, copy = made / "batch.h5", tmp_path / "copy.h5"
    shutil.copyfile(archive, copy)
    link = tmp_path / "link.h5"
    link.symlink_to(archive)
    for other in (copy, link):
        for command in ("merge", "repack"):
            found = run(command, archive, other, "-o", tmp_path / "out.h5", code=2)
            assert f"{archive} and {other} are the same archive" in found.stderr
    found = run("merge", archive, archive, "-o", tmp_path / "out.h5", code=2)
    assert f"{archive} is named twice" in found.stderr
    assert not (tmp_path / "out.h5").exists()


def test_equal_samples_of_two_archives_are_named(made: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.h5", tmp_path / "second.h5"
    run("repack", made / "batch.h5", "-o", first, "--samples", "0:3")
    run("repack", made / "batch.h5", "-o", second, "--samples", "2:5")
    found = run("merge", first, second, "-o", tmp_path / "out.h5")
    sample_id = h5traces.open(made / "batch.h5").ids[2]
    assert "1 sample is stored twice, byte for byte" in found.stderr
    assert f"{sample_id!r} of {first} and {second}" in found.stderr
    assert len(h5traces.open(tmp_path / "out.h5")) == 6
    assert "stored twice" not in run("repack", first, "-o", tmp_path / "one.h5").stderr


def test_samples_that_differ_in_labels_or_types_only_are_named(tmp_path: Path) -> None:
    batch = make_batch("full_pkl", dtype="float32-from-float16", num_samples=3)
    makers = {
        "plain": ([dict(each) for each in batch], {}),
        "labelled": ([{**each, "label": 1} for each in batch[:2]], {}),
        "wide": ([dict(each) for each in batch[1:]], {"dtype": "float32"}),
        "other": (make_batch("full_pkl", num_samples=3, seed=5), {}),
    }
    paths = {}
    for name, (samples, options) in makers.items():
        source = write_batch(tmp_path / f"{name}.pkl", samples)
        paths[name] = tmp_path / f"{name}.h5"
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        run("convert", source, "-o", paths[name], *words)
    out = tmp_path / "out.h5"
    found = run("merge", paths["plain"], paths["labelled"], "-o", out)
    assert "2 samples are stored twice, with other labels, scores or texts: 'tc_0'" in found.stderr
    found = run("merge", paths["plain"], paths["wide"], "-o", out, "--overwrite")
    assert "2 samples are stored twice, with arrays of another type: 'tc_1'" in found.stderr
    assert f"of {paths['plain']} and {paths['wide']}" in found.stderr
    # Other generations of the same questions are no repetition.
    found = run("merge", paths["plain"], paths["other"], "-o", out, "--overwrite")
    assert "stored twice" not in found.stderr


def test_a_batch_is_not_merged_twice(made: Path, tmp_path: Path) -> None:
    batch, link = made / "batch.pkl", tmp_path / "link.pkl"
    link.symlink_to(batch)
    for other in (batch, link):
        found = run("convert", batch, other, "-o", tmp_path / "out.h5", "--merge", code=2)
        assert f"{batch} and {other} are one file" in found.stderr
    assert not (tmp_path / "out.h5").exists()


# --- messages name flags ------------------------------------------------------------------------


def test_an_existing_output_names_the_options_that_help(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "there.h5"
    target.write_text("mine")
    convert = run("convert", made / "batch.pkl", "-o", target, code=2).stderr
    assert "--overwrite" in convert
    assert "--skip-existing" in convert
    for words in (["repack"], ["merge"], ["export"], ["salvage"], ["calibrate"]):
        found = run(*words, made / "batch.h5", "-o", target, code=2).stderr
        assert "--overwrite" in found
        assert "skip" not in found
        assert "=True" not in found
    assert target.read_text() == "mine"


def test_a_path_is_no_option(made: Path, tmp_path: Path) -> None:
    odd = tmp_path / "dry_run" / "shard_samples"
    found = run("repack", odd / "head_mean.h5", "-o", tmp_path / "out.h5", code=2)
    assert str(odd / "head_mean.h5") in found.stderr


def test_layers_of_text(made: Path, tmp_path: Path) -> None:
    last = max(h5traces.open(made / "batch.h5").layers)
    for command, source in (("convert", "batch.pkl"), ("repack", "batch.h5")):
        target = tmp_path / f"{command}.h5"
        run(command, made / source, "-o", target, "--layers", "0,last")
        assert h5traces.open(target).layers == (0, last)
        found = run(command, made / source, "-o", tmp_path / "no.h5", "--layers", "x", code=2)
        assert "'x' is not a layer" in found.stderr
    run("calibrate", made / "batch.h5", "-o", tmp_path / "s.h5", "--layers", "last")
    found = run(
        "calibrate", made / "batch.pkl", "-o", tmp_path / "t.h5", "--layers", "last", "--json"
    )
    assert json.loads(found.stdout)["layers"] == [f"hidden_states/layer_{last:03d}"]


# --- what a cast changed ------------------------------------------------------------------------


def test_convert_says_what_the_cast_changed(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((3, 4), np.float32)
    weights = np.full((2, 3, 3), 0.25, np.float32)
    sample = {"hidden_states": [values, values], "attentions": [weights, weights]}
    batch = [{**sample, "tokens": np.arange(3), "tokens_decoded": list("abc")}]
    source = write_batch(tmp_path / "batch.pkl", batch)
    changed = 2 * int((values.astype(np.float16) != values).sum())
    assert changed > 10
    found = run("convert", source, "-o", tmp_path / "a.h5")
    assert f"a.h5: cast float32 -> float16 changed {changed} values" in found.stdout
    assert "lossless" not in found.stdout
    report = json.loads(run("convert", source, "-o", tmp_path / "b.h5", "--json").stdout)
    assert report["files"][0]["is_lossless"] is False
    for number, options in enumerate((["--dtype", "auto"], ["--dtype", "float32"])):
        found = run("convert", source, "-o", tmp_path / f"c{number}.h5", *options)
        assert "lossless: the archives hold every bit" in found.stdout
    assert "lossless: yes (every stored value)" in run("inspect", tmp_path / "c0.h5").stdout
    rest = "the 1 of 2 layers kept; the other layers are only in the source"
    options = ["--layers", "0"]
    found = run("convert", source, "-o", tmp_path / "e.h5", "--dtype", "auto", *options)
    assert f"lossless for {rest}" in found.stdout
    assert "every bit" not in found.stdout
    found = run("inspect", tmp_path / "e.h5")
    assert f"lossless: yes, for {rest}" in found.stdout
    found = run("convert", source, "-o", tmp_path / "f.h5", *options)
    assert f"holds {rest}" in found.stdout
    assert "lossless" not in found.stdout
    for name in ("a.pkl", "a32.h5"):
        found = run("export", tmp_path / "a.h5", "-o", tmp_path / "out" / name)
        told = f"values are those of the archive: cast float32 -> float16 changed {changed} values"
        assert told in found.stdout
    for name in ("b.pkl", "b32.h5"):
        found = run("export", tmp_path / "c0.h5", "-o", tmp_path / "out" / name)
        assert "cast" not in found.stdout
    half = ["--dtype", "float16"]
    found = run("export", tmp_path / "c0.h5", "-o", tmp_path / "out" / "b16.h5", *half)
    assert f"cast float32 -> float16 changed {changed} values" in found.stdout
    found = run("convert", source, "-o", tmp_path / "d.h5", "--tier", "native")
    assert "lossless" not in found.stdout
    assert "native (" in found.stdout


# --- what an earlier run left -------------------------------------------------------------------


def test_labels_never_replace_the_table_that_they_are_read_from(made: Path, tmp_path: Path) -> None:
    archive = Path(shutil.copy(made / "batch.h5", tmp_path / "a.h5"))
    table = Path(shutil.copy(made / "scores.csv", tmp_path / "a.h5.labels.json"))
    before = table.read_bytes()
    found = run("label", archive, table, "--partial", "--overwrite", code=2)
    assert table.name in found.stderr
    assert table.read_bytes() == before


def test_labels_of_a_replaced_archive_do_not_end_a_conversion(made: Path, tmp_path: Path) -> None:
    batch = Path(shutil.copy(made / "batch.pkl", tmp_path / "batch.pkl"))
    run("convert", batch, "-o", tmp_path / "a.h5")
    run("label", tmp_path / "a.h5", made / "scores.csv", "--partial")
    found = run("convert", batch, "-o", tmp_path / "a.h5", "--overwrite", "--json")
    assert json.loads(found.stdout)["files"][0]["status"] == "converted"


def test_shards_that_an_earlier_run_left_are_named(made: Path, tmp_path: Path) -> None:
    folder = f"{tmp_path}/shards/"
    run("split", made / "batch.h5", "-n", 2, "-o", folder)
    found = run("split", made / "batch.h5", "-n", 4, "-o", folder, "--overwrite")
    assert "batch-00002.h5: left by an earlier run" in " ".join(found.stderr.split())
    again = run("split", made / "batch.h5", "-n", 2, "-o", folder, "--overwrite")
    assert "left by an earlier run" not in again.stderr


def test_one_file_by_two_names_is_named_twice(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    for other in (Path("batch.h5"), "./batch.h5", made / "batch.h5"):
        with pytest.raises(h5traces.errors.OptionError, match="is named twice"):
            h5traces.merge(["batch.h5", other], made / "twice.h5")
    assert not (made / "twice.h5").exists()
