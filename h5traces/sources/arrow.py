"""Rows of Parquet and Arrow tables by pyarrow, in batches of bounded size."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
from pyarrow import compute as pc
from pyarrow import ipc
from pyarrow import parquet as pq

from h5traces.errors import ConversionError
from h5traces.sources.arrays import ArrayFile, Held
from h5traces.sources.arrow_sizes import inflated_nbytes, read_page
from h5traces.sources.mapped import MappedFile
from h5traces.storage.files import open_regular
from h5traces.storage.trial import attempt

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from h5traces.sources.arrays import Group

_BATCH_NBYTES: Final = 16 << 20
_MAX_BATCH_ROWS: Final = 1024
# A value takes at most this many bytes, but for text, whose bytes are counted by the file.
_VALUE_NBYTES: Final = 8
_MAX_EXPANSION: Final = 2000
# Of what is decompressed at once, and of columns of lists, any row of which may hold all numbers.
_MAX_EXPANSION_AT_ONCE: Final = 100
_GRACE_NBYTES: Final = 64 << 20
_MAX_FOOTER_NBYTES: Final = 16 << 20
_MAX_PAGES: Final = 100_000
# A Python object in a list takes this many bytes.
_OBJECT_NBYTES: Final = 32
_MAX_OBJECTS_NBYTES: Final = 256 << 20
_MAX_LAYERS: Final = 10_000
_MAGIC: Final = b"ARROW1"
_STREAM_BEGIN: Final = 8
_SPLIT: Final = "split"
# What pyarrow raises for damaged files.
_ERRORS: Final = (
    *(pa.ArrowException, OSError, ValueError, ArithmeticError, MemoryError, KeyError, TypeError),
    RuntimeError,
)


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
            self._check_footer()
            # Pages are read one by one: a row group may be larger than memory.
            options: dict[str, Any] = {"buffer_size": 1 << 20, "pre_buffer": False}
            found = pq.ParquetFile(self._descriptor, **options)
            # Text stays as numbers of a dictionary, which may hold long text that is named often.
            # A C++ exception that pyarrow 26 does not catch, as of counts that do not fit, aborts.
            names = functools.partial(_text_columns, found.metadata)
            attempt(lambda: dict.fromkeys(names(), ""), path, "pyarrow")
            options |= {"metadata": found.metadata, "read_dictionary": names()}
            self._file = pq.ParquetFile(self._descriptor, **options)
        except _ERRORS as error:
            self.close()
            raise _error(path, error) from error
        except BaseException:
            self.close()
            raise

    def _read_at(self, offset: int, nbytes: int) -> bytes:
        return os.pread(self._descriptor.fileno(), nbytes, offset)

    def _check_footer(self) -> None:
        """Reject a footer that would take much more memory than its size."""
        nbytes = int.from_bytes(self._read_at(max(self._size - 8, 0), 4), "little")
        if nbytes > _MAX_FOOTER_NBYTES:
            message = (
                f"{self._path}: the footer has {nbytes:,} bytes, at most {_MAX_FOOTER_NBYTES:,} "
                "are read; write larger row groups, or several files"
            )
            raise ConversionError(message)

    def _nbytes_of(self, number: int, index: int) -> int:
        """Bytes that a column's values take in a row group; ConversionError for far too many."""
        column = self._file.metadata.row_group(number).column(index)
        stored = min(max(column.total_compressed_size, 0), self._size)
        needed = max(column.total_uncompressed_size, column.num_values * _VALUE_NBYTES, 0)
        is_list = self._file.schema.column(index).max_repetition_level > 0
        factor = _MAX_EXPANSION_AT_ONCE if is_list else _MAX_EXPANSION
        problem = None
        if needed > _GRACE_NBYTES + factor * stored or column.num_values < 0:
            problem = (
                f"{column.num_values:,} values of {needed:,} bytes are said to lie in {stored:,}; "
                "write it with smaller row groups"
            )
        else:
            problem = self._problem_of_pages(column)
        if problem is not None:
            message = (
                f"{self._path}: row group {number}, column {column.path_in_schema[:80]!r}: "
                f"{problem}"
            )
            raise ConversionError(message)
        return int(max(column.total_uncompressed_size, column.num_values * _VALUE_NBYTES // 2))

    def _problem_of_pages(self, column: Any) -> str | None:
        """What is wrong with the pages of a column chunk, which pyarrow reads until it has all."""
        place, first = column.data_page_offset, column.dictionary_page_offset
        if first is not None and 0 < first < place:
            place = first
        num_values = num_pages = nbytes = 0
        while num_values < column.num_values:
            page = read_page(self._read_at, place)
            num_pages += 1
            num_values += page.num_values
            nbytes += page.header_nbytes + page.nbytes
            place += page.header_nbytes + page.compressed_nbytes
            if page.nbytes > _GRACE_NBYTES + _MAX_EXPANSION_AT_ONCE * page.compressed_nbytes:
                return f"a page of {page.compressed_nbytes:,} bytes becomes {page.nbytes:,}"
            if num_pages > _MAX_PAGES:
                return f"it has more than {_MAX_PAGES:,} pages; write it with larger ones"
        if num_values > column.num_values or nbytes > max(column.total_uncompressed_size, 0):
            return (
                f"{column.num_values:,} values of {column.total_uncompressed_size:,} bytes are "
                f"expected, and its pages hold {num_values:,} of {nbytes:,}"
            )
        return None

    def groups(self) -> Iterator[Group]:
        """One group per row."""
        metadata = self._file.metadata
        for number in range(metadata.num_row_groups):
            try:
                group = metadata.row_group(number)
                nbytes = sum(self._nbytes_of(number, each) for each in range(group.num_columns))
                row_nbytes = max(1, nbytes // max(1, group.num_rows))
                size = max(1, min(_MAX_BATCH_ROWS, _BATCH_NBYTES // row_nbytes))
                num_rows = 0
                for batch in self._file.iter_batches(size, row_groups=[number], use_threads=False):
                    # What the batch was decoded in: two levels per value, and the pages.
                    pa.default_memory_pool().release_unused()
                    num_rows += batch.num_rows
                    rows = _rows(batch, None)
                    del batch
                    yield from rows
                pa.default_memory_pool().release_unused()
            except _ERRORS as error:
                raise _error(self._path, error) from error
            if num_rows != group.num_rows:
                message = (
                    f"{self._path}: pyarrow reads {num_rows:,} rows of row group {number}, "
                    f"expected {group.num_rows:,}; write it with another version of it"
                )
                raise ConversionError(message)
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


def _text_columns(metadata: Any) -> list[str]:
    """Columns of bytes by path, which may be read as dictionaries; looks at all columns."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    columns = (each.column(index) for each in groups for index in range(each.num_columns))
    found = [each.path_in_schema for each in columns if each.physical_type == "BYTE_ARRAY"]
    return list(dict.fromkeys(found))


class ArrowTable(ArrayFile):
    """Files of Arrow or Feather, memory-mapped, one sample per row."""

    has_rows = True

    def __init__(self, kind: str, files: list[tuple[Path, str | None]], *, links: bool) -> None:
        self.kind = kind
        self._files = [(MappedFile(path, links=links), split) for path, split in files]
        self._done = 0
        self._size = sum(file.nbytes for file, _ in self._files)

    def groups(self) -> Iterator[Group]:
        """One group per row."""
        for file, split in self._files:
            try:
                for batch in _batches(file):
                    row_nbytes = batch.get_total_buffer_size() // max(1, batch.num_rows)
                    for start in range(0, batch.num_rows, _MAX_BATCH_ROWS):
                        for row in _rows(batch.slice(start, _MAX_BATCH_ROWS), split):
                            yield row
                            # A batch of datasets has a thousand rows.
                            file.release(row_nbytes)
            except _ERRORS as error:
                raise _error(file.path, error) from error
            self._done += file.nbytes
            file.close()

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes read so far, by files, and the size of all."""
        return self._done, self._size

    def close(self) -> None:
        """Close the files; rows that were read stay valid."""
        for file, _ in self._files:
            file.close()


def _batches(file: MappedFile) -> Iterator[pa.RecordBatch]:
    """The batches of a file, each checked before and after pyarrow decompresses it.

    A file is a stream with a magic before it and a list of its batches after it.
    """
    content = pa.py_buffer(file.view(0, file.nbytes))
    is_file = file.read_at(0, len(_MAGIC)) == _MAGIC
    stream = content.slice(_STREAM_BEGIN) if is_file else content
    batches = ipc.open_stream(pa.BufferReader(stream))
    num_batches = 0
    for part in ipc.MessageReader.open_stream(pa.BufferReader(stream)):
        body = part.body
        needed = inflated_nbytes(part.metadata.to_pybytes(), body or b"")
        stored = 0 if body is None else body.size
        if needed > _GRACE_NBYTES + _MAX_EXPANSION_AT_ONCE * stored:
            problem = f"a batch of {stored:,} bytes becomes {needed:,}; write it in smaller batches"
            message = f"{file.path}: {problem}"
            raise ConversionError(message)
        if part.type == "record batch":
            # With the dictionaries before it, checked already.
            batch = batches.read_next_batch()
            # pyarrow would follow offsets and indices that lead elsewhere.
            batch.validate(full=True)
            num_batches += 1
            yield batch
            file.release(stored)
    listed = ipc.open_file(pa.BufferReader(content)).num_record_batches if is_file else num_batches
    if listed != num_batches:
        message = f"{file.path}: holds {num_batches} batches, and lists {listed}; copy it again"
        raise ConversionError(message)


def _rows(batch: pa.RecordBatch, split: str | None) -> Iterator[Group]:
    names = batch.schema.names
    columns = [_stored(column) for column in batch.columns]
    for index in range(batch.num_rows):
        row = {name: Held(cell(each, index)) for name, each in zip(names, columns, strict=True)}
        if split is not None:
            row.setdefault(_SPLIT, Held(split))
        yield row


def _stored(column: Any) -> Any:
    """The storage of an extension type: `Array2D` of datasets, tensors of fixed shape."""
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
    """One value of a column: an array for nested lists of numbers, else a plain value."""
    if not _is_list(column.type):
        return _as_python(column, index)
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
                return _as_python(column, index)
        shape.append(size)
        values = values.flatten()
        is_layers = _is_list(values.type) and len(values) <= _MAX_LAYERS
        if values.null_count and is_layers and len(shape) == 1:
            # Of layers, some may be absent.
            return [cell(values, item) for item in range(len(values))]
        if values.null_count and not pa.types.is_floating(values.type):
            return _as_python(column, index)
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return _as_python(column, index)
    # Null among floats is NaN, as pandas writes it.
    found = values.to_numpy(zero_copy_only=False)
    # Shape of the cells inside: one row was taken.
    return found.reshape(shape)


def _as_python(column: Any, index: int) -> Any:
    """One value; ConversionError where it takes far more memory than the table."""
    if pa.types.is_primitive(column.type):
        return column[index].as_py()
    if _python_nbytes(column.slice(index, 1)) > _MAX_OBJECTS_NBYTES:
        message = (
            f"a value of type {str(column.type)[:80]} takes more than {_MAX_OBJECTS_NBYTES:,} bytes"
        )
        raise ValueError(message)
    return column[index].as_py()


def _python_nbytes(values: Any) -> int:
    """About how much values take as Python objects; views and dictionaries repeat texts."""
    types, kind = pa.types, values.type
    total = len(values) * _OBJECT_NBYTES
    if total > _MAX_OBJECTS_NBYTES:
        return total
    if _is_list(kind) or types.is_map(kind):
        return total + _python_nbytes(values.flatten())
    if types.is_struct(kind):
        return total + sum(map(_python_nbytes, values.flatten()))
    if types.is_dictionary(kind):
        used = values.dictionary.take(pc.unique(values.indices).drop_null())
        return total + len(values) * _longest(used)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        for value in values:
            total += len(value.as_py() or "")
            if total > _MAX_OBJECTS_NBYTES:
                break
        return total
    if types.is_nested(kind) or types.is_run_end_encoded(kind):
        # Unions, views of lists: few write them, and no bound is known.
        return _MAX_OBJECTS_NBYTES + 1
    return total + int(values.nbytes)


def _longest(values: Any) -> int:
    """Bytes of the longest value of a dictionary."""
    if pa.types.is_primitive(values.type):
        return 0
    return max((_python_nbytes(values[i : i + 1]) for i in range(len(values))), default=0)


def _is_list(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _error(path: Path, error: BaseException) -> ConversionError:
    return ConversionError(f"{path}: pyarrow cannot read it: {str(error)[:300]}")
