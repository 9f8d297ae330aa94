"""The shipped example in every view: numbers, pictures, scores of a probe; and a long sample."""

from __future__ import annotations

import io
import re
from importlib.util import module_from_spec, spec_from_file_location
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from document_pages import ROOT, blocks_of, run_command, run_page
from matplotlib import image
from view_helpers import WAIT, pointed_at, served, show, written

import h5traces

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SAMPLE, OTHER = 2, 3
VIEWS = ("archive", "attention", "compare", "sample")
# Thumbnails of the same view, whatever the fonts of the machine, are more alike than this.
ALIKE = 0.9


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first command of the README writes."""
    folder = tmp_path_factory.mktemp("shipped")
    (folder / "examples").symlink_to(ROOT / "examples")
    commands = [words for block in blocks_of("README.md") for words in block.commands]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_command(next(words for words in commands if words[:2] == ["h5traces", "convert"]))
    (found,) = (folder / "archives").glob("*.h5")
    return found


@pytest.fixture(scope="module")
def traces(archive: Path) -> h5traces.Archive:
    return h5traces.open(archive, container="numpy")


@pytest.fixture(scope="module")
def url(archive: Path) -> Iterator[str]:
    with served(archive) as found:
        yield found


def test_the_archive_view_shows_every_sample(page: Any, url: str, traces: Any) -> None:
    show(page, url)
    page.wait_for_selector(f"text={traces[7]['question_id']}", timeout=WAIT)
    page.wait_for_load_state("networkidle")
    rows = page.locator("[data-testid=samples] tbody tr").all_inner_texts()
    cells = [row.split("\t") for row in rows if row.strip()]
    wanted = [
        [
            str(number),
            trace["question_id"],
            trace.get("question", ""),
            " ".join(trace["generated_answer_clean"].split()),
            "\u2013",
            str(len(trace["tokens"])),
        ]
        for number, trace in enumerate(traces)
    ]
    shown = [[" ".join(each.split()) for each in row] for row in cells]
    # Long texts are cut, and say so.
    for row, expected in zip(shown, wanted, strict=True):
        if row[3].endswith("\u2026"):
            assert len(row[3]) > 150
            expected[3] = expected[3][: len(row[3]) - 1] + "\u2026"
    assert shown == wanted
    assert f"{len(traces)} of {len(traces)} samples" in page.inner_text("main")


def test_the_sample_view_shows_norms_and_tokens(page: Any, url: str, traces: Any) -> None:
    trace = traces[SAMPLE]
    show(page, url, view="sample", sample=SAMPLE, quantity="norm")
    states = np.stack([np.float64(each) for each in trace["hidden_states"]])
    norms = np.linalg.norm(states, axis=-1)
    layers, length = norms.shape
    for layer in range(layers):
        for token in (0, length // 2, length - 1):
            found = pointed_at(page, "map", layer, layers, token, length)
            np.testing.assert_allclose(found, norms[layer, token], rtol=1e-3)
    assert page.inner_text("[data-testid=words]") == "".join(trace["tokens_decoded"])
    assert page.locator("dt:text-is('length') + dd").inner_text() == str(length)


def test_the_attention_view_shows_weights_of_every_head(page: Any, url: str, traces: Any) -> None:
    weights = np.float64(traces[SAMPLE]["attentions"][3])
    heads, length, _ = weights.shape
    rng = np.random.default_rng(0)
    for head in range(heads):
        show(page, url, view="attention", sample=SAMPLE, layer=3, head=head)
        query = int(rng.integers(1, length))
        for each, key in ((query, int(rng.integers(query))), (query, query), (0, 1)):
            found = pointed_at(page, "head", each, length, key, length)
            np.testing.assert_allclose(found, weights[head, each, key], rtol=1e-3)
    assert page.locator("[data-testid=heads] button").count() == heads
    edges = re.search(r": (\d+) edges", page.inner_text("main"))
    assert int(edges[1]) == (np.tril(weights[-1]) > 0).sum()


def test_the_compare_view_shows_both_numbers(page: Any, url: str, traces: Any) -> None:
    place = {"view": "compare", "sample": SAMPLE, "otherSample": OTHER, "quantity": "norm"}
    show(page, url, **place)
    norms = [
        np.linalg.norm(np.stack([np.float64(each) for each in traces[at]["hidden_states"]]), axis=2)
        for at in (SAMPLE, OTHER)
    ]
    layers, length = len(norms[0]), min(each.shape[1] for each in norms)
    for layer, token in ((0, 0), (3, length // 2), (layers - 1, length - 1)):
        pointed_at(page, "difference", layer, layers, token, length)
        text = page.inner_text("[data-testid=value]").split(":")[1]
        one, other, difference = map(float, re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text))
        expected = [each[layer, token] for each in norms]
        np.testing.assert_allclose([one, other], expected, rtol=1e-3)
        reach = 1e-3 * abs(expected[0])
        np.testing.assert_allclose(difference, expected[0] - expected[1], rtol=1e-3, atol=reach)


def test_a_sample_of_4096_tokens_is_shown(page: Any, tmp_path: Path) -> None:
    """Where a cell is smaller than a pixel, the text names the cell whose number it gives."""
    length = 4096
    each = np.arange(length, dtype="i4")
    steps = (each[:, None] * 31 + each * 17) % 101
    weights = np.stack([np.tril((steps + head) / 128).astype("f2") for head in (1, 2)])
    sample = {
        "hidden_states": [np.sin(each[:, None] + np.arange(8) + layer) for layer in range(2)],
        "attentions": [weights] * 2,
        "tokens": each,
        "tokens_decoded": [f"w{number} " for number in each],
    }
    path = written(tmp_path / "long.h5", sample)
    stored = h5traces.open(path)[0]
    with served(path) as url:
        show(page, url, view="attention", sample=0, layer=1, head=1)
        page.wait_for_selector("[data-testid=heads][data-drawn]", timeout=WAIT)
        for zooms, query, key in ((0, 3000, 1000), (0, 4000, 3900), (20, 2000, 500)):
            pointed_at(page, "head", query, length, key, length)
            for _ in range(zooms):
                page.mouse.wheel(0, -300)
                page.wait_for_timeout(20)
            if zooms:
                pointed_at(page, "head", query, length, key + 1, length)
            text = page.inner_text("[data-testid=value]")
            found = re.search(r"query (\d+) .*key (\d+) .*: ([\d.e-]+)", text, re.DOTALL)
            at = int(found[1]), int(found[2])
            assert np.abs(np.subtract(at, (query, key))).max() < length / 500
            expected = float(stored["attentions"][1][1][at])
            assert expected > 0
            np.testing.assert_allclose(float(found[3]), expected, rtol=1e-3)
        show(page, url, view="sample", sample=0, quantity="norm")
        found = pointed_at(page, "map", 1, 2, 2048, length)
        token = int(re.search(r"token (\d+)", page.inner_text("[data-testid=value]"))[1])
        assert abs(token - 2048) < 10
        expected = np.linalg.norm(np.float64(stored["hidden_states"][1][token]))
        np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.fixture(scope="module")
def tool() -> Any:
    path = ROOT / "tools" / "make_view_pictures.py"
    spec = spec_from_file_location("make_view_pictures", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pixels(content: bytes) -> np.ndarray:
    """Red, green and blue, 0 to 1, (height, width, 3)."""
    return image.imread(io.BytesIO(content), format="png")[..., :3]


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """Means of squares of 20 pixels, without what every view has: the background."""
    height, width, _ = picture.shape
    means = picture.reshape(height // 20, 20, width // 20, 20, 3).mean((1, 3))
    return means - np.median(means, axis=(0, 1))


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Cosine of two thumbnails, cut to the same height: 1 of equal ones, 0 with a blank one."""
    height = min(len(one), len(other))
    first, second = (thumbnail(each[:height]).ravel() for each in (one, other))
    size = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / size) if size else 0.0


@pytest.fixture(scope="module")
def shipped() -> dict[str, np.ndarray]:
    folder = ROOT / "docs" / "images"
    return {view: pixels((folder / f"view-{view}.png").read_bytes()) for view in VIEWS}


@pytest.mark.parametrize("view", VIEWS)
def test_views_look_as_their_pictures_do(
    browser: Any, url: str, tool: Any, shipped: dict[str, np.ndarray], view: str
) -> None:
    taken = pixels(tool.taken(browser, url, view))
    assert taken.shape == shipped[view].shape
    found = {name: likeness(taken, picture) for name, picture in shipped.items()}
    assert found.pop(view) > ALIKE, "run 'python tools/make_view_pictures.py docs/images'"
    # Another view in this one's place is noticed, and so is none at all.
    assert max(found.values()) < ALIKE - 0.1
    assert likeness(np.ones_like(taken), shipped[view]) == 0


@pytest.mark.parametrize("view", ["attention", "compare", "sample"])
def test_a_view_that_draws_nothing_is_noticed(
    browser: Any, url: str, tool: Any, shipped: dict[str, np.ndarray], view: str
) -> None:
    script = "CanvasRenderingContext2D.prototype.putImageData = () => {}"
    taken = pixels(tool.taken(browser, url, view, script))
    assert likeness(taken, shipped[view]) < ALIKE


def test_the_pictures_are_in_the_documents() -> None:
    text = (ROOT / "docs" / "viewing.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(images/view-(\w+)\.png\)", text) == [
        "archive",
        "sample",
        "attention",
        "compare",
    ]
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("docs/images/view-") == 1


def test_the_probes_of_docs_viewing_md_are_shown(
    page: Any, archive: Path, traces: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the tutorial's, here with labels that mean nothing."""
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    monkeypatch.chdir(tmp_path)
    run_command(["h5traces", "features", str(archive), "--last-token", "-o", "features.npz"])
    features = np.load("features.npz")
    x, y = features["last_token"], np.arange(len(traces)) % 2
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    run_page("docs/viewing.md", "python", np=np, features=features, x=x, y=y, probe=probe)
    with served(archive, scores=tmp_path / "scores.npz") as url:
        for layer in (0, 5):
            expected = probe.fit(x[:, layer], y)
            for sample in (1, 6):
                length = len(traces[sample]["tokens"])
                show(page, url, view="sample", sample=sample, quantity="score:truth:0")
                found = pointed_at(page, "map", layer, 6, length - 1, length)
                decision = expected.decision_function(x[sample : sample + 1, layer])[0]
                np.testing.assert_allclose(found, decision, rtol=2e-3, atol=2e-3)
                every = expected.decision_function(traces[sample]["hidden_states"][layer])
                found = pointed_at(page, "map", layer, 6, 4, length)
                np.testing.assert_allclose(found, every[4], rtol=2e-3, atol=2e-3)
                show(page, url, view="sample", sample=sample, quantity="score:answer")
                found = pointed_at(page, "map", layer, 6, 0, 1)
                chance = expected.predict_proba(x[sample : sample + 1, layer])[0, 1]
                np.testing.assert_allclose(found, chance, rtol=1e-3)
