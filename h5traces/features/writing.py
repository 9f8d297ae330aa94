"""Files of features: HDF5, and numpy's ``.npz``."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

from h5traces.format import text
from h5traces.format.entries import stored_type_of
from h5traces.lazy import needing
from h5traces.storage.arrays import as_bytes, chunk_shape, cut
from h5traces.storage.codecs import GZIP, get_codec
from h5traces.storage.hdf5.writing import Hdf5Writer
from h5traces.storage.publish import PartFile, make_folder, remove_abandoned_parts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.features.table import FeatureTable
    from h5traces.format.document import Attrs


FORMATS = (".h5", ".npz", ".parquet")


def check_writer(target: Path) -> None:
    """Raise MissingDependencyError where a file of that suffix needs a library that is missing."""
    if target.suffix == ".parquet":
        _parquet_writer()


def write_features(table: FeatureTable, target: Path, *, overwrite: bool) -> int:
    """Write a table to a file of the kind that its suffix says; its size in bytes."""
    writers = {".h5": _write_hdf5, ".npz": _write_npz}
    write = writers.get(target.suffix) or _parquet_writer()
    make_folder(target.parent)
    remove_abandoned_parts(target)
    with PartFile(target) as part:
        write(table, part)
        part.file.raise_error()
        nbytes = part.file.nbytes
        part.publish(overwrite=overwrite)
    return nbytes


def _parquet_writer() -> Callable[[FeatureTable, PartFile], None]:
    with needing(".parquet", "pyarrow", extra="parquet"):
        from h5traces.features.parquet import write_parquet
    return write_parquet


def _write_hdf5(table: FeatureTable, part: PartFile) -> None:
    writer = Hdf5Writer(part.file)
    try:
        attrs: Attrs = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in table.metadata.items()
        }
        writer.add_attributes("/", attrs)
        for name, column in table.features.items():
            _write_dataset(writer, f"/features/{name}", column)
        samples = {f"samples/{name}": values for name, values in table.samples.items()}
        for path, values in (samples | table.others).items():
            plain = text.encode_all(values.tolist()) if values.dtype == object else values
            _write_dataset(writer, f"/{path}", plain)
            part.file.raise_error()
    finally:
        writer.close()


def _write_dataset(writer: Hdf5Writer, path: str, values: NDArray[Any]) -> None:
    itemsize = values.dtype.itemsize
    # Whole rows, so that a reader of one sample inflates few of others.
    rows = chunk_shape(values.shape, itemsize)[0]
    chunk = (rows, *(max(1, length) for length in values.shape[1:]))
    rest = (0,) * (values.ndim - 1)
    codec = get_codec(GZIP.name if values.dtype.kind in "iuf" and itemsize > 1 else "deflate")
    starts = range(0, len(values), rows)
    chunks = (cut(values, (start, *rest), chunk) for start in starts)
    writer.write_dataset(
        path,
        dtype=stored_type_of(np.empty(0, values.dtype)),
        shape=values.shape,
        chunk=chunk,
        codec=codec.name,
        chunks=(codec.encode(as_bytes(each), itemsize) for each in chunks),
        attrs={},
    )


def _write_npz(table: FeatureTable, part: PartFile) -> None:
    """As ``numpy.savez_compressed`` does, but a block at a time."""
    others = {path.replace("/", "_"): values for path, values in table.others.items()}
    arrays = table.features | table.samples | others
    arrays["metadata"] = np.array([json.dumps(table.metadata)])
    with zipfile.ZipFile(part.file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, values in arrays.items():
            plain = np.array(values.tolist(), dtype=str) if values.dtype == object else values
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, plain, allow_pickle=False)
            part.file.raise_error()
