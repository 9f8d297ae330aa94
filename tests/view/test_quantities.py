"""What the map shows: stored scores, a file of features, labels, weights of queries and keys."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from view_helpers import WAIT, item, pointed_at, published, served, show, written

import h5traces
from h5traces.features import extract_features
from h5traces.format.attention import AttentionRule
from h5traces.format.record import SourcePosition
from h5traces.meaning.records import to_record
from h5traces.writing.options import PrecisionOptions

if TYPE_CHECKING:
    from pathlib import Path

TOKENS, LAYERS = 8, 3


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(7)
    more = {
        "probe": [rng.normal(size=TOKENS).astype("f4") for _ in range(LAYERS)],
        "mlp_output": [rng.normal(size=(TOKENS, 5)).astype("f4") for _ in range(LAYERS)],
        "logprobs": np.array([np.nan, *rng.normal(size=TOKENS - 1)], "f4"),
    }
    folder = tmp_path_factory.mktemp("quantities")
    return written(folder / "run.h5", *(item(number, TOKENS, **more) for number in range(3)))


def test_stored_scores_are_shown(page: Any, archive: Path) -> None:
    trace = h5traces.open(archive)[1]
    with served(archive) as url:
        show(page, url, view="sample", sample=1, quantity="kind:probe")
        found = pointed_at(page, "map", 2, LAYERS, 5, TOKENS)
        np.testing.assert_allclose(found, trace["probe"][2][5], rtol=1e-3)
        show(page, url, view="sample", sample=1, quantity="kind:mlp_output")
        found = pointed_at(page, "map", 0, LAYERS, 3, TOKENS)
        np.testing.assert_allclose(found, np.linalg.norm(trace["mlp_output"][0][3]), rtol=1e-3)
        show(page, url, view="sample", sample=1, quantity="extra/logprobs")
        found = pointed_at(page, "map", 0, 1, 6, TOKENS, pattern="logprobs, token")
        np.testing.assert_allclose(found, trace["logprobs"][6], rtol=1e-3)
        titles = page.locator("select >> nth=0").inner_text()
        assert {"probe, stored", "norm of mlp_output", "logprobs, stored"} <= set(
            titles.split("\n")
        )


@pytest.mark.parametrize("suffix", [".h5", ".npz"])
def test_principal_components_of_a_features_file_are_shown(
    page: Any, archive: Path, tmp_path: Path, suffix: str
) -> None:
    pytest.importorskip("sklearn")
    path = tmp_path / f"features{suffix}"
    extract_features(archive, path, ["last_token", "sink_mass"], pca=2)
    trace = h5traces.open(archive)[2]
    with served(archive, scores=path) as url:
        show(page, url, view="sample", sample=2, quantity="score:last_token_pca:1")
        # The last token is what the file has.
        found = [
            pointed_at(page, "map", layer, LAYERS, TOKENS - 1, TOKENS) for layer in range(LAYERS)
        ]
        if suffix == ".npz":
            with np.load(path) as file:
                expected = file["last_token_pca"][2, :, 1]
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)
        show(page, url, view="sample", sample=2, quantity="score:sink_mass")
        found = pointed_at(page, "map", 1, LAYERS, 1, 2)
        weights = np.float64(trace["attentions"][1][1])
        np.testing.assert_allclose(found, (weights[1:, 0] / weights[1:].sum(-1)).mean(), rtol=2e-3)


def test_probes_of_a_features_file_are_shown(page: Any, archive: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    traces = h5traces.open(archive)
    own = {
        "layers": np.array([0, 2]),
        "archive": np.array(["run.h5"] * 2),
        "index": np.array([2, 0]),
        "seq_len": np.array([TOKENS] * 2),
        "truth_coef": rng.normal(size=(2, 16)),
        "truth_intercept": rng.normal(size=2),
        "answer": rng.normal(size=(2, 2)),
        "each": rng.normal(size=(2, 2, TOKENS)),
    }
    np.savez(tmp_path / "scores.npz", **own)
    with served(archive, scores=tmp_path / "scores.npz") as url:
        show(page, url, view="sample", sample=0, quantity="score:truth:0")
        states = np.float64(traces[0]["hidden_states"][2])
        expected = states @ own["truth_coef"][1] + own["truth_intercept"][1]
        found = pointed_at(page, "map", 2, LAYERS, 4, TOKENS)
        np.testing.assert_allclose(found, expected[4], rtol=1e-3)
        show(page, url, view="sample", sample=0, quantity="score:answer")
        found = pointed_at(page, "map", 1, 2, 0, 1)
        np.testing.assert_allclose(found, own["answer"][1, 1], rtol=1e-3)
        show(page, url, view="sample", sample=2, quantity="score:each")
        found = pointed_at(page, "map", 0, 2, 6, TOKENS)
        np.testing.assert_allclose(found, own["each"][0, 0, 6], rtol=1e-3)
    target = tmp_path / "page"
    h5traces.view.export_page(archive, target, scores=tmp_path / "scores.npz")
    with published(target) as url:
        show(page, f"{url}index.html", view="sample", sample=0, quantity="score:answer")
        found = pointed_at(page, "map", 0, 2, 0, 1)
        np.testing.assert_allclose(found, own["answer"][1, 0], rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores.csv", b"", "scores come from .h5 or .npz"),
        ("scores.npz", b"PK", "is not a file of features"),
        ("scores.h5", b"x" * 100, "is not a file of features"),
    ],
)
def test_other_files_of_scores_are_named(
    archive: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(h5traces.errors.OptionError, match=rf"{re.escape(name)}: {message}"):
        h5traces.view.export_page(archive, tmp_path / "page", scores=tmp_path / name)
    assert not (tmp_path / "page").exists()


def test_scores_of_other_archives_are_named(archive: Path, tmp_path: Path) -> None:
    extract_features(archive, tmp_path / "f.npz", ["sink_mass"])
    other = written(tmp_path / "other.h5", item(0, 4))
    with pytest.raises(h5traces.errors.OptionError, match="holds no scores of these archives"):
        h5traces.view.export_page(other, tmp_path / "page", scores=tmp_path / "f.npz")


def test_labels_beside_the_archive_are_shown(page: Any, archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    path.write_bytes(archive.read_bytes())
    table = tmp_path / "labels.csv"
    table.write_text("question_id,bleurt_score\nq0,0.25\nq2,0.75\n")
    h5traces.label(path, table, partial=True)
    expected = h5traces.open(path)
    h5traces.view.export_page(path, tmp_path / "page")
    with served(path) as url, published(tmp_path / "page") as exported:
        for address in (url, f"{exported}index.html"):
            show(page, address)
            page.wait_for_selector("text=Answer 2.", timeout=WAIT)
            rows = page.locator("[data-testid=samples] tbody tr").all_inner_texts()
            cells = [each.split("\t") for each in rows if each.strip()]
            assert [row[4] for row in cells] == [
                str(each.metadata.label) if each.metadata.label is not None else "\u2013"
                for each in expected
            ]
            assert [row[6] for row in cells] == ["0.25", "\u2013", "0.75"]
        page.fill("input[type=search]", "bleurt>0.5 label:0")
        page.wait_for_selector("text=1 of 3 samples", timeout=WAIT)
        labels = path.with_name("run.h5.labels.json")
        labels.write_text(labels.read_text().replace('"q2"', '"q1"'))
        show(page, url)
        page.wait_for_selector("text=sample 2 has another id in the labels", timeout=WAIT)


@pytest.mark.parametrize("mask", ["all", "causal", "chunk", "window"])
def test_weights_of_queries_and_keys_are_computed(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: str
) -> None:
    window = 3 if mask in ("chunk", "window") else None
    rule = AttentionRule(
        mask=mask,
        window=window,
        scale=0.7,
        soft_cap=3.0,
        slopes=(0.0, 0.3, 0.0, -0.2),
        sinks=(0.1, -1.0, 2.0, 0.5),
    )
    path = written_with_rule(tmp_path / "qk.h5", rule)
    trace = h5traces.open(path)[0]
    expected = np.asarray(trace.layer(1, "attentions"))
    with served(path) as url:
        show(page, url, view="attention", sample=0, layer=1, head=3)
        for query, key in ((7, 6), (4, 4), (5, 0)):
            found = pointed_at(page, "head", query, TOKENS, key, TOKENS)
            np.testing.assert_allclose(found, expected[3, query, key], rtol=1e-3, atol=1e-6)
        assert page.locator("[data-testid=heads] button").count() == 4
        show(page, url, view="sample", sample=0, quantity="entropy")
        found = pointed_at(page, "map", 1, 2, 6, TOKENS)
        rows = expected[:, 6].astype("f8") / expected[:, 6].sum(-1, keepdims=True)
        logs = np.log(rows, out=np.zeros_like(rows), where=rows > 0)
        np.testing.assert_allclose(found, -(rows * logs).sum(-1).mean(), rtol=1e-3)


def test_queries_and_keys_without_a_rule_are_explained(page: Any, tmp_path: Path) -> None:
    path = written_with_rule(tmp_path / "qk.h5", None)
    with served(path) as url:
        show(page, url, view="attention", sample=0)
        page.wait_for_selector("text=stores queries and keys, but not the rule", timeout=WAIT)


def written_with_rule(path: Path, rule: AttentionRule | None) -> Path:
    """An archive as `extract` writes it with ``attentions="qk"``."""
    rng = np.random.default_rng(2)
    shapes = {"queries": (4, TOKENS, 5), "keys": (2, TOKENS, 5)}
    kinds = {
        kind: [rng.normal(size=shape).astype("f4") for _ in range(2)]
        for kind, shape in shapes.items()
    }
    place = SourcePosition(file=0, position=0)
    record = to_record({**item(0, TOKENS, layers=2), **kinds}, source=place)
    queries = record.layered["queries"]
    arrays = tuple(replace(each, rule=rule) for each in queries.arrays)
    layered = {**record.layered, "queries": replace(queries, arrays=arrays)}
    del layered["attentions"]
    fields = tuple(name for name in record.fields if name != "attentions")
    with h5traces.create(path, precision=PrecisionOptions(dtype="float32")) as writer:
        writer.append(record.model_copy(update={"layered": layered, "fields": fields}))
    return path
