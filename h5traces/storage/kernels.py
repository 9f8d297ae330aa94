"""Many chunks at a time, by compiled kernels where they are installed, else in Python.

`run_plan` reads, checks, inflates and restores every chunk of a plan into memory of the caller. The
compiled kernels do so without the interpreter, in many threads; what they do not know, or what
looks odd to them, is left to Python, which decides, and words all errors.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.format.digests import chunk_checksum
from h5traces.format.dtypes import bfloat16_to_float32, float32_to_float16
from h5traces.format.native import NATIVE
from h5traces.storage.codecs import CODECS, DEFLATE, GZIP, ZSTD

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    Bytes = NDArray[np.uint8]


class Restoring(enum.IntEnum):
    """How the elements of a chunk become those of the caller."""

    AS_STORED = 0
    # uint8 or uint16: ``offset + (stored - zero_point) * factor`` of each channel, in float32
    STEPS_TO_FLOAT16 = 1
    STEPS_TO_FLOAT32 = 2
    # uint8: a row of a table of 256 elements
    TABLE_OF_2_BYTES = 3
    TABLE_OF_4_BYTES = 4
    FLOAT16_TO_FLOAT32 = 5
    BFLOAT16_TO_FLOAT32 = 6


# Codecs by their number in plans.
PLAN_CODECS: Final = (GZIP.name, DEFLATE.name, ZSTD.name)

# Stored bytes that one call reads; more would fall out of the processor's cache on the way.
_READ_AT_ONCE: Final = 1 << 20

# One row for each chunk, in any order. Rows must not write to the same place.
PLAN: Final = np.dtype(
    [
        # Place of the stored bytes in the file, or in the bytes given instead of it.
        ("offset", "<i8"),
        ("nbytes", "<i8"),
        # xxh3-64 of the stored bytes, compared where `is_checked`.
        ("checksum", "<u8"),
        # Bytes of the whole chunk.
        ("raw_nbytes", "<i8"),
        # Elements of the chunk to restore, in C order: `count` from `first` on.
        ("first", "<i8"),
        ("count", "<i8"),
        # Where they begin in the arena, in bytes; a multiple of the size of a restored element.
        ("target", "<i8"),
        # Where in `tables`, in bytes, a multiple of 4: float32 factor and then offset of all
        # channels, or the 256 elements of a table.
        ("table", "<i8"),
        # Of stored elements, in bytes.
        ("itemsize", "<i4"),
        # Channels; the chunk must begin with the first one.
        ("width", "<i4"),
        ("zero_point", "<i4"),
        # A number of `PLAN_CODECS`.
        ("codec", "u1"),
        # A `Restoring`.
        ("restoring", "u1"),
        ("is_checked", "u1"),
        ("padding", "u1"),
    ]
)


class ChunkError(ValueError):
    """A chunk of a plan is damaged: the number of its row, and what is wrong with it."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


def run_plan(
    plan: NDArray[Any],
    source: int | Buffer,
    arena: Buffer,
    tables: Buffer = b"",
    *,
    threads: int = 1,
) -> None:
    """Restore every chunk of a plan into `arena`.

    Parameters
    ----------
    plan
        Rows of `PLAN`, C-contiguous. They say what is; sizes that a hostile file could claim are
        checked before the plan is made.
    source
        The descriptor of an open file, or the bytes that offsets count in.
    arena
        Writable memory. Nothing outside the places of the rows is written.
    tables
        What the rows refer to.
    threads
        How many work at a time at most.

    Raises
    ------
    ChunkError
        The first row, in order of the plan, that is damaged, or that reaches out of `source`,
        `arena` or `tables`. What other rows restored is undefined.
    """
    rows = list(range(len(plan)))
    if NATIVE is not None:
        done = bytearray(len(plan))
        descriptor, given = (source, b"") if isinstance(source, int) else (-1, source)
        NATIVE.run_plan(descriptor, given, plan, arena, tables, done, threads)
        rows = [row for row, is_done in enumerate(done) if not is_done] if 0 in done else []
    _run_rows(plan, rows, source, arena, tables)


def _run_rows(
    plan: NDArray[Any], rows: list[int], source: int | Buffer, arena: Buffer, tables: Buffer
) -> None:
    """`run_plan` in Python, one row after the other."""
    if not rows:
        return
    out, more = (np.frombuffer(memoryview(each), np.uint8) for each in (arena, tables))
    chosen = plan[rows]
    stored = _Stored(source, chosen)
    for number, values in zip(rows, chosen.tolist(), strict=True):
        try:
            _run_row(_Row(*values), stored, out, more)
        except ValueError as error:
            raise ChunkError(number, str(error)) from error


@dataclass(slots=True)
class _Row:
    """A row of `PLAN`."""

    offset: int
    nbytes: int
    checksum: int
    raw_nbytes: int
    first: int
    count: int
    target: int
    table: int
    itemsize: int
    width: int
    zero_point: int
    codec: int
    restoring: int
    is_checked: int
    padding: int


class _Stored:
    """The stored bytes of chunks; small ones that lie near each other are read at once."""

    def __init__(self, source: int | Buffer, plan: NDArray[Any]) -> None:
        self._source, self._start = source, 0
        if isinstance(source, int):
            start = max(0, int(plan["offset"].min()))
            nbytes = int((plan["offset"] + plan["nbytes"]).max()) - start
            if 0 < nbytes <= _READ_AT_ONCE:
                self._source, self._start = os.pread(source, nbytes, start), start

    def of(self, row: _Row) -> memoryview:
        """The stored bytes of one chunk."""
        if isinstance(self._source, int):
            found = memoryview(os.pread(self._source, row.nbytes, row.offset))
        else:
            start = row.offset - self._start
            stop = start + row.nbytes if start >= 0 else 0
            found = memoryview(self._source).cast("B")[max(start, 0) : stop]
        if len(found) != row.nbytes:
            msg = f"{row.nbytes} bytes at {row.offset} are not in the file; it was truncated"
            raise ValueError(msg)
        return found


def _run_row(row: _Row, source: _Stored, arena: Bytes, tables: Bytes) -> None:
    stored = source.of(row)
    if row.is_checked and chunk_checksum(stored) != row.checksum:
        msg = "its checksum does not fit"
        raise ValueError(msg)
    codec, itemsize, target = CODECS[PLAN_CODECS[row.codec]], row.itemsize, row.target
    is_whole = row.first == 0 and row.count * itemsize == row.raw_nbytes
    if row.restoring == Restoring.AS_STORED and is_whole:
        codec.decode(stored, _place(arena, target, row.raw_nbytes).data, itemsize)
        return
    raw = np.empty(row.raw_nbytes, np.uint8)
    codec.decode(stored, raw.data, itemsize)
    first, count = row.first, row.count
    if not 0 <= first <= first + count <= raw.size // itemsize:
        msg = f"elements {first} to {first + count} are not in the chunk"
        raise ValueError(msg)
    values = raw[first * itemsize : (first + count) * itemsize]
    restored = _restored(row, values, tables)
    _place(arena, target, restored.size)[:] = restored


def _place(arena: Bytes, target: int, nbytes: int) -> Bytes:
    if not 0 <= target <= target + nbytes <= arena.size:
        msg = f"{nbytes} bytes at {target} do not fit into {arena.size}"
        raise ValueError(msg)
    return arena[target : target + nbytes]


def _restored(row: _Row, values: Bytes, tables: Bytes) -> Bytes:
    how, at = Restoring(row.restoring), row.table
    itemsize = row.itemsize
    if how is Restoring.AS_STORED:
        return values
    if how in (Restoring.TABLE_OF_2_BYTES, Restoring.TABLE_OF_4_BYTES):
        dtype = "<u2" if how is Restoring.TABLE_OF_2_BYTES else "<u4"
        size = 256 * np.dtype(dtype).itemsize
        return tables[at : at + size].view(dtype).take(values).view(np.uint8)
    elements = values.view(f"<u{itemsize}")
    if how is Restoring.FLOAT16_TO_FLOAT32:
        return elements.view("<f2").astype("<f4").view(np.uint8)
    if how is Restoring.BFLOAT16_TO_FLOAT32:
        return bfloat16_to_float32(elements).view(np.uint8)
    width = row.width
    factor, offset = tables[at : at + 8 * width].view("<f4").reshape(2, width)
    channels = np.arange(row.first, row.first + elements.size) % width
    numbers = elements.astype(np.float32) - np.float32(row.zero_point)
    numbers *= factor[channels]
    numbers += offset[channels]
    if how is Restoring.STEPS_TO_FLOAT16:
        return float32_to_float16(numbers).view(np.uint8)
    return numbers.view(np.uint8)
