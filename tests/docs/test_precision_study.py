"""The study of precision tiers runs, in small, and what is committed says what it found."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoTokenizer, BertConfig, BertModel

from h5traces.graph.edges import attention_edges

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-llama-pydocs"
STEPS = ("0.02", "0.05", "0.1", "0.2", "0.4", "1")
ENCODINGS = ("float16", *(f"step {step}" for step in STEPS), "5 mantissa bits")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents = [inspect.getdoc(value) or "" for value in vars(textwrap).values()]
    documents += [inspect.getdoc(value) or "" for value in vars(str).values()]
    lines = [" ".join(each.split()) for each in documents if len(each) > 60]
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def figures(folder: Path, *arguments: Any) -> tuple[dict[str, Any], str]:
    sizes = ("--calibration", 16, "--held-out", 6, "--longest", 40, "--resamples", 200)
    command = [*sizes, "-o", folder / "study.json", *arguments]
    done = subprocess.run(
        [sys.executable, "benchmarks/precision.py", "--quick", *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads((folder / "study.json").read_text())["models"].values()
    return found, done.stdout


@pytest.fixture(scope="module")
def causal(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return figures(tmp_path_factory.mktemp("causal"), "--texts", texts)


@pytest.fixture(scope="module")
def encoder(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2048,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / "model")
    return figures(folder, "--encoder", folder / "model", "--texts", texts)


@pytest.fixture(params=["causal", "encoder"])
def states(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.getfixturevalue(request.param)[0]["states"]


def test_errors_stay_within_their_bounds(states):
    assert set(states) == set(ENCODINGS)
    for step in STEPS:
        found = states[f"step {step}"]
        assert found["kept_exact"] == 0
        assert 0 < found["max_error_sigma"] <= float(step) / 2
        assert 0.2 * float(step) < found["nrmse"] < 0.32 * float(step)  # a uniform error: 0.289
        assert all(each > 0 for each in found["nrmse_of_differences"])


def test_bits_fall_as_steps_grow_and_their_parts_add_up(states):
    for which in ("bits_per_sample", "bits_pooled"):
        bits = [states[f"step {step}"][which] for step in STEPS]
        assert bits == sorted(bits, reverse=True)
        assert states["float16"][which] > states["5 mantissa bits"][which] > bits[0]
    for step in STEPS:
        found = states[f"step {step}"]
        assert sum(found["parts"].values()) == pytest.approx(found["bits_pooled"])
        assert found["formula"] == pytest.approx(2.05 - np.log2(float(step)))
        assert found["bits_pooled"] == pytest.approx(found["formula"], rel=0.2)


def test_the_exact_tier_changes_nothing(causal):
    found = causal[0]
    states = found["states"]["float16"]
    assert states["nrmse"] == states["max_error_sigma"] == 0
    nothing = {"value": 0, "low": 0, "high": 0}
    places = found["patching"]["by_encoding"]["float16"]
    assert set(places) == {
        *(f"layer {layer}" for layer in range(6)),
        "every layer at once",
        "mean of single layers",
    }
    assert all(each == {"loss_change": nothing, "kl": nothing} for each in places.values())
    probes = found["probes"]["by_encoding"]["float16"]
    assert probes["mean"] == nothing
    assert all(each == nothing for each in probes["by_layer"])
    assert found["attentions"]["float16"]["flips"] == 0


def test_what_is_lost_shows_in_the_predictions(causal):
    by_encoding = causal[0]["patching"]["by_encoding"]
    for name in ENCODINGS[1:]:
        for place in by_encoding[name].values():
            assert 0 < place["kl"]["low"] <= place["kl"]["value"] <= place["kl"]["high"]
            change = place["loss_change"]
            assert change["low"] <= change["value"] <= change["high"]
    kl = [by_encoding[f"step {step}"]["mean of single layers"]["kl"]["value"] for step in STEPS]
    assert kl == sorted(kl)
    assert all(
        each["every layer at once"]["kl"]["value"] > each["mean of single layers"]["kl"]["value"]
        for name, each in by_encoding.items()
        if name != "float16"
    )


def test_states_are_put_back_where_they_came_from(causal):
    """Else what float16 rounds away would not be all that changes."""
    patching = causal[0]["patching"]
    for place in patching["rounding"].values():
        assert 0 < place["kl"]["value"] < 1e-5
        assert abs(place["loss_change"]["value"]) < 1e-3


def test_probes_have_something_to_lose(causal):
    probes = causal[0]["probes"]
    assert set(probes["auroc"]) == {"word", "mark", "seen"}
    assert all(len(each) == 6 and max(each) < 1 for each in probes["auroc"].values())
    worst = probes["by_encoding"]["step 1"]["worst"]
    assert worst["low"] <= worst["value"] <= worst["high"]
    assert worst["value"] == min(
        each["value"] for each in probes["by_encoding"]["step 1"]["by_layer"]
    )


def test_attentions_and_yardsticks(causal):
    found = causal[0]
    weights = found["attentions"]
    bits = [weights[name]["bits_per_entry"] for name in ("float16", "8 bits", "6 bits", "5 bits")]
    assert bits == sorted(bits, reverse=True)
    flips = [weights[name]["flips"] for name in ("head mean", "8 bits", "6 bits", "5 bits")]
    assert flips[0] == 0
    assert flips == sorted(flips)
    assert all(each["kl_per_row"] >= 0 for each in weights.values())
    assert found["yardsticks"]["bfloat16"]["nrmse"] > found["yardsticks"]["float16"]["nrmse"] > 0


def test_an_encoder_has_embeddings_and_no_predictions(encoder):
    found, report = encoder
    assert "patching" not in found
    assert found["embeddings"]["float16"]["nearest_kept"] == 1
    cosines = [found["embeddings"][f"step {step}"]["cosine_mean"] for step in STEPS]
    assert cosines == sorted(cosines, reverse=True)
    assert "### Sentence embeddings" in report


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.usefixtures("tools")
def test_too_few_texts_no_model_and_no_file_are_said(tmp_path: Path, texts: Path):
    from downstream.texts import Limits, split, texts_of_file
    from precision import options_of, parse

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    lines, _ = texts_of_file(texts)
    with pytest.raises(SystemExit, match="give more texts, or a smaller --calibration"):
        split(lines, tokenizer, Limits(calibration=5000))
    parts = split(lines, tokenizer, Limits(calibration=10, held_out=5))
    assert [len(parts.calibration), len(parts.held_out)] == [10, 5]
    assert not any(each in parts.calibration for each in parts.held_out)
    with pytest.raises(SystemExit, match=r"has no config\.json"):
        options_of(parse(["--model", str(tmp_path)]))
    with pytest.raises(SystemExit, match="expected one text per line"):
        options_of(parse(["--texts", str(tmp_path / "missing.txt")]))


@pytest.mark.usefixtures("tools")
def test_what_is_committed_is_what_the_figures_say():
    from downstream.report import markdown, tier_table

    folder = ROOT / "benchmarks"
    results = json.loads((folder / "precision.json").read_text(encoding="utf-8"))
    assert markdown(results) == (folder / "precision.md").read_text(encoding="utf-8")
    table = tier_table(results["models"]["tiny-llama-pydocs"])
    document = (ROOT / "docs" / "precision-study.md").read_text(encoding="utf-8")
    assert f"<!-- study -->\n{table}\n<!-- end of study -->" in document


@pytest.mark.usefixtures("tools")
def test_areas_under_the_curve_are_those_of_scikit_learn():
    from downstream.resampling import Bootstrap, Ranking, change

    random = np.random.default_rng(0)
    texts = np.repeat(np.arange(5), 40)
    labels = random.random(200) < 0.3
    scores = np.round(random.normal(size=200) + labels, 1)  # with ties
    ranking = Ranking(scores, labels, texts, 5)
    for counts in ([1, 1, 1, 1, 1], [0, 3, 1, 0, 1]):
        rows = np.concatenate(
            [np.flatnonzero(texts == n) for n in range(5) for _ in range(counts[n])]
        )
        expected = roc_auc_score(labels[rows], scores[rows])
        assert ranking.auroc(np.array([counts], float))[0] == pytest.approx(expected)
    better = Ranking(scores + labels, labels, texts, 5)
    bootstrap = Bootstrap(5, 500)
    found = change([bootstrap.auroc(better) - bootstrap.auroc(ranking)])
    assert 0 < found["low"] < found["value"] < found["high"]


@pytest.mark.usefixtures("tools")
def test_edges_are_those_of_graphs():
    from downstream.weights import edges, head_mean

    weights = np.random.default_rng(0).dirichlet(np.full(30, 0.2), (4, 30)).astype(np.float16)
    found = edges(head_mean(weights))
    expected, _ = attention_edges(torch.from_numpy(weights), 30)
    assert np.array_equal(np.argwhere(found).T, expected.numpy())
