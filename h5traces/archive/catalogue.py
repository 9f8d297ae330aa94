"""Catalogues: one Parquet file with a row for every sample of many shards, opened as an archive.

The rows are for queries, and for finding samples. What opening needs of every shard lies in the
metadata of the file: a JSON document under `FACTS_KEY`, and a table of Arrow, compressed and in
base64, under `SHARDS_KEY`. No shard is touched before one of its samples is read.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import pyarrow as pa
import xxhash
from pyarrow import parquet as pq

from h5traces.archive.archive import Archive
from h5traces.archive.file import ArchiveFile
from h5traces.archive.open_files import OpenFiles
from h5traces.archive.shards import SHARED_FACTS, check_alike
from h5traces.errors import CorruptArchiveError, H5TracesError, NotAnArchiveError
from h5traces.format.archive import ArchiveMetadata
from h5traces.format.document import from_attributes
from h5traces.storage.footer import attrs_from_json
from h5traces.storage.remote.file import RemoteFile
from h5traces.storage.remote.paths import RemotePath, is_url

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.archive.tensors import Container
    from h5traces.format.limits import ReadLimits
    from h5traces.storage.remote.paths import RemoteOptions

FORMAT: Final = "h5traces-catalogue"
VERSION: Final = 1
FACTS_KEY: Final = b"h5traces"
SHARDS_KEY: Final = b"h5traces.shards"
SUFFIX: Final = ".parquet"
# What is known of every shard.
SHARDS: Final = pa.schema(
    {
        "path": pa.string(),
        "archive_id": pa.string(),
        "num_samples": pa.int64(),
        "nbytes": pa.int64(),
        # Of the shard and of the labels beside it; null on servers, and without labels.
        "modified_ns": pa.int64(),
        "labels_ns": pa.int64(),
        # Bytes after the HDF5 part, from which all of the shard is read; 0 without an index.
        "index_nbytes": pa.int64(),
        "family": pa.int64(),
        "is_lossless": pa.bool_(),
    }
)
# Shards kept in memory; `OpenFiles` says how many of them are open.
_FILES_KEPT: Final = 256
# A reader holds only parts of a larger index.
_MOST_TAIL_NBYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True)
class _Family:
    """A shard that stands for all with the same facts, for `check_alike`."""

    path: str
    metadata: ArchiveMetadata
    layers: tuple[int, ...]
    num_samples: int


class Catalogue:
    """A catalogue on disk or on a server.

    NotAnArchiveError where the file is none, CorruptArchiveError where it is damaged.
    """

    def __init__(self, path: Path | RemotePath, remote: RemoteOptions) -> None:
        self.path, self._remote = path, remote
        with self._opened() as parquet:
            stored = parquet.metadata.metadata or {}
            num_rows = parquet.metadata.num_rows
        try:
            facts = json.loads(stored.get(FACTS_KEY, b"null"))
            if not isinstance(facts, dict) or facts.get("format") != FORMAT:
                message = f"{path}: is Parquet, but no catalogue that 'h5traces index' wrote"
                raise NotAnArchiveError(message)
            if facts["version"] != VERSION:
                message = f"{path}: is a catalogue of version {facts['version']}; upgrade h5traces"
                raise NotAnArchiveError(message)
            self.shards = pa.ipc.open_stream(base64.b64decode(stored[SHARDS_KEY])).read_all()
            self.shards = self.shards.cast(SHARDS).combine_chunks()
            self.facts: dict[str, Any] = facts
            self.has_texts = bool(facts["texts"])
            counts = self.shards["num_samples"].to_numpy()
            self.starts = np.concatenate([[0], np.cumsum(counts)])
        except (ValueError, TypeError, KeyError, pa.ArrowException) as error:
            message = f"{path}: the catalogue is damaged ({error!r}); run 'h5traces index' again"
            raise CorruptArchiveError(message) from error
        if (counts < 0).any() or self.starts[-1] != num_rows:
            message = (
                f"{path}: the catalogue has {num_rows} rows for {self.starts[-1]} samples; run "
                "'h5traces index' again"
            )
            raise CorruptArchiveError(message)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        # Anew each time: processes after a fork would share a position in an open file.
        try:
            if isinstance(self.path, RemotePath):
                source: Any = pa.PythonFile(_Seekable(RemoteFile(self.path, self._remote)), "r")
            else:
                source = pa.memory_map(str(self.path))
            with source, pq.ParquetFile(source) as parquet:
                yield parquet
        except pa.ArrowInvalid as error:
            message = (
                f"{self.path}: is not a whole Parquet file ({error}); run 'h5traces index' again"
            )
            raise NotAnArchiveError(message) from error

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all samples."""
        with self._opened() as parquet:
            return parquet.read([name])[name]

    def groups(self) -> Iterator[pa.Table]:
        """All rows, in order."""
        with self._opened() as parquet:
            for number in range(parquet.num_row_groups):
                yield parquet.read_row_group(number)

    def place(self, number: int) -> Path | RemotePath:
        """Where a shard lies; relative paths begin at the folder of the catalogue."""
        return self.place_of(self.shards["path"][number].as_py())

    def place_of(self, name: str) -> Path | RemotePath:
        """Where the shard of a name lies."""
        if is_url(name):
            return RemotePath(name)
        if isinstance(self.path, RemotePath):
            return RemotePath(f"{self.path.url.rpartition('/')[0]}/{name}")
        return self.path.parent / name

    @cached_property
    def metadata(self) -> ArchiveMetadata:
        """Those of the first shard with samples."""
        return from_attributes(ArchiveMetadata, attrs_from_json(self.facts["first"]))

    def check_alike(self) -> None:
        """Raise ArchiveError where shards are of different models, layers or precisions."""
        own = {key: each for key, each in self.facts["first"].items() if key not in SHARED_FACTS}
        families: list[Any] = []
        for each in self.facts["families"]:
            metadata = from_attributes(ArchiveMetadata, attrs_from_json(own | each["facts"]))
            path, layers = str(self.place_of(each["path"])), tuple(each["layers"])
            families.append(_Family(path, metadata, layers, each["num_samples"]))
        check_alike(families)

    @cached_property
    def _by_hash(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Hashes of all ids, ascending, and the row of each."""
        column = self.column("id_hash")
        known = column.drop_null().to_numpy()
        rows = np.flatnonzero(column.is_valid().to_numpy())
        order = np.argsort(known, kind="stable")
        return known[order], rows[order]

    def rows_of(self, sample_id: str) -> list[int]:
        """Rows that may have a sample id, ascending."""
        hashes, rows = self._by_hash
        wanted = np.uint64(id_hash(sample_id))
        first, stop = (np.searchsorted(hashes, wanted, side) for side in ("left", "right"))
        found: list[int] = np.sort(rows[first:stop]).tolist()
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_by_hash"}


def id_hash(sample_id: str) -> int:
    """xxh3-64 of an id in UTF-8."""
    return int(xxhash.xxh3_64_intdigest(sample_id.encode("utf-8", "surrogatepass")))


class _Seekable(io.RawIOBase):
    """A `ByteFile` as a file of Python, which pyarrow reads."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.nbytes}
        self._position = starts[whence] + offset
        return self._position

    def size(self) -> int:
        """Bytes of the file."""
        return self._file.nbytes

    def read(self, nbytes: int | None = -1) -> bytes:
        left = max(0, self._file.nbytes - self._position)
        wanted = left if nbytes is None or nbytes < 0 else min(nbytes, left)
        data = self._file.read_at(self._position, wanted)
        self._position += len(data)
        return data


class CatalogueFiles(Sequence[ArchiveFile]):
    """The shards of a catalogue, each opened on first use."""

    def __init__(
        self,
        catalogue: Catalogue,
        limits: ReadLimits,
        open_files: OpenFiles,
        remote: RemoteOptions,
        **settings: Any,
    ) -> None:
        self.catalogue = catalogue
        self._limits, self._open_files, self._remote = limits, open_files, remote
        self._settings = settings
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[int, ArchiveFile] = OrderedDict()

    def __len__(self) -> int:
        return int(self.catalogue.shards.num_rows)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return tuple(self[each] for each in range(len(self))[number])
        number = range(len(self))[number]
        with self._lock:
            found = self._known.get(number)
        # Opened outside of the lock, since a server may be slow.
        found = self._opened(number) if found is None else found
        with self._lock:
            found = self._known.setdefault(number, found)
            self._known.move_to_end(number)
            while len(self._known) > _FILES_KEPT:
                self._known.popitem(last=False)
        return found

    def _opened(self, number: int) -> ArchiveFile:
        expected = {name: each[0].as_py() for name, each in _row(self.catalogue.shards, number)}
        path = self.catalogue.place(number)
        # So that one request gets all of the index.
        tail_nbytes = max(self._remote.tail_nbytes, expected["index_nbytes"])
        remote = replace(self._remote, tail_nbytes=min(tail_nbytes, _MOST_TAIL_NBYTES))
        try:
            file = ArchiveFile(
                path, self._limits, opened=self._open_files.use, remote=remote, **self._settings
            )
        except FileNotFoundError as error:
            message = (
                f"{path}: is in the catalogue {self.catalogue.path}, but not there; restore it, or "
                "run 'h5traces index' again"
            )
            raise CorruptArchiveError(message) from error
        found = (file.metadata.archive_id, file.num_samples)
        if found != (expected["archive_id"], expected["num_samples"]):
            file.close()
            message = (
                f"{path}: was replaced since it was catalogued (archive_id {found[0]} with "
                f"{found[1]} samples, expected {expected['archive_id']} with "
                f"{expected['num_samples']}); run 'h5traces index' again to update "
                f"{self.catalogue.path}"
            )
            raise CorruptArchiveError(message)
        return file

    def close(self) -> None:
        """Let go of all open files."""
        with self._lock:
            known = list(self._known.values())
        for file in known:
            file.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def _row(table: pa.Table, number: int) -> Iterator[tuple[str, Any]]:
    row = table.slice(number, 1)
    return zip(row.column_names, row.columns, strict=True)


class CataloguedArchive(Archive):
    """The shards of a catalogue as one sequence; see `Archive`.

    Ids, labels and lengths come from the catalogue. Metadata are those of the first shard.
    """

    _files: CatalogueFiles  # type: ignore[assignment]  # a sequence, too

    def __init__(
        self,
        path: Path | RemotePath,
        limits: ReadLimits,
        remote: RemoteOptions,
        label_folder: Path | Literal[False] | None = None,
        *,
        unrounded: bool = False,
        container: Container = "source",
    ) -> None:
        catalogue = Catalogue(path, remote)
        catalogue.check_alike()
        self._open_files, self._container = OpenFiles(), container
        settings = {"label_folder": label_folder, "unrounded": unrounded}
        self._files = CatalogueFiles(catalogue, limits, self._open_files, remote, **settings)
        self._starts = catalogue.starts.tolist()
        self._indices, self._layers = range(self._starts[-1]), None

    @property
    def catalogue(self) -> Catalogue:
        """The file that lists the shards."""
        return self._files.catalogue

    @property
    def paths(self) -> tuple[Path | RemotePath, ...]:
        return tuple(map(self.catalogue.place_of, self.catalogue.shards["path"].to_pylist()))

    @property
    def metadata(self) -> ArchiveMetadata:
        return self.catalogue.metadata.model_copy(update={"num_samples": len(self)})

    @property
    def layers(self) -> tuple[int, ...]:
        stored = tuple(self.catalogue.facts["families"][0]["layers"])
        return stored if self._layers is None else self._layers

    @property
    def labels(self) -> tuple[int | None, ...]:
        return tuple(self._column("label"))

    @cached_property
    def _keys(self) -> list[tuple[str | None, int | None]]:
        ids, generations = map(self._column, ("sample_id", "generation_index"))
        return list(zip(ids, generations, strict=True))

    def _column(self, name: str) -> list[Any]:
        column = self.catalogue.column(name)
        if self._indices != range(len(column)):
            column = column.take(pa.array(self._indices, pa.int64()))
        found: list[Any] = column.to_pylist()
        return found

    @property
    def _is_remote(self) -> bool:
        # Relative names lie where the catalogue does.
        return isinstance(self.catalogue.place(0), RemotePath) if len(self._files) else False

    @cached_property
    def _positions(self) -> dict[int, list[int]] | None:
        """Where in this view a row of the catalogue is; None if it is all of them."""
        if self._indices == range(self._starts[-1]):
            return None
        positions: dict[int, list[int]] = {}
        for position, row in enumerate(self._indices):
            positions.setdefault(row, []).append(position)
        return positions

    def _found(self, sample_id: str) -> list[tuple[int, int | None]]:
        known, found = self._positions, []
        for row in self.catalogue.rows_of(sample_id):
            for position in [row] if known is None else known.get(row, ()):
                metadata = self[position].metadata
                # Another id may have the same hash.
                if metadata.sample_id == sample_id:
                    found.append((position, metadata.generation_index))
        return found

    @property
    def _suspects(self) -> Sequence[ArchiveFile]:
        states = self.catalogue.shards["is_lossless"].to_pylist()
        number = next((number for number, state in enumerate(states) if not state), None)
        return () if number is None else (self._files[number],)

    def close(self) -> None:
        """Let go of the open files; the next use opens them again."""
        self._files.close()

    def __repr__(self) -> str:
        shards = self.catalogue.shards.num_rows
        return (
            f"<Archive {self.catalogue.path}: {len(self)} traces in {shards} shards, layers "
            f"{list(self.layers)}>"
        )


def open_catalogue(path: Path | RemotePath, remote: RemoteOptions) -> Catalogue | None:
    """The catalogue at a path; None without one, or if it is damaged."""
    try:
        return Catalogue(path, remote)
    except (FileNotFoundError, H5TracesError):
        return None
