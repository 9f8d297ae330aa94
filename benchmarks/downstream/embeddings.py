"""Sentence embeddings of an encoder: do neighbours stay neighbours?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from downstream.capturing import Trace
    from downstream.coding import Coder

NEIGHBOURS: Final = 5


def embed(states: Sequence[NDArray[np.float16]]) -> NDArray[np.float64]:
    """The mean over tokens of each text, of length one: ``(texts, hidden)``."""
    means = np.stack([each.astype(np.float64).mean(axis=0) for each in states])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def nearest(embeddings: NDArray[np.float64]) -> NDArray[np.int64]:
    """The nearest other texts by cosine: ``(texts, NEIGHBOURS)``."""
    likeness = embeddings @ embeddings.T
    np.fill_diagonal(likeness, -np.inf)
    return np.argsort(-likeness, axis=1, kind="stable")[:, :NEIGHBOURS]


def measure_embeddings(coder: Coder, traces: Sequence[Trace]) -> dict[str, Any]:
    """Cosine of the last layer's embeddings with the original ones, and shared neighbours.

    Returns
    -------
    dict
        ``cosine_mean`` and ``cosine_least``, the share of texts whose nearest neighbour stays
        (``nearest_kept``), and the share of all `NEIGHBOURS` nearest ones that stay
        (``neighbours_kept``).
    """
    last = len(traces[0].states) - 1
    before = embed([each.states[last] for each in traces])
    after = embed([coder.restore(last, each.states[last]) for each in traces])
    cosines = (before * after).sum(axis=1)
    theirs, ours = nearest(before), nearest(after)
    shared = [len(set(a) & set(b)) for a, b in zip(theirs.tolist(), ours.tolist(), strict=True)]
    return {
        "cosine_mean": float(cosines.mean()),
        "cosine_least": float(cosines.min()),
        "nearest_kept": float((theirs[:, 0] == ours[:, 0]).mean()),
        "neighbours_kept": float(np.mean(shared) / theirs.shape[1]),
    }
