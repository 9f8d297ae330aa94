"""Every measure against the formula in plain loops, and against libraries that have it."""

from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import asdict, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from by_hand import difference_nrmse, sigmas, state_measures, weight_measures
from hypothesis import given, settings
from hypothesis import strategies as st
from legacy_batches import LAYOUTS, make_archive, make_batch
from perturbed import HIDDEN, Sample, in_steps, make, with_means_only, write
from scipy.stats import entropy
from sklearn.metrics.pairwise import cosine_similarity

import h5traces
from h5traces.errors import FidelityError
from h5traces.fidelity import FidelityReport, compare
from h5traces.fidelity.states import StateErrors, ValuePair
from h5traces.fidelity.weights import WeightErrors, row_divergences
from h5traces.graph import attention_edges

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

STATES, ATTENTIONS, MEANS = "hidden_states", "attentions", "attention_mean"
NAMES = ["layer_000", "layer_001", "layer_005"]


def compared(
    folder: Path, a: Sequence[Sample], b: Sequence[Sample], **options: Any
) -> FidelityReport:
    """The report on two archives of these samples."""
    for name in ("a.h5", "b.h5"):
        (folder / name).unlink(missing_ok=True)
    return compare(write(folder / "a.h5", a), write(folder / "b.h5", b), **options)


def layer(report: FidelityReport, kind: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in report.kind(kind).layers if each.name == name]
    return asdict(found)


def assert_close(found: dict[str, Any], expected: dict[str, Any], relative: float = 2e-6) -> None:
    for name, value in expected.items():
        if isinstance(value, (bool, int, np.bool_, np.integer)):
            assert found[name] == value, name
        else:
            assert found[name] == pytest.approx(value, rel=relative, abs=1e-12), name


# --- the formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.02, 0.4, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_states(tmp_path: Path, step: float, seed: int) -> None:
    a = make(seed=seed)
    b = in_steps(a, step)
    report = compared(tmp_path, a, b)
    assert [each.name for each in report.kind(STATES).layers] == NAMES
    for name in NAMES:
        expected = state_measures(
            [each.states[name] for each in a], [each.states[name] for each in b]
        )
        assert expected["nrmse"] > 0
        assert_close(layer(report, STATES, name), expected)


def test_differences_between_layers(tmp_path: Path) -> None:
    a = make()
    b = in_steps(a, 0.2)
    report = compared(tmp_path, a, b)
    assert layer(report, STATES, NAMES[0])["difference_nrmse"] is None
    for before, name in pairwise(NAMES):
        expected = difference_nrmse(
            *([each.states[of] for each in samples] for of in (name, before) for samples in (a, b))
        )
        found = layer(report, STATES, name)
        assert found["difference_nrmse"] == pytest.approx(expected, rel=2e-6)
        assert found["num_differences"] == found["num_values"]
        assert expected > found["nrmse"]


@pytest.mark.parametrize("threshold", [0.01, 0.1])
def test_weights(tmp_path: Path, threshold: float) -> None:
    a = make(num_samples=8)
    b = in_steps(a, 0.1)
    report = compared(tmp_path, a, b, threshold=threshold)
    for name in NAMES:
        expected = weight_measures(
            [each.attentions[name] for each in a], [each.attentions[name] for each in b], threshold
        )
        assert_close(layer(report, ATTENTIONS, name), expected, 1e-9)
    assert report.threshold == threshold
    assert report.kind(ATTENTIONS).total.num_edges > 0


def test_edges_flip_in_both_directions(tmp_path: Path) -> None:
    a = make(num_samples=8)
    b = [
        replace(
            each,
            attentions={
                name: (values.astype(np.float32) ** power).astype(np.float16)
                for (name, values), power in zip(each.attentions.items(), (0.5, 2, 1), strict=True)
            },
        )
        for each in a
    ]
    report = compared(tmp_path, a, b, threshold=0.1)
    for name, changed in zip(NAMES, ("num_added", "num_removed", None), strict=True):
        found = layer(report, ATTENTIONS, name)
        expected = weight_measures(
            [each.attentions[name] for each in a], [each.attentions[name] for each in b], 0.1
        )
        assert_close(found, expected, 1e-9)
        for each in ("num_added", "num_removed"):
            assert (found[each] > 0) == (each == changed)
    total = report.kind(ATTENTIONS).total
    assert total.num_flips == sum(each.num_flips for each in report.kind(ATTENTIONS).layers)
    assert total.flip_share == total.num_flips / total.num_edges


def test_edges_are_those_of_graphs(tmp_path: Path) -> None:
    a = make(num_samples=5, seed=4)
    b = in_steps(a, 0.1)
    report = compared(tmp_path, a, b, threshold=0.05)
    for name in NAMES:
        edges = [_graph_edges(samples, name, 0.05) for samples in (a, b)]
        found = layer(report, ATTENTIONS, name)
        assert found["num_edges"] == len(edges[0])
        assert found["num_added"] == len(edges[1] - edges[0])
        assert found["num_removed"] == len(edges[0] - edges[1])


def _graph_edges(samples: Sequence[Sample], name: str, threshold: float) -> set[tuple[int, ...]]:
    found = set()
    for index, each in enumerate(samples):
        weights = torch.from_numpy(each.attentions[name])
        edges, _ = attention_edges(weights, weights.shape[1], threshold=threshold)
        found |= {(index, *edge) for edge in edges.t().tolist()}
    return found


def test_means_over_heads(tmp_path: Path) -> None:
    a = make(num_samples=8)
    b = with_means_only(a)
    report = compared(tmp_path, a, b)
    assert report.kind(MEANS).reference == ATTENTIONS
    for name in NAMES:
        means = [
            each.attentions[name].astype(np.float64).mean(0).astype(np.float32)[None] for each in a
        ]
        expected = weight_measures(means, [each.means[name][None] for each in b], 0.01)
        assert_close(layer(report, MEANS, name), expected, 1e-9)
    # 0.01 lies on the boundary of two levels.
    assert report.kind(MEANS).total.num_flips == 0
    assert report.only_in_a.kinds() == {ATTENTIONS: 3}
    assert report.only_in_b.kinds() == {}


def test_both_kinds_of_attention(tmp_path: Path) -> None:
    a = make()
    b = [
        replace(each, attentions=lossy.attentions)
        for each, lossy in zip(with_means_only(a), in_steps(a, 0.1), strict=True)
    ]
    report = compared(tmp_path, a, b)
    assert [(each.kind, each.reference) for each in report.kinds] == [
        (STATES, STATES),
        (ATTENTIONS, ATTENTIONS),
        (MEANS, ATTENTIONS),
    ]
    both = compared(tmp_path, with_means_only(a), b)
    assert [(each.kind, each.reference) for each in both.kinds] == [
        (STATES, STATES),
        (MEANS, MEANS),
    ]
    assert both.kind(MEANS).total.max_error == 0
    assert both.only_in_b.kinds() == {ATTENTIONS: 3}


@given(st.integers(0, 2**32), st.integers(1, 9))
def test_divergence_is_that_of_scipy(seed: int, keys: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = pair = rng.random((2, 3, keys)) + 1e-3
    np.testing.assert_allclose(row_divergences(pair, b / a), entropy(a, b, axis=-1), atol=1e-12)


def test_cosines_are_those_of_sklearn(tmp_path: Path) -> None:
    a = make(seed=3)
    b = in_steps(a, 0.4)
    report = compared(tmp_path, a, b)
    for name in NAMES:
        cosines = np.concatenate(
            [
                np.diag(cosine_similarity(*(s.states[name].astype(np.float64) for s in pair)))
                for pair in zip(a, b, strict=True)
            ]
        )
        found = layer(report, STATES, name)
        assert found["mean_cosine"] == pytest.approx(cosines.mean(), abs=1e-7)
        assert found["min_cosine"] == pytest.approx(cosines.min(), abs=1e-7)


@pytest.mark.parametrize("tokens", [2, 40, 64, 65, 200])
def test_neighbours_of_many_tokens(tmp_path: Path, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    values = rng.standard_normal((tokens, 700)).astype(np.float16)
    moved = (values + 1.5 * rng.standard_normal(values.shape)).astype(np.float16)
    a, b = ([Sample("q", {"layer_000": each})] for each in (values, moved))
    report = compared(tmp_path, a, b)
    nearest = []
    for each in (values, moved):
        cosines = cosine_similarity(each.astype(np.float64))
        np.fill_diagonal(cosines, -np.inf)
        nearest.append(cosines.argmax(axis=1))
    expected = (nearest[0] == nearest[1]).mean()
    assert report.kind(STATES).total.neighbour_agreement == pytest.approx(expected)
    assert tokens == 2 or 0 < expected < 1


def test_arrays_that_are_worked_on_in_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    states = rng.standard_normal((2, 400, 700)).astype(np.float16)
    weights = (np.exp(2 * rng.standard_normal((2, 400, 400))) * np.tri(400)).astype(np.float32)
    weights = (weights / weights.sum(-1, keepdims=True)).astype(np.float16)
    a = [Sample("q", dict(zip(NAMES[:2], states, strict=True)), {NAMES[0]: weights})]
    b = in_steps(a, 0.3)
    report = compared(tmp_path, a, b)

    def nrmse(before: np.ndarray, after: np.ndarray) -> float:
        return float(np.sqrt(np.square((after - before) / before[1:].std(axis=0)).mean()))

    first, second = (
        [each.states[name].astype(float) for each in (a[0], b[0])] for name in NAMES[:2]
    )
    found = layer(report, STATES, NAMES[1])
    assert found["nrmse"] == pytest.approx(nrmse(*second), rel=1e-5)
    steps = [after - before for before, after in zip(first, second, strict=True)]
    assert found["difference_nrmse"] == pytest.approx(nrmse(*steps), rel=1e-5)
    found = layer(report, ATTENTIONS, NAMES[0])
    edges = [_graph_edges(each, NAMES[0], 0.01) for each in (a, b)]
    assert found["num_edges"] == len(edges[0])
    assert found["num_added"] + found["num_removed"] == len(edges[0] ^ edges[1]) > 0
    restored = b[0].attentions[NAMES[0]].astype(float)
    restored[(restored == 0) & (weights > 0)] = 2.0**-24
    expected = entropy(weights.astype(float), restored, axis=-1)
    assert found["mean_kl"] == pytest.approx(expected.mean())
    assert found["max_kl"] == pytest.approx(expected.max())


def test_totals(tmp_path: Path) -> None:
    a = make()
    b = in_steps(a, 0.3)
    report = compared(tmp_path, a, b)
    layers = [layer(report, STATES, name) for name in NAMES]
    total = report.kind(STATES).total
    values = [each["num_values"] for each in layers]
    assert total.num_values == sum(values)
    assert total.nrmse == pytest.approx(
        np.sqrt(sum(each["nrmse"] ** 2 * each["num_values"] for each in layers) / sum(values))
    )
    assert total.max_sigma == max(each["max_sigma"] for each in layers)
    assert total.min_cosine == min(each["min_cosine"] for each in layers)
    weights = [
        np.concatenate([s.attentions[name].ravel() for s in samples for name in NAMES]).astype(
            float
        )
        for samples in (a, b)
    ]
    expected = np.linalg.norm(weights[1] - weights[0]) / np.linalg.norm(weights[0])
    assert report.kind(ATTENTIONS).total.nrmse == pytest.approx(expected)


# --- odd values -----------------------------------------------------------------------------------


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    a = make()
    b = in_steps(a, 0.1)
    name = NAMES[1]
    for samples in (a, b):
        samples[0].states[name][1, :3] = np.nan, np.inf, -np.inf
        samples[1].attentions[name][0, 2, 1] = np.nan
    a[1].states[name][2, 0] = np.nan
    b[1].states[name][3, 1] = np.inf
    b[2].states[name][1, 1] = np.inf
    a[2].states[name][1, 1] = -np.inf
    report = compared(tmp_path, a, b)
    states = [[each.states[name] for each in samples] for samples in (a, b)]
    expected = state_measures(*states)
    assert (expected["num_not_finite"], expected["num_misplaced"]) == (5, 3)
    found = layer(report, STATES, name)
    assert_close(found, expected)
    # Differences leave out what is not finite in either layer.
    for other in (name, NAMES[2]):
        assert layer(report, STATES, other)["num_differences"] == found["num_values"]
    weights = layer(report, ATTENTIONS, name)
    assert (weights["num_not_finite"], weights["num_misplaced"]) == (1, 0)
    whole = layer(report, ATTENTIONS, NAMES[0])
    assert weights["num_rows"] == whole["num_rows"] - 1
    assert weights["num_values"] == whole["num_values"] - 1
    assert all("not finite" in line for line in report.exceeding(max_sigma=1e9))


ODD = st.sampled_from([0.0, -0.0, 6e-8, 0.01, -0.01, 1.0, 0.5, 65504.0, np.nan, np.inf, -np.inf])


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@given(st.lists(st.tuples(ODD, ODD), min_size=24, max_size=24))
def test_odd_values_are_those_of_the_plain_formulas(
    dtype: type, pairs: list[tuple[float, float]]
) -> None:
    """Of states and of weights; where NaN and infinity are, and where zeros."""
    a, b = np.array(pairs, dtype).T.reshape(2, 2, 3, 4)
    states, weights = StateErrors("layer_000"), WeightErrors("layer_000", 0.01)
    for one, other in zip(a, b, strict=True):
        pair = ValuePair.of(one, other, np.float32 if dtype is np.float16 else np.float64)
        states.add(pair, None, first=0)
    weights.add(a, b)
    x, y = (each.ravel().astype(np.float64) for each in (a, b))
    finite = np.isfinite(x) & np.isfinite(y)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    kept, other = x[finite], y[finite]
    errors = np.abs(other - kept)
    relative = errors[kept != 0] / np.abs(kept[kept != 0])
    expected = {
        "num_values": int(finite.sum()),
        "num_not_finite": int((~np.isfinite(x)).sum()),
        "num_misplaced": int((~finite & ~same).sum()),
        "max_error": errors.max(initial=0),
        "max_relative": relative.max(initial=0),
        "num_from_zero": int(((kept == 0) & (other != 0)).sum()),
        "num_to_zero": int(((kept != 0) & (other == 0)).sum()),
    }
    for each in (states, weights):
        assert_close(asdict(each.result()), expected)


def test_dead_channels(tmp_path: Path) -> None:
    a = make()
    b = in_steps(a, 0.1)
    for each in b:
        each.states[NAMES[0]][:, 2] += np.float16(0.25)
    report = compared(tmp_path, a, b)
    sigma = sigmas([each.states[NAMES[0]] for each in a])
    assert sigma[2] == min(sigma)
    found = layer(report, STATES, NAMES[0])
    assert found["max_sigma"] == pytest.approx(0.25 / sigma[2])
    assert found["max_sigma"] > 4096 * 0.01


def test_states_without_a_sigma(tmp_path: Path) -> None:
    values = np.ones((3, HIDDEN), np.float16)
    a = [Sample("q", {"layer_000": values})]
    report = compared(tmp_path, a, a)
    total = report.kind(STATES).total
    assert (total.nrmse, total.max_sigma, total.max_error) == (None, None, 0)
    assert report.exceeding(max_sigma=0) == []
    report = compared(tmp_path, a, [Sample("q", {"layer_000": values * np.float16(1.5)})])
    assert report.kind(STATES).total.max_sigma is None
    assert "without a sigma" in report.exceeding(max_sigma=9)[0]


def test_a_single_token(tmp_path: Path) -> None:
    values = [np.full((1, HIDDEN), index, np.float16) for index in range(4)]
    a, b = (
        [
            Sample(f"q{i}", {"layer_000": each + np.float16(error)}, num_tokens=5)
            for i, each in enumerate(values)
        ]
        for error in (0, 0.5)
    )
    total = compared(tmp_path, a, b).kind(STATES).total
    # Old extractors kept the last token alone, so there is nothing to leave out.
    assert h5traces.open(tmp_path / "a.h5")[0].metadata.coverage == "last_position"
    assert total.nrmse == pytest.approx(0.5 / np.arange(4.0).std())
    assert (total.num_neighbours, total.neighbour_agreement) == (0, None)
    assert (total.num_from_zero, total.min_cosine) == (HIDDEN, 0)
    # A sequence of one token has no other than the first.
    short = [[replace(each, num_tokens=1) for each in samples] for samples in (a, b)]
    total = compared(tmp_path, *short).kind(STATES).total
    assert (total.nrmse, total.max_error) == (None, 0.5)


def test_weights_that_were_lost(tmp_path: Path) -> None:
    weights = np.array([[[1.0, 0.0], [2.0**-24, 0.5]], [[0.0, 0.0], [0.25, 0.75]]], np.float16)
    lost = weights.copy()
    lost[0, 1, 0] = 0
    lost[1, 0, 0] = 0.5
    a, b = ([Sample("q", {}, {"layer_000": each})] for each in (weights, lost))
    found = layer(compared(tmp_path, a, b), ATTENTIONS, "layer_000")
    assert_close(found, weight_measures([weights], [lost], 0.01), 1e-9)
    assert found["max_kl"] == 0
    assert (found["num_rows"], found["num_to_zero"], found["num_from_zero"]) == (3, 1, 1)


def test_other_float_types(tmp_path: Path) -> None:
    wide = [
        replace(each, states={n: v.astype(np.float32) * 1.001 for n, v in each.states.items()})
        for each in make()
    ]
    narrow = [
        replace(each, states={n: v.astype(np.float16) for n, v in each.states.items()})
        for each in wide
    ]
    report = compared(tmp_path, wide, narrow)
    for name in NAMES:
        expected = state_measures(
            [each.states[name] for each in wide], [each.states[name] for each in narrow]
        )
        assert_close(layer(report, STATES, name), expected, 1e-9)
    rounded = make_archive(tmp_path, make_batch("full_pkl", dtype="float32"), dtype="bfloat16")
    exact = make_archive(
        tmp_path, make_batch("full_pkl", dtype="float32"), name="e.pkl", dtype="float32"
    )
    total = compare(exact, rounded).kind(STATES).total
    assert total.max_relative == pytest.approx(2**-8, rel=0.1)


def test_values_whose_squares_overflow(tmp_path: Path) -> None:
    values = np.array([[1.0, 2.0], [1e300, -1e308], [-1e300, 1e308]])
    a, b = ([Sample("q", {"layer_000": each}, num_tokens=3)] for each in (values, -values))
    report = compared(tmp_path, a, b)
    found = report.as_dict()["kinds"][0]["total"]
    assert (found["nrmse"], found["max_sigma"], found["max_error"]) == (None, None, None)
    assert len(report.exceeding(max_sigma=1e9)) == 1
    same = compared(tmp_path, a, a)
    assert same.kind(STATES).total.max_error == 0
    assert same.exceeding(max_sigma=0) == []


@pytest.mark.parametrize("old", [each for each in LAYOUTS if not each.startswith("step")])
def test_all_layouts_that_were_ever_written(tmp_path: Path, old: str) -> None:
    path = make_archive(tmp_path, make_batch(old))
    report = compare(path, path)
    assert_perfect(report)
    assert STATES in [each.kind for each in report.kinds]
    assert report.num_samples == len(h5traces.open(path))


# --- which belong together ------------------------------------------------------------------------


@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), order=st.permutations(range(5)))
def test_identities(tmp_path_factory: pytest.TempPathFactory, seed: int, order: list[int]) -> None:
    folder = tmp_path_factory.mktemp("fidelity")
    a = make(num_samples=5, seed=seed)
    b = in_steps(a, 0.3)
    assert_perfect(compared(folder, a, a))
    assert_perfect(compared(folder, a, [a[index] for index in order]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        plain = compared(folder, a, b)
        patch.setattr(os, "cpu_count", lambda: 3)
        mixed = compared(folder, [a[i] for i in order], [b[i] for i in reversed(order)])
    for kind in plain.kinds:
        for each, other in zip(kind.layers, mixed.kind(kind.kind).layers, strict=True):
            expected = asdict(each)
            assert expected.pop("name") == other.name
            assert_close(asdict(other), {k: v for k, v in expected.items() if v is not None})


def assert_perfect(report: FidelityReport) -> None:
    for kind in report.kinds:
        for each in (kind.total, *kind.layers):
            found = asdict(each)
            zero = ["nrmse", "max_error", "max_relative", "num_misplaced"]
            zero += ["max_sigma"] if kind.kind == STATES else ["mean_kl", "max_kl", "num_added"]
            assert [found[name] or 0 for name in zero] == [0] * len(zero)
            if kind.kind == STATES:
                assert found["mean_cosine"] == found["min_cosine"]
                assert found["mean_cosine"] in (1, None)
                assert found["neighbour_agreement"] in (1, None)
                assert found["difference_nrmse"] in (0, None)
    assert report.exceeding(max_sigma=0, max_flips=0) == []
    assert report.only_in_a == report.only_in_b


def test_samples_by_id_and_generation(tmp_path: Path) -> None:
    a = make(num_samples=4)
    a = [replace(each, sample_id="q", generation=index % 2) for index, each in enumerate(a)]
    a[3] = replace(a[3], sample_id=None, generation=None)
    # The third repeats the first's key, and comes after it in both.
    order = [1, 0, 2, 3]
    report = compared(tmp_path, a, [a[index] for index in order])
    assert_perfect(report)
    assert (report.num_samples, report.matched_by) == (4, "id and ordinal")


def test_samples_without_ids(tmp_path: Path) -> None:
    a = make(sample_id=None)
    report = compared(tmp_path, a, make()[:3])
    assert (report.num_samples, report.matched_by) == (3, "ordinal")
    assert report.only_in_a.samples == ["index 3"]
    assert report.kind(STATES).total.max_error == 0


def test_what_only_one_has(tmp_path: Path) -> None:
    a = make(num_samples=3)
    b = make(num_samples=5)[1:]
    for each in b:
        del each.states[NAMES[1]]
        del each.attentions[NAMES[0]]
    report = compared(tmp_path, a, b)
    assert report.num_samples == 2
    assert report.only_in_a.samples == ["q0"]
    assert report.only_in_b.samples == ["q3", "q4"]
    assert report.only_in_a.arrays == {f"{ATTENTIONS}/{NAMES[0]}": 2, f"{STATES}/{NAMES[1]}": 2}
    assert report.only_in_b.arrays == {}
    # Differences are to the compared layer before.
    assert [each.name for each in report.kind(STATES).layers] == [NAMES[0], NAMES[2]]
    assert layer(report, STATES, NAMES[2])["difference_nrmse"] == 0


def test_the_embedding(tmp_path: Path) -> None:
    a = make()
    for each in a:
        each.states["embedding"] = each.states[NAMES[0]] * np.float16(0.5)
    report = compared(tmp_path, a, a)
    assert_perfect(report)
    assert [each.name for each in report.kind(STATES).layers] == ["embedding", *NAMES]


def test_shards(tmp_path: Path) -> None:
    a = make(num_samples=5)
    whole = write(tmp_path / "whole.h5", a)
    write(tmp_path / "shards", a, shard_samples=2)
    report = compare(whole, tmp_path / "shards")
    assert_perfect(report)
    assert (len(report.b), report.num_samples) == (3, 5)
    assert_perfect(compare(f"{tmp_path}/shards/*.h5", [whole]))


def test_generation_steps_are_left_out(tmp_path: Path) -> None:
    steps = make_archive(tmp_path, make_batch("step_full"))
    with pytest.raises(FidelityError, match="hidden_states holds generation steps"):
        compare(steps, steps)


# --- what cannot be compared ----------------------------------------------------------------------


def test_different_shapes(tmp_path: Path) -> None:
    a = make()
    longer = [replace(each, sample_id=f"q{3 - i}") for i, each in enumerate(make(seed=9))]
    with pytest.raises(
        FidelityError, match=r"b\.h5: /samples/0000000\d \('q\d'\): .* has the shape"
    ):
        compared(tmp_path, a, longer)
    wider = [
        replace(each, states={n: v[:, :5].copy() for n, v in each.states.items()}) for each in a
    ]
    with pytest.raises(FidelityError, match=r"hidden_states/layer_\d+ has the shape \(\d, 5\)"):
        compared(tmp_path, a, wider)
    heads = [
        replace(
            each,
            means={n: v[0, :3, :3].copy() for n, v in each.attentions.items()},
            states={},
            attentions={},
        )
        for each in a
    ]
    with pytest.raises(FidelityError, match=r"attention_mean/layer_\d+ has the shape \(3, 3\)"):
        compared(tmp_path, a, heads)


def test_samples_of_different_width(tmp_path: Path) -> None:
    a = make(num_samples=2)
    a[1] = replace(a[1], states={n: v[:, :5].copy() for n, v in a[1].states.items()})
    with pytest.raises(FidelityError, match="is 5 wide, in other samples 8"):
        compared(tmp_path, a, a)


def test_nothing_in_common(tmp_path: Path) -> None:
    with pytest.raises(
        FidelityError, match="have no sample in common: the first has q0, q1, q2 and 1 more"
    ):
        compared(tmp_path, make(), [replace(each, sample_id="x") for each in make(1)])
    with pytest.raises(FidelityError, match="no layer of a kind in common"):
        compared(tmp_path, make(attentions={}), make(states={}))
    with pytest.raises(FileNotFoundError, match=r"nope\.h5"):
        compare(tmp_path / "a.h5", tmp_path / "nope.h5")


# --- limits and memory ----------------------------------------------------------------------------


def test_limits(tmp_path: Path) -> None:
    a = make(num_samples=8)
    report = compared(tmp_path, a, in_steps(a, 0.4))
    total = report.kind(STATES).total
    assert report.exceeding(max_sigma=total.max_sigma) == []
    (line,) = report.exceeding(max_sigma=total.max_sigma * 0.9999)
    assert line.startswith("hidden_states/layer_0")
    assert len(report.exceeding(max_sigma=0.0)) == 3
    assert report.exceeding() == []
    assert report.exceeding(max_flips=1.0) == []
    states_only = compared(tmp_path, make(attentions={}), make(attentions={}))
    assert "no attentions were compared" in states_only.exceeding(max_flips=1)[0]
    none = [Sample("q", {}, {"layer_000": np.zeros((1, 2, 2), np.float16)})]
    some = [Sample("q", {}, {"layer_000": np.ones((1, 2, 2), np.float16)})]
    report = compared(tmp_path, none, some)
    assert report.kind(ATTENTIONS).total.flip_share is None
    assert report.exceeding(max_flips=1) == [
        "attentions/layer_000: 3 of 0 edges flip, more than 1 of them"
    ]


def test_the_report_is_json(tmp_path: Path) -> None:
    a = make()
    report = compared(tmp_path, a, with_means_only(in_steps(a, 0.1)))
    document = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert document["num_samples"] == 4
    assert [each["kind"] for each in document["kinds"]] == [STATES, MEANS]
    assert document["kinds"][1]["total"]["num_flips"] == 0
    assert document["kinds"][1]["total"]["flip_share"] == 0
    assert len(document["kinds"][0]["layers"]) == 3


def test_progress_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = make()
    b = in_steps(a, 0.1)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    first = compared(tmp_path, a, b, progress=lambda *each: seen.append(each))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for threads in (2, 7):
        monkeypatch.setattr(os, "cpu_count", lambda found=threads: found)
        assert compared(tmp_path, a, b) == first


def test_memory_does_not_grow_with_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)

    def peak(num_samples: int) -> int:
        rng = np.random.default_rng(0)
        values = rng.standard_normal((16, 1024)).astype(np.float16)
        states = {f"layer_{number:03d}": values for number in range(3)}
        path = write(
            tmp_path / f"{num_samples}.h5", [Sample(f"q{i}", states) for i in range(num_samples)]
        )
        compare(path, path)
        tracemalloc.start()
        compare(path, path)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    # 56 samples more take 5.5 MB in each of both archives.
    assert peak(64) < peak(8) + 1_000_000


def test_nothing_is_written(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", make())
    before = path.read_bytes()
    compare(path, path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.h5"]
    assert len(h5traces.open(path)) == 4
