"""An iterable dataset: the items of a map-style dataset as a stream, shared among workers."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from h5traces.arguments import checked
from h5traces.errors import DatasetError
from h5traces.torch_data.sampler import DEFAULT_WINDOW, Iteration, Schedule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h5traces.torch_data.dataset import ShardedDataset

_NUM_WORKERS = "num_workers"


class IterableTraceDataset(IterableDataset[Any]):
    """A stream over a map-style dataset, in the order of a `ShardSampler`.

    Processes (`num_replicas`) and the workers of a loader each take every n-th item; each comes
    once, except as `drop_last` says. The stream knows its position in each worker, so that
    ``StatefulDataLoader.state_dict`` is right within an epoch with any number of workers.

    Parameters
    ----------
    dataset
        A `TraceDataset` or `h5traces.graph.TraceGraphDataset`.
    shuffle, seed, window, num_replicas, rank, drop_last
        As in `ShardSampler`.
    threads
        Threads that read ahead in each worker, or in this process where there are no workers.
    prefetch
        Items that each reads ahead; twice the number of threads by default.
    """

    @checked
    def __init__(
        self,
        dataset: ShardedDataset,
        *,
        shuffle: bool = False,
        seed: int = 0,
        window: int | None = DEFAULT_WINDOW,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
        threads: int = 0,
        prefetch: int | None = None,
    ) -> None:
        if threads < 0 or (prefetch is not None and prefetch < 1):
            message = f"threads is {threads} and prefetch {prefetch}, expected 0 or more, and 1"
            raise DatasetError(message)
        self.dataset = dataset
        self._threads = threads
        self._prefetch = prefetch or max(1, 2 * threads)
        self._schedule = Schedule(
            dataset,
            shuffle=shuffle,
            seed=seed,
            window=window,
            num_replicas=num_replicas,
            rank=rank,
            drop_last=drop_last,
        )
        # In shared memory, so that persistent workers, which hold copies of this object, see it.
        self._epoch = torch.zeros(1, dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it so

    @property
    def num_items(self) -> int:
        """Items of one epoch in this process, over all its workers.

        There is no ``len``: a loader would derive a wrong number of batches from it, since the last
        batch of each worker may be short.
        """
        return len(self._schedule)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Names of the axes of every tensor of an item."""
        axes: dict[str, tuple[str, ...]] = getattr(self.dataset, "axes", {})
        return axes

    @property
    def epoch(self) -> int:
        """Decides the order of the next iteration, together with the seed."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, in running workers too."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Any]:
        return _Stream(self.dataset, self._schedule, self.epoch, self._threads, self._prefetch)


class _Stream(Iteration):
    """One iteration in one worker."""

    def __init__(
        self, dataset: ShardedDataset, schedule: Schedule, epoch: int, threads: int, prefetch: int
    ) -> None:
        super().__init__(schedule, epoch)
        self._dataset, self._threads, self._prefetch = dataset, threads, prefetch
        worker = get_worker_info()
        self._worker = 0 if worker is None else worker.id
        self._num_workers = 1 if worker is None else worker.num_workers

    def _begin(self) -> Iterator[Any]:
        share = self._schedule.order(self._epoch)[self._worker :: self._num_workers]
        indices = map(int, share[self._position :])
        if not self._threads:
            return (self._dataset[index] for index in indices)
        return _read_ahead(self._dataset, indices, self._threads, self._prefetch)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), _NUM_WORKERS: self._num_workers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state.get(_NUM_WORKERS) != self._num_workers:
            message = (
                f"the state was saved with {state.get(_NUM_WORKERS)} workers, now there are "
                f"{self._num_workers}; each worker has its own share: use the same number"
            )
            raise DatasetError(message)


def _read_ahead(
    dataset: ShardedDataset, indices: Iterator[int], threads: int, prefetch: int
) -> Iterator[Any]:
    """Items in order; threads read the next `prefetch` items while one is in use."""
    with ThreadPoolExecutor(threads, thread_name_prefix="h5traces-read") as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for index in indices:
                waiting.append(pool.submit(dataset.__getitem__, index))
                if len(waiting) > prefetch:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
