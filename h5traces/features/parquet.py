"""Features as a Parquet table: one row per sample, a list of numbers per feature."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet as pq

from h5traces.format.text import utf8

if TYPE_CHECKING:
    from h5traces.features.table import FeatureTable
    from h5traces.storage.publish import PartFile

_ROWS_NBYTES = 64 << 20


def write_parquet(table: FeatureTable, part: PartFile) -> None:
    """Write the table; shapes of rows and numbers of layers go to the schema's metadata.

    Directions of principal components are left out; ``.h5`` and ``.npz`` have them.
    """
    columns = table.features
    shapes = {name: list(column.shape[1:]) for name, column in columns.items()}
    layers = table.others["layers"].tolist()
    facts = {"h5traces": json.dumps({**table.metadata, "shapes": shapes, "layers": layers})}
    types = {name: pa.list_(pa.float32(), math.prod(shape)) for name, shape in shapes.items()}
    samples = {name: _samples(name, table) for name in table.samples if name != "has_label"}
    schema = pa.schema(
        [*((name, each.type) for name, each in samples.items()), *types.items()], metadata=facts
    )
    row_nbytes = 4 * sum(map(math.prod, shapes.values()))
    step = max(1, _ROWS_NBYTES // max(1, row_nbytes))
    with pq.ParquetWriter(part.file, schema) as writer:
        for start in range(0, len(table.samples["index"]), step):
            found = {name: each.slice(start, step) for name, each in samples.items()}
            for name, column in columns.items():
                flat = pa.array(column[start : start + step].reshape(-1))
                found[name] = pa.FixedSizeListArray.from_arrays(flat, math.prod(shapes[name]))
            writer.write_table(pa.table(found, schema=schema))
            part.file.raise_error()


def _samples(name: str, table: FeatureTable) -> Any:
    """A column with one value per sample; a missing label is null."""
    values = table.samples[name]
    mask = table.samples["has_label"] == 0 if name == "label" else None
    if values.dtype == object:
        return pa.array(list(map(utf8, values)), pa.string())
    return pa.array(values, mask=mask)
