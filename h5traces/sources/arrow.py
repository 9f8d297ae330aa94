"""Rows of Parquet and Arrow tables by pyarrow, in batches of bounded size."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
from pyarrow import ipc
from pyarrow import parquet as pq

from h5traces.errors import ConversionError
from h5traces.sources.arrays import ArrayFile, Held
from h5traces.storage.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from h5traces.sources.arrays import Group

_BATCH_NBYTES: Final = 16 << 20
_MAX_BATCH_ROWS: Final = 1024
# A value takes at most so many bytes, but for text, whose bytes are counted by the file.
_VALUE_NBYTES: Final = 8
_MAX_EXPANSION: Final = 2000
_GRACE_NBYTES: Final = 64 << 20
_MAGIC: Final = b"ARROW1"
_SPLIT: Final = "split"
# What pyarrow raises about what a file says.
_ERRORS: Final = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError)


class ParquetTable(ArrayFile):
    """A file of Parquet, one sample per row."""

    kind = "parquet"
    has_rows = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.fdopen(open_regular(path, ConversionError), "rb")
        self._size = os.fstat(self._descriptor.fileno()).st_size
        self._done = 0
        try:
            # Pages are read one by one: a row group may be larger than memory.
            self._file = pq.ParquetFile(self._descriptor, buffer_size=1 << 20, pre_buffer=False)
            for number in range(self._file.metadata.num_row_groups):
                self._check(number)
        except _ERRORS as error:
            self.close()
            raise _error(path, error) from error
        except BaseException:
            self.close()
            raise

    def _check(self, number: int) -> None:
        """Reject a row group whose values take more memory than its bytes explain."""
        group = self._file.metadata.row_group(number)
        for index in range(group.num_columns):
            column = group.column(index)
            stored = min(max(column.total_compressed_size, 0), self._size)
            needed = max(column.total_uncompressed_size, column.num_values * _VALUE_NBYTES, 0)
            if needed > _GRACE_NBYTES + _MAX_EXPANSION * stored or column.num_values < 0:
                message = (
                    f"{self._path}: row group {number}, column {column.path_in_schema[:80]!r}: "
                    f"{column.num_values:,} values of {needed:,} bytes are said to lie in "
                    f"{stored:,}; write it with smaller row groups"
                )
                raise ConversionError(message)

    def groups(self) -> Iterator[Group]:
        """One group per row."""
        metadata = self._file.metadata
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            nbytes = sum(
                max(column.total_uncompressed_size, column.num_values * _VALUE_NBYTES // 2)
                for column in map(group.column, range(group.num_columns))
            )
            row_nbytes = max(1, nbytes // max(1, group.num_rows))
            size = max(1, min(_MAX_BATCH_ROWS, _BATCH_NBYTES // row_nbytes))
            try:
                for batch in self._file.iter_batches(size, row_groups=[number], use_threads=False):
                    yield from _rows(batch, None)
            except _ERRORS as error:
                raise _error(self._path, error) from error
            self._done += sum(
                group.column(index).total_compressed_size for index in range(group.num_columns)
            )

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes read so far, by row groups, and the size of the file."""
        return min(self._done, self._size), self._size

    def close(self) -> None:
        """Close the file."""
        self._descriptor.close()


class ArrowTable(ArrayFile):
    """Files of Arrow or Feather, memory-mapped, one sample per row."""

    has_rows = True

    def __init__(self, kind: str, files: list[tuple[Path, str | None]]) -> None:
        self.kind = kind
        self._files = files
        self._done = 0
        self._size = sum(_size(path) for path, _ in files)

    def groups(self) -> Iterator[Group]:
        """One group per row."""
        for path, split in self._files:
            try:
                for batch in _batches(path):
                    for start in range(0, batch.num_rows, _MAX_BATCH_ROWS):
                        yield from _rows(batch.slice(start, _MAX_BATCH_ROWS), split)
            except _ERRORS as error:
                raise _error(path, error) from error
            self._done += _size(path)

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes read so far, by files, and the size of all."""
        return self._done, self._size

    def close(self) -> None:
        """Do nothing: files are open while they are read."""


def _size(path: Path) -> int:
    descriptor = open_regular(path, ConversionError, links=False)
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file:
        is_file = file.read(len(_MAGIC)) == _MAGIC
        file.seek(0)
        if not is_file:
            yield from ipc.open_stream(file)
            return
        reader = ipc.open_file(file)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _rows(batch: pa.RecordBatch, split: str | None) -> Iterator[Group]:
    names = batch.schema.names
    columns = [_stored(column) for column in batch.columns]
    for index in range(batch.num_rows):
        row = {name: Held(cell(each, index)) for name, each in zip(names, columns, strict=True)}
        if split is not None:
            row.setdefault(_SPLIT, Held(split))
        yield row


def _stored(column: Any) -> Any:
    """What an extension type is stored as: `Array2D` of datasets, tensors of fixed shape."""
    if not isinstance(column.type, pa.BaseExtensionType):
        return column
    shape = getattr(column.type, "shape", None)
    stored = column.storage
    if pa.types.is_fixed_size_list(stored.type) and shape and len(shape) > 1:
        for size in reversed(tuple(shape)[1:]):
            stored = _regrouped(stored, size)
    return stored


def _regrouped(column: Any, size: int) -> Any:
    """A column of flat rows of fixed size as rows of rows."""
    inner = pa.FixedSizeListArray.from_arrays(column.flatten(), size)
    return pa.FixedSizeListArray.from_arrays(inner, column.type.list_size // size)


def cell(column: Any, index: int) -> Any:
    """One value of a column: an array of what is nested lists of numbers, else a plain value."""
    if not _is_list(column.type):
        return column[index].as_py()
    values, shape = column.slice(index, 1), []
    if values.null_count:
        return None
    while _is_list(values.type):
        if pa.types.is_fixed_size_list(values.type):
            size: int | None = values.type.list_size
        else:
            lengths = values.value_lengths()
            size = lengths[0].as_py() if len(lengths) else 0
            if len(lengths.unique()) > 1:
                return column[index].as_py()
        shape.append(size)
        values = values.flatten()
        if values.null_count and len(shape) == 1:
            # Of layers, some may be absent.
            return [cell(values, item) for item in range(len(values))]
        if values.null_count:
            return column[index].as_py()
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return column[index].as_py()
    found = values.to_numpy(zero_copy_only=False)
    # Shape of the cells inside: one row was taken.
    return found.reshape(shape)


def _is_list(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _error(path: Path, error: BaseException) -> ConversionError:
    return ConversionError(f"{path}: pyarrow cannot read it: {str(error)[:300]}")
