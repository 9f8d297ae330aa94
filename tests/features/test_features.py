"""Features of archives: in memory, in files of three kinds, and what cannot have any."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import run
from legacy_batches import ZERO_TOKENS, make_archive, make_batch
from sklearn.decomposition import PCA
from typer.testing import CliRunner

import h5traces
from h5traces.cli.app import app
from h5traces.errors import (
    ArchiveExistsError,
    FeatureError,
    H5TracesError,
    LayerIndexError,
    TargetError,
)
from h5traces.features import (
    FEATURES,
    PcaOptions,
    compute_features,
    extract_features,
    fit_pca,
    iterate_features,
    lookback_ratio,
    max_pooled,
    mean_pooled,
    row_entropy,
    sink_mass,
)
from h5traces.rewriting.label import label
from h5traces.rewriting.repack import repack
from h5traces.writing.options import TargetOptions

if TYPE_CHECKING:
    from pathlib import Path

TWO = TargetOptions(workers=2)
OVERWRITE = TargetOptions(overwrite=True)

LAYERS, HEADS, HIDDEN = 4, 2, 12
PROMPT = 3
ALL = list(FEATURES)


def batch(num_samples: int = 10, seed: int = 0, **change: Any) -> list[dict[str, Any]]:
    """Traces of which everything is known."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(num_samples):
        tokens = PROMPT + 2 + int(rng.integers(0, 5))
        weights = rng.random((LAYERS, HEADS, tokens, tokens)) * np.tri(tokens)
        weights /= weights.sum(-1, keepdims=True)
        found.append(
            {
                "hidden_states": list(
                    rng.standard_normal((LAYERS, tokens, HIDDEN)).astype(np.float16)
                ),
                "attentions": list(weights.astype(np.float16)),
                "tokens": rng.integers(0, 100, tokens),
                "question_id": f"q{seed}_{index}",
                "prompt_length": PROMPT,
                **change,
            }
        )
    return found


BATCH = batch()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return make_archive(tmp_path, BATCH, name="run.pkl")


def expected_features(traces: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What the functions of arrays give, sample by sample and layer by layer."""
    states = {
        "last_token": lambda each: each[-1].astype(np.float32),
        "mean": mean_pooled,
        "max": max_pooled,
        "answer_mean": lambda each: mean_pooled(each[PROMPT:]),
        "answer_max": lambda each: max_pooled(each[PROMPT:]),
    }
    weights = {
        "attention_entropy": row_entropy,
        "sink_mass": sink_mass,
        "lookback_ratio": lambda each: lookback_ratio(each, PROMPT),
    }
    kinds = {"hidden_states": states, "attentions": weights}
    return {
        name: np.stack([np.stack([reduce(each) for each in trace[kind]]) for trace in traces])
        for kind, found in kinds.items()
        for name, reduce in found.items()
    }


# --- over an archive ------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 7, None])
def test_features_of_an_archive(archive: Path, workers: int | None) -> None:
    found = compute_features(h5traces.open(archive), ALL, workers=workers)
    expected = expected_features(BATCH)
    assert list(found) == ALL
    for name in ALL:
        width = HIDDEN if FEATURES[name].is_state else HEADS
        assert found[name].shape == (len(BATCH), LAYERS, width)
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], expected[name], name)


def test_layers_and_views(archive: Path) -> None:
    opened = h5traces.open(archive)
    expected = expected_features(BATCH)["mean"]
    np.testing.assert_array_equal(
        compute_features(opened[3:7], ["mean"], layers=[0, 2])["mean"], expected[3:7][:, [0, 2]]
    )
    with pytest.raises(LayerIndexError, match="layer 9 was asked for"):
        compute_features(opened, ["mean"], layers=[9])


def test_rows_come_one_by_one(archive: Path) -> None:
    rows = iterate_features(h5traces.open(archive), ["last_token"], workers=2)
    first = next(rows)
    assert first.index == 0
    assert first.problems == []
    assert [each.index for each in rows] == list(range(1, 10))


def test_components_of_all_tokens(archive: Path) -> None:
    opened = h5traces.open(archive)
    found = fit_pca(opened, 2, 3, indices=range(8))
    tokens = np.concatenate([trace["hidden_states"][2] for trace in BATCH[:8]])
    expected = PCA(3, svd_solver="full").fit(tokens.astype(np.float64))
    assert found.num_rows == len(tokens)
    np.testing.assert_allclose(found.explained_variance, expected.explained_variance_, rtol=1e-9)
    overlap = np.abs(np.sum(found.components * expected.components_, axis=1))
    np.testing.assert_allclose(overlap, 1, atol=1e-9)


# --- in a file ------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of features, with stock readers."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file)
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            found: dict[str, np.ndarray] = {"layers": file["layers"][:]}
            for group in ("features", "samples"):
                found |= {name: each[:] for name, each in file[group].items()}
        return {
            name: np.array([each.decode() for each in values])
            if values.dtype.kind == "S"
            else values
            for name, values in found.items()
        }
    table = pq.read_table(path)
    facts = json.loads(table.schema.metadata[b"h5traces"])
    found = {"layers": np.array(facts["layers"])}
    for name in table.column_names:
        values = table[name].to_pylist()
        shape = facts["shapes"].get(name)
        found[name] = np.array(values)
        if shape is not None:
            found[name] = np.array(values, np.float32).reshape(-1, *shape)
    return found


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".parquet"])
def test_files_hold_the_same(archive: Path, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"features{suffix}"
    report = extract_features(archive, target, ALL, layers=[1, 3])
    assert report.num_samples == 10
    assert report.nbytes == target.stat().st_size
    found = read(target)
    for name, expected in expected_features(BATCH).items():
        np.testing.assert_array_equal(found[name], expected[:, [1, 3]], name)
        assert report.shapes[name] == list(found[name].shape)
    assert found["layers"].tolist() == [1, 3]
    assert found["sample_id"].tolist() == [each["question_id"] for each in BATCH]
    assert found["index"].tolist() == list(range(10))
    assert set(found["archive"].tolist()) == {"run.h5"}
    assert found["prompt_len"].tolist() == [PROMPT] * 10
    assert found["seq_len"].tolist() == [len(each["tokens"]) for each in BATCH]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".parquet"])
def test_labels_and_scores_lie_beside(archive: Path, tmp_path: Path, suffix: str) -> None:
    table = tmp_path / "scores.csv"
    rows = [f"q0_{index},{index / 10}" for index in range(9)]
    table.write_text("\n".join(["question_id,bleurt_score", *rows]), encoding="utf-8")
    label(archive, table, partial=True)
    report = extract_features(archive, tmp_path / f"f{suffix}", ["last_token"])
    assert report.num_labelled == 9
    found = read(tmp_path / f"f{suffix}")
    expected = [1] * 5 + [0] * 4
    assert found["label"].tolist()[:9] == expected
    # Never 0 where there is none.
    if suffix == ".parquet":
        assert found["label"].tolist()[9] is None
    else:
        assert found["has_label"].tolist() == [1] * 9 + [0]
        assert found["label"].tolist()[9] == -(2**63)
    np.testing.assert_array_equal(found["score_bleurt"][:9], np.arange(9) / 10)
    assert np.isnan(found["score_bleurt"].astype(float)[9])


def test_shards_tell_rows_apart(archive: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    repack(archive, shards / "run.h5", target=TargetOptions(shard_samples=4))
    extract_features(shards, tmp_path / "f.npz", ["mean"])
    found = read(tmp_path / "f.npz")
    np.testing.assert_array_equal(found["mean"], expected_features(BATCH)["mean"])
    assert found["archive"].tolist()[3:5] == ["run-00000.h5", "run-00001.h5"]
    assert found["index"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("suffix", [".h5", ".npz"])
def test_components_by_layer(archive: Path, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"f{suffix}"
    report = extract_features(
        archive, target, ["last_token", "sink_mass"], pca=PcaOptions(2, slice(0, 7), only=True)
    )
    found = read(target)
    assert "last_token" not in found
    assert "sink_mass" in found
    values = expected_features(BATCH)["last_token"].astype(np.float64)
    for layer in range(LAYERS):
        fitted = PCA(2, svd_solver="full").fit(values[:7, layer])
        expected = fitted.transform(values[:, layer])
        np.testing.assert_allclose(
            np.abs(found["last_token_pca"][:, layer]), np.abs(expected), atol=1e-4
        )
        assert report.explained["last_token"][layer] == pytest.approx(
            fitted.explained_variance_ratio_.sum(), abs=1e-5
        )
    if suffix == ".h5":
        with h5py.File(target) as file:
            assert file["pca/last_token/components"].shape == (LAYERS, 2, HIDDEN)
            assert file["pca/last_token/mean"].shape == (LAYERS, HIDDEN)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Of 24 MB of features, hardly more than a few samples are ever in memory."""
    traces = [
        {
            "hidden_states": [np.full((2, 4096), index % 7, np.float16) for _ in range(8)],
            "question_id": f"q{index}",
        }
        for index in range(180)
    ]
    archive = make_archive(tmp_path, traces, name="wide.pkl")
    del traces
    extract_features(archive, tmp_path / "warm.h5", ["last_token"], layers=[0], target=TWO)
    tracemalloc.start()
    extract_features(archive, tmp_path / "f.h5", ["last_token"], target=TWO)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["features/last_token"].size * 4 == 180 * 8 * 4096 * 4
    assert most < 16e6


# --- what cannot be computed ----------------------------------------------------------------------


def with_nan(tmp_path: Path) -> Path:
    traces = batch(6)
    traces[4]["hidden_states"][2][-1, 3] = np.nan
    traces[5]["attentions"][1][0, -1, 0] = np.inf
    return make_archive(tmp_path, traces, name="nan.pkl")


def test_nan_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    archive, target = with_nan(tmp_path), tmp_path / "f.h5"
    with pytest.raises(FeatureError) as caught:
        extract_features(archive, target, ["last_token", "sink_mass"])
    said = str(caught.value)
    assert f"{archive}: /samples/00000004 ('q0_4'): last_token of layers [2]" in said
    assert f"{archive}: /samples/00000005 ('q0_5'): sink_mass of layers [1]" in said
    assert "allow_nan=True" in said
    assert not target.exists()
    assert not list(tmp_path.glob("*.part"))


def test_nan_is_written_on_request(tmp_path: Path) -> None:
    archive, target = with_nan(tmp_path), tmp_path / "f.npz"
    report = extract_features(archive, target, ["last_token"], allow_nan=True, pca=2)
    assert len(report.problems) == 1
    found = read(target)
    assert np.argwhere(np.isnan(found["last_token"])).tolist() == [[4, 2, 3]]
    # Components are fitted on the other rows; what is projected on them is NaN there, too.
    assert np.unique(np.argwhere(np.isnan(found["last_token_pca"]))[:, :2], axis=0).tolist() == [
        [4, 2]
    ]
    with pytest.raises(FeatureError, match=r"/samples/00000004.*layer 2 holds NaN"):
        fit_pca(h5traces.open(archive), 2, 2)


def test_samples_without_arrays(tmp_path: Path) -> None:
    traces = batch(5)
    for index in (0, 3):
        traces[index]["hidden_states"] = []
        traces[index]["attentions"] = []
    archive = make_archive(tmp_path, traces, name="some.pkl")
    with pytest.raises(FeatureError, match=r"/samples/00000000.*mean of all layers"):
        extract_features(archive, tmp_path / "f.h5", ["mean"])
    report = extract_features(archive, tmp_path / "f.h5", ["mean"], allow_nan=True)
    assert len(report.problems) == 2
    found = read(tmp_path / "f.h5")["mean"]
    assert np.isnan(found).all(axis=(1, 2)).tolist() == [True, False, False, True, False]
    both = compute_features(h5traces.open(archive), ["mean"])["mean"]
    np.testing.assert_array_equal(found, both)


def test_an_archive_without_arrays(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, batch(2, hidden_states=[], attentions=[]), name="none.pkl")
    with pytest.raises(FeatureError, match="no layer is stored"):
        extract_features(archive, tmp_path / "f.h5", ["mean"])


def test_legacy_layouts(tmp_path: Path) -> None:
    full = make_batch("full_pkl")
    found = compute_features(
        h5traces.open(make_archive(tmp_path, full, name="full.pkl")), ["last_token", "mean"]
    )
    assert found["last_token"].shape[0] == len(full)
    steps = make_archive(tmp_path, make_batch("step_min"), name="steps.pkl")
    with pytest.raises(FeatureError, match=r"steps\.h5: /samples/0000000\d .*generation steps"):
        compute_features(h5traces.open(steps), ["mean"])
    bug = h5traces.open(make_archive(tmp_path, make_batch("final_cut"), name="bug.pkl"))
    found = compute_features(bug[ZERO_TOKENS + 1 :], ["last_token", "attention_entropy"])
    assert found["last_token"].shape[1] == len(bug.layers)


def test_a_prompt_that_nobody_knows(tmp_path: Path) -> None:
    traces = batch(3)
    del traces[1]["prompt_length"]
    archive = make_archive(tmp_path, traces, name="run.pkl")
    for name in ("answer_mean", "answer_max", "lookback_ratio"):
        with pytest.raises(FeatureError, match=rf"/samples/00000001.*{name}"):
            compute_features(h5traces.open(archive), [name])
    assert compute_features(h5traces.open(archive), ["mean"])["mean"].shape[0] == 3


def test_layers_of_other_widths(tmp_path: Path) -> None:
    traces = batch(2)
    traces[1]["hidden_states"][2] = traces[1]["hidden_states"][2][:, :5]
    archive = make_archive(tmp_path, traces, name="run.pkl")
    with pytest.raises(FeatureError, match=r"/samples/00000001.*differ in width \(\[5, 12\]\)"):
        extract_features(archive, tmp_path / "f.h5", ["mean"])
    traces[1]["hidden_states"] = [each[:, :5] for each in BATCH[1]["hidden_states"]]
    archive = make_archive(tmp_path, traces, name="other.pkl")
    with pytest.raises(FeatureError, match=r"/samples/00000001.*width 5, other samples have 12"):
        extract_features(archive, tmp_path / "f.h5", ["mean"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"names": ["median"]}, "no feature is called median; there are last_token"),
        ({"names": []}, "no feature is named"),
        ({"names": ["sink_mass"], "pca": 2}, "principal components are of hidden states"),
        ({"names": ["mean"], "pca": 10}, "10 components were asked for, but 10 rows"),
        ({"names": ["mean"], "output": "f.csv"}, r"f\.csv is neither .* ending in \.h5 or \.npz"),
        ({"names": ["mean"], "pca": PcaOptions(2, "3,x")}, "'3,x' names no samples"),
        ({"names": ["mean"], "pca": PcaOptions(2, [10])}, "sample 10 was asked for"),
    ],
)
def test_what_is_asked_for_wrongly(
    archive: Path, tmp_path: Path, options: dict[str, Any], expected: str
) -> None:
    output = tmp_path / options.pop("output", "f.h5")
    with pytest.raises(H5TracesError, match=expected):
        extract_features(archive, output, **options)
    assert not output.exists()


def test_nothing_is_overwritten(archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "f.h5"
    target.write_bytes(b"mine")
    with pytest.raises(ArchiveExistsError, match="overwrite=True"):
        extract_features(archive, target, ["mean"])
    assert target.read_bytes() == b"mine"
    extract_features(archive, target, ["mean"], target=OVERWRITE)
    assert "mean" in read(target)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
def test_a_source_is_never_overwritten(
    archive: Path, tmp_path: Path, link: str | None, overwrite: bool
) -> None:
    target = archive
    if link is not None:
        target = tmp_path / "other.h5"
        getattr(target, link)(archive)
    before = archive.read_bytes()
    with pytest.raises(TargetError, match=rf"{target}.* is one of the sources"):
        extract_features(
            tmp_path / "run.h5", target, ["mean"], target=TargetOptions(overwrite=overwrite)
        )
    flags = ["--overwrite"] if overwrite else []
    failed = run("features", archive, "--last-token", "-o", target, *flags, code=2)
    assert "is one of the sources" in failed.stderr
    assert archive.read_bytes() == before
    assert len(h5traces.open(archive)) == len(BATCH)


def test_labels_are_never_overwritten(archive: Path, tmp_path: Path) -> None:
    table = tmp_path / "scores.csv"
    table.write_text("question_id,bleurt_score\nq0_4,0.1\n", encoding="utf-8")
    label(archive, table, partial=True)
    (tmp_path / "f.h5").hardlink_to(tmp_path / "run.h5.labels.json")
    with pytest.raises(TargetError, match=r"f\.h5, the same file as .*run\.h5\.labels\.json,"):
        extract_features(archive, tmp_path / "f.h5", ["mean"], target=OVERWRITE)


@pytest.mark.parametrize("folder", ["new/", "old"])
def test_a_folder_gets_a_file(archive: Path, tmp_path: Path, folder: str) -> None:
    (tmp_path / "old").mkdir()
    report = extract_features(archive, f"{tmp_path}/{folder}", ["mean"])
    assert report.target == str(tmp_path / folder / "features.h5")
    assert "mean" in read(tmp_path / folder / "features.h5")


def test_a_missing_library_is_named(archive: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from h5traces.features import extract_features\n"
        f"extract_features({str(archive)!r}, {str(tmp_path / 'f.parquet')!r}, ['mean'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingDependencyError" in done.stderr
    assert ".parquet needs pyarrow, which is not installed; pip install" in done.stderr


# --- the command ----------------------------------------------------------------------------------


def test_the_command(archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "f.parquet"
    options = ["--last-token", "--pooled", "mean,answer_max", "--attention", "entropy,lookback"]
    tried = run("features", archive, *options, "-o", target, "--dry-run", "--json")
    shapes = json.loads(tried.stdout)["shapes"]
    names = ["last_token", "mean", "answer_max", "attention_entropy", "lookback_ratio"]
    assert list(shapes) == names
    assert not target.exists()
    done = run("features", archive, *options, "-o", target, "--layers", "0,3", "--workers", "2")
    assert "last_token: (10, 2, 12) float32" in done.stdout
    found = read(target)
    np.testing.assert_array_equal(found["mean"], expected_features(BATCH)["mean"][:, [0, 3]])
    assert "exists" in run("features", archive, *options, "-o", target, code=2).stderr
    table = tmp_path / "scores.csv"
    table.write_text("question_id,bleurt_score\nq0_4,0.1\n", encoding="utf-8")
    label(archive, table, folder=tmp_path / "labels", partial=True)
    run("features", archive, *options, "-o", target, "--overwrite", "--labels", tmp_path / "labels")
    assert read(target)["label"].tolist() == [None] * 4 + [1] + [None] * 5
    shown = run("features", archive, "--last-token", "--pca", "2", "-o", tmp_path / "f.npz")
    assert "components of last_token explain" in shown.stdout


@pytest.mark.parametrize(
    "options",
    [[], ["--pooled", "median"], ["--attention", "entropy,else"], ["--last-token", "--pca", "0"]],
)
def test_wrong_usage(archive: Path, tmp_path: Path, options: list[str]) -> None:
    run("features", archive, *options, "-o", tmp_path / "f.h5", code=2)


def test_the_command_names_nan(tmp_path: Path) -> None:
    archive = with_nan(tmp_path)
    failed = run("features", archive, "--last-token", "-o", tmp_path / "f.h5", code=1)
    assert "/samples/00000004 ('q0_4')" in failed.stderr
    done = run("features", archive, "--last-token", "-o", tmp_path / "f.h5", "--allow-nan")
    assert "/samples/00000004 ('q0_4')" in done.stderr


def test_files_of_ours_are_no_archives_and_not_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "archives"
    folder.mkdir()
    archive = make_archive(folder, make_batch("full_pkl"))
    expected = h5traces.open(archive).ids
    extract_features(folder, f"{folder}/", ["last_token"], allow_nan=True)
    h5traces.calibrate(archive, folder / "scales.h5")
    runner = CliRunner()
    for name in ("features", "scales"):
        path = str(folder / f"{name}.h5")
        said = f"is a file of {name} that h5traces wrote, not an archive of traces"
        for command in ("verify", "verify --deep", "validate", "inspect", "ls", "seal"):
            result = runner.invoke(app, [*command.split(), path])
            assert result.exit_code == 1, command
            assert said in result.output.replace("\n", " "), command
            assert "damage" not in result.output, command
            assert "missing" not in result.output, command
        result = runner.invoke(app, ["salvage", path, "-o", str(tmp_path / "saved.h5")])
        assert (result.exit_code, "damage" in result.output) == (1, False)
        assert said in result.output.replace("\n", " ")
    with pytest.warns(
        UserWarning, match=r"skipped, .*features\.h5 is .*scales\.h5 is of features or"
    ):
        assert h5traces.open(f"{folder}/").ids == expected
    with pytest.warns(UserWarning, match="skipped"):
        extract_features(folder, f"{folder}/", ["last_token"], allow_nan=True, target=OVERWRITE)
    with pytest.warns(UserWarning, match="skipped"):
        assert [each.path for each in h5traces.verify(folder)] == [str(archive)]
    with pytest.raises(H5TracesError, match="is a file of features that h5traces wrote"):
        h5traces.open(folder / "features.h5")


def test_more_components_than_samples_are_wrong_usage(archive: Path, tmp_path: Path) -> None:
    many = run("features", archive, "--last-token", "--pca", 40, "-o", tmp_path / "f.h5", code=2)
    assert "40 components were asked for" in many.stderr
    assert not (tmp_path / "f.h5").exists()
