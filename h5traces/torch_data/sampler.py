"""A sampler that shuffles by shards, shares among processes, and can resume within an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch.distributed
from torch.utils.data import Sampler

from h5traces.arguments import checked
from h5traces.errors import DatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.torch_data.dataset import ShardedDataset

DEFAULT_WINDOW = 8
# Entries of a checkpoint.
EPOCH, POSITION = "epoch", "position"


class ShardSampler(Sampler[int]):
    """Indices for a map-style dataset: shuffled by shards, shared among processes, resumable.

    Replaces `torch.utils.data.DistributedSampler` (call `set_epoch` in the same way), and knows its
    position: in a `torchdata.stateful_dataloader.StatefulDataLoader` the loader's own
    ``state_dict`` is right with any number of workers. With a plain `DataLoader`, whose workers run
    ahead, `state_at` makes the state for the samples that were really used.

    Parameters
    ----------
    dataset
        A `TraceDataset` or `h5traces.graph.TraceGraphDataset`.
    shuffle
        A new order every epoch; without it items come in the order of the dataset.
    seed
        Decides the order, together with the epoch.
    window
        Shards that are mixed at a time; None mixes all.
    num_replicas, rank
        Number of processes, and the number of this one; from `torch.distributed` by default.
    drop_last
        Leave out the remainder instead of repeating items for equal shares.
    """

    @checked
    def __init__(
        self,
        dataset: ShardedDataset,
        *,
        shuffle: bool = True,
        seed: int = 0,
        window: int | None = DEFAULT_WINDOW,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
    ) -> None:
        self._schedule = Schedule(
            dataset,
            shuffle=shuffle,
            seed=seed,
            window=window,
            num_replicas=num_replicas,
            rank=rank,
            drop_last=drop_last,
        )
        self.epoch = 0
        self._start = 0
        self._current: Iteration | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; a loaded position holds for its epoch only."""
        if epoch != self.epoch:
            self.epoch, self._start, self._current = epoch, 0, None

    def __len__(self) -> int:
        return len(self._schedule)

    def __iter__(self) -> Iterator[int]:
        start, self._start = self._start, 0
        self._current = Iteration(self._schedule, self.epoch, start)
        return self._current

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position of the current iteration, for `load_state_dict`."""
        if self._current is None:
            return self._schedule.state(self.epoch, self._start)
        return self._current.state_dict()

    def state_at(self, num_used: int) -> dict[str, Any]:
        """The state after that many samples of this epoch, for loaders that read ahead."""
        return self._schedule.state(self.epoch, min(num_used, len(self)))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue where that state was saved.

        Raises
        ------
        DatasetError
            The state is of other data or options.
        """
        self._schedule.check_state(state)
        self.epoch, self._start = state[EPOCH], state[POSITION]
        self._current = None


class Iteration(Iterator[Any]):
    """The indices of one iteration; has its own state, as StatefulDataLoader needs it.

    The state counts what was returned.
    """

    def __init__(self, schedule: Schedule, epoch: int, position: int = 0) -> None:
        self._schedule, self._epoch, self._position = schedule, epoch, position
        self._rest: Iterator[Any] | None = None

    def _begin(self) -> Iterator[Any]:
        return map(int, self._schedule.order(self._epoch)[self._position :])

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self._rest is None:
            self._rest = self._begin()
        found = next(self._rest)
        self._position += 1
        return found

    def state_dict(self) -> dict[str, Any]:
        return self._schedule.state(self._epoch, self._position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._schedule.check_state(state)
        self._epoch, self._position, self._rest = state[EPOCH], state[POSITION], None


class Schedule:
    """The order of items in one process of a training run; parameters as for `ShardSampler`."""

    def __init__(
        self,
        dataset: ShardedDataset,
        *,
        shuffle: bool,
        seed: int,
        window: int | None,
        num_replicas: int | None,
        rank: int | None,
        drop_last: bool,
    ) -> None:
        self.shard_numbers = dataset.shard_numbers
        self.num_replicas, self.rank = _place_among_processes(num_replicas, rank)
        self._shuffle, self._seed, self._window = shuffle, seed, window
        self._drop_last = drop_last
        # A checkpoint must agree in all of these. The rank may differ: ranks are in step.
        self.key = {
            "dataset": dataset.fingerprint,
            "seed": seed,
            "shuffle": shuffle,
            "window": window,
            "num_replicas": self.num_replicas,
            "drop_last": drop_last,
        }
        # Of no items: impossible options raise now, not in the first epoch.
        nothing = self.shard_numbers[:0]
        epoch_order(nothing, seed=seed, epoch=0, window=window)
        share_of_rank(nothing, rank=self.rank, num_replicas=self.num_replicas, drop_last=drop_last)

    def __len__(self) -> int:
        return length_of_share(
            len(self.shard_numbers), num_replicas=self.num_replicas, drop_last=self._drop_last
        )

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The items of this process in one epoch, in order."""
        numbers = self.shard_numbers
        order = np.arange(len(numbers))
        if self._shuffle:
            order = epoch_order(numbers, seed=self._seed, epoch=epoch, window=self._window)
        return share_of_rank(
            order, rank=self.rank, num_replicas=self.num_replicas, drop_last=self._drop_last
        )

    def state(self, epoch: int, position: int) -> dict[str, Any]:
        """A checkpoint: plain values, for `check_state`."""
        return {EPOCH: epoch, POSITION: position, **self.key}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise DatasetError for a checkpoint of another run, which would mix up the items."""
        missing = [name for name in (EPOCH, POSITION, *self.key) if name not in state]
        if missing:
            message = f"the state has no {', '.join(missing)}; expected what state_dict() gave"
            raise DatasetError(message)
        for name, ours in self.key.items():
            if state[name] != ours:
                what = "other samples, or shards that were rewritten" if name == "dataset" else name
                message = (
                    f"the state was saved with {name}={state[name]!r}, here it is {ours!r} "
                    f"({what}); continuing would repeat some samples and leave out others: use the "
                    "same data and options, or start the epoch again"
                )
                raise DatasetError(message)


def _place_among_processes(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """Number of processes and the number of this one: as given, else from torch.distributed."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_replicas is None:
        num_replicas = torch.distributed.get_world_size() if started else 1
    if rank is None:
        rank = torch.distributed.get_rank() if started else 0
    if num_replicas < 1:
        message = f"num_replicas is {num_replicas}, expected at least 1"
        raise DatasetError(message)
    return num_replicas, rank


def epoch_order(
    shard_numbers: NDArray[np.int64], *, seed: int, epoch: int, window: int | None
) -> NDArray[np.int64]:
    """All items in random order: the same `seed` and `epoch` give the same one on every machine.

    Shards come in random order, `window` of them at a time, and the items of those are shuffled
    together; None mixes all.
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
    """The items of one of several processes: every n-th item, equally many for all of them.

    As in `torch.utils.data.DistributedSampler`, items from the beginning are repeated for equal
    shares, or the remainder is left out with `drop_last`.
    """
    if not 0 <= rank < num_replicas:
        message = f"rank is {rank}, expected 0 to {num_replicas - 1}: there are {num_replicas}"
        raise DatasetError(message)
    share = length_of_share(len(order), num_replicas=num_replicas, drop_last=drop_last)
    return np.resize(order, share * num_replicas)[rank::num_replicas] if share else order[:0]


def length_of_share(num_items: int, *, num_replicas: int, drop_last: bool) -> int:
    """How many items `share_of_rank` returns."""
    return num_items // num_replicas if drop_last else -(-num_items // num_replicas)
