"""What takes a look at all of a file: how much is stored, and whether its bytes are as written."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.archive.footer_store import FooterStore
from h5traces.format.entries import NO_ORDINAL, carrier_dtype
from h5traces.storage.footer import COLUMNS, GROUP_ROWS
from h5traces.storage.footer_rows import FooterError
from h5traces.storage.scanning import metadata_checksum, scan

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from h5traces.archive.hdf5_store import Store

    Table = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]


@dataclass(frozen=True, slots=True)
class StoredSize:
    """Sizes of several datasets, before and after compression."""

    num_datasets: int = 0
    raw_nbytes: int = 0
    stored_nbytes: int = 0

    def __add__(self, other: StoredSize) -> StoredSize:
        return StoredSize(
            self.num_datasets + other.num_datasets,
            self.raw_nbytes + other.raw_nbytes,
            self.stored_nbytes + other.stored_nbytes,
        )


@dataclass(frozen=True, slots=True)
class BytesChecked:
    """What comparing all bytes of a file with the checksums of its index found."""

    num_chunks: int
    # Datasets that are not empty.
    num_datasets: int
    # By chunk, the sample (or `NO_ORDINAL`) and the path below it, or below the root.
    damaged: list[tuple[int, str]]
    # Whether all bytes outside of chunks are as written.
    rest_fits: bool


def _chunk_table(store: FooterStore) -> tuple[NDArray[np.int64], Table, int]:
    """How many chunks samples up to each have; offset, size, checksum of all; num_datasets."""
    parts: list[list[NDArray[Any]]] = [[np.empty(0, dtype)] for dtype in ("i8", "i8", "u8")]
    counts: list[int] = []
    num_datasets, rows = 0, store.tables.rows()
    # Joined group by group: views would keep all of their rows.
    while batch := list(islice(rows, GROUP_ROWS)):
        chunks = [row.chunks for row in batch]
        for part, columns in zip(parts, zip(*chunks, strict=True), strict=True):
            part.append(np.concatenate(columns))
        counts += [len(sizes) for _, sizes, _ in chunks]
        numbers = np.concatenate([row.form.object_num_chunks for row in batch])
        num_datasets += int(np.count_nonzero(numbers))
    offsets, sizes, checksums = map(np.concatenate, parts)
    return np.cumsum(counts), (offsets, sizes, checksums), num_datasets


def structures_fit(store: FooterStore) -> bool:
    """Whether all bytes of the HDF5 part outside of chunks are as written."""
    _, (offsets, sizes, _), _ = _chunk_table(store)
    end = store.directory.hdf5_nbytes
    if ((offsets < 0) | (sizes < 0) | (offsets > end - sizes)).any():
        return False
    found = metadata_checksum(store.file, offsets, sizes, end)
    return found == store.directory.metadata_checksum


def check_bytes(
    store: FooterStore,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BytesChecked:
    """Compare every byte of the file with the index's checksums.

    FooterError where a row or a column of the index is damaged; all of them are read.
    """
    for name in COLUMNS:
        store.tables.column(name)
    ends, table, num_datasets = _chunk_table(store)
    offsets, sizes, _ = table
    end = store.directory.hdf5_nbytes
    # Chunks that overlap would be read again and again; floats, as the sum may be any.
    if sizes.astype(np.float64).sum() > end:
        message = f"the index's chunks overlap in {end} bytes"
        raise FooterError(message)
    scanned = scan(store.file, table, end, workers=workers, progress=progress)
    damaged = []
    for number in scanned.damaged:
        index = int(np.searchsorted(ends, number, side="right"))
        row = store.row(index)
        within = number - (int(ends[index - 1]) if index else 0)
        place = int(np.searchsorted(row.form.chunk_ends, within, side="right")) - 1
        ordinal = index if index < store.num_samples else NO_ORDINAL
        damaged.append((ordinal, store.entry(row, place).path))
    rest_fits = scanned.metadata_checksum == store.directory.metadata_checksum
    return BytesChecked(len(offsets), num_datasets, damaged, rest_fits)


def stored_sizes(store: Store) -> dict[str, StoredSize]:
    """Sizes of all datasets by the first part of their path."""
    if isinstance(store, FooterStore):
        return _listed_sizes(store)
    sizes: dict[str, StoredSize] = {}
    for index in range(store.num_samples):
        for path, entry in store.sample(index).objects.items():
            if entry.raw_nbytes:
                first = path.partition("/")[0]
                part = StoredSize(1, entry.raw_nbytes, entry.stored_nbytes)
                sizes[first] = sizes.get(first, StoredSize()) + part
    return sizes


def _listed_sizes(store: FooterStore) -> dict[str, StoredSize]:
    types = store.directory.types
    itemsizes = np.array([carrier_dtype(each).itemsize if each else 0 for each in types])
    firsts = list(dict.fromkeys(name.partition("/")[0] for name in store.terms.names))
    kinds = np.array([firsts.index(name.partition("/")[0]) for name in store.terms.names])
    totals = np.zeros((3, len(firsts)), dtype=np.int64)
    rows = store.tables.rows()
    while batch := list(islice(rows, GROUP_ROWS)):
        forms = [row.form for row in batch]
        number, kind, ndim, dims, chunks = (
            np.concatenate([getattr(form, name) for form in forms])
            for name in (
                *("object_type", "object_name", "object_ndim"),
                *("object_dims", "object_num_chunks"),
            )
        )
        stored = np.concatenate([row.chunks[1] for row in batch])
        try:
            raw, kind = itemsizes[number], kinds[kind]
        except IndexError as error:
            message = f"a row of the index does not fit its columns: {error}"
            raise FooterError(message) from error
        starts = np.cumsum(ndim, dtype=np.int64) - ndim
        for axis in range(int(ndim.max(initial=0))):
            has_axis = ndim > axis
            raw[has_axis] *= dims[starts[has_axis] + axis]
        of_chunk = np.repeat(np.where(raw > 0, kind, len(firsts)), chunks)
        width = len(firsts) + 1
        for total, values in enumerate(
            (
                np.bincount(kind[raw > 0], minlength=width),
                np.bincount(kind, raw, minlength=width),
                np.bincount(of_chunk, stored, minlength=width),
            )
        ):
            totals[total] += values[:-1].astype(np.int64)
    return {name: StoredSize(*totals[:, place].tolist()) for place, name in enumerate(firsts)}
