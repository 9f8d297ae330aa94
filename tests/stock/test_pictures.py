"""What viewers show of attention, in the way in which HDFView turns numbers into grey levels."""

from __future__ import annotations

import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from matplotlib import image

import h5traces
from h5traces.format import layout
from h5traces.storage.hdf5.templates import template_of
from h5traces.writing.options import PrecisionOptions
from h5traces.writing.pictures import Picture, whites_of

ROOT = Path(__file__).parents[2]
TOKENS, HEADS = 300, 2


def attentions(seed: int = 0) -> np.ndarray:
    """Causal weights ``(heads, query, key)`` of which the first key has most, and few have much."""
    scores = np.random.default_rng(seed).normal(0, 3, (HEADS, TOKENS, TOKENS))
    scores[:, :, 0] = 9
    scores[:, ~np.tril(np.ones((TOKENS, TOKENS), bool))] = -np.inf
    weights = np.exp(scores)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float16)


def convert(folder: Path, **precision: Any) -> Path:
    sample = {
        "hidden_states": [np.ones((TOKENS, 8), np.float16)] * 2,
        "attentions": [attentions(0), attentions(1)],
        "tokens": list(range(TOKENS)),
    }
    with h5traces.create(folder / "a.h5", precision=PrecisionOptions(**precision)) as writer:
        writer.append(sample)
    return folder / "a.h5"


def grey(dataset: h5py.Dataset, head: int) -> np.ndarray:
    """HDFView's levels: a linear scale over IMAGE_MINMAXRANGE, or over the values without it."""
    values = (dataset[head] if dataset.ndim == 3 else dataset[:]).astype(np.float64)
    low, high = dataset.attrs.get(layout.IMAGE_RANGE, (values.min(), values.max()))
    return np.clip((values - low) / (high - low) * 255, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("precision", [{}, {"tier": "compact"}, {"dtype": "float32"}])
def test_a_head_of_300_tokens_is_no_black_square(tmp_path: Path, precision: dict) -> None:
    causal = np.tril(np.ones((TOKENS, TOKENS), bool), k=-1)
    with h5py.File(convert(tmp_path, **precision), "r+") as file:
        sample = file["samples/00000000"]
        kind = "attentions" if "attentions" in sample else "attention_mean"
        dataset = sample[f"{kind}/layer_000"]
        shown = grey(dataset, 0)[causal]
        del dataset.attrs[layout.IMAGE_RANGE]
        before = grey(dataset, 0)[causal]
        are_weights = dataset.dtype.kind == "f"
    # Without the range most weights have the darkest of 256 levels; few codes, square roots, do.
    assert ((before == 0).mean() > 0.5) == are_weights
    assert (shown == 0).mean() < (0.5 * (before == 0).mean() if are_weights else 0.1)
    # White is for few.
    assert 0.005 < (shown == 255).mean() < 0.1


@pytest.fixture(scope="module")
def tool() -> Any:
    pytest.importorskip("transformers")
    spec = spec_from_file_location("picture", ROOT / "tools" / "make_hdfview_picture.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_in_the_documents_is_what_the_tool_draws(tool: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, after = tool.heads(tool.recorded(tmp_path))
    assert tool.black_share(before) > 0.8
    assert tool.black_share(after) < 0.5
    shown = image.imread(ROOT / "docs" / "images" / "hdfview.png")[..., 0]
    drawn = np.hstack((before, np.full((TOKENS, tool.GAP), 255, np.uint8), after))
    assert shown.shape == drawn.shape
    # Machines round a model's numbers in other ways.
    assert np.abs(shown * 255 - drawn).mean() < 2


def test_attributes_of_h5web_would_take_96_bytes_of_each_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What schema/RATIONALE.md says of them."""
    attrs = {"interpretation": "image", "long_name": "attention weight"}
    sizes = []
    for number, added in enumerate(({}, attrs)):
        monkeypatch.setattr(layout, "IMAGE_ATTRS", {**layout.IMAGE_ATTRS, **added})
        # Headers are made once for all datasets of a form.
        template_of.cache_clear()
        folder = tmp_path / str(number)
        folder.mkdir()
        sizes.append(convert(folder).stat().st_size)
    template_of.cache_clear()
    # A few bytes less or more: addresses compress in the index.
    assert sizes[1] - sizes[0] == pytest.approx(2 * 96, abs=8)


def test_the_range_is_the_percentile_that_the_specification_names() -> None:
    weights = attentions()
    rows = [weights[:, query, 1 : query + 1].ravel() for query in (74, 149, 224, 299)]
    expected = np.percentile(np.concatenate(rows).astype(float), 95)
    (found,) = whites_of([Picture("attentions/layer_000", "float16", weights, weights.shape)])
    assert found is not None
    # Rounded up to two digits.
    assert found == pytest.approx(expected, rel=0.11)
    assert found >= expected * 0.999
    assert float(f"{found:.1e}") == found


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("hidden_states/layer_000", np.ones((4, 4), np.float16)),
        ("attentions/steps", np.ones((4, 4), np.int64)),
        ("attentions/layer_000", np.ones((2, 3, 4), np.float16)),
        ("attentions/layer_000", np.zeros((2, 4, 4), np.float16)),
        ("attentions/layer_000", np.full((2, 4, 4), np.nan, np.float16)),
        ("attentions/layer_000", np.ones((2, 1, 1), np.float16)),
        ("attentions/layer_000", np.ones((0, 4, 4), np.float16)),
    ],
)
def test_no_range_where_there_is_nothing_to_show(path: str, values: np.ndarray) -> None:
    chunk = tuple(max(1, n) for n in values.shape)
    assert whites_of([Picture(path, values.dtype.name, values, chunk)]) == [None]


def test_pictures_that_are_alike_have_ranges_of_their_own() -> None:
    weights = attentions()
    some = weights.copy()
    some[:, 149, 1:20] = np.inf
    arrays = [weights, some, weights / 2, np.zeros_like(weights), weights[:1]]
    pictures = [
        Picture(f"attentions/layer_{number:03d}", "float16", each, each.shape)
        for number, each in enumerate(arrays)
    ]
    found = whites_of(pictures)
    assert found == [whites_of([each])[0] for each in pictures]
    assert found[3] is None
    assert found[2] == pytest.approx(found[0] / 2, rel=0.11)
    # As without the infinite values.
    some[:, 149, 1:20] = np.nan
    assert whites_of(pictures[1:2]) == found[1:2]


def test_anyone_may_change_the_range(tmp_path: Path) -> None:
    path = convert(tmp_path)
    with h5traces.open(path) as archive:
        before = archive[0].to_dict()
    for value in ((0, 1), np.float32([0.1, 0.2]), "from black to white", None):
        with h5py.File(path, "r+") as file:
            attrs = file["samples/00000000/attentions/layer_001"].attrs
            del attrs[layout.IMAGE_RANGE]
            if value is not None:
                attrs[layout.IMAGE_RANGE] = value
        h5traces.seal(path)
        assert h5traces.validate(path).problems == []
        assert h5traces.verify(path).ok
        with h5traces.open(path) as archive:
            after = archive[0].to_dict()
        assert after["attentions"][1].tobytes() == before["attentions"][1].tobytes()
        with h5py.File(path, "r+") as file:
            file["samples/00000000/attentions/layer_001"].attrs[layout.IMAGE_RANGE] = 1


def test_repack_adds_the_range_to_archives_without_it(tmp_path: Path) -> None:
    path = convert(tmp_path)
    with h5py.File(path, "r+") as file:
        attrs = file["samples/00000000/attentions/layer_001"].attrs
        stored = attrs[layout.IMAGE_RANGE]
        del attrs[layout.IMAGE_RANGE]
    h5traces.seal(path)
    h5traces.repack(path, tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5") as file:
        found = file["samples/00000000/attentions/layer_001"].attrs[layout.IMAGE_RANGE]
    assert found.tolist() == stored.tolist()
