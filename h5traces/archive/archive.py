"""One or many archive files as one lazy sequence of traces."""

from __future__ import annotations

import contextlib
import itertools
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property, partial
from operator import index as as_index
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, overload

import numpy as np

from h5traces.archive.equality import equal
from h5traces.archive.fetching import (
    FILES_AT_A_TIME,
    MOST_FETCHED_NBYTES,
    fetch,
    read_samples,
    stored_nbytes,
)
from h5traces.archive.file import ArchiveFile
from h5traces.archive.notebook import archive_page
from h5traces.archive.open_files import OpenFiles
from h5traces.archive.read_only import ReadOnly
from h5traces.archive.selection import as_numbers, choose_layers, choose_samples, sliced
from h5traces.archive.shards import check_alike
from h5traces.archive.stored_sample import NUM_CORES
from h5traces.archive.stored_trace import StoredTrace
from h5traces.archive.trace import LayerSequence, Trace
from h5traces.arguments import checked, shown
from h5traces.errors import ArchiveError, ArgumentError, SampleIndexError, TraceNotFoundError
from h5traces.format.archive import add_casts
from h5traces.format.text import and_more, as_names
from h5traces.lazy import needing
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemotePath
from h5traces.storage.threads import ThreadPool

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    import pandas as pd
    import pyarrow as pa
    import xarray as xr
    from numpy.typing import NDArray

    from h5traces.archive.selection import LayerChoice, SampleChoice
    from h5traces.archive.tensors import Container
    from h5traces.format.archive import ArchiveMetadata
    from h5traces.format.limits import ReadLimits
    from h5traces.format.record import TraceMetadata
    from h5traces.storage.remote.paths import RemoteOptions


class Archive(ReadOnly, Sequence[Trace]):
    """A lazy sequence of traces over one or more archive files (shards), in the order given.

    It is indexed as a list is, and by lists of indices or masks: ``archive[[0, 2]]``,
    ``archive[mask]``. These, slices, `select` and ``archive + archive`` give views that share the
    open files. An Archive can be pickled, and used after a fork and from many threads.
    """

    _way_out: ClassVar[str] = (
        "take list(archive) to change a list of its traces, archive[order] for another order "
        "(order = random.sample(range(n), n) shuffles), or h5traces.create to write an archive"
    )

    def __init__(
        self,
        paths: Sequence[Path | RemotePath],
        limits: ReadLimits,
        remote: RemoteOptions = DEFAULT_REMOTE,
        label_folder: Path | Literal[False] | None = None,
        *,
        unrounded: bool = False,
        container: Container = "source",
    ) -> None:
        self._open_files = OpenFiles()
        self._container = container

        open_file = partial(
            ArchiveFile,
            limits=limits,
            opened=self._open_files.use,
            remote=remote,
            label_folder=label_folder,
            unrounded=unrounded,
        )
        # Several on servers at a time, since each waits for one.
        waits = sum(isinstance(path, RemotePath) for path in paths) > 1
        with ThreadPool(FILES_AT_A_TIME) if waits else contextlib.nullcontext() as pool:
            # Read by the other rooms; in the order of `paths`, and the same for all views.
            self._files = tuple((pool.map if pool else map)(open_file, paths))
        check_alike(self._files)
        self._starts = _starts_of(self._files)
        self._indices: Sequence[int] = range(self._starts[-1])
        self._layers: tuple[int, ...] | None = None

    def _view(self, indices: Sequence[int], layers: tuple[int, ...] | None) -> Self:
        view = type(self).__new__(type(self))
        view._files, view._starts = self._files, self._starts
        view._open_files, view._container = self._open_files, self._container
        view._indices, view._layers = indices, layers
        return view

    @property
    def paths(self) -> tuple[Path | RemotePath, ...]:
        """The files, or their addresses, in order."""
        return tuple(file.path for file in self._files)

    @property
    def _is_remote(self) -> bool:
        """Whether any of the files is on a server."""
        return any(isinstance(file.path, RemotePath) for file in self._files)

    @property
    def _suspects(self) -> Sequence[ArchiveFile]:
        """Files that may not be lossless."""
        return self._files

    @property
    def _shard_numbers(self) -> NDArray[np.int64]:
        """For every trace of this view, which of `_files` it lies in."""
        indices = np.asarray(self._indices, dtype=np.int64)
        return np.searchsorted(self._starts, indices, side="right").astype(np.int64) - 1

    @property
    def metadata(self) -> ArchiveMetadata:
        """The first file's metadata, with the samples of this view and the casts of all files."""
        casts = [file.metadata.casts for file in self._files]
        known = [each for each in casts if each is not None]
        together = add_casts(itertools.chain(*known)) if len(known) == len(casts) else None
        update = {"num_samples": len(self), "casts": together}
        return self._files[0].metadata.model_copy(update=update)

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's own layer numbers that are stored (and selected), by position."""
        if self._layers is not None:
            return self._layers
        return self._files[0].layers

    @cached_property
    def ids(self) -> tuple[str | None, ...]:
        """Every trace's sample id; None if it has none. Ids may repeat."""
        return tuple(sample_id for sample_id, _ in self._keys)

    @property
    def labels(self) -> tuple[int | None, ...]:
        """Every trace's label, stored or from beside the archive; None if it has none."""
        return tuple(self._label(position) for position in range(len(self)))

    def _label(self, position: int) -> int | None:
        file, local = self._locate(self._indices[position])
        if file.labels is not None and file.labels.has_label(local):
            # Ids come from one column: nothing of the sample itself is read.
            return file.labels.label(self._keys[position][0], local)
        return self[position].metadata.label

    @cached_property
    def _keys(self) -> list[tuple[str | None, int | None]]:
        known: dict[int, list[tuple[str | None, int | None]]] = {}
        keys = []
        for index, number in zip(self._indices, self._shard_numbers.tolist(), strict=True):
            if number not in known:
                known[number] = self._files[number].keys()
            keys.append(known[number][index - self._starts[number]])
        return keys

    @cached_property
    def _by_id(self) -> dict[str, list[int]]:
        positions: dict[str, list[int]] = {}
        for position, sample_id in enumerate(self.ids):
            if sample_id is not None:
                positions.setdefault(sample_id, []).append(position)
        return positions

    def _found(self, sample_id: str) -> list[tuple[int, int | None]]:
        """Position and generation index of every trace with a sample id."""
        return [(each, self._keys[each][1]) for each in self._by_id.get(sample_id, ())]

    @checked
    def by_id(self, sample_id: str, generation_index: int | None = None) -> Trace:
        """The trace of that sample id, and of that generation where several share the id.

        Raises
        ------
        TraceNotFoundError
            No trace has the id, or several have; the message lists their indices.
        """
        found = [
            position
            for position, generation in self._found(sample_id)
            if generation_index in (None, generation)
        ]
        if len(found) == 1:
            return self[found[0]]
        wanted = f"sample id {shown(sample_id)}"
        if generation_index is not None:
            wanted += f" with generation_index {generation_index}"
        if not found:
            message = f"no trace has the {wanted}; archive.ids lists all {len(self)}"
            raise TraceNotFoundError(message)
        message = (
            f"{len(found)} traces have the {wanted}, at {found}; "
            "take one by index, or name its generation_index"
        )
        raise TraceNotFoundError(message)

    @checked
    def select(self, *, layers: LayerChoice = None, samples: SampleChoice = None) -> Self:
        """A view of some of the layers and traces.

        Parameters
        ----------
        layers
            The model's own 0-based layer numbers, or text such as ``0,5,10-12,last``; the view has
            them in ascending order.
        samples
            Indices or a slice of this view, or text such as ``0,3`` or ``0:100``; in this order.

        Raises
        ------
        LayerIndexError
            A layer is not stored, or the text names none.
        SampleIndexError
            There is no such trace, or the text names none.
        """
        indices = self._indices
        if samples is not None:
            indices = [indices[each] for each in choose_samples(samples, len(self))]
        if layers is None:
            return self._view(indices, self._layers)
        owner = f"{self._files[0].path} stores"
        return self._view(indices, choose_layers(layers, self.layers, owner))

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Trace: ...
    @overload
    def __getitem__(self, index: slice | Iterable[int] | Iterable[bool]) -> Self: ...
    def __getitem__(self, index: int | slice | Iterable[int] | Iterable[bool]) -> Trace | Self:
        if isinstance(index, slice):
            return self._view(sliced(self._indices, index), self._layers)
        if index is None or isinstance(index, (str, bytes)):
            message = "an archive is indexed by number; "
            message += f"archive.by_id({shown(index)}) takes a sample id"
            raise ArgumentError(message)
        # Arrays and tensors of one number count as numbers for Python, but are lists here. Looking
        # for the method takes a twentieth of the time of a check against a protocol.
        if getattr(index, "ndim", 0) or not hasattr(index, "__index__"):
            return self.select(samples=index)
        try:
            position = self._indices[as_index(index)]  # type: ignore[arg-type]
        except IndexError:
            message = f"index {shown(index)} is out of range; the archive holds {len(self)} traces"
            raise SampleIndexError(message) from None
        file, local = self._locate(position)
        stored = StoredTrace(file, local, self._layers)
        return Trace(stored, ordinal=position, container=self._container)

    def _locate(self, index: int) -> tuple[ArchiveFile, int]:
        number = bisect_right(self._starts, index) - 1
        file = self._files[number]
        self._open_files.use(file)
        return file, index - self._starts[number]

    def __iter__(self) -> Iterator[Trace]:
        return (self[position] for position in range(len(self)))

    def _metadata(self) -> Iterator[TraceMetadata]:
        """The metadata of all traces, in order; many are read at a time.

        For archives that are not views.
        """
        for file in self._files:
            self._open_files.use(file)
            for number, attrs in enumerate(file.samples_attrs()):
                yield StoredTrace(file, number, None).validated(attrs)

    @overload
    def __add__(self, other: Archive) -> Self: ...
    @overload
    def __add__(self, other: list[Any]) -> list[Any]: ...
    def __add__(self, other: Archive | list[Any]) -> Self | list[Any]:
        if isinstance(other, list):
            return [*self, *other]
        return self._joined(other) if isinstance(other, Archive) else NotImplemented

    def __radd__(self, other: list[Any]) -> list[Any]:
        return [*other, *self] if isinstance(other, list) else NotImplemented

    def _joined(self, other: Archive) -> Self:
        """A view of the traces of both."""
        for what, ours, theirs in (
            ("layers", self.layers, other.layers),
            ("container", self._container, other._container),
        ):
            if ours != theirs and len(self) and len(other):
                message = (
                    f"{self!r} and {other!r} cannot be joined: {what} {ours!r} and {theirs!r}; "
                    "open and select both alike, or join lists: [*one, *other]"
                )
                raise ArchiveError(message)
        view = Archive._view(self, (), self._layers)
        view._files, view._open_files = (*self._files, *other._files), OpenFiles()
        check_alike(view._files)
        view._starts = _starts_of(view._files)
        after = self._starts[-1]
        view._indices = [*self._indices, *(after + each for each in other._indices)]
        return view

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Archive, list)):
            return NotImplemented
        return self is other or (len(self) == len(other) and all(map(equal, self, other)))

    # Lists have no hash either.
    __hash__ = None  # type: ignore[assignment]

    @checked
    def read(
        self,
        indices: int | Iterable[int],
        *,
        layers: LayerChoice = None,
        kinds: str | Iterable[str] | None = None,
        workers: int | None = None,
    ) -> list[dict[str, list[Any]]]:
        """Many arrays in one call, read and inflated in parallel.

        Parameters
        ----------
        indices
            Which traces, or one; may repeat.
        layers
            The model's own layer numbers; all that are stored by default.
        kinds
            Which kinds of arrays, of those that the archive stores; hidden states and attentions
            by default, or the mean over heads where it took the place of attentions.
        workers
            Threads; one per core by default.

        Returns
        -------
        list of dict
            For every index, a list of arrays by kind, in ascending order of layer; empty if the
            sample has none of the kind. Arrays are in the archive's container. Those of less than
            4 MiB share memory with their neighbours: copy one that outlives the others.

        Raises
        ------
        LayerIndexError
            A layer is not stored.
        HeadsNotStoredError
            Only the mean over heads is stored; name the kind ``attention_mean``.
        OptionError
            The archive stores no such kind.
        """
        view = self if layers is None else self.select(layers=layers)
        samples = []
        for trace in (view[index] for index in as_numbers(indices)):
            names = trace._stored.default_kinds if kinds is None else as_names(kinds)
            for kind in names if kinds is not None else ():
                trace._stored.check_kind(kind)
            samples.append(
                {
                    kind: LayerSequence(trace._stored, kind, view._layers, self._container)
                    for kind in names
                }
            )
        return read_samples(samples, workers or NUM_CORES)

    @checked
    def fetched(
        self,
        indices: Iterable[int],
        *,
        kinds: str | Iterable[str],
        layers: Iterable[int] | None = None,
    ) -> AbstractContextManager[object]:
        """Inside the block, these arrays are read from memory; for archives on servers only.

        They are fetched here, in few requests and side by side. Where they take more than 256 MB
        as stored, each is fetched when it is read.

        Raises
        ------
        RemoteError, CorruptArchiveError
            They cannot be fetched; the message names shard and samples.
        """
        if not self._is_remote:
            return contextlib.nullcontext()
        chosen = self._layers if layers is None else tuple(layers)
        wanted = [
            LayerSequence(self[index]._stored, kind, chosen)
            for index in indices
            for kind in as_names(kinds)
        ]
        with contextlib.ExitStack() as until_closed:
            if sum(map(stored_nbytes, wanted)) <= MOST_FETCHED_NBYTES:
                fetch(wanted, until_closed)
            return until_closed.pop_all()

    @checked
    def to_arrow(self, columns: str | Iterable[str] | None = None) -> pa.Table:
        """A table of Arrow with one row per trace, which DuckDB and polars query directly.

        Parameters
        ----------
        columns
            Names of columns; all but ``hidden_norms`` by default. Texts are read one by one, so
            name the columns you need of large archives.

        Returns
        -------
        pyarrow.Table
            ``ordinal``, ``path``, ``position_in_file``, ``sample_id``, ``generation_index``,
            ``seq_len``, ``prompt_len``, ``coverage``, ``label``, ``score_NAME`` for every score,
            the texts (``question``, ``generated_text``, ``generated_answer``,
            ``generated_answer_clean``), and ``hidden_norms``, the mean over tokens of the 2-norm
            of hidden states, a number for each layer. Null where a trace has none.

        Raises
        ------
        MissingDependencyError
            pyarrow is not installed.
        OptionError
            There is no such column.
        """
        from h5traces.archive.tables import to_arrow

        return to_arrow(self, columns)

    @checked
    def to_pandas(self, columns: str | Iterable[str] | None = None) -> pd.DataFrame:
        """A DataFrame of the table that `to_arrow` gives; whole numbers are of type ``Int64``.

        Raises
        ------
        MissingDependencyError
            pandas is not installed.
        OptionError
            There is no such column.
        """
        from h5traces.archive.tables import to_pandas

        return to_pandas(self, columns)

    @checked
    def to_xarray(
        self, kinds: str | Iterable[str] | None = None, *, layers: LayerChoice = None
    ) -> xr.Dataset:
        """The arrays of all traces as a data set of xarray, read when they are used.

        Parameters
        ----------
        kinds
            Kinds of arrays; hidden states and attentions by default.
        layers
            The model's own layer numbers; all that are stored by default.

        Returns
        -------
        xarray.Dataset
            A variable for each kind: ``sample``, ``layer`` and the axes of its arrays, as
            `Trace.to_xarray`. Shorter traces are padded with NaN at the end; ``seq_len`` has their
            lengths. Coordinates: ``layer``, ``sample_id``, ``seq_len``, ``label`` (NaN without).

        Raises
        ------
        MissingDependencyError
            xarray is not installed.
        LayerIndexError
            A layer is not stored.
        OptionError
            The archive stores no such kind, or generation steps of it.
        """
        with needing("to_xarray", "xarray", extra="tables"):
            from h5traces.archive.labelled import archive_dataset

        return archive_dataset(self if layers is None else self.select(layers=layers), kinds)

    def close(self) -> None:
        """Let go of the open files; the next use opens them again."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = and_more(self.paths, 1)
        precision = self.metadata.precision
        tier = f", {precision.tier}" if precision is not None else ""
        lossy = " (lossy)" if self.metadata.is_lossless is False else ""
        return f"<Archive {where}: {len(self)} traces, layers {list(self.layers)}{tier}{lossy}>"

    def _repr_html_(self) -> str:
        return archive_page(self, self.metadata, self.layers, self.paths)


def _starts_of(files: Sequence[ArchiveFile]) -> list[int]:
    """Index of the first sample of every file, and the number of all samples."""
    return list(itertools.accumulate((file.num_samples for file in files), initial=0))
