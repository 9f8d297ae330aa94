"""Plans made of the index: many datasets are read in one call, into memory that they share.

All claims of the index are compared with the limits for all datasets at a time, before memory is
allocated. What does not fit, or turns out to be damaged, is left to whoever reads one dataset,
which words the errors.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from h5traces.errors import CorruptArchiveError, RemoteError
from h5traces.storage.files import LocalFile
from h5traces.storage.kernels import PLAN, PLAN_CODECS, ChunkError, run_plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from h5traces.format.limits import ReadLimits
    from h5traces.storage.files import ByteFile

    Longs = NDArray[np.int64]

# HDF5's own limit
MAX_AXES: Final = 32
# The most raw bytes that a stored byte can stand for in each codec, with a margin.
MOST_RAW_NBYTES: Final = {"gzip": 1040, "deflate": 1040, "zstd": 33_000}
_MOST_RAW: Final = np.array([MOST_RAW_NBYTES[name] for name in PLAN_CODECS])
UNKNOWN: Final = -1
# Datasets share memory up to so many bytes, so that keeping one keeps little else. As much is one
# task of a thread.
_SHARED_NBYTES: Final = 4 << 20
# Less is read at once: handing it to a thread takes longer than is won.
_SMALL_NBYTES: Final = 64 << 10


class Datasets(NamedTuple):
    """Columns that describe some datasets; axes beyond those of a dataset have the length 1."""

    # (datasets, axes)
    shape: Longs
    chunk: Longs
    # (datasets,)
    num_axes: Longs
    itemsize: Longs
    # a number of `PLAN_CODECS`, or `UNKNOWN`
    codec: Longs
    num_chunks: Longs
    # (chunks,), those of the first dataset first
    offsets: Longs
    sizes: Longs
    # None where only HDF5 is known, which keeps none
    checksums: NDArray[np.uint64] | None

    @property
    def owners(self) -> Longs:
        """The dataset of every chunk."""
        return np.repeat(np.arange(len(self.shape)), self.num_chunks)

    @property
    def nbytes(self) -> Longs:
        """Raw bytes of every dataset."""
        nbytes: Longs = self.shape.prod(axis=1) * self.itemsize
        return nbytes

    def chosen(self, which: NDArray[np.bool_]) -> Datasets:
        """Some of the datasets."""
        chunks = which[self.owners]
        checksums = None if self.checksums is None else self.checksums[chunks]
        shape, chunk, num_axes, itemsize, codec, num_chunks = (each[which] for each in self[:6])
        datasets = shape, chunk, num_axes, itemsize, codec, num_chunks
        return Datasets(*datasets, self.offsets[chunks], self.sizes[chunks], checksums)


def fitting(found: Datasets, limits: ReadLimits, file_nbytes: int) -> NDArray[np.bool_]:
    """Which datasets claim only what the file can hold, as `arrays.check_sizes` has it.

    Their chunks must be of consecutive elements, too, as those that h5traces writes are.
    """
    shape, chunk = found.shape, found.chunk
    # Floats do not overflow.
    most, itemsize = np.maximum(shape, 1).astype(np.float64).prod(axis=1), found.itemsize
    chunk_nbytes = chunk.astype(np.float64).prod(axis=1) * itemsize
    fits = np.asarray(((shape >= 0) & (chunk >= 1)).all(axis=1))
    fits &= (itemsize > 0) & (found.codec != UNKNOWN)
    fits &= (found.num_axes > 0) & (found.num_axes <= MAX_AXES)
    fits &= (most * itemsize <= limits.max_array_nbytes) & (chunk_nbytes <= limits.max_chunk_nbytes)
    grid = -(-shape // np.maximum(chunk, 1))
    fits &= grid.astype(np.float64).prod(axis=1) == found.num_chunks
    cut = _cut_axis(grid)
    axes = np.arange(shape.shape[1])
    fits &= ((axes >= cut) | (chunk == 1)).all(axis=1)
    fits &= ((axes <= cut) | (chunk == np.maximum(shape, 1))).all(axis=1)
    owners, sizes = found.owners, found.sizes
    raw = chunk_nbytes[owners]
    inside = (found.offsets > 0) & (sizes >= 0) & (sizes <= file_nbytes)
    inside &= found.offsets <= file_nbytes - sizes
    inside &= sizes >= np.maximum(1, raw // _MOST_RAW[found.codec[owners]])
    inside &= sizes <= raw + raw // 100 + 1024
    fits[owners[~inside]] = False
    # Chunks that overlap would inflate to any size; floats, as the sum may be any.
    if sizes.astype(np.float64).sum() > file_nbytes:
        fits[:] = False
    return fits


def _cut_axis(grid: Longs) -> Longs:
    """The last axis along which a dataset has several chunks; the first one where none has."""
    several = grid > 1
    last = grid.shape[1] - 1 - several[:, ::-1].argmax(axis=1)
    return np.where(several.any(axis=1), last, 0)[:, np.newaxis]


def plan_of(found: Datasets, targets: Longs) -> NDArray[Any]:
    """The plan that reads datasets, for which `fitting` holds, to these places of an arena."""
    owners = found.owners
    starts = np.cumsum(found.num_chunks) - found.num_chunks
    number = np.arange(len(owners)) - starts[owners]
    shape, chunk = np.maximum(found.shape, 1), found.chunk
    cut = _cut_axis(-(-shape // chunk))
    length, step = (np.take_along_axis(each, cut, axis=1)[:, 0] for each in (shape, chunk))
    inner = np.where(np.arange(shape.shape[1]) > cut, shape, 1).prod(axis=1)
    per_row = -(-length // step)
    outer, along = np.divmod(number, per_row[owners])
    first = along * step[owners]
    itemsize = found.itemsize[owners]
    plan = np.zeros(len(owners), PLAN)
    plan["offset"], plan["nbytes"] = found.offsets, found.sizes
    if found.checksums is not None:
        plan["checksum"], plan["is_checked"] = found.checksums, 1
    plan["raw_nbytes"] = (step * inner * found.itemsize)[owners]
    plan["count"] = np.minimum(step[owners], length[owners] - first) * inner[owners]
    plan["target"] = targets[owners] + (outer * length[owners] + first) * inner[owners] * itemsize
    plan["itemsize"], plan["codec"] = itemsize, found.codec[owners]
    return plan


def run(file: ByteFile, plan: NDArray[Any], arena: Buffer) -> None:
    """Read the chunks of a plan; ChunkError as `run_plan`."""
    if isinstance(file, LocalFile):
        with file.descriptor() as descriptor:
            run_plan(plan, descriptor, arena)
        return
    # From memory, where `prefetched` has put it.
    places = zip(plan["offset"].tolist(), plan["nbytes"].tolist(), strict=True)
    stored = b"".join(file.read_at(offset, nbytes) for offset, nbytes in places)
    plan = plan.copy()
    plan["offset"] = np.cumsum(plan["nbytes"]) - plan["nbytes"]
    run_plan(plan, stored, arena)


class Reading:
    """Datasets on their way into memory, in up to `workers` threads.

    Arrays share memory with their neighbours: to keep one is to keep up to 4 MiB. With `together`,
    all lie one after the other in one piece of memory.
    """

    def __init__(
        self,
        file: ByteFile,
        types: Mapping[str, np.dtype[Any]],
        found: Datasets,
        workers: int,
        *,
        together: bool = False,
    ) -> None:
        self._types, self._found = types, found
        nbytes = found.nbytes
        # Elements of several sizes begin at multiples of eight bytes.
        room = nbytes if len({*found.itemsize.tolist()}) <= 1 else -(-nbytes // 8) * 8
        ends = np.cumsum(room)
        self._starts = ends - room
        bounds = [0, len(ends)] if together else _bounds(self._starts)
        plan, owners = plan_of(found, self._starts), found.owners
        self._parts: list[tuple[NDArray[np.uint8], Future[bool]]] = []
        for first, stop in itertools.pairwise(bounds):
            start = int(self._starts[first])
            arena = np.empty(int(ends[stop - 1]) - start, np.uint8)
            self._starts[first:stop] -= start
            part = plan[slice(*np.searchsorted(owners, (first, stop)).tolist())]
            part["target"] -= start
            running = _submit(file, part, arena, workers)
            self._parts += [(arena, running)] * (stop - first)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by path, without those that are damaged or share memory with such."""
        found = self._found
        shapes, axes = found.shape.tolist(), found.num_axes.tolist()
        return {
            path: np.ndarray(shape[:num_axes], dtype, arena, start)
            for (path, dtype), shape, num_axes, start, (arena, running) in zip(
                self._types.items(), shapes, axes, self._starts.tolist(), self._parts, strict=True
            )
            if running.result()
        }


def _bounds(starts: Longs) -> list[int]:
    """Where new memory begins: after every 4 MiB, and for every dataset that is as large."""
    pieces = starts // _SHARED_NBYTES
    changes = np.flatnonzero(np.diff(pieces, prepend=-1)).tolist()
    return [*changes, len(starts)]


def _submit(
    file: ByteFile, plan: NDArray[Any], arena: NDArray[np.uint8], workers: int
) -> Future[bool]:
    """Whether a plan was read; now, or in a thread if that is worth it."""

    def read() -> bool:
        try:
            run(file, plan, arena.data)
        except (ChunkError, CorruptArchiveError, RemoteError):
            return False
        return True

    if workers > 1 and arena.size >= _SMALL_NBYTES:
        return _pool(workers, os.getpid()).submit(read)
    done: Future[bool] = Future()
    done.set_result(read())
    return done


@cache
def _pool(workers: int, _process: int) -> ThreadPoolExecutor:
    """Threads that stay, since starting them takes as long as reading a small sample."""
    return ThreadPoolExecutor(workers, thread_name_prefix="h5traces-read")
