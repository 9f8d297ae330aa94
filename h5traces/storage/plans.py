"""Plans made of the index: many datasets are read in one call, into memory that they share.

All claims of the index are compared with the limits for all datasets at a time, before memory is
allocated. What does not fit, or turns out to be damaged, is left to whoever reads one dataset,
which words the errors.
"""

from __future__ import annotations

from concurrent.futures import Future
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from h5traces.errors import CorruptArchiveError, RemoteError
from h5traces.storage.files import LocalFile
from h5traces.storage.kernels import PLAN, PLAN_CODECS, ChunkError, Restoring, run_plan
from h5traces.storage.memory import POOL
from h5traces.storage.threads import shared_pool

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    # None if only HDF5 is known, which keeps none
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


def joined(parts: Sequence[Datasets]) -> Datasets:
    """The datasets of several samples, in order."""
    if len(parts) == 1:
        return parts[0]
    most = max(part.shape.shape[1] for part in parts)

    def wide(lengths: Longs) -> Longs:
        missing = np.ones((len(lengths), most - lengths.shape[1]), np.int64)
        return np.concatenate((lengths, missing), axis=1)

    padded = (part._replace(shape=wide(part.shape), chunk=wide(part.chunk)) for part in parts)
    return Datasets(*map(np.concatenate, zip(*padded, strict=True)))


class Restoration(NamedTuple):
    """How stored integers of a tier become floats after their chunks."""

    how: Restoring
    dtype: np.dtype[Any]
    # As `PLAN` has them; rows of steps have `width` channels.
    table: bytes
    width: int = 0
    zero_point: int = 0

    def suits(self, shape: Sequence[int], chunk: Sequence[int], num_axes: int) -> bool:
        """Whether a dataset has as many channels, and chunks of whole rows."""
        has_rows = num_axes == 2 and shape[1] == chunk[1] == self.width
        return not self.width or has_rows


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
    return fits & (np.bincount(owners, sizes, minlength=len(fits)) <= file_nbytes)


def _cut_axis(grid: Longs) -> Longs:
    """The last axis along which a dataset has several chunks; the first one where none has."""
    several = grid > 1
    last = grid.shape[1] - 1 - several[:, ::-1].argmax(axis=1)
    return np.where(several.any(axis=1), last, 0)[:, np.newaxis]


def plan_of(found: Datasets, targets: Longs, restored: Longs) -> NDArray[Any]:
    """The plan that reads datasets, for which `fitting` holds, to these places of an arena.

    `restored` are the sizes of their elements there.
    """
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
    plan = np.zeros(len(owners), PLAN)
    plan["offset"], plan["nbytes"] = found.offsets, found.sizes
    if found.checksums is not None:
        plan["checksum"], plan["is_checked"] = found.checksums, 1
    plan["raw_nbytes"] = (step * inner * found.itemsize)[owners]
    plan["count"] = np.minimum(step[owners], length[owners] - first) * inner[owners]
    elements = (outer * length[owners] + first) * inner[owners]
    plan["target"] = targets[owners] + elements * restored[owners]
    plan["itemsize"], plan["codec"] = found.itemsize[owners], found.codec[owners]
    return plan


def _add_restorations(
    plan: NDArray[Any], owners: Longs, restorations: Sequence[Restoration | None]
) -> bytes:
    """Write how chunks are restored into a plan; the tables that it refers to."""
    tables: dict[int, tuple[int, bytes]] = {}
    end = 0
    for number, each in enumerate(restorations):
        if each is None:
            continue
        if id(each.table) not in tables:
            tables[id(each.table)] = end, each.table
            end += len(each.table)
        rows = slice(*np.searchsorted(owners, (number, number + 1)).tolist())
        plan["restoring"][rows], plan["table"][rows] = each.how, tables[id(each.table)][0]
        plan["width"][rows], plan["zero_point"][rows] = each.width, each.zero_point
    return b"".join(table for _, table in tables.values())


def run(
    file: ByteFile, plan: NDArray[Any], arena: Buffer, tables: bytes = b"", threads: int = 1
) -> None:
    """Read the chunks of a plan; ChunkError as `run_plan`."""
    if isinstance(file, LocalFile):
        with file.descriptor() as descriptor:
            run_plan(plan, descriptor, arena, tables, threads=threads)
        return
    # From memory, where `prefetched` has put it.
    places = zip(plan["offset"].tolist(), plan["nbytes"].tolist(), strict=True)
    stored = b"".join(file.read_at(offset, nbytes) for offset, nbytes in places)
    plan = plan.copy()
    plan["offset"] = np.cumsum(plan["nbytes"]) - plan["nbytes"]
    run_plan(plan, stored, arena, tables, threads=threads)


class Reading:
    """Datasets of some samples on their way into memory, in up to `workers` threads.

    Arrays share memory with their neighbours: to keep one is to keep up to 4 MiB. With `together`,
    all lie one after the other in one piece of memory.

    Parameters
    ----------
    file
        Where they are stored.
    names
        Number of the sample and path of every dataset, in order of samples.
    types
        Their types.
    found
        What the index says of them; `fitting` holds for all.
    restorations
        Of those that are restored after their chunks; their types are those restored.
    """

    def __init__(
        self,
        file: ByteFile,
        names: Sequence[tuple[int, str]],
        types: Sequence[np.dtype[Any]],
        found: Datasets,
        workers: int,
        *,
        together: bool = False,
        restorations: Sequence[Restoration | None] = (),
    ) -> None:
        self._firsts: dict[int, int] = {}
        for place, (sample, _) in enumerate(names):
            self._firsts.setdefault(sample, place)
        restored = found.itemsize
        if any(restorations):
            changed = enumerate(restorations)
            types = [each.dtype if each else types[number] for number, each in changed]
            sizes = [each.dtype.itemsize if each else 0 for each in restorations]
            restored = np.where(np.equal(sizes, 0), restored, sizes)
        nbytes = found.shape.prod(axis=1) * restored
        # Elements of several sizes begin at multiples of eight bytes.
        room = nbytes if len(set(types)) <= 1 else -(-nbytes // 8) * 8
        ends = np.cumsum(room)
        starts = ends - room
        plan, owners = plan_of(found, starts, restored), found.owners
        tables = _add_restorations(plan, owners, restorations)
        # Little is read at once, by threads of the kernels: Python's would wait for each other.
        is_small = workers > 1 and _SMALL_NBYTES <= ends[-1] <= _SHARED_NBYTES
        threads = workers if is_small else 1
        bounds = [0, len(names)] if together or is_small else _bounds(starts, workers)
        rows = np.searchsorted(owners, bounds).tolist()
        parts: list[tuple[NDArray[np.uint8], Future[bool]]] = []
        for (first, stop), each in zip(pairwise(bounds), pairwise(rows), strict=True):
            start = int(starts[first])
            arena = POOL.array(int(ends[stop - 1]) - start)
            starts[first:stop] -= start
            part = plan[slice(*each)]
            part["target"] -= start
            parts += [(arena, _submit(file, part, arena, tables, workers, threads))] * (
                stop - first
            )
        shapes, places = found.shape.tolist(), starts.tolist()
        axes = found.num_axes.tolist()
        self._datasets = list(zip(names, types, shapes, axes, places, parts, strict=True))

    def arrays(self, sample: int = 0) -> dict[str, NDArray[Any]]:
        """The arrays of a sample by path, without those that share memory with damaged ones."""
        first = self._firsts.get(sample, len(self._datasets))
        found = {}
        for (number, path), dtype, shape, axes, start, (arena, read) in self._datasets[first:]:
            if number != sample:
                break
            if read.result():
                found[path] = np.ndarray(shape[:axes], dtype, arena, start)
        return found


class NothingRead(Reading):
    """None of them: whoever wants one reads it alone, and says why where it cannot be read."""

    def __init__(self) -> None:
        self._firsts, self._datasets = {}, []


def _bounds(starts: Longs, workers: int) -> list[int]:
    """Where new memory begins: after every 4 MiB, or less where threads would have nothing to do.

    A dataset that is as large has memory of its own.
    """
    share = int(starts[-1]) // (2 * workers) if workers > 1 else _SHARED_NBYTES
    pieces = starts // min(max(share, _SMALL_NBYTES), _SHARED_NBYTES)
    return [0, *(np.flatnonzero(pieces[1:] != pieces[:-1]) + 1).tolist(), len(starts)]


def _submit(
    file: ByteFile,
    plan: NDArray[Any],
    arena: NDArray[np.uint8],
    tables: bytes,
    workers: int,
    threads: int,
) -> Future[bool]:
    """Whether a plan was read; now, by `threads`, or in one of `workers` if that is worth it."""

    def read() -> bool:
        try:
            run(file, plan, arena.data, tables, threads)
        except (ChunkError, CorruptArchiveError, RemoteError):
            return False
        return True

    if workers > 1 and threads == 1 and arena.size >= _SMALL_NBYTES:
        return shared_pool(workers).submit(read)
    done: Future[bool] = Future()
    done.set_result(read())
    return done
