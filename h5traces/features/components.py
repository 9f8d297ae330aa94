"""Principal components of more rows than fit into memory, by scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import OptionError
from h5traces.lazy import needing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

# Rows that are decomposed at a time; 32 MB at a width of 4096.
_BATCH_ROWS: Final = 1024


@dataclass(frozen=True, slots=True)
class PrincipalComponents:
    """What was fitted, all in float64.

    Attributes
    ----------
    mean
        Mean of all rows, ``(width,)``.
    components
        Directions, largest variance first, ``(components, width)``; orthonormal, the entry of
        largest magnitude of each is positive.
    explained_variance
        Variance along each, with ``rows - 1`` as the denominator.
    explained_variance_ratio
        Its share of the variance of all directions; 0 where the rows do not vary.
    num_rows
        Rows that were fitted on.
    """

    mean: NDArray[np.float64]
    components: NDArray[np.float64]
    explained_variance: NDArray[np.float64]
    explained_variance_ratio: NDArray[np.float64]
    num_rows: int

    def transform(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Rows ``(rows, width)`` along the components: float32 ``(rows, components)``."""
        centred = np.asarray(rows, dtype=np.float64) - self.mean
        return (centred @ self.components.T).astype(np.float32)


def require_scikit_learn() -> Any:
    """The class ``sklearn.decomposition.IncrementalPCA``."""
    with needing("pca", "scikit-learn", extra="pca"):
        from sklearn.decomposition import IncrementalPCA
    return IncrementalPCA


# Shares of a variance of zero are 0 / 0.
@np.errstate(invalid="ignore")
def fit_components(blocks: Iterable[NDArray[Any]], num_components: int) -> PrincipalComponents:
    """Principal components of finite rows, which come in blocks ``(rows, width)`` of any size.

    Up to 1,090 rows they are those of ``sklearn.decomposition.PCA``. More rows go through
    ``IncrementalPCA``, which forgets the variance outside the directions that it keeps; so it keeps
    about four times as many as are asked for, and takes 1,024 rows or more at a time.
    """
    if num_components < 1:
        message = f"num_components is {num_components}, expected at least 1"
        raise OptionError(message)
    num_kept = min(4 * num_components + 64, num_components + 512)
    batch_rows = max(_BATCH_ROWS, 2 * num_kept)
    make, fitting = require_scikit_learn(), None
    waiting: list[NDArray[Any]] = []
    for block in blocks:
        waiting.append(block)
        # No batch may have fewer rows than directions are kept, so the last one has some to spare.
        while sum(map(len, waiting)) >= batch_rows + num_kept:
            rows = np.concatenate(waiting, dtype=np.float64)
            fitting = fitting or make(min(num_kept, rows.shape[1]), copy=False)
            waiting = [rows[batch_rows:].copy()]
            fitting.partial_fit(rows[:batch_rows])
    rows = np.concatenate(waiting, dtype=np.float64) if waiting else np.zeros((0, 0))
    if fitting is None:
        most = min(len(rows) - 1, rows.shape[1])
        if num_components > most:
            message = (
                f"{num_components} components were asked for, but {len(rows)} rows of width "
                f"{rows.shape[1]} have {max(0, most)} at most; ask for fewer, or give more samples"
            )
            raise OptionError(message)
        fitting = make(min(num_kept, *rows.shape), copy=False)
    fitting.partial_fit(rows)
    return PrincipalComponents(
        mean=fitting.mean_,
        components=fitting.components_[:num_components],
        explained_variance=fitting.explained_variance_[:num_components],
        explained_variance_ratio=np.nan_to_num(fitting.explained_variance_ratio_[:num_components]),
        num_rows=int(fitting.n_samples_seen_),
    )
