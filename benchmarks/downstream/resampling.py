"""Confidence intervals by bootstrap over texts, the same resamples for all that is compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_SEED: Final = 0
_TAILS: Final = (2.5, 97.5)


class Bootstrap:
    """Resamples of texts, drawn once.

    Tokens of a text resemble each other, so whole texts are drawn, with all of their tokens.

    Parameters
    ----------
    num_texts
        Texts to draw from; as many are drawn.
    num_resamples
        How often.
    """

    def __init__(self, num_texts: int, num_resamples: int = 10_000) -> None:
        generator = np.random.default_rng(_SEED)
        shares = np.full(num_texts, 1 / num_texts)
        # How often each text is in each resample: (resamples, texts).
        self._counts = generator.multinomial(num_texts, shares, num_resamples).astype(np.float64)

    def per_token(self, sums: NDArray[Any], tokens: NDArray[Any]) -> dict[str, float]:
        """Mean over tokens, and its interval.

        Parameters
        ----------
        sums, tokens
            Of every text: the sum over its tokens, and their number.
        """
        drawn = (self._counts @ sums) / (self._counts @ tokens)
        return interval(float(sums.sum() / tokens.sum()), drawn)

    def auroc(self, ranking: Ranking) -> NDArray[np.float64]:
        """Area under the curve: of the texts as they are, and then of every resample."""
        return ranking.auroc(np.vstack((np.ones((1, self._counts.shape[1])), self._counts)))


def change(areas: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    """The mean of several changes of what `Bootstrap.auroc` gives, and its interval."""
    mean = np.mean(areas, axis=0)
    return interval(float(mean[0]), mean[1:])


def interval(value: float, drawn: NDArray[np.float64]) -> dict[str, float]:
    """A value with the 95 % interval that resamples give."""
    low, high = np.percentile(drawn, _TAILS)
    return {"value": value, "low": float(low), "high": float(high)}


class Ranking:
    """How scores rank tokens that have a property above those that have not, text by text.

    Parameters
    ----------
    scores, labels, texts
        Of every token: its score, whether it has the property, and the number of its text.
    num_texts
        How many texts there are.
    """

    def __init__(
        self,
        scores: NDArray[np.float64],
        labels: NDArray[np.bool_],
        texts: NDArray[np.int64],
        num_texts: int,
    ) -> None:
        positives, owners = scores[labels], texts[labels]
        self._num_positive = np.bincount(owners, minlength=num_texts).astype(np.float64)
        self._num_negative = np.bincount(texts[~labels], minlength=num_texts).astype(np.float64)
        # Pairs in the right order, equal ones counting half: (texts of positives, of negatives).
        self._right = np.empty((num_texts, num_texts))
        for text in range(num_texts):
            negatives = np.sort(scores[~labels & (texts == text)])
            below = np.searchsorted(negatives, positives, "left")
            below_or_equal = np.searchsorted(negatives, positives, "right")
            wins = (below + below_or_equal) / 2
            self._right[:, text] = np.bincount(owners, wins, minlength=num_texts)

    def auroc(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Area under the curve where each text is there so many times: ``(resamples, texts)``."""
        right = np.einsum("ij,ij->i", counts @ self._right, counts)
        pairs = (counts @ self._num_positive) * (counts @ self._num_negative)
        # A resample may lack one of the classes.
        return np.divide(right, pairs, out=np.full(len(counts), 0.5), where=pairs > 0)
