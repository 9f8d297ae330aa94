"""Opens files of every kind as named arrays, for mappings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import ConversionError
from h5traces.format.text import and_more
from h5traces.format.values import TorchValue
from h5traces.sources.arrays import ArrayFile, Held, Loaded, flattened, is_array
from h5traces.sources.mapped import MappedFile, aligned
from h5traces.sources.mapping import ARRAY, CARRIERS
from h5traces.sources.opening import DECOMPRESSED
from h5traces.sources.signatures import KINDS as COMPRESSORS
from h5traces.sources.signatures import identify

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from h5traces.sources.arrays import Group
    from h5traces.sources.mapping import ArrayMapping, MappingDocument
    from h5traces.sources.named_arrays import NamedArraysSource
    from h5traces.sources.pickle.stream import BatchStream

RAW: Final = "raw"
TABLES: Final = ("parquet", "arrow", "jsonl", "json", "datasets-folder")
_NAMED: Final = ("safetensors", "npz", "npy")
_PICKLED: Final = ("pickle", "torch", "torch-old")
KINDS: Final = (*_NAMED, *_PICKLED, "hdf5", *TABLES)
_SYNONYMS: Final = {"torch-old": "torch"}


def open_arrays(path: str | os.PathLike[str], mapping: MappingDocument | None = None) -> ArrayFile:
    """Open a file, or a folder that is one set, as named arrays.

    Parameters
    ----------
    path
        A file of any kind in `KINDS`; with `mapping.array`, of raw numbers.
    mapping
        Says what raw numbers are, and which kind is expected.

    Raises
    ------
    ConversionError
        It is of another kind, or cannot be read.
    """
    path = Path(path)
    if mapping is not None and mapping.array is not None:
        return _RawFile(path, mapping.array)
    kind = identify(path)
    if mapping is not None and mapping.kind not in (None, kind.id, _SYNONYMS.get(kind.id)):
        message = f"{path}: is {kind}, and the mapping is for {mapping.kind}"
        raise ConversionError(message)
    if kind.compression is not None and kind.id not in DECOMPRESSED:
        message = f"{path}: is {kind}; {COMPRESSORS[kind.compression].remedy}"
        raise ConversionError(message)
    if kind.id == "hdf5":
        return _Hdf5File(path)
    if kind.id in TABLES:
        return _table(path, kind.id)
    if kind.id in _NAMED:
        return _NamedFile(_named_reader(path, kind.id))
    if kind.id in _PICKLED:
        return _PickledFile(_pickle_reader(path, kind.id))
    message = f"{path}: is {kind}; a mapping is for {and_more(KINDS, 20)}"
    if kind.id == "unknown":
        message = f"{path}: is {kind}; for raw numbers, the mapping needs a table [array]"
    raise ConversionError(message)


def _named_reader(path: Path, kind: str) -> NamedArraysSource:
    from h5traces.sources.numpy_file import NpySource, NpzSource
    from h5traces.sources.safetensors import SafetensorsSource

    readers = {"safetensors": SafetensorsSource, "npz": NpzSource, "npy": NpySource}
    return readers[kind](path)


def _pickle_reader(path: Path, kind: str) -> BatchStream:
    from h5traces.sources.pickle.stream import BatchStream
    from h5traces.sources.torch_file import OldTorchStream, TorchZipStream

    if kind == "pickle":
        return BatchStream(path, whole_nbytes=1 << 62)
    return TorchZipStream(path) if kind == "torch" else OldTorchStream(path)


def _table(path: Path, kind: str) -> ArrayFile:
    from h5traces.sources.tables import open_table

    return open_table(path, kind)


class _NamedFile(ArrayFile):
    """Arrays of safetensors and numpy: views of the file unless it is compressed."""

    def __init__(self, reader: NamedArraysSource) -> None:
        self._reader, self.kind = reader, reader.kind

    def groups(self) -> Iterator[Group]:
        """One group."""
        arrays = dict(self._reader.arrays)
        if self.kind == "npy":
            arrays = dict(zip((ARRAY,), arrays.values(), strict=True))
        yield {name: Loaded(load) for name, load in arrays.items()}

    @property
    def progress(self) -> tuple[int, int]:
        """Nothing or all, as samples are counted by the mapping."""
        return self._reader.progress

    def release(self, nbytes: int = 0) -> None:
        """Give back pages of the file."""
        self._reader.release(nbytes)

    def close(self) -> None:
        """Close the file."""
        self._reader.close()


class _PickledFile(ArrayFile):
    """Objects of a pickle or a file of torch.save, with names such as ``hidden_states/0``."""

    def __init__(self, reader: BatchStream) -> None:
        self._reader = reader
        self.kind = reader.kind

    def groups(self) -> Iterator[Group]:
        """One group per dict of a list, or one for another object."""
        for each in self._reader.objects():
            self.has_rows = self._reader.is_list
            yield {ARRAY: Held(each)} if is_array(each) else flattened(each)

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes read so far, and the size of the file."""
        return self._reader.progress

    def close(self) -> None:
        """Close the file."""
        self._reader.close()


class _Hdf5File(ArrayFile):
    """Datasets by path, such as ``layer_3/inputs``, and attributes, such as ``layer_3/@unit``."""

    kind = "hdf5"

    def __init__(self, path: Path) -> None:
        from h5traces.storage.hdf5.others import OtherHdf5

        self._file = OtherHdf5(path)
        if self._file.links:
            links = and_more(map(repr, self._file.links), 5)
            self.understood = (f"soft links are not followed: {links}",)

    def groups(self) -> Iterator[Group]:
        """One group."""
        yield {**self._file.datasets, **self._file.attributes}

    @property
    def progress(self) -> tuple[int, int]:
        """The size of the file."""
        return 0, self._file.nbytes

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _RawFile(ArrayFile):
    """A file of numbers without a header: one array, a view of the file."""

    kind = RAW

    def __init__(self, path: Path, array: ArrayMapping) -> None:
        self._file = MappedFile(path)
        self._array = Held(self._view(path, array))

    def _view(self, path: Path, array: ArrayMapping) -> Any:
        dtype = np.dtype(CARRIERS.get(array.dtype, array.dtype))
        dtype = dtype.newbyteorder("<" if array.byte_order == "little" else ">")
        nbytes = self._file.nbytes - array.offset
        known = math.prod(each for each in array.shape if each != -1) * dtype.itemsize
        shape = array.shape
        if -1 in shape and known and nbytes >= 0 and nbytes % known == 0:
            shape = tuple(nbytes // known if each == -1 else each for each in shape)
        needed = math.prod(max(each, 1) for each in shape) * dtype.itemsize
        if -1 in shape or 0 in shape or needed != nbytes:
            message = (
                f"{path}: has {max(nbytes, 0):,} bytes after an offset of {array.offset:,}, "
                f"expected {'a multiple of ' if -1 in shape else ''}"
                f"{known if -1 in shape else needed:,} for shape {array.shape} of {array.dtype}"
            )
            raise ConversionError(message)
        stored = shape if array.order == "C" else shape[::-1]
        values = self._file.array(array.offset, dtype, stored)
        values = aligned(values if array.order == "C" else values.T)
        if not dtype.isnative:
            values = values.astype(dtype.newbyteorder("="))
        return TorchValue(values, array.dtype) if array.dtype in CARRIERS else values

    def groups(self) -> Iterator[Group]:
        """One group of one array."""
        yield {ARRAY: self._array}

    @property
    def progress(self) -> tuple[int, int]:
        """The size of the file."""
        return 0, self._file.nbytes

    def release(self, nbytes: int = 0) -> None:
        """Give back pages of the file."""
        self._file.release(nbytes)

    def close(self) -> None:
        """Close the file; views stay valid."""
        self._file.close()
