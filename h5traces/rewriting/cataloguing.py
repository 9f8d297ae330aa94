"""`index`: writes the catalogue of many shards, or brings it up to date."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet as pq

from h5traces.archive.archive import Archive
from h5traces.archive.catalogue import (
    FACTS_KEY,
    FORMAT,
    SHARDS,
    SHARDS_KEY,
    SUFFIX,
    VERSION,
    Catalogue,
    id_hash,
    open_catalogue,
)
from h5traces.archive.footer_store import FooterStore
from h5traces.archive.labels import sidecar_path
from h5traces.archive.shards import SHARED_FACTS
from h5traces.archive.tables import to_arrow
from h5traces.arguments import checked
from h5traces.errors import ArchiveError, TargetError
from h5traces.format import layout
from h5traces.format.html import Report
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.paths import ARCHIVE_SUFFIXES, Target, expand_sources
from h5traces.ranks.parts import PartsRun
from h5traces.ranks.plan import RunPlan, planned_source, run_folder
from h5traces.ranks.rank import find_rank
from h5traces.storage.publish import PartFile, make_folder, remove_abandoned_parts
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemoteOptions, RemotePath, is_url
from h5traces.storage.remote.uploading import upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from h5traces.archive.file import ArchiveFile
    from h5traces.paths import PathLike, Source
    from h5traces.ranks.rank import Rank

_COLUMNS: Final = ("position_in_file", "sample_id", "generation_index")
_MORE_COLUMNS: Final = ("seq_len", "prompt_len", "coverage", "label")
_GROUP_ROWS: Final = 64 << 10
# Shards that are read together, so that not all rows wait in memory.
_SHARDS_AT_A_TIME: Final = 256
# Those that a rank reads at a time; fewer, so that a small run has a part for each.
_SHARDS_OF_A_PART: Final = 64
_WORKERS: Final = 4
_REMOTE_WORKERS: Final = 32


@dataclass(slots=True)
class CatalogueReport(Report):
    """What `index` did.

    Attributes
    ----------
    path
        The catalogue.
    num_shards, num_samples
        What it lists.
    num_read
        Shards that were read, as they are new or have changed.
    num_kept
        Shards whose rows the catalogue had.
    gone
        Shards that the catalogue listed and that are not there any more.
    is_written
        Whether the catalogue is there: a rank that does not end last leaves it to others.
    """

    path: str
    num_shards: int = 0
    num_samples: int = 0
    num_read: int = 0
    num_kept: int = 0
    gone: list[str] = field(default_factory=list)
    is_written: bool = False


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard: its row of the table, its facts, and where its samples are listed already."""

    row: dict[str, Any]
    facts: dict[str, Any]
    # Attributes of the root; None if the rows are taken over.
    first: dict[str, Any] | None
    table: Any
    before: tuple[_Known, int] | None = None


@checked
def index(
    sources: Source | Iterable[Source],
    output: PathLike,
    *,
    texts: bool = False,
    check: bool = False,
    workers: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    remote: RemoteOptions = DEFAULT_REMOTE,
    progress: Callable[[int, int], None] | None = None,
    rank: int | Literal["auto"] | None = None,
    world_size: int | None = None,
) -> CatalogueReport:
    """Write the catalogue of many shards, or bring one up to date.

    A catalogue is a Parquet file with one row per sample, which DuckDB, polars and pandas query as
    it is, and which `h5traces.open` opens as one archive without touching a shard. Rows of shards
    that have not changed are taken over from the catalogue that `output` names, if there is one.

    Parameters
    ----------
    sources
        Archives, globs or folders, on disk or on servers; sorted within each.
    output
        The catalogue, a name that ends in ``.parquet``; also ``s3://bucket/run.parquet``, for
        shards on servers. It lists shards below its own folder on disk by relative paths, so both
        can move together.
    texts
        Add the columns ``question``, ``generated_text``, ``generated_answer`` and
        ``generated_answer_clean``; reads every sample.
    check
        Open every shard and compare its ``archive_id`` with the catalogue. By default a shard on
        disk is unchanged where it has the same size and time; those on servers are always compared.
    workers
        Shards that are read at a time; 4 by default, 32 on servers.
    storage_options, remote
        As for `h5traces.open`.
    progress
        Called with the number of shards done and of all, or of those of the rank.
    rank, world_size
        Read the share of one of `world_size` processes. Parts lie in ``<output>.run`` until all are
        there; the rank that ends last writes `output`. See `docs/cluster.md`.

    Returns
    -------
    CatalogueReport
        How many shards were read, and how many taken over. The columns of the catalogue are
        ``ordinal`` (index in the opened archive), ``path``, ``position_in_file``, ``sample_id``,
        ``generation_index``, ``seq_len``, ``prompt_len``, ``coverage``, ``label``, ``model_id``,
        ``offset`` and ``nbytes`` (where the sample's arrays lie in the shard, bytes; null without
        an index), ``id_hash`` (xxh3-64 of the id).

    Raises
    ------
    FileNotFoundError
        Nothing matches.
    ArchiveError
        Two shards are copies of each other, or one is not an archive or damaged.
    TargetError
        `output` does not end in ``.parquet``.
    """
    if storage_options is not None:
        remote = replace(remote, storage_options=storage_options)
    if is_url(output):
        if rank is not None:
            message = (
                f"{output}: ranks share parts in a folder on disk, which a bucket is not; write "
                "the catalogue to disk, then copy it, as it lists shards by their addresses"
            )
            raise TargetError(message)
        return _uploaded(RemotePath(str(output)), sources, remote, texts=texts, check=check)
    target = Target.of(output, suffixes=(SUFFIX,)).named("catalogue").path
    paths = expand_sources(sources, ARCHIVE_SUFFIXES, remote)
    report = CatalogueReport(str(target), len(paths))
    chosen = find_rank(rank, world_size, run_folder(target))
    make_folder(target.parent)
    if workers is None:
        far = sum(isinstance(path, RemotePath) for path in paths)
        workers = _REMOTE_WORKERS if far else _WORKERS
    work = _Work(target=target, remote=remote, workers=workers, texts=texts, check=check)
    if chosen is None:
        work.write(paths, target, report, progress)
    else:
        with PartsRun(
            target, chosen, _plan(paths, chosen, texts=texts), SUFFIX, may_replace=True
        ) as run:
            if not run.is_joined:
                _share(run, work, paths, report, progress)
            report.is_written = run.is_joined
    return report


def _uploaded(
    output: RemotePath,
    sources: Source | Iterable[Source],
    remote: RemoteOptions,
    *,
    texts: bool,
    check: bool,
) -> CatalogueReport:
    """Write a catalogue here and upload it; one on the server is brought up to date."""
    if not output.url.endswith(SUFFIX):
        message = f"{output}: expected a name ending in {SUFFIX}"
        raise TargetError(message)
    paths = expand_sources(sources, ARCHIVE_SUFFIXES, remote)
    near = [path for path in paths if not isinstance(path, RemotePath)]
    if near:
        message = f"{near[0]}: is on this disk; a catalogue in a bucket lists shards on servers"
        raise TargetError(message)
    report = CatalogueReport(str(output), len(paths))
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / output.name
        work = _Work(target=local, remote=remote, workers=_REMOTE_WORKERS, texts=texts, check=check)
        known = open_catalogue(output, remote)
        work.write(paths, local, report, None, () if known is None else (output,))
        upload(local, output, remote, overwrite=True)
    return report


def _plan(paths: list[Path | RemotePath], rank: Rank, *, texts: bool) -> RunPlan:
    """What all ranks must agree on; a piece of work is a number of shards."""
    starts = range(0, len(paths), _SHARDS_OF_A_PART)
    return RunPlan(
        command="index",
        world_size=rank.size,
        first_task=rank.first,
        options={"texts": texts},
        sources=tuple(
            (path.url, 0, 0) if isinstance(path, RemotePath) else planned_source(path)
            for path in paths
        ),
        costs=tuple(min(_SHARDS_OF_A_PART, len(paths) - start) for start in starts),
    )


def _share(
    run: PartsRun,
    work: _Work,
    paths: list[Path | RemotePath],
    report: CatalogueReport,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write the parts of a rank, and the catalogue if it is the last."""
    done, total = 0, sum(run.plan.costs[number] for number in run.share)
    for number in run.share:
        some = paths[number * _SHARDS_OF_A_PART : (number + 1) * _SHARDS_OF_A_PART]
        part = run.part(number)
        one = CatalogueReport(str(part), len(some))
        if not part.exists():
            work.write(some, part, one, None)
        report.num_read += one.num_read
        run.note(number, status="written", nbytes=part.stat().st_size)
        done += len(some)
        if progress is not None:
            progress(done, total)
    whole = CatalogueReport(report.path, len(paths))
    if run.join(lambda: work.write(paths, run.output, whole, None, run.parts)):
        report.num_samples, report.gone = whole.num_samples, whole.gone


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What a catalogue is made with."""

    target: Path
    remote: RemoteOptions
    workers: int
    texts: bool
    check: bool

    def write(
        self,
        paths: list[Path | RemotePath],
        output: Path,
        report: CatalogueReport,
        progress: Callable[[int, int], None] | None,
        parts: Sequence[Path | RemotePath] = (),
    ) -> None:
        """Write a catalogue of shards; what it has read already lies in `parts`."""
        known = [open_catalogue(each, self.remote) for each in (*parts, self.target)]
        before = _Before([each for each in known if each is not None], texts=self.texts)
        # Shards that ranks have just read are not read again.
        check = self.check and not parts
        reader = _Reader(self.target.parent, before, self.remote, texts=self.texts, check=check)
        remove_abandoned_parts(output)
        with PartFile(output) as part, ThreadPoolExecutor(self.workers) as pool:
            # A part of a rank may be of empty shards; the whole may not.
            written = _Written(part, texts=self.texts, may_be_empty=output != self.target)
            for start in range(0, len(paths), _SHARDS_AT_A_TIME):
                some = paths[start : start + _SHARDS_AT_A_TIME]
                for shard in pool.map(reader.read, some):
                    written.add(shard)
                    report.num_read += shard.table is not None
                if progress is not None:
                    progress(start + len(some), len(paths))
            written.finish(before.first)
            part.publish(overwrite=True)
        report.num_samples = written.num_samples
        report.num_kept = report.num_shards - report.num_read
        report.gone = sorted(before.names - written.names)
        report.is_written = True


class _Before:
    """Catalogues with the same columns; rows are taken over from the first that has a shard."""

    def __init__(self, catalogues: Sequence[Catalogue], *, texts: bool) -> None:
        self._known = [_Known(each) for each in catalogues if each.has_texts == texts]

    @property
    def first(self) -> dict[str, Any] | None:
        """Attributes of the root of the first shard that was listed, and is not empty."""
        found = [each.catalogue.facts["first"] for each in self._known]
        return next((each for each in found if each["num_samples"]), found[0] if found else None)

    @property
    def names(self) -> set[str]:
        """All shards that were listed."""
        return {name for each in self._known for name in each.numbers}

    def row(self, name: str) -> dict[str, Any] | None:
        """Facts known about a shard."""
        known = next((each for each in self._known if name in each.numbers), None)
        return None if known is None else known.row(name)

    def shard(self, row: dict[str, Any]) -> _Shard:
        """A shard whose rows are taken over."""
        known = next(each for each in self._known if row["path"] in each.numbers)
        family = known.catalogue.facts["families"][row["family"]]
        facts = {"facts": family["facts"], "layers": family["layers"]}
        return _Shard(row, facts, None, None, (known, known.numbers[row["path"]]))


class _Known:
    """One catalogue that rows are taken over from."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        names = catalogue.shards["path"].to_pylist()
        self.numbers = {name: number for number, name in enumerate(names)}
        self._tables: Iterator[pa.Table] = iter(())
        self._table: Any = None
        self._start = 0

    def row(self, name: str) -> dict[str, Any]:
        """Facts known about a shard."""
        found: dict[str, Any] = self.catalogue.shards.slice(self.numbers[name], 1).to_pylist()[0]
        return found

    def rows(self, number: int) -> pa.Table:
        """The rows of a shard; quick in the order of the catalogue."""
        start, stop = self.catalogue.starts[number : number + 2].tolist()
        if self._table is None or start < self._start:
            self._tables, self._start = self.catalogue.groups(), 0
            self._table = next(self._tables)
        parts = []
        while start < stop:
            end = self._start + self._table.num_rows
            if start >= end:
                self._table, self._start = next(self._tables), end
                continue
            count = min(stop, end) - start
            parts.append(self._table.slice(start - self._start, count))
            start += count
        return pa.concat_tables(parts) if parts else self._table.slice(0, 0)


class _Reader:
    """Reads what a catalogue says of a shard. Safe for threads."""

    def __init__(
        self, folder: Path, before: _Before, remote: RemoteOptions, *, texts: bool, check: bool
    ) -> None:
        self._folder = os.path.realpath(folder)
        self._before, self._remote = before, remote
        self._texts, self._check = texts, check

    def read(self, path: Path | RemotePath) -> _Shard:
        name = self._name(path)
        known, stamps = self._before.row(name), _stamps(path)
        if known is not None and not isinstance(path, RemotePath) and not self._check:
            if all(known[each] == value for each, value in stamps.items()):
                return self._before.shard(known)
        with Archive([path], DEFAULT_LIMITS, self._remote) as archive:
            (file,) = archive._files
            row = {"path": name, "archive_id": file.metadata.archive_id, **stamps}
            row |= {"num_samples": file.num_samples, "nbytes": file.nbytes}
            if known is not None and all(known[each] == value for each, value in row.items()):
                return self._before.shard(known)
            store = file.store
            is_indexed = isinstance(store, FooterStore)
            row["index_nbytes"] = 0
            if isinstance(store, FooterStore):
                row["index_nbytes"] = file.nbytes - store.directory.hdf5_nbytes
            row["is_lossless"] = file.metadata.is_lossless
            attrs = dict(store.root_attrs)
            facts = {
                "facts": {key: attrs[key] for key in SHARED_FACTS if key in attrs},
                "layers": list(file.layers),
            }
            return _Shard(row, facts, attrs, self._table(archive, file, is_indexed=is_indexed))

    def _name(self, path: Path | RemotePath) -> str:
        """Relative to the catalogue where it lies below its folder, so that both can move."""
        if isinstance(path, RemotePath):
            return path.url
        # Links to files are kept: only the folder of the shard is resolved.
        place = os.path.join(os.path.realpath(path.parent), path.name)  # noqa: PTH118
        is_below = place.startswith(f"{self._folder}{os.sep}")
        return os.path.relpath(place, self._folder) if is_below else place

    def _table(self, archive: Archive, file: ArchiveFile, *, is_indexed: bool) -> pa.Table:
        names = [*_COLUMNS, *_MORE_COLUMNS, *(layout.TEXT_FIELDS if self._texts else ())]
        table = to_arrow(archive, names)
        spans = [
            _span(file, number) if is_indexed else (None, None) for number in range(len(table))
        ]
        hashes = [None if each is None else id_hash(each) for each in archive.ids]
        model = file.metadata.model_id
        for name, column in {
            "model_id": pa.array([model] * len(table), pa.string()),
            "offset": pa.array([offset for offset, _ in spans], pa.int64()),
            "nbytes": pa.array([nbytes for _, nbytes in spans], pa.int64()),
            "id_hash": pa.array(hashes, pa.uint64()),
        }.items():
            table = table.append_column(name, column)
        return table


def _span(file: ArchiveFile, number: int) -> tuple[int, int]:
    """Where the arrays of a sample lie in its file: offset and number of bytes."""
    ranges = [
        each
        for entry in file.sample(number).objects.values()
        if entry.chunks is not None
        for each in entry.chunks.ranges
    ]
    start = min((offset for offset, _ in ranges), default=0)
    return start, max((offset + nbytes for offset, nbytes in ranges), default=start) - start


def _stamps(path: Path | RemotePath) -> dict[str, Any]:
    """Differs once a shard or its labels change."""
    if isinstance(path, RemotePath):
        return {"modified_ns": None, "labels_ns": None}
    status, sidecar = path.stat(), sidecar_path(path, None)
    labels_ns = None
    if sidecar is not None and sidecar.exists():
        labels_ns = sidecar.stat().st_mtime_ns
    return {"nbytes": status.st_size, "modified_ns": status.st_mtime_ns, "labels_ns": labels_ns}


class _Written:
    """A catalogue that is being written."""

    def __init__(self, part: PartFile, *, texts: bool, may_be_empty: bool = False) -> None:
        self._part, self._texts, self._may_be_empty = part, texts, may_be_empty
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._num_waiting = self.num_samples = 0
        self._rows: list[dict[str, Any]] = []
        self._families: dict[str, int] = {}
        self._listed: list[dict[str, Any]] = []
        self._by_id: dict[str, str] = {}
        self._first: dict[str, Any] | None = None

    @property
    def names(self) -> set[str]:
        """Names of the shards."""
        return {each["path"] for each in self._rows}

    def add(self, shard: _Shard) -> None:
        """Append a shard."""
        row = shard.row
        if row["num_samples"]:
            other = self._by_id.setdefault(row["archive_id"], row["path"])
            if other != row["path"]:
                message = (
                    f"{other} and {row['path']} are copies of one archive (archive_id "
                    f"{row['archive_id']}), which would list its samples twice; move one away"
                )
                raise ArchiveError(message)
        key = json.dumps([shard.facts, row["num_samples"] > 0], sort_keys=True)
        if key not in self._families:
            self._families[key] = len(self._families)
            facts = {"path": row["path"], "num_samples": row["num_samples"]}
            self._listed.append({**shard.facts, **facts})
        self._rows.append({**row, "family": self._families[key]})
        if shard.first is not None and (self._first is None or not self._first["num_samples"]):
            self._first = shard.first
        if not row["num_samples"] and (self.num_samples or not self._may_be_empty):
            return
        table = shard.table if shard.before is None else shard.before[0].rows(shard.before[1])
        count = len(table)
        named = pa.array([row["path"]], pa.string())
        columns = {name: table[name] for name in table.column_names}
        columns["path"] = pc.take(named, pa.array([0] * count, pa.int32()))
        columns["ordinal"] = pa.array(range(self.num_samples, self.num_samples + count), pa.int64())
        order = ["ordinal", "path", *(each for each in columns if each not in ("ordinal", "path"))]
        if not self.num_samples:
            # An empty shard says no types; a part that holds only such shards has columns, too.
            self._waiting = []
        self._waiting.append(pa.table({name: columns[name] for name in order}))
        self.num_samples += count
        self._num_waiting += count
        if self._num_waiting >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        table = pa.concat_tables(self._waiting)
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._part.file,
                table.schema,
                compression="zstd",
                use_dictionary=["path", "coverage", "model_id"],
                column_encoding={"ordinal": "DELTA_BINARY_PACKED", "offset": "DELTA_BINARY_PACKED"},
            )
        self._writer.write_table(table, row_group_size=_GROUP_ROWS)
        self._part.file.raise_error()
        self._waiting, self._num_waiting = [], 0

    def finish(self, first: dict[str, Any] | None) -> None:
        """Write what waits, and what is known of the shards."""
        if not self.num_samples and not self._may_be_empty:
            message = f"{self._part.target}: the shards hold no samples; there is nothing to list"
            raise ArchiveError(message)
        if self._waiting:
            self._flush()
        assert self._writer is not None
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "texts": self._texts,
            "first": self._first or first,
            "families": self._listed,
        }
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(sink, SHARDS, options=options) as stream:
            stream.write_table(pa.Table.from_pylist(self._rows, SHARDS))
        self._writer.add_key_value_metadata(
            {
                FACTS_KEY.decode(): json.dumps(facts),
                SHARDS_KEY.decode(): base64.b64encode(sink.getvalue()).decode(),
            }
        )
        self._writer.close()
        self._part.file.raise_error()
