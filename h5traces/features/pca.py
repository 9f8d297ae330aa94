"""Principal components of more rows than fit into memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h5traces.errors import FeatureError

Doubles = NDArray[np.float64]
# Up to this width the whole covariance is kept (32 MB); it is exact.
MOST_EXACT_WIDTH = 2048


@dataclass(frozen=True, slots=True)
class PrincipalComponents:
    """What was fitted.

    Attributes
    ----------
    mean
        Mean of all rows, ``(width,)``.
    components
        Directions, largest variance first, ``(components, width)``; orthonormal.
    explained_variance
        Variance along each, with ``rows - 1`` below.
    explained_variance_ratio
        Its share of the variance of all directions.
    num_rows
        Rows that it was fitted on.
    """

    mean: Doubles
    components: Doubles
    explained_variance: Doubles
    explained_variance_ratio: Doubles
    num_rows: int

    def transform(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Rows along the components, ``(rows, components)``."""
        centred = np.asarray(rows, dtype=np.float64) - self.mean
        return (centred @ self.components.T).astype(np.float32)


class StreamingPCA:
    """Principal components, fitted block by block.

    Up to a width of 2048, the mean and the matrix of squared deviations are accumulated in float64
    (the pairwise update of Chan, Golub and LeVeque 1979), and the components are its eigenvectors:
    exact, whatever the blocks. Wider rows go through the incremental singular value decomposition
    of Ross et al. 2008 (as in scikit-learn's ``IncrementalPCA``), which keeps `num_components`
    directions and forgets the rest after each block; larger blocks are more exact.

    Signs are such that the entry of largest magnitude of every component is positive.

    Parameters
    ----------
    num_components
        How many directions to keep.
    """

    def __init__(self, num_components: int) -> None:
        if num_components < 1:
            message = f"num_components is {num_components}, expected at least 1"
            raise FeatureError(message)
        self.num_components = num_components
        self.num_rows = 0
        self._mean: Doubles = np.zeros(0)
        self._scatter: Doubles | None = None
        # Directions times their singular values, for wide rows.
        self._sketch: Doubles = np.zeros((0, 0))
        self._waiting: list[Doubles] = []
        self._total_squares = 0.0

    def partial_fit(self, rows: NDArray[Any]) -> StreamingPCA:
        """Take a block of rows, ``(rows, width)``, into account.

        Raises
        ------
        FeatureError
            The rows hold NaN or infinite values, or are of another width than those before.
        """
        block = np.asarray(rows, dtype=np.float64)
        width = self._mean.shape[0] or (self._waiting[0].shape[1] if self._waiting else 0)
        if block.ndim != 2 or (width and block.shape[1] != width):
            message = f"rows have the shape {block.shape}, expected (rows, {width or 'width'})"
            raise FeatureError(message)
        if not np.isfinite(block).all():
            message = "rows hold NaN or infinite values; principal components of these do not exist"
            raise FeatureError(message)
        if not len(block):
            return self
        if block.shape[1] <= MOST_EXACT_WIDTH:
            self._add_exact(block)
            return self
        # Small blocks would lose most: they wait until there are several times the components.
        self._waiting.append(block)
        if sum(map(len, self._waiting)) >= 5 * self.num_components:
            self._flush()
        return self

    def _add_exact(self, block: Doubles) -> None:
        mean, gain = self._merged_mean(block)
        centred = block - block.mean(axis=0)
        added = centred.T @ centred
        if self._scatter is None:
            self._scatter = added
        else:
            self._scatter += added
            self._scatter += np.outer(gain, gain)
        self._mean, self.num_rows = mean, self.num_rows + len(block)

    def _merged_mean(self, block: Doubles) -> tuple[Doubles, Doubles]:
        """The mean with a block, and the direction in which the two means' difference spreads."""
        added, known = block.mean(axis=0), self.num_rows
        if not known:
            return added, np.zeros_like(added)
        total = known + len(block)
        shift = added - self._mean
        return self._mean + shift * (len(block) / total), shift * np.sqrt(
            known * len(block) / total
        )

    def _flush(self) -> None:
        """Take the blocks that wait into account, for wide rows."""
        if not self._waiting:
            return
        block = np.concatenate(self._waiting)
        self._waiting = []
        mean, gain = self._merged_mean(block)
        centred = block - block.mean(axis=0)
        self._total_squares += float(np.square(centred).sum() + np.square(gain).sum())
        stacked = np.concatenate([self._sketch.reshape(-1, block.shape[1]), centred, gain[None]])
        _, values, directions = np.linalg.svd(stacked, full_matrices=False)
        keep = min(self.num_components, len(values))
        self._sketch = values[:keep, None] * directions[:keep]
        self._mean, self.num_rows = mean, self.num_rows + len(block)

    def finished(self) -> PrincipalComponents:
        """The components of all rows so far.

        Raises
        ------
        FeatureError
            More components are wanted than the rows have.
        """
        self._flush()
        width = self._mean.shape[0]
        most = min(self.num_rows - 1, width)
        if self.num_components > most:
            message = (
                f"{self.num_components} components were asked for, but {self.num_rows} rows of "
                f"width {width} have {max(0, most)} at most; ask for fewer, or give more samples"
            )
            raise FeatureError(message)
        if self._scatter is not None:
            total = float(np.trace(self._scatter))
            squares, vectors = np.linalg.eigh(self._scatter)
            order = np.argsort(squares)[::-1][: self.num_components]
            squares, directions = np.maximum(squares[order], 0.0), vectors[:, order].T
        else:
            total = self._total_squares
            values = np.linalg.norm(self._sketch, axis=1)
            # Directions of no variance at all would be divided by 0.
            directions = self._sketch / np.where(values, values, 1.0)[:, None]
            squares = values**2
        largest = np.argmax(np.abs(directions), axis=1)
        signs = np.sign(directions[np.arange(len(directions)), largest])
        return PrincipalComponents(
            mean=self._mean,
            components=directions * np.where(signs, signs, 1.0)[:, None],
            explained_variance=squares / (self.num_rows - 1),
            explained_variance_ratio=squares / total if total else np.zeros_like(squares),
            num_rows=self.num_rows,
        )
