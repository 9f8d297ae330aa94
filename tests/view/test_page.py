"""The page in Chromium: its numbers are those of `h5traces.open`, and texts stay text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from view_helpers import WAIT, item, pointed_at, published, served, show, written

import h5traces
from h5traces.features import lookback_ratio

if TYPE_CHECKING:
    from pathlib import Path


def matrix_of(trace: h5traces.Trace, quantity: str) -> np.ndarray:
    """What the page shows of a sample, (layer, token), worked out with numpy."""
    if quantity in ("norm", "change", "cosine-before", "cosine-last"):
        states = np.stack([np.asarray(each, "f8") for each in trace["hidden_states"]])
        norms = np.linalg.norm(states, axis=-1)
        if quantity == "norm":
            return norms
        if quantity == "change":
            return np.linalg.norm(states[1:] - states[:-1], axis=-1)
        other = states[:-1] if quantity == "cosine-before" else states[-1:]
        ours = states[1:] if quantity == "cosine-before" else states
        dots = (ours * other).sum(-1)
        return dots / (np.linalg.norm(ours, axis=-1) * np.linalg.norm(other, axis=-1))
    weights = np.stack([np.asarray(each, "f8") for each in trace["attentions"]])
    weights /= weights.sum(-1, keepdims=True)
    if quantity == "entropy":
        logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
        return -(weights * logs).sum(-1).mean(1)
    return weights[..., 0].mean(1)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view")
    return written(folder / "run.h5", *(item(number, 6 + number) for number in range(4)))


def test_the_table_lists_the_samples(page: Any, archive: Path) -> None:
    with served(archive) as url:
        show(page, url)
        page.wait_for_selector("text=Answer 3.", timeout=WAIT)
        rows = page.locator("[data-testid=samples] tbody tr").all_inner_texts()
        cells = [each.split("\t") for each in rows if each.strip()]
        assert [row[1] for row in cells] == ["q0", "q1", "q2", "q3"]
        assert [row[2] for row in cells] == [f"Question {each}?" for each in range(4)]
        assert [row[4] for row in cells] == ["0", "1", "0", "1"]
        assert [row[5] for row in cells] == ["6", "7", "8", "9"]
        page.fill("input[type=search]", "answer 2")
        page.wait_for_selector("text=1 of 4 samples", timeout=WAIT)
        page.fill("input[type=search]", "label:1")
        page.wait_for_selector("text=2 of 4 samples", timeout=WAIT)
        page.fill("input[type=search]", "")
        page.click("th >> text=length")
        page.click("th >> text=length")
        page.wait_for_function(
            "() => document.querySelector('[data-testid=samples] tbody').innerText"
            ".trim().startsWith('3')",
            timeout=WAIT,
        )
        page.click("text=Answer 2.")
        page.wait_for_selector("[data-testid=map]", timeout=WAIT)
        assert "sample=2" in page.url


@pytest.mark.parametrize(
    "quantity",
    ["norm", "change", "cosine-before", "cosine-last", "entropy", "sink", "lookback"],
)
def test_the_map_shows_the_quantity(page: Any, archive: Path, quantity: str) -> None:
    trace = h5traces.open(archive, container="numpy")[3]
    length = len(trace["tokens"])
    with served(archive) as url:
        show(page, url, view="sample", sample=3, quantity=quantity)
        for layer, token in ((0, 1), (1, 5), (2, length - 1)):
            if layer == 0 and quantity in ("change", "cosine-before"):
                continue
            if quantity == "lookback":
                # The mean over the queries of the answer is what `h5traces features` gives.
                found = [pointed_at(page, "map", layer, 3, each, length) for each in range(4, 9)]
                expected = lookback_ratio(np.asarray(trace["attentions"][layer]), 4).mean()
                np.testing.assert_allclose(np.mean(found), expected, rtol=2e-3)
                continue
            wanted = matrix_of(trace, quantity)
            row = layer - 1 if quantity in ("change", "cosine-before") else layer
            found_value = pointed_at(page, "map", layer, 3, token, length)
            np.testing.assert_allclose(found_value, wanted[row, token], rtol=1e-3)


def test_a_head_shows_its_weights(page: Any, archive: Path) -> None:
    trace = h5traces.open(archive, container="numpy")[2]
    with served(archive) as url:
        show(page, url, view="attention", sample=2, layer=1, head=1)
        for query, key in ((3, 2), (7, 0), (0, 0)):
            found = pointed_at(page, "head", query, 8, key, 8)
            np.testing.assert_allclose(found, trace["attentions"][1][1, query, key], rtol=1e-3)
        assert page.locator("[data-testid=heads] button").count() == 2
        page.select_option("select >> nth=1", "mean")
        page.wait_for_function("() => location.hash.includes('head=mean')")
        page.wait_for_timeout(300)
        found = pointed_at(page, "head", 5, 8, 4, 8)
        np.testing.assert_allclose(
            found, trace["attentions"][1][:, 5, 4].mean(dtype="f8"), rtol=1e-3
        )
        page.keyboard.press("]")
        page.wait_for_function("() => location.hash.includes('layer=2')")


def test_two_archives_are_compared(page: Any, archive: Path, tmp_path: Path) -> None:
    lossy = tmp_path / "compact.h5"
    h5traces.repack(archive, lossy, precision=h5traces.PrecisionOptions(tier="compact"))
    exact, compact = h5traces.open(archive), h5traces.open(lossy)
    norms = [
        np.linalg.norm(np.float64(each[1]["hidden_states"][2]), axis=1) for each in (exact, compact)
    ]
    with served(archive, lossy) as url:
        show(page, url, view="compare", sample=1, otherArchive=1, otherSample=1, quantity="norm")
        page.wait_for_selector("[data-testid=difference]", timeout=WAIT)
        page.wait_for_timeout(300)
        pointed_at(page, "difference", 2, 3, 4, 7)
        text = page.inner_text("[data-testid=value]")
        numbers = [
            float(each) for each in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text.split(":")[1])
        ]
        np.testing.assert_allclose(numbers[:2], [each[4] for each in norms], rtol=1e-3)


@pytest.mark.parametrize("tier", ["fine", "analysis", "compact", "native"])
def test_tiers_are_decoded(page: Any, archive: Path, tmp_path: Path, tier: Any) -> None:
    lossy = tmp_path / f"{tier}.h5"
    h5traces.repack(archive, lossy, precision=h5traces.PrecisionOptions(tier=tier))
    trace = h5traces.open(lossy)[3]
    with served(lossy) as url:
        show(page, url, view="sample", sample=3, quantity="norm")
        found = pointed_at(page, "map", 1, 3, 4, 9)
        expected = np.linalg.norm(np.float64(trace["hidden_states"][1]), axis=1)[4]
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        show(page, url, view="attention", sample=3, layer=2, head=0)
        found = pointed_at(page, "head", 6, 9, 3, 9)
        kept = trace["attention_mean"][2] if tier == "compact" else trace["attentions"][2][0]
        np.testing.assert_allclose(found, kept[6, 3], rtol=1e-3)


def test_layers_have_the_numbers_of_the_model(page: Any, archive: Path, tmp_path: Path) -> None:
    h5traces.repack(archive, tmp_path / "some.h5", layers=[0, 2])
    with served(tmp_path / "some.h5") as url:
        show(page, url, view="sample", sample=0)
        page.wait_for_selector("[data-testid=map]", timeout=WAIT)
        assert page.locator(".layers li").all_inner_texts() == ["layer 0", "layer 2"]


def test_a_long_sample_is_read_head_by_head(page: Any, tmp_path: Path) -> None:
    length = 2048
    rng = np.random.default_rng(0)
    weights = rng.random((3, length, length), np.float32) * np.tri(length, dtype=np.float32)
    weights /= weights.sum(-1, keepdims=True)
    weights[1, 2000, 17] = 0.5
    states = rng.normal(size=(length, 8)).astype("f2")
    path = written(
        tmp_path / "long.h5",
        {
            "hidden_states": [states, states],
            "attentions": [weights.astype("f2")] * 2,
            "tokens": np.arange(length),
            "tokens_decoded": ["x"] * length,
        },
    )
    requested = []
    with served(path) as url:
        page.on(
            "response", lambda each: requested.append(int(each.headers.get("content-length", 0)))
        )
        show(page, url, view="attention", sample=0, layer=1, head=1)
        found = pointed_at(page, "head", 2000, length, 17, length)
        # A pixel stands for several cells here, so that the largest of them is what may be hit.
        assert found <= 0.5
        page.wait_for_selector("text=What token", timeout=WAIT)
        assert page.locator("[data-testid=heads]").count() == 1
        assert sum(requested) < path.stat().st_size


def test_texts_of_files_stay_text(page: Any, tmp_path: Path) -> None:
    hostile = (
        "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    )
    odd = item(
        0, 4, question_id=hostile, question=hostile + "\u202e\x07", generated_answer="a" * 1_000_000
    )
    odd["tokens_decoded"] = [hostile, "\u202eabc", "\x1b[31m", "\ud800"]
    path = written(tmp_path / "<b>odd.h5", odd)
    with served(path) as url:
        for view in ("archive", "sample", "attention", "compare"):
            show(page, url, view=view, sample=0)
            page.wait_for_timeout(500)
            assert "owned" not in page.title()
            assert page.locator("main script, main img").count() == 0
        show(page, url, view="sample", sample=0)
        page.wait_for_selector("[data-testid=words]", timeout=WAIT)
        text = page.inner_text("main")
        assert hostile in text
        assert "\u202e" not in text
        assert "\\u202e" in text


def test_what_is_missing_is_said(page: Any, tmp_path: Path) -> None:
    bare = {"question_id": "bare", "hidden_states": [np.full((3, 4), np.nan, "f2")] * 2}
    path = written(tmp_path / "bare.h5", bare)
    with served(path) as url:
        show(page, url, view="attention", sample=0)
        page.wait_for_selector("text=stores no attentions", timeout=WAIT)
        show(page, url, view="sample", sample=0)
        page.wait_for_selector("[data-testid=map]", timeout=WAIT)


def test_a_file_that_is_no_archive_is_named(page: Any, tmp_path: Path) -> None:
    (tmp_path / "other.h5").write_bytes(b"x" * 1000)
    with served(tmp_path / "other.h5") as url:
        show(page, url)
        page.wait_for_selector("text=other.h5: is no archive of h5traces", timeout=WAIT)


def test_damage_is_named(page: Any, archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.h5"
    data = bytearray(archive.read_bytes())
    chunks = h5traces.open(archive)[0]._stored.ranges("attentions/layer_001")
    data[chunks[0][0] + 20] ^= 1
    path.write_bytes(data)
    with served(path) as url:
        show(page, url, view="attention", sample=0, layer=1, head=0)
        page.wait_for_selector(
            "text=sample 0, attentions/layer_001: the checksum does not fit", timeout=WAIT
        )


def test_a_file_that_is_replaced_or_deleted_is_named(page: Any, tmp_path: Path) -> None:
    # Larger than what comes with the index.
    path = written(tmp_path / "run.h5", *(item(each, 60, layers=8, heads=8) for each in range(3)))
    with served(path) as url:
        show(page, url)
        page.wait_for_selector("text=Answer 2.", timeout=WAIT)
        written(tmp_path / "new.h5", item(9, 5)).replace(path)
        page.click("text=Answer 1.")
        page.wait_for_selector("text=was replaced while it was shown", timeout=WAIT)
        path.unlink()
        show(page, url)
        page.wait_for_selector("text=there is no such file", timeout=WAIT)


def test_the_page_works_from_plain_files(page: Any, archive: Path, tmp_path: Path) -> None:
    h5traces.view.export_page(archive, tmp_path / "page")
    with published(tmp_path / "page") as url:
        show(page, f"{url}index.html", view="sample", sample=1)
        trace = h5traces.open(archive)[1]
        found = pointed_at(page, "map", 2, 3, 6, 7)
        expected = np.linalg.norm(np.float64(trace["hidden_states"][2][6]))
        np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_servers_that_cannot_be_read_are_explained(
    page: Any, archive: Path, tmp_path: Path
) -> None:
    h5traces.view.export_page(archive, tmp_path / "page")
    padded = tmp_path / "large"
    padded.mkdir()
    big = written(padded / "big.h5", *(item(each, 60, layers=8, heads=8) for each in range(3)))
    with published(tmp_path / "page") as url:
        with published(padded, ranges=False, cors=True) as other:
            show(page, f"{url}index.html?archive={other}{big.name}")
            page.wait_for_selector("text=needs byte ranges", timeout=WAIT)
        with published(padded) as other:
            show(page, f"{url}index.html?archive={other}{big.name}")
            page.wait_for_selector("text=Access-Control-Allow-Origin", timeout=WAIT)
        with published(padded, cors=True) as other:
            show(page, f"{url}index.html?archive={other}{big.name}")
            page.wait_for_selector("text=Answer 2.", timeout=WAIT)


def test_an_empty_archive_says_so(page: Any, tmp_path: Path) -> None:
    import pickle

    (tmp_path / "none.pkl").write_bytes(pickle.dumps([]))
    h5traces.convert(tmp_path / "none.pkl", tmp_path / "none.h5")
    with served(tmp_path / "none.h5") as url:
        show(page, url)
        page.wait_for_selector("text=holds no samples", timeout=WAIT)
