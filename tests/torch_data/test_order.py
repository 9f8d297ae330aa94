"""The order of an epoch: a permutation, the same everywhere, a few shards at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from h5traces.errors import DatasetError
from h5traces.torch_data import ShardSampler
from h5traces.torch_data.sampler import epoch_order, length_of_share, share_of_rank

FROZEN_WINDOWED = [1, 10, 0, 11, 2, 9, 6, 7, 4, 5, 3, 8]
FROZEN_WHOLE = [0, 3, 5, 1, 8, 11, 4, 10, 9, 2, 6, 7]

shard_sizes = st.lists(st.integers(0, 7), min_size=1, max_size=9)


class Numbers:
    """A dataset of numbers in shards."""

    fingerprint = "numbers"

    def __init__(self, sizes: list[int]) -> None:
        self.shard_numbers = np.repeat(np.arange(len(sizes)), sizes)

    def __len__(self) -> int:
        return len(self.shard_numbers)

    def __getitem__(self, index: int) -> int:
        return index


@given(
    sizes=shard_sizes,
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 2**20),
    window=st.none() | st.integers(1, 10),
)
def test_an_order_is_a_permutation_that_repeats(
    sizes: list[int], seed: int, epoch: int, window: int | None
) -> None:
    numbers = Numbers(sizes).shard_numbers
    order = epoch_order(numbers, seed=seed, epoch=epoch, window=window)
    assert sorted(order.tolist()) == list(range(len(numbers)))
    again = epoch_order(numbers, seed=seed, epoch=epoch, window=window)
    assert order.tolist() == again.tolist()


@given(sizes=shard_sizes, window=st.integers(1, 4), seed=st.integers(0, 99))
def test_shards_come_a_window_at_a_time(sizes: list[int], window: int, seed: int) -> None:
    numbers = Numbers(sizes).shard_numbers
    order = epoch_order(numbers, seed=seed, epoch=0, window=window)
    seen = numbers[order]
    present = [number for number, size in enumerate(sizes) if size]
    # What is begun is finished before more than `window` shards are open.
    open_shards: set[int] = set()
    left = {number: sizes[number] for number in present}
    for number in seen.tolist():
        open_shards.add(number)
        left[number] -= 1
        assert len(open_shards) <= window
        if all(not left[each] for each in open_shards):
            open_shards.clear()


def test_the_order_is_the_same_on_every_machine() -> None:
    """Orders as they were when this was written: a checkpoint of then must go on from there."""
    numbers = np.repeat(np.arange(4), 3)
    found = epoch_order(numbers, seed=7, epoch=2, window=2).tolist()
    assert found == FROZEN_WINDOWED
    assert epoch_order(numbers, seed=7, epoch=2, window=None).tolist() == FROZEN_WHOLE


def test_epochs_and_seeds_differ() -> None:
    numbers = np.repeat(np.arange(10), 10)
    orders = {
        tuple(epoch_order(numbers, seed=seed, epoch=epoch, window=3).tolist())
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


@given(num_items=st.integers(0, 40), num_replicas=st.integers(1, 7), drop_last=st.booleans())
def test_shares_are_those_of_torch(num_items: int, num_replicas: int, drop_last: bool) -> None:
    dataset = Numbers([num_items])
    for rank in range(num_replicas):
        found = share_of_rank(
            np.arange(num_items), rank=rank, num_replicas=num_replicas, drop_last=drop_last
        )
        assert len(found) == length_of_share(
            num_items, num_replicas=num_replicas, drop_last=drop_last
        )
        theirs = DistributedSampler(
            dataset,  # type: ignore[arg-type]  # it only wants a length
            num_replicas,
            rank,
            shuffle=False,
            drop_last=drop_last,
        )
        # Where there are fewer items than processes, torch's own drop_last miscounts.
        if num_items >= num_replicas or not drop_last:
            assert found.tolist() == list(theirs)


@given(
    sizes=shard_sizes.filter(sum),
    used=st.integers(0, 60),
    num_replicas=st.integers(1, 3),
    shuffle=st.booleans(),
)
def test_a_sampler_goes_on_where_it_was(
    sizes: list[int], used: int, num_replicas: int, shuffle: bool
) -> None:
    def make(rank: int = 0) -> ShardSampler:
        return ShardSampler(
            Numbers(sizes),
            shuffle=shuffle,
            seed=3,
            window=2,
            num_replicas=num_replicas,
            rank=rank,
        )

    sampler = make()
    sampler.set_epoch(5)
    whole = list(sampler)
    assert len(whole) == len(sampler)
    assert list(sampler) == whole
    iterator = iter(sampler)
    first = [next(iterator) for _ in range(min(used, len(sampler)))]
    state = sampler.state_dict()
    assert state == sampler.state_at(used)
    again = make()
    again.load_state_dict(state)
    assert again.epoch == 5
    again.set_epoch(5)
    assert first + list(again) == whole
    assert list(again) == whole
    # Another rank takes up its own share at the same place.
    if num_replicas > 1:
        other, resumed = make(1), make(1)
        other.set_epoch(5)
        resumed.load_state_dict(state)
        assert list(resumed) == list(other)[len(first) :]


def test_a_new_epoch_starts_at_its_beginning() -> None:
    sampler = ShardSampler(Numbers([4, 4]), seed=1)
    sampler.load_state_dict(sampler.state_at(6))
    sampler.set_epoch(1)
    assert len(list(sampler)) == 8
    assert sampler.state_dict()["position"] == 8
    sampler.set_epoch(2)
    assert sampler.state_dict()["position"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2}, "seed=1, here it is 2"),
        ({"window": 3}, "window=2, here it is 3"),
        ({"shuffle": False}, "shuffle=True, here it is False"),
        ({"num_replicas": 2, "rank": 0}, "num_replicas=1, here it is 2"),
        ({"drop_last": True}, "drop_last=False, here it is True"),
    ],
)
def test_a_state_of_another_run_is_refused(options: dict[str, Any], message: str) -> None:
    base: dict[str, Any] = {"seed": 1, "window": 2}
    state = ShardSampler(Numbers([4]), **base).state_dict()
    other = ShardSampler(Numbers([4]), **{**base, **options})
    with pytest.raises(DatasetError, match=message):
        other.load_state_dict(state)
    changed = ShardSampler(Numbers([4]), **base)
    with pytest.raises(DatasetError, match=r"dataset='other'.*shards that were rewritten"):
        changed.load_state_dict({**state, "dataset": "other"})
    with pytest.raises(DatasetError, match="has no epoch"):
        changed.load_state_dict({"position": 3})


def test_impossible_options() -> None:
    with pytest.raises(DatasetError, match="window is 0"):
        ShardSampler(Numbers([4, 4]), window=0)
    with pytest.raises(DatasetError, match="rank is 2, expected 0 to 1"):
        ShardSampler(Numbers([4]), num_replicas=2, rank=2)
    with pytest.raises(DatasetError, match="num_replicas is 0"):
        ShardSampler(Numbers([4]), num_replicas=0)
