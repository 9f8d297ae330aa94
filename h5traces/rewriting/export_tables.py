"""Exports archives as tables, one row per sample: Parquet, and data sets of ``datasets``."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from h5traces.archive.trace import LayerSequence
from h5traces.format.dtypes import read_type
from h5traces.format.text import utf8
from h5traces.rewriting.plain_values import PlainFields, add_as_json, is_plain, layers_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace
    from h5traces.storage.publish import PartFile

# Raw bytes of rows that are written together, if there are several. Parquet takes 17 times as much
# while it writes float16: a pointer and two levels per value.
_ROWS_NBYTES: Final = 8 << 20
_FILE: Final = "data-00000-of-00001.arrow"


def table_schema(archive: Archive) -> tuple[Any, list[str]]:
    """Names and types of the columns of all samples, and the fields that are left out.

    Layers are not read: their types are in the index.
    """
    schema, left_out = pa.schema([]), dict[str, None]()
    for trace in archive:
        fields = _fields(trace)
        left_out |= dict.fromkeys(fields.left_out)
        left_out |= {
            f"lone surrogates of {name}": None
            for name, value in fields.named.items()
            if _has_surrogates(value)
        }
        types = {name: _type_of(trace, value) for name, value in fields.named.items()}
        schema = pa.unify_schemas([schema, pa.schema(types)], promote_options="permissive")
    return schema, list(left_out)


def write_parquet(archive: Iterable[Trace], schema: Any, part: PartFile) -> None:
    """Write samples as the rows of a Parquet file."""
    # Values of layers repeat too seldom for dictionaries.
    with pq.ParquetWriter(part.file, schema, use_dictionary=False) as writer:
        for table in _tables(archive, schema):
            writer.write_table(table)
            pa.default_memory_pool().release_unused()
            part.file.raise_error()


def write_dataset(archive: Iterable[Trace], schema: Any, folder: Path) -> None:
    """Write samples as ``datasets.Dataset.save_to_disk`` does, into a folder that exists."""
    with (folder / _FILE).open("wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            for table in _tables(archive, schema):
                writer.write_table(table)
        file.flush()
        os.fsync(file.fileno())
    state: dict[str, Any] = {
        "_data_files": [{"filename": _FILE}],
        "_fingerprint": hashlib.sha256(os.urandom(16)).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    for name, document in (("dataset_info.json", {}), ("state.json", state)):
        with (folder / name).open("w", encoding="utf-8") as text:
            json.dump(document, text, indent=2)
            text.flush()
            os.fsync(text.fileno())


def _fields(trace: Trace) -> PlainFields:
    """Values by column; layers unread."""
    found = PlainFields()
    for key in trace.fields:
        value = trace._value(key, "numpy")
        if isinstance(value, LayerSequence) or is_plain(value):
            found.add(key, value)
        else:
            add_as_json(found, key, value)
    return found


def _type_of(trace: Trace, value: Any) -> Any:
    if isinstance(value, LayerSequence):
        if not value._stored_names:
            return pa.null()
        entry = trace._stored.entry(f"{value.kind}/{value._stored_names[0]}")
        name = read_type(entry.attrs, entry.dtype)
        found = pa.from_numpy_dtype(np.dtype("float32" if name == "bfloat16" else name))
        for _ in range(len(entry.shape) + 1):
            found = pa.large_list(found)
        return found
    return _cell(trace, value).type


def _tables(traces: Iterable[Trace], schema: Any) -> Iterator[Any]:
    rows: list[Any] = []
    nbytes = 0
    for trace in traces:
        found = _fields(trace).named
        columns = {name: _cell(trace, value) for name, value in found.items()}
        arrays = [
            columns[name].cast(kind) if name in columns else pa.nulls(1, kind)
            for name, kind in zip(schema.names, schema.types, strict=True)
        ]
        row = pa.table(arrays, schema=schema)
        if rows and nbytes + row.nbytes > _ROWS_NBYTES:
            yield _joined(rows)
            rows, nbytes = [], 0
        rows.append(row)
        nbytes += row.nbytes
    if rows:
        yield _joined(rows)


def _joined(rows: list[Any]) -> Any:
    return pa.concat_tables(rows).combine_chunks() if len(rows) > 1 else rows[0]


def _cell(trace: Trace, value: Any) -> Any:
    """An Arrow array of one row."""
    if isinstance(value, LayerSequence):
        layers = [_nested(each.to_numpy()) for each in layers_of(trace, value)]
        stored = iter([pa.LargeListArray.from_arrays([0, len(each)], each) for each in layers])
        if not layers:
            return pa.nulls(1)
        absent = pa.nulls(1, pa.large_list(layers[0].type))
        items = [absent if name in value._absent else next(stored) for name in value._names]
        return pa.LargeListArray.from_arrays([0, len(items)], pa.concat_arrays(items))
    if isinstance(value, np.ndarray) and value.ndim:
        inner = _nested(value)
        return pa.LargeListArray.from_arrays([0, len(inner)], inner)
    if isinstance(value, list):
        return pa.array([[utf8(each) for each in value]])
    plain = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
    return pa.array([utf8(plain) if isinstance(plain, str) else plain])


def _nested(values: Any) -> Any:
    """An array of any number of axes as an Arrow array with the length of the first."""
    if values.dtype.kind in "SUc":
        flat = pa.array([utf8(str(each)) for each in values.reshape(-1).tolist()])
    else:
        flat = pa.array(np.ascontiguousarray(values, values.dtype.newbyteorder("=")).reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        size = values.shape[axis]
        rows = int(np.prod(values.shape[:axis], dtype=np.int64))
        flat = pa.LargeListArray.from_arrays(pa.array(np.arange(rows + 1) * size), flat)
    return flat


def _has_surrogates(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return any(isinstance(each, str) and utf8(each) != each for each in texts)
