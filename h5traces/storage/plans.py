"""Plans made of the index: many datasets are read in one call, into memory that they share.

All claims of the index are compared with the limits for all datasets at a time, before memory is
allocated. What does not fit, or turns out to be damaged, is left to whoever reads one dataset,
which words the errors.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import compress, pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from h5traces.errors import CorruptArchiveError, RemoteError
from h5traces.storage.files import LocalFile
from h5traces.storage.kernels import PLAN, PLAN_CODECS, ChunkError, Restoring, run_plan
from h5traces.storage.memory import POOL
from h5traces.storage.threads import shared_pool

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from h5traces.format.limits import ReadLimits
    from h5traces.storage.files import ByteFile

    Longs = NDArray[np.int64]
    Floats = NDArray[np.float64]
    # Offset, stored size and checksum of some chunks.
    Chunks = tuple[Longs, Longs, NDArray[np.uint64]]

# HDF5's own limit
MAX_AXES: Final = 32
# The most raw bytes that a stored byte can stand for in each codec, with a margin.
MOST_RAW_NBYTES: Final = {"gzip": 1040, "deflate": 1040, "zstd": 33_000}
_MOST_RAW: Final = np.array([MOST_RAW_NBYTES[name] for name in PLAN_CODECS])
UNKNOWN: Final = -1
# Datasets share memory up to this many bytes, so that keeping one keeps little else. As much is one
# task of a thread.
_SHARED_NBYTES: Final = 4 << 20
# Less is read at once: handing it to a thread takes longer than is won.
_SMALL_NBYTES: Final = 64 << 10


@dataclass(frozen=True)
class Datasets:
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
    checksums: NDArray[np.uint64]

    @cached_property
    def owners(self) -> Longs:
        """The dataset of every chunk."""
        return np.repeat(np.arange(len(self.shape)), self.num_chunks)

    @cached_property
    def grid(self) -> Longs:
        """Numbers of chunks along the axes."""
        return -(-self.shape // np.maximum(self.chunk, 1))

    @cached_property
    def cut(self) -> Longs:
        """The last axis along which there are several chunks, in a column; else the first one."""
        several = self.grid > 1
        last = several.shape[1] - 1 - several[:, ::-1].argmax(axis=1)
        return np.where(several.any(axis=1), last, 0)[:, np.newaxis]

    @cached_property
    def bounds(self) -> tuple[Floats, Floats]:
        """The smallest and largest stored size of every chunk, as `arrays.chunk_bounds`."""
        # Floats do not overflow.
        raw = self.chunk.astype(np.float64).prod(axis=1) * self.itemsize
        smallest = np.maximum(1, raw // _MOST_RAW[self.codec])
        return smallest[self.owners], (raw + raw // 100 + 1024)[self.owners]

    @property
    def nbytes(self) -> Longs:
        """Raw bytes of every dataset."""
        nbytes: Longs = self.shape.prod(axis=1) * self.itemsize
        return nbytes

    def chosen(self, which: NDArray[np.bool_]) -> Datasets:
        """Some of the datasets."""
        chunks = which[self.owners]
        columns = [getattr(self, each.name) for each in fields(self)]
        return Datasets(
            *(each[which] for each in columns[:6]), *(each[chunks] for each in columns[6:])
        )


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
    shape, chunk, itemsize = found.shape, found.chunk, found.itemsize
    # Floats do not overflow.
    most = np.maximum(shape, 1).astype(np.float64).prod(axis=1) * itemsize
    chunk_nbytes = chunk.astype(np.float64).prod(axis=1) * itemsize
    fits = np.asarray(((shape >= 0) & (chunk >= 1)).all(axis=1))
    fits &= (itemsize > 0) & (found.codec != UNKNOWN)
    fits &= (found.num_axes > 0) & (found.num_axes <= MAX_AXES)
    fits &= (most <= limits.max_array_nbytes) & (chunk_nbytes <= limits.max_chunk_nbytes)
    fits &= found.grid.astype(np.float64).prod(axis=1) == found.num_chunks
    axes, cut = np.arange(shape.shape[1]), found.cut
    consecutive = ((axes >= cut) | (chunk == 1)) & ((axes <= cut) | (chunk == np.maximum(shape, 1)))
    fits &= consecutive.all(axis=1)
    owners, sizes, (smallest, largest) = found.owners, found.sizes, found.bounds
    inside = (found.offsets > 0) & (sizes >= smallest) & (sizes <= largest)
    inside &= (sizes <= file_nbytes) & (found.offsets <= file_nbytes - sizes)
    fits[owners[~inside]] = False
    # Chunks that overlap would inflate to any size; floats, as the sum may be any.
    return fits & (np.bincount(owners, sizes, minlength=len(fits)) <= file_nbytes)


def plan_of(found: Datasets, targets: Longs, restored: Longs) -> NDArray[Any]:
    """The plan that reads datasets, for which `fitting` holds, to these places of an arena.

    `restored` are the sizes of their elements there.
    """
    owners, cut = found.owners, found.cut
    starts = np.cumsum(found.num_chunks) - found.num_chunks
    number = np.arange(len(owners)) - starts[owners]
    shape = np.maximum(found.shape, 1)
    length, step = (np.take_along_axis(each, cut, axis=1)[:, 0] for each in (shape, found.chunk))
    inner = np.where(np.arange(shape.shape[1]) > cut, shape, 1).prod(axis=1)
    per_row = -(-length // step)
    outer, along = np.divmod(number, per_row[owners])
    first = along * step[owners]
    plan = np.zeros(len(owners), PLAN)
    plan["offset"], plan["nbytes"] = found.offsets, found.sizes
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
    places: dict[bytes, int] = {}
    end = 0
    for number, each in enumerate(restorations):
        if each is None:
            continue
        if each.table not in places:
            places[each.table] = end
            end += len(each.table)
        rows = slice(*np.searchsorted(owners, (number, number + 1)).tolist())
        plan["restoring"][rows], plan["table"][rows] = each.how, places[each.table]
        plan["width"][rows], plan["zero_point"][rows] = each.width, each.zero_point
    return _joined_tables(tuple(places))


@lru_cache(maxsize=4)
def _joined_tables(tables: tuple[bytes, ...]) -> bytes:
    """One piece of memory for all layouts with these tables, which take 1 MB for 32 wide layers."""
    return b"".join(tables)


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


class Wanted(NamedTuple):
    """Datasets of some samples, those of the first one first.

    `restorations` are those of datasets that are restored after their chunks; `places` are those
    of their chunks among all of their sample, of which every one has `counts` datasets.
    """

    paths: Sequence[str]
    types: Sequence[np.dtype[Any]]
    found: Datasets
    restorations: Sequence[Restoration | None]
    places: Longs
    counts: Sequence[int]

    def chosen(self, which: NDArray[np.bool_]) -> Wanted:
        """Some of the datasets."""
        samples = np.repeat(np.arange(len(self.counts)), self.counts)[which]
        return Wanted(
            list(compress(self.paths, which)),
            list(compress(self.types, which)),
            self.found.chosen(which),
            list(compress(self.restorations, which)),
            self.places[which[self.found.owners]],
            np.bincount(samples, minlength=len(self.counts)).tolist(),
        )


class Layout:
    """Where datasets of a sample lie in memory, and the plan that reads them.

    They are the same for all samples of one form. `layouts_of` makes some.

    Attributes
    ----------
    datasets
        Path, type, shape and first byte of each.
    starts, nbytes, raw_nbytes
        First bytes; bytes in memory, and before anything is restored.
    plan, tables, rows
        The plan, the tables it refers to, and where the chunks of every dataset begin in it.
    """

    def __init__(
        self,
        datasets: list[tuple[str, np.dtype[Any], tuple[int, ...], int]],
        starts: Longs,
        nbytes: tuple[int, int],
        plan: tuple[NDArray[Any], bytes, Longs],
        chunks: tuple[Longs, Floats, Floats],
    ) -> None:
        self.datasets, self.starts = datasets, starts
        self.nbytes, self.raw_nbytes = nbytes
        self.plan, self.tables, self.rows = plan
        self.types = frozenset(dtype for _, dtype, _, _ in datasets)
        self._chunks, self._smallest, self._largest = chunks

    def chosen(self, chunks: Chunks) -> Chunks:
        """The chunks of these datasets, of all of a sample."""
        offsets, sizes, checksums = chunks
        return offsets[self._chunks], sizes[self._chunks], checksums[self._chunks]

    def fits(self, chosen: Chunks, file_nbytes: int) -> bool:
        """Whether chunks lie in the file and have sizes that their codecs can produce."""
        offsets, sizes, _ = chosen
        inside = (offsets > 0) & (sizes >= self._smallest) & (sizes <= self._largest)
        inside &= offsets <= file_nbytes - sizes
        return bool(inside.all()) and int(sizes.sum()) <= file_nbytes


def layouts_of(wanted: Wanted) -> list[Layout]:
    """The layouts of some samples, whose datasets fit; numpy is called as often as for one."""
    found, types, restorations = wanted.found, wanted.types, wanted.restorations
    restored = found.itemsize
    if any(restorations):
        types = [how.dtype if how else types[number] for number, how in enumerate(restorations)]
        sizes = [how.dtype.itemsize if how else 0 for how in restorations]
        restored = np.where(np.equal(sizes, 0), restored, sizes)
    edges = np.cumsum([0, *wanted.counts])
    bounds = list(pairwise(edges.tolist()))
    nbytes = found.shape.prod(axis=1) * restored
    # Elements of several sizes begin at multiples of eight bytes.
    if len(set(types)) > 1:
        is_mixed = np.repeat([len(set(types[a:b])) > 1 for a, b in bounds], wanted.counts)
        nbytes = np.where(is_mixed, -(-nbytes // 8) * 8, nbytes)
    starts, raw_starts, rows = (
        np.cumsum([0, *each.tolist()]) for each in (nbytes, found.nbytes, found.num_chunks)
    )
    own = starts[:-1] - np.repeat(starts[edges[:-1]], wanted.counts)
    plan = plan_of(found, own, restored)
    tables = _add_restorations(plan, found.owners, restorations)
    smallest, largest = found.bounds
    shapes = [
        tuple(shape[:axes])
        for shape, axes in zip(found.shape.tolist(), found.num_axes.tolist(), strict=True)
    ]
    listed = list(zip(wanted.paths, types, shapes, own.tolist(), strict=True))
    totals = zip(*(np.diff(each[edges]).tolist() for each in (starts, raw_starts)), strict=True)
    layouts = []
    for (a, b), (first, stop), total in zip(
        bounds, pairwise(rows[edges].tolist()), totals, strict=True
    ):
        chunks = wanted.places[first:stop], smallest[first:stop], largest[first:stop]
        planned = plan[first:stop], tables, rows[a:b] - first
        layouts.append(Layout(listed[a:b], own[a:b], total, planned, chunks))
    return layouts


class Part(NamedTuple):
    """Datasets of one sample that are to be read: its number, and the chunks of its `layout`."""

    number: int
    layout: Layout
    chunks: Chunks


class Reading:
    """Datasets of some samples on their way into memory, in up to `workers` threads.

    Arrays share memory with their neighbours: to keep one is to keep up to 4 MiB. With `together`,
    all lie one after the other in one piece of memory.

    `parts` are in order of samples; `Layout.fits` holds for their chunks.
    """

    def __init__(
        self, file: ByteFile, parts: Sequence[Part], workers: int, *, together: bool = False
    ) -> None:
        plan, tables, bases = _joined_plan(parts)
        nbytes, num_datasets = bases[-1], sum(len(part.layout.datasets) for part in parts)
        # Little is read at once, by threads of the kernels: Python's would wait for each other.
        is_small = workers > 1 and _SMALL_NBYTES <= nbytes <= _SHARED_NBYTES
        threads = workers if is_small else 1
        starts, bounds, rows = [0], [0, num_datasets], [0, len(plan)]
        if not together and not is_small and nbytes > _SMALL_NBYTES:
            starts, bounds, rows = _pieces(parts, bases, workers)
        # Memory of every dataset, and whether it was read.
        self._memory: list[tuple[NDArray[np.uint8], Future[bool] | _Done]] = []
        # First byte in it of the first of several datasets.
        self._origins: list[int] = []
        spans = pairwise([*starts, nbytes])
        for (first, stop), each, (start, end) in zip(
            pairwise(bounds), pairwise(rows), spans, strict=True
        ):
            arena = POOL.array(end - start)
            part = plan[slice(*each)]
            part["target"] -= start
            known = (arena, _submit(file, part, arena, tables, workers, threads))
            self._memory += [known] * (stop - first)
            self._origins += [start] * (stop - first)
        self._parts: dict[int, tuple[Layout, int, int]] = {}
        first = 0
        for part_, base in zip(parts, bases, strict=False):
            self._parts[part_.number] = part_.layout, base, first
            first += len(part_.layout.datasets)

    def arrays(self, sample: int = 0) -> dict[str, NDArray[Any]]:
        """The arrays of a sample by path, without those that share memory with damaged ones."""
        if sample not in self._parts:
            return {}
        layout, base, place = self._parts[sample]
        found = {}
        for path, dtype, shape, start in layout.datasets:
            arena, read = self._memory[place]
            if read.result():
                found[path] = np.ndarray(shape, dtype, arena, base + start - self._origins[place])
            place += 1
        return found


class _Done:
    """A result that is known; a `Future` takes as long to make as a small sample to read."""

    def __init__(self, *, value: bool) -> None:
        self._value = value

    def result(self) -> bool:
        """The result."""
        return self._value


class NothingRead(Reading):
    """None of them: whoever wants one reads it alone, and says why where it cannot be read."""

    def __init__(self) -> None:
        self._parts = {}


def _joined_plan(parts: Sequence[Part]) -> tuple[NDArray[Any], bytes, list[int]]:
    """The plan of all parts, the tables it refers to, and where parts begin and the last ends."""
    # As bytes: numpy would compare the fields of every part.
    rows_of = [part.layout.plan.view(f"V{PLAN.itemsize}") for part in parts]
    plan = np.concatenate(rows_of).view(PLAN)
    for name, columns in zip(
        ("offset", "nbytes", "checksum"),
        zip(*(part.chunks for part in parts), strict=True),
        strict=True,
    ):
        plan[name] = columns[0] if len(columns) == 1 else np.concatenate(columns)
    is_mixed = len({each for part in parts for each in part.layout.types}) > 1
    bases, tables = [0], {}
    row = end = 0
    for number, (_, layout, _) in enumerate(parts):
        if number:
            plan["target"][row : row + len(layout.plan)] += bases[-1]
        if layout.tables:
            if layout.tables not in tables:
                tables[layout.tables] = end
                end += len(layout.tables)
            some = plan[row : row + len(layout.plan)]
            some["table"] += np.where(some["restoring"] > 0, tables[layout.tables], 0)
        row += len(layout.plan)
        base = bases[-1] + layout.nbytes
        bases.append(-(-base // 8) * 8 if is_mixed else base)
    return plan, b"".join(tables), bases


def _pieces(
    parts: Sequence[Part], bases: Sequence[int], workers: int
) -> tuple[list[int], list[int], list[int]]:
    """First bytes of the pieces of memory, and where their datasets and rows begin and end.

    After every 4 MiB, or less where threads would have nothing to do, new memory begins. A dataset
    that is as large has its own memory.
    """
    layouts = [part.layout for part in parts]
    numbers = np.cumsum([0, *(len(layout.plan) for layout in layouts)])
    firsts = zip(layouts, bases, numbers, strict=False)
    starts, rows = (
        np.concatenate(each)
        for each in zip(
            *((layout.starts + base, layout.rows + row) for layout, base, row in firsts),
            strict=True,
        )
    )
    share = int(starts[-1]) // (2 * workers) if workers > 1 else _SHARED_NBYTES
    size = min(max(share, _SMALL_NBYTES), _SHARED_NBYTES)
    # The last ones are half as large, so that all threads end at about the same time.
    left = starts[-1] - starts
    pieces = np.where(2 * left < workers * size, -2 * left // size - 1, starts // size)
    bounds = np.array([0, *(np.flatnonzero(pieces[1:] != pieces[:-1]) + 1)])
    return (
        starts[bounds].tolist(),
        [*bounds.tolist(), len(starts)],
        [*rows[bounds].tolist(), int(numbers[-1])],
    )


def _submit(
    file: ByteFile,
    plan: NDArray[Any],
    arena: NDArray[np.uint8],
    tables: bytes,
    workers: int,
    threads: int,
) -> Future[bool] | _Done:
    """Whether a plan was read; now, by `threads`, or in one of `workers` if that is worth it."""

    def read() -> bool:
        try:
            run(file, plan, arena.data, tables, threads)
        except (ChunkError, CorruptArchiveError, RemoteError):
            return False
        return True

    if workers > 1 and threads == 1 and arena.size >= _SMALL_NBYTES:
        return shared_pool(workers).submit(read)
    return _Done(value=read())
