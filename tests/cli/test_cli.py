"""Every command: what it writes where, what it prints where, and how it ends."""

from __future__ import annotations

import gzip
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from commands import run
from legacy_batches import (
    LAYOUTS,
    as_dicts,
    assert_same,
    bits,
    in_float16,
    make_archive,
    make_batch,
    with_torch,
    write_batch,
    write_layout,
)

import h5traces
from h5traces.checking.validate import validate
from h5traces.cli.app import COMMANDS, load
from h5traces.format import native
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import hdf5_end
from h5traces.writing.options import PrecisionOptions

BATCH = make_batch("full_pkl")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    """A folder as the pipeline leaves it, with a subfolder."""
    folder = tmp_path / "traces"
    write_batch(folder / "run_batch_0000.pkl.gz", BATCH)
    write_batch(folder / "run_batch_0001.pkl.gz", make_batch("full_pkl", num_samples=3, seed=1))
    write_batch(folder / "old" / "run_batch_0000.pkl", make_batch("final_cut"))
    (folder / "notes.txt").write_text("no batch")
    return folder


# --- convert ------------------------------------------------------------------------------------


def test_convert_a_folder(batches: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "archives"
    result = run("convert", batches, "-o", f"{out}/")
    assert names(out) == ["old/run_batch_0000.h5", "run_batch_0000.h5", "run_batch_0001.h5"]
    assert_same(h5traces.load(out / "run_batch_0000.h5"), BATCH)
    assert result.stdout.count("converted") == 3
    assert "total" in result.stdout
    assert "350 MB bug" in result.stderr
    assert "350 MB bug" not in result.stdout


def test_convert_files_and_globs(batches: Path, tmp_path: Path) -> None:
    run(
        "convert", batches / "run_batch_0001.pkl.gz", f"{batches}/old/*.pkl", "-o", f"{tmp_path}/a/"
    )
    assert names(tmp_path / "a") == ["run_batch_0000.h5", "run_batch_0001.h5"]
    run("convert", f"{batches}/**/*.pkl*", "-o", f"{tmp_path}/b/", "--merge")
    assert names(tmp_path / "b") == ["traces.h5"]


def test_convert_to_a_named_archive(batches: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.h5"
    run("convert", batches / "run_batch_0000.pkl.gz", "-o", out)
    assert_same(h5traces.load(out), BATCH)
    result = run("convert", batches, "-o", tmp_path / "two.h5", code=2)
    assert "--merge" in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "two.h5").exists()


def test_convert_merges(batches: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.h5"
    run("convert", f"{batches}/*.gz", "-o", out, "--merge", "--model-id", "m", "--dataset", "d")
    expected = [*BATCH, *make_batch("full_pkl", num_samples=3, seed=1)]
    assert_same(h5traces.load(out), expected)
    archive = h5traces.open(out)
    assert archive.metadata.model_id == "m"
    assert archive.metadata.dataset == "d"
    assert [source.num_samples for source in archive.metadata.sources or ()] == [6, 3]
    assert archive[7].metadata.source is not None
    assert (archive[7].metadata.source.file, archive[7].metadata.source.position) == (1, 1)
    # Both batches name their samples alike, so the generation tells them apart.
    assert archive.by_id("tc_1", 1).ordinal == 7


def test_convert_shards(batches: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    run("convert", f"{batches}/*.gz", "-o", f"{out}/", "--merge", "--shard-samples", 4)
    assert names(out) == [f"traces-0000{number}.h5" for number in range(3)]
    assert [len(h5traces.open(path)) for path in sorted(out.iterdir())] == [4, 4, 1]
    expected = [*BATCH, *make_batch("full_pkl", num_samples=3, seed=1)]
    assert_same([trace.to_dict() for trace in h5traces.open(out)], expected)


def test_convert_layers_and_types(batches: Path, tmp_path: Path) -> None:
    source = write_batch(tmp_path / "a.pkl", make_batch("full_pkl", dtype="float32"))
    run("convert", source, "-o", tmp_path / "a.h5", "--layers", "0,2", "--dtype", "auto")
    archive = h5traces.open(tmp_path / "a.h5")
    assert archive.layers == (0, 2)
    assert archive[5]["hidden_states"][0].dtype == np.float32
    run("convert", source, "-o", tmp_path / "b.h5", "--layers", "1-2,0", "--dtype", "bfloat16")
    assert h5traces.open(tmp_path / "b.h5").layers == (0, 1, 2)
    result = run("convert", source, "-o", tmp_path / "c.h5", "--layers", "0,9", code=2)
    assert "layer 9 was asked for" in result.stderr
    for layers in ("x", "1,", "-1", "1-x", "1.5"):
        run("convert", source, "-o", tmp_path / "c.h5", "--layers", layers, code=2)
    run("convert", source, "-o", tmp_path / "c.h5", "--dtype", "float8", code=2)
    assert not (tmp_path / "c.h5").exists()


def test_convert_over_existing_archives(batches: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = batches / "run_batch_0000.pkl.gz"
    run("convert", first, "-o", f"{out}/")
    before = (out / "run_batch_0000.h5").read_bytes()

    result = run("convert", f"{batches}/*.gz", "-o", f"{out}/", code=2)
    assert "run_batch_0000.h5 exists; use --overwrite" in result.stderr
    assert (out / "run_batch_0000.h5").read_bytes() == before
    assert len(h5traces.open(out / "run_batch_0001.h5")) == 3

    (out / "run_batch_0001.h5").unlink()
    result = run("convert", f"{batches}/*.gz", "-o", f"{out}/", "--skip-existing")
    assert result.stdout.count("skipped") == 1
    assert (out / "run_batch_0000.h5").read_bytes() == before
    assert len(h5traces.open(out / "run_batch_0001.h5")) == 3

    both = run("convert", first, "-o", f"{out}/", "--overwrite", "--skip-existing", code=2)
    assert "--overwrite and --skip-existing contradict each other" in both.stderr
    (batches / "run_batch_0002.pkl").write_bytes(b"no pickle")  # a problem beside the targets
    run("convert", f"{batches}/run*", "-o", f"{out}/", code=1)

    run("convert", first, "-o", f"{out}/", "--overwrite", "--dtype", "float32")
    assert (out / "run_batch_0000.h5").read_bytes() != before
    assert h5traces.open(out / "run_batch_0000.h5")[0]["attentions"][0].dtype == np.float32
    assert all(name.endswith(".h5") for name in names(out))


def test_convert_dry_run(batches: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("convert", batches, "-o", f"{out}/", "--dry-run")
    assert result.stdout.count("planned") == 3
    assert not out.exists()
    target = make_archive(tmp_path, BATCH)
    result = run("convert", tmp_path / "batch.pkl", "-o", target, "--dry-run", code=2)
    assert "exists" in result.stderr


def test_convert_json(batches: Path, tmp_path: Path) -> None:
    (batches / "run_batch_0002.pkl.gz.part").write_bytes(b"half")
    (batches / "run_batch_0003.pkl").write_bytes(pickle.dumps(BATCH)[:-1000])
    result = run("convert", batches, "-o", f"{tmp_path}/out/", "--json", code=1)
    report = json.loads(result.stdout)
    assert report["ok"] is False
    assert [each["status"] for each in report["files"]].count("converted") == 3
    (failed,) = [each for each in report["files"] if each["status"] == "failed"]
    assert "truncated pickle" in failed["error"]
    (leftover,) = report["leftovers"]
    assert "unfinished write" in leftover["reason"]
    for each in report["files"]:
        if each["status"] == "converted":
            assert each["seconds"] > 0
            (target,) = each["targets"]
            assert each["archive_nbytes"] == Path(target).stat().st_size
            assert each["num_samples"] in (3, 6)
            assert each["raw_nbytes"]["hidden_states"] > 0


def test_convert_does_what_it_can(batches: Path, tmp_path: Path) -> None:
    part = batches / "run_batch_0002.pkl.gz.part"
    part.write_bytes(b"half")
    damaged = batches / "run_batch_0003.pkl.gz"
    damaged.write_bytes(gzip.compress(pickle.dumps(BATCH))[:-100])
    foreign = batches / "other.pkl"
    foreign.write_bytes(pickle.dumps(Path("/")))
    result = run("convert", batches, "-o", f"{tmp_path}/out/", code=1)
    assert names(tmp_path / "out") == [
        "old/run_batch_0000.h5",
        "run_batch_0000.h5",
        "run_batch_0001.h5",
    ]
    assert f"{part}: is an unfinished write" in result.stderr
    assert str(damaged) in result.stderr
    assert "truncated gzip file" in result.stderr
    assert str(foreign) in result.stderr
    assert "PosixPath" in result.stderr
    for path in (part, damaged, foreign):
        assert path.exists()


def test_merge_leaves_out_what_it_cannot_read(batches: Path, tmp_path: Path) -> None:
    damaged = batches / "run_batch_0000b.pkl"
    damaged.write_bytes(pickle.dumps(BATCH)[:-1000])
    result = run("convert", f"{batches}/run*", "-o", tmp_path / "all.h5", "--merge", code=1)
    assert "left out of the merge" in result.stderr
    assert len(h5traces.open(tmp_path / "all.h5")) == 9


def test_convert_usage(tmp_path: Path) -> None:
    assert (
        "nope.pkl" in run("convert", tmp_path / "nope.pkl", "-o", f"{tmp_path}/o/", code=2).stderr
    )
    assert "holds no batch" in run("convert", tmp_path, "-o", f"{tmp_path}/o/", code=2).stderr
    run("convert", tmp_path, code=2)
    run("convert", "-o", f"{tmp_path}/o/", code=2)
    run("convert", tmp_path, "-o", f"{tmp_path}/o/", "--shard-samples", 0, code=2)
    run("convert", tmp_path, "-o", f"{tmp_path}/o/", "--workers", 0, code=2)
    run("convert", tmp_path, "-o", f"{tmp_path}/o/", "--codec", "rar", code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--no-verify", "--workers=1", "--verify"])
def test_convert_options_change_no_number(batches: Path, tmp_path: Path, option: str) -> None:
    run("convert", batches / "run_batch_0000.pkl.gz", "-o", tmp_path / "a.h5", option)
    assert_same(h5traces.load(tmp_path / "a.h5"), BATCH)


# --- inspect ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_batch_and_archive_alike(tmp_path: Path, layout: str) -> None:
    made = make_batch(layout)
    for trace in made if isinstance(made, list) else ():
        for name in ("generated_answer_clean", "generated_answer", "generated_text"):
            # No stream takes lone surrogates.
            trace[name] = trace.get(name, "").replace("\ud83d", "")
    source = write_layout(tmp_path, layout, made)
    run("convert", source, "-o", tmp_path / "a.h5")
    found = {}
    for path in (source, tmp_path / "a.h5"):
        result = run("inspect", path, "--num-samples", "all", "--json")
        (found[path.suffix == ".h5"],) = json.loads(result.stdout)
        assert result.stderr == ""
    batch, archive = found[False], found[True]
    assert (batch["container"], archive["container"]) == ("pickle", "archive")
    for name in ("num_samples", "layers", "lengths", "coverage", "samples"):
        assert batch[name] == archive[name], name
    assert batch["num_samples"] == 6
    expected = as_dicts(made)
    for sample, trace in zip(batch["samples"], expected, strict=True):
        assert sample["fields"] == list(trace)
        assert sample["problems"] == []
        first = trace["hidden_states"][0]
        if isinstance(first, np.ndarray):
            assert sample["arrays"][0]["shape"] == list(first.shape)
            finite = first[np.isfinite(first)]
            assert sample["arrays"][0]["minimum"] == finite.min()
            assert sample["arrays"][0]["maximum"] == finite.max()
            assert sample["arrays"][0]["num_nan"] == np.isnan(first).sum()
            assert sample["arrays"][0]["num_inf"] == np.isinf(first).sum()


def test_inspect_for_people(batches: Path, tmp_path: Path) -> None:
    run("convert", batches, "-o", f"{tmp_path}/out/")
    result = run("inspect", tmp_path / "out", batches / "run_batch_0000.pkl.gz")
    assert result.stdout.count("samples: 6") == 3
    assert "Hidden states: shape=(6, 8), dtype=float16 in every layer" in result.stdout
    assert "Attentions: shape=(2, 6, 6)" in result.stdout
    assert "layer_002" in result.stdout
    assert "final_norm" in result.stdout
    assert result.stderr == ""


def test_inspect_shows_contradictions(tmp_path: Path) -> None:
    batch = [dict(BATCH[5])]
    batch[0]["hidden_states"] = [*batch[0]["hidden_states"][:2], np.ones((2, 8), np.float16)]
    source = write_batch(tmp_path / "a.pkl", batch)
    result = run("inspect", source, code=1)
    assert "layer_002: shape (2, 8) has 2 on the token axis" in result.stdout


def test_inspect_goes_on_after_an_error(batches: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.h5"
    bad.write_bytes(b"no HDF5")
    result = run("inspect", bad, batches / "run_batch_0001.pkl.gz", code=1)
    assert f"error: {bad}" in result.stderr
    assert "samples: 3" in result.stdout
    run("inspect", tmp_path / "nope.h5", code=2)
    run("inspect", batches, "--num-samples", "some", code=2)


# --- ls, validate, seal -------------------------------------------------------------------------


def test_ls(tmp_path: Path) -> None:
    batch = [{**trace, "label": index % 2} for index, trace in enumerate(BATCH)]
    archive = make_archive(tmp_path, batch)
    result = run("ls", archive)
    lines = result.stdout.splitlines()
    assert len(lines) == 7
    assert "tc_3" in lines[4]
    rows = json.loads(run("ls", archive, "--json").stdout)
    assert [row["sample_id"] for row in rows] == [f"tc_{number}" for number in range(6)]
    assert [row["label"] for row in rows] == [0, 1, 0, 1, 0, 1]
    assert [row["seq_len"] for row in rows] == [len(trace["tokens"]) for trace in BATCH]
    run("ls", tmp_path / "nope.h5", code=2)
    result = run("ls", tmp_path / "batch.pkl", code=1)
    assert "error:" in result.stderr
    assert result.stdout == ""


def test_head(tmp_path: Path) -> None:
    batch = [{**BATCH[0], "question": "Why?\nReally?", "label": 1}, *BATCH[1:]]
    archive = make_archive(tmp_path, batch)
    lines = run("head", archive, "-n", "2").stdout.splitlines()
    assert lines[0] == f"0: tc_0, {len(BATCH[0]['tokens'])} tokens, label 1"
    assert lines[1:3] == ["  question: Why?", "    Really?"]
    assert [each.split(",")[0] for each in lines if not each.startswith(" ")] == [
        "0: tc_0",
        "1: tc_1",
    ]
    rows = json.loads(run("head", archive, "--json").stdout)
    assert [row.get("question") for row in rows] == [batch[0]["question"], None, None]
    for row, trace in zip(rows, batch, strict=False):
        assert row["generated_answer_clean"] == trace["generated_answer_clean"]
    assert rows[0]["label"] == 1
    run("head", archive, "-n", "0", code=2)


def test_validate(tmp_path: Path) -> None:
    good = make_archive(tmp_path / "good", BATCH)
    bad = make_archive(tmp_path / "bad", BATCH)
    with h5py.File(bad, "a") as file:
        file["samples/00000002"].attrs["unknown"] = np.int64(1)
        file["samples/00000002/hidden_states/layer_001"].attrs["site"] = np.bytes_("moon")
    assert "valid" in run("validate", good).stdout
    result = run("validate", good, bad, code=1)
    assert f"{bad}: note: /samples/00000002: attribute 'unknown' is not of the" in result.stdout
    assert "[wrong_site]" in result.stdout
    assert re.search(
        rf"{re.escape(str(good))}: valid, with \d+ warnings? \(6 samples", result.stdout
    )
    reports = json.loads(run("validate", bad, "--json", code=1).stdout)
    kinds = {(each["loc"], each["kind"]) for each in reports[0]["problems"]}
    assert ("/samples/00000002/hidden_states/layer_001", "wrong_site") in kinds
    assert "attribute 'unknown'" in reports[0]["notes"][-1]
    assert json.loads(run("validate", good, "--json").stdout)[0]["ok"] is True
    run("validate", tmp_path / "nope.h5", code=2)


def test_seal(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, BATCH)
    archive.write_bytes(archive.read_bytes()[: hdf5_end(LocalFile(archive))])
    size = archive.stat().st_size
    assert "would seal it, 6 samples" in run("seal", archive, "--dry-run").stdout
    assert archive.stat().st_size == size
    result = run("ls", archive)
    assert "h5traces seal" in result.stderr
    assert "h5traces seal" not in result.stdout
    assert f"{archive.name}: sealed, 6 samples" in run("seal", archive).stdout
    assert run("ls", archive).stderr == ""
    assert_same(h5traces.load(archive), BATCH)


@pytest.mark.parametrize("tier", ["exact", "fine"])
def test_seal_leaves_a_sealed_archive_alone(tmp_path: Path, tier: str) -> None:
    archive = make_archive(tmp_path, BATCH, precision=PrecisionOptions.of(tier))
    before, stat = archive.read_bytes(), archive.stat()
    for more in ([], ["--dry-run"], ["--accept-edits"]):
        found = run("seal", archive, *more).stdout
        assert f"{archive.name}: already sealed, 6 samples" in found
    assert archive.read_bytes() == before
    assert archive.stat().st_mtime_ns == stat.st_mtime_ns


def test_seal_refuses_edits(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, BATCH)
    with h5py.File(archive, "a") as file:
        file["samples/00000001/tokens"][0] = 9
    result = run("seal", archive, code=1)
    assert "/samples/00000001/tokens was changed" in result.stderr
    assert "--accept-edits" in result.stderr
    report = json.loads(run("seal", archive, "--json", code=1).stdout)
    assert report[0]["edited"] == ["/samples/00000001/tokens"]
    assert report[0]["sealed"] is False
    run("seal", archive, "--accept-edits")
    assert h5traces.open(archive)[1]["tokens"][0] == 9


# --- export -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pkl", ".pkl.gz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_a_pickle_that_anybody_can_load(tmp_path: Path, layout: str, suffix: str) -> None:
    run("convert", write_layout(tmp_path, layout), "-o", tmp_path / "a.h5")
    out = tmp_path / f"back{suffix}"
    run("export", tmp_path / "a.h5", "-o", out)
    data = out.read_bytes()
    loaded = pickle.loads(gzip.decompress(data) if suffix.endswith("gz") else data)
    assert_same(loaded, as_dicts(make_batch(layout)))
    run("convert", out, "-o", tmp_path / "again.h5")
    assert_same(h5traces.load(tmp_path / "again.h5"), loaded)


def test_export_tensors(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    batch = with_torch(BATCH, "bfloat16")
    archive = make_archive(tmp_path, batch, dtype="auto")
    run("export", archive, "-o", tmp_path / "tensors.pkl")
    assert_same(pickle.loads((tmp_path / "tensors.pkl").read_bytes()), batch)
    run("export", archive, "-o", tmp_path / "arrays.pkl", "--numpy")
    arrays = pickle.loads((tmp_path / "arrays.pkl").read_bytes())
    expected = batch[5]["hidden_states"][0].float().numpy()
    assert_same(arrays[5]["hidden_states"][0], expected)


@pytest.mark.parametrize("layout", ["full_pkl", "step_min", "final_cut", "container_dict"])
def test_export_float32_for_viewers(tmp_path: Path, layout: str) -> None:
    run("convert", write_layout(tmp_path, layout), "-o", tmp_path / "a.h5")
    run("export", tmp_path / "a.h5", "-o", tmp_path / "wide.h5")
    assert validate(tmp_path / "wide.h5").ok
    types = set()

    def visit(name: str, each: Any) -> None:
        if isinstance(each, h5py.Dataset) and "/layer_" in name:
            types.add(each.dtype.name)

    with h5py.File(tmp_path / "wide.h5", "r") as file:
        file.visititems(visit)
    assert types == {"float32"}
    wide, narrow = (h5traces.load(tmp_path / name) for name in ("wide.h5", "a.h5"))
    assert_same([in_float16(trace) for trace in wide], narrow)
    assert h5traces.open(tmp_path / "wide.h5").ids == h5traces.open(tmp_path / "a.h5").ids


def test_export_shards_and_subsets(tmp_path: Path) -> None:
    source = write_batch(tmp_path / "a.pkl", BATCH)
    run("convert", source, "-o", f"{tmp_path}/s/", "--shard-samples", 4, "--layers", "0,2")
    run("export", tmp_path / "s", "-o", tmp_path / "all.pkl")
    loaded = pickle.loads((tmp_path / "all.pkl").read_bytes())
    assert [len(trace["hidden_states"]) for trace in loaded] == [2] * 6
    assert_same(loaded[5]["attentions"][1], BATCH[5]["attentions"][2])
    run("export", tmp_path / "s", "-o", tmp_path / "all.h5", "--dtype", "float16")
    archive = h5traces.open(tmp_path / "all.h5")
    assert archive.layers == (0, 2)
    assert archive.metadata.num_layers == 3
    assert bits(archive[4].layer(2)) == bits(BATCH[4]["hidden_states"][2])
    assert validate(tmp_path / "all.h5").ok


def test_export_usage(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, BATCH)
    assert ".pkl or .h5" in run("export", archive, "-o", tmp_path / "a.xyz", code=2).stderr
    assert "name a folder" in run("export", archive, "-o", tmp_path / "a.npz", code=2).stderr
    run("export", archive, "-o", tmp_path / "a.pkl", "--dtype", "float32", code=2)
    run("export", tmp_path / "nope.h5", "-o", tmp_path / "a.pkl", code=2)
    assert "would write" in run("export", archive, "-o", tmp_path / "a.pkl", "--dry-run").stdout
    assert names(tmp_path) == ["batch.h5", "batch.pkl"]
    before = archive.read_bytes()
    assert "exists" in run("export", archive, "-o", tmp_path / "batch.pkl", code=2).stderr
    run("export", archive, "-o", tmp_path / "batch.pkl", "--overwrite")
    assert_same(pickle.loads((tmp_path / "batch.pkl").read_bytes()), BATCH)
    assert archive.read_bytes() == before


# --- the program --------------------------------------------------------------------------------


def test_the_list_of_commands() -> None:
    listed = run("--help").stdout
    assert run("-h").stdout == listed
    for name, entry in COMMANDS.items():
        function = load(name).callback
        assert function.__name__ == name
        assert inspect.getdoc(function).splitlines()[0] == entry.summary
        assert re.search(rf"{name} +{re.escape(entry.summary[:40])}", listed)
    run(code=2)
    run("nonsense", code=2)


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_fits_80_columns(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run(*([] if name is None else [name]), "--help").stdout
    assert max(map(len, text.splitlines())) <= 80
    words = set(re.findall(r"-[-\w]+", text))
    parameters = [] if name is None else load(name).params
    options = {each for one in parameters for each in (*one.opts, *one.secondary_opts)}
    assert {each for each in options if each[0] == "-"} | {"--help", "-h"} <= words


def loaded(argv: list[str], names: set[str], **environment: str) -> tuple[str, str]:
    """What a run of the program prints, and which of these modules it has imported then."""
    code = (
        f"import sys; from h5traces.cli import main; sys.argv = {argv}\n"
        "try:\n    main()\nexcept SystemExit:\n"
        f"    print(*sorted({names} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return done.stdout, done.stderr.strip()


def test_the_list_of_commands_is_light() -> None:
    """Neither for help nor for completion is the module of a command imported."""
    heavy = {"numpy", "h5py", "h5traces.format.archive", "h5traces.cli.converting"}
    assert loaded(["h5traces", "--help"], {"pydantic", *heavy})[1] == ""
    words = {"_H5TRACES_COMPLETE": "complete_bash", "COMP_WORDS": "h5traces ver", "COMP_CWORD": "1"}
    # typer itself imports pydantic here.
    completed, modules = loaded(["h5traces"], heavy, **words)
    assert completed.split() == ["verify"]
    assert modules == ""


def test_version() -> None:
    expected = f"h5traces {h5traces.__version__} (format 1.0), {native.describe()}\n"
    assert run("--version").stdout == expected


def test_the_installed_program(tmp_path: Path) -> None:
    """Once as users run it: real exit codes, real streams."""
    source = write_batch(tmp_path / "a.pkl", BATCH)
    program = [sys.executable, "-c", "from h5traces.cli import main; main()"]
    done = subprocess.run(
        [*program, "convert", source, tmp_path / "bad.pkl", "-o", f"{tmp_path}/out/", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    done = subprocess.run(
        [*program, "convert", source, "-o", f"{tmp_path}/out/", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    assert "NaN" in done.stderr
    piped = subprocess.run(
        f"{sys.executable} -c 'from h5traces.cli import main; main()' "
        f"ls {tmp_path / 'out' / 'a.h5'} --json | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert piped.stdout == "["
    assert "Traceback" not in piped.stderr


@pytest.mark.parametrize("command", [["ls"], ["ls", "--json"], ["head"], ["inspect"], ["validate"]])
def test_a_file_does_not_steer_the_terminal(tmp_path: Path, command: list[str]) -> None:
    """`ls` wrote escape sequences of a sample's id as they are."""
    odd = "\x1b]0;title\x07\x1b[31mred\x9b2J\u202eesrever\nFAKE LINE"
    trace = {"hidden_states": [np.ones((2, 3), "f2")], "question_id": odd, odd: 1}
    archive = make_archive(tmp_path, [trace], name="odd.pkl")
    result = run(*command, archive)
    assert not set("\x1b\x07\x9b\u202e") & set(result.output)
    assert not any(line.startswith("FAKE") for line in result.output.splitlines()), result.output
    if "--json" in command:
        assert json.dumps(odd, ensure_ascii=False)[1:-1] in json.dumps(
            json.loads(result.stdout), ensure_ascii=False
        )
    elif command == ["ls"]:
        assert "\\u001b[31mred\\u009b2J\\u202eesrever\\nFAKE LINE" in result.stdout


def test_tokens_in_a_list_are_counted(tmp_path: Path) -> None:
    batch = [{**BATCH[0], "tokens": BATCH[0]["tokens"].tolist()}]
    archive = make_archive(tmp_path, batch)
    length = len(BATCH[0]["tokens"])
    for path in (archive, archive.with_suffix(".pkl")):
        assert f"tokens: {length}, decoded: {length}" in run("inspect", path).stdout


def test_an_empty_batch_has_no_ratio(tmp_path: Path) -> None:
    (tmp_path / "empty.pkl").write_bytes(pickle.dumps([]))
    found = run("convert", tmp_path / "empty.pkl", "-o", tmp_path / "empty.h5").stdout
    assert "0 samples" in found
    assert not re.search(r"[0-9]\.[0-9]{3}", found)


def test_another_source_is_told_by_sample(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, BATCH)
    other = tmp_path / "other.pkl"
    changed = [{**each, "hidden_states": [-x for x in each["hidden_states"]]} for each in BATCH]
    other.write_bytes(pickle.dumps(changed))
    lines = run("verify", archive, "--against", other, code=1).stdout.splitlines()
    assert sum("differs_from_source" in each for each in lines) == len(BATCH)
    num_layers = len(BATCH[0]["hidden_states"])
    assert lines[0].endswith(f"[differs_from_source] and {num_layers - 1} more")
    (report,) = json.loads(run("verify", archive, "--against", other, "--json", code=1).stdout)
    assert len(report["problems"]) == len(BATCH) * num_layers
