"""The order of an epoch: a function of seed and epoch alone, so that it can be taken up again.

A shuffle is an argsort of the raw output of numpy's Philox generator, whose stream numpy keeps the
same in all releases; `Generator.permutation` gives no such promise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from h5traces.errors import DatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEFAULT_WINDOW = 8


def epoch_order(
    shard_numbers: NDArray[np.int64], *, seed: int, epoch: int, window: int | None
) -> NDArray[np.int64]:
    """All items in random order, a few shards at a time.

    Parameters
    ----------
    shard_numbers
        For every item, the shard that it lies in.
    seed, epoch
        The same two give the same order, on every machine.
    window
        Shards that are mixed with one another: they come in random order, so many at a time, and
        the items of those are shuffled together. None mixes all.

    Returns
    -------
    NDArray
        A permutation of the items, int64.
    """
    if window is not None and window < 1:
        message = f"window is {window}, expected the number of shards to mix, or None for all"
        raise DatasetError(message)
    draws = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    shards = np.unique(shard_numbers)
    if window is None or len(shards) <= window:
        return _shuffled(np.arange(len(shard_numbers)), draws)
    by_shard = np.argsort(shard_numbers, kind="stable")
    parts = np.split(by_shard, np.searchsorted(shard_numbers[by_shard], shards[1:]))
    turns = _shuffled(np.arange(len(parts)), draws).tolist()
    windows = (turns[start : start + window] for start in range(0, len(turns), window))
    return np.concatenate(
        [_shuffled(np.concatenate([parts[turn] for turn in each]), draws) for each in windows]
    )


def _shuffled(values: NDArray[np.int64], draws: np.random.Philox) -> NDArray[np.int64]:
    shuffled: NDArray[np.int64] = values[np.argsort(draws.random_raw(len(values)), kind="stable")]
    return shuffled


def share_of_rank(
    order: NDArray[np.int64], *, rank: int, num_replicas: int, drop_last: bool
) -> NDArray[np.int64]:
    """What one of several processes takes: every n-th item, the same number for all of them.

    As `torch.utils.data.DistributedSampler` has it: what is missing for equal shares is taken from
    the beginning again, or, with `drop_last`, the remainder is left out.
    """
    if not 0 <= rank < num_replicas:
        message = f"rank is {rank}, expected 0 to {num_replicas - 1}: there are {num_replicas}"
        raise DatasetError(message)
    share = len(order) // num_replicas if drop_last else -(-len(order) // num_replicas)
    return np.resize(order, share * num_replicas)[rank::num_replicas] if share else order[:0]


def length_of_share(num_items: int, *, num_replicas: int, drop_last: bool) -> int:
    """How many items `share_of_rank` gives."""
    return num_items // num_replicas if drop_last else -(-num_items // num_replicas)
