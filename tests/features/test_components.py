"""Principal components equal those of scikit-learn's PCA on all rows at once."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import pytest
from sklearn.decomposition import PCA

from h5traces.errors import OptionError
from h5traces.features.components import fit_components

if TYPE_CHECKING:
    from collections.abc import Iterator


def correlated(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows far from zero whose variances fall as 1 / n, as slowly as those of hidden states."""
    rng = np.random.default_rng(seed)
    turned = np.linalg.qr(rng.standard_normal((width, width)))[0]
    strengths = np.arange(1, width + 1) ** -0.5
    return (rng.standard_normal((rows, width)) * strengths) @ turned + 100.0


def split(rows: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(rows, np.cumsum(sizes)[:-1])


def signed(components: np.ndarray) -> np.ndarray:
    largest = np.argmax(np.abs(components), axis=1)
    return components * np.sign(components[np.arange(len(components)), largest])[:, None]


@pytest.mark.parametrize("sizes", [[200], [50] * 4, [1, 2, 190, 7], [0, 120, 0, 80]])
def test_few_rows_give_the_components_of_pca(sizes: list[int]) -> None:
    rows = correlated(200, 20)
    found, expected = fit_components(split(rows, sizes), 6), PCA(6, svd_solver="full").fit(rows)
    assert found.num_rows == 200
    np.testing.assert_allclose(found.mean, expected.mean_, rtol=1e-12)
    np.testing.assert_allclose(found.components, signed(expected.components_), atol=1e-8)
    np.testing.assert_allclose(found.explained_variance, expected.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(
        found.explained_variance_ratio, expected.explained_variance_ratio_, rtol=1e-9
    )
    by_hand = (rows - rows.mean(0)) @ found.components.T
    np.testing.assert_allclose(found.transform(rows), by_hand, atol=1e-4)


@pytest.mark.parametrize("num_components", [4, 32])
@pytest.mark.parametrize("block_rows", [7, 1500])
def test_many_rows_come_close(num_components: int, block_rows: int) -> None:
    rows = correlated(4000, 128)
    blocks = (rows[start : start + block_rows] for start in range(0, len(rows), block_rows))
    found = fit_components(blocks, num_components)
    expected = PCA(num_components, svd_solver="full").fit(rows)
    assert found.num_rows == len(rows)
    assert found.components.shape == (num_components, 128)
    np.testing.assert_allclose(found.mean, expected.mean_, rtol=1e-10)
    np.testing.assert_allclose(found.explained_variance, expected.explained_variance_, rtol=1e-3)
    np.testing.assert_allclose(
        found.explained_variance_ratio, expected.explained_variance_ratio_, rtol=1e-3
    )
    # Of the variance that the best directions explain, less than one in 100,000 is lost.
    along = rows @ found.components.T
    lost = 1 - along.var(axis=0, ddof=1).sum() / expected.explained_variance_.sum()
    assert lost < 1e-5
    assert np.abs(np.sum(found.components * expected.components_, axis=1)).min() > 0.999
    products = found.components @ found.components.T
    np.testing.assert_allclose(products, np.eye(num_components), atol=1e-9)


def test_a_channel_that_is_thousands_of_times_larger() -> None:
    """As one of massive activations; in float32, the others would drown in its rounding."""
    rows = correlated(3000, 64)
    rows[:, 5] *= 1000
    found, expected = fit_components([rows], 8), PCA(8, svd_solver="full").fit(rows)
    np.testing.assert_allclose(found.explained_variance, expected.explained_variance_, rtol=1e-6)


def test_wide_rows_in_bounded_memory() -> None:
    rng = np.random.default_rng(0)
    strong = rng.standard_normal((3, 4096)).astype(np.float32)

    def blocks() -> Iterator[np.ndarray]:
        for _ in range(12):
            noise = 0.1 * rng.standard_normal((100, 4096), dtype=np.float32)
            yield rng.standard_normal((100, 3), dtype=np.float32) @ strong + noise

    tracemalloc.start()
    found = fit_components(blocks(), 3)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.components.shape == (3, 4096)
    # The batch, its three factors and what LAPACK takes for them; no matrix of covariances.
    assert found.num_rows == 1200
    assert most < 250e6
    ours, theirs = found.components, np.linalg.qr(strong.astype(float).T)[0].T
    assert np.linalg.svd(ours @ theirs.T, compute_uv=False).min() > 0.999


@pytest.mark.parametrize("rows", [10, 1500])
def test_rows_without_variance(rows: int) -> None:
    found = fit_components([np.ones((rows, 4))], 2)
    assert found.explained_variance_ratio.tolist() == [0, 0]
    assert np.isfinite(found.transform(np.ones((3, 4)))).all()


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(OptionError, match="at least 1"):
        fit_components([], 0)
    with pytest.raises(OptionError, match="3 components were asked for, but 3 rows"):
        fit_components([correlated(3, 9)], 3)
    with pytest.raises(OptionError, match="have 0 at most"):
        fit_components([], 3)


def test_without_scikit_learn_it_is_named() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import h5traces.features as features\n"
        "features.extract_features('missing.h5', 'f.h5', ['last_token'], pca=2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingDependencyError" in done.stderr
    assert "h5traces[pca]" in done.stderr
