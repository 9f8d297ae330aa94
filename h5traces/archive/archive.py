"""One or many archive files as one lazy sequence of traces."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final, Literal, Self, overload

import numpy as np

from h5traces.archive.file import ArchiveFile
from h5traces.archive.scales import stored_scales
from h5traces.archive.selection import as_numbers, choose_layers, choose_samples
from h5traces.archive.stored_trace import StoredTrace
from h5traces.archive.trace import LayerSequence, Trace
from h5traces.errors import ArchiveError, SampleIndexError, TraceNotFoundError
from h5traces.format.archive import add_casts
from h5traces.format.text import and_more, as_names
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemotePath

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.archive.selection import LayerChoice, SampleChoice
    from h5traces.format.archive import ArchiveMetadata
    from h5traces.format.limits import ReadLimits
    from h5traces.precision.scales import ScaleSet
    from h5traces.storage.remote.paths import RemoteOptions


# Files kept open at a time; the usual limit on descriptors is 1024 for the whole process, and
# where it is lower, other files need most of them.
MAX_OPEN_FILES = 64
_MOST_OF_LIMIT = 1 / 4
# Those on servers take no descriptor but their footers in memory, and new requests when reopened.
MAX_OPEN_REMOTE_FILES = 128
# Enough that no thread waits long for the last one.
_TASKS_PER_WORKER = 4
# Stored bytes of arrays on servers that one call holds at a time.
_WINDOW_NBYTES = 128 << 20
_MOST_FETCHED_NBYTES = 256 << 20
# Shards on servers that are opened or read at a time; each may make several requests.
_FILES_AT_A_TIME = 8
# What must agree among shards that are read as one sequence.
_SHARED_FIELDS = ("model_id", "model_revision", "num_layers", "hidden_size", "num_heads", "layers")
# What must agree where a file that does not have it is not just silent, but says so.
_SHARED_OR_ABSENT = ("precision", "earlier_precisions")


class Archive(Sequence[Trace]):
    """A lazy sequence of traces over one or more archive files (shards), in the order given.

    Slices and `select` give views that share the open files. An Archive can be pickled, and used
    after a fork and from many threads.
    """

    def __init__(
        self,
        paths: Sequence[Path | RemotePath],
        limits: ReadLimits,
        remote: RemoteOptions = DEFAULT_REMOTE,
        label_folder: Path | Literal[False] | None = None,
        *,
        unrounded: bool = False,
    ) -> None:
        self._open_files = _OpenFiles()

        open_file = partial(
            ArchiveFile,
            limits=limits,
            opened=self._open_files.use,
            remote=remote,
            label_folder=label_folder,
            unrounded=unrounded,
        )
        with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
            # Several on servers at a time, since each waits for one.
            waits = sum(isinstance(path, RemotePath) for path in paths) > 1
            opened = (pool.map if waits else map)(open_file, paths)
            # Read by the other rooms; in the order of `paths`, and the same for all views.
            self._files = tuple(opened)
        _check_alike(self._files)
        self._starts = np.cumsum([0, *(file.num_samples for file in self._files)]).tolist()
        self._indices: Sequence[int] = range(self._starts[-1])
        self._layers: tuple[int, ...] | None = None

    def _view(self, indices: Sequence[int], layers: tuple[int, ...] | None) -> Self:
        view = type(self).__new__(type(self))
        view._files, view._starts = self._files, self._starts
        view._open_files = self._open_files
        view._indices, view._layers = indices, layers
        return view

    @property
    def paths(self) -> tuple[Path | RemotePath, ...]:
        """The files, or their addresses, in order."""
        return tuple(file.path for file in self._files)

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
        return tuple(trace.metadata.label for trace in self)

    @cached_property
    def _keys(self) -> list[tuple[str | None, int | None]]:
        keys = []
        for index in self._indices:
            file, local = self._locate(index)
            attrs = file.sample_attrs(local)
            sample_id, generation = attrs.get("sample_id"), attrs.get("generation_index")
            keys.append(
                (
                    sample_id if isinstance(sample_id, str) else None,
                    generation if isinstance(generation, int) else None,
                )
            )
        return keys

    @cached_property
    def _by_id(self) -> dict[str, list[int]]:
        positions: dict[str, list[int]] = {}
        for position, sample_id in enumerate(self.ids):
            if sample_id is not None:
                positions.setdefault(sample_id, []).append(position)
        return positions

    def by_id(self, sample_id: str, generation_index: int | None = None) -> Trace:
        """The trace of that sample id, and of that generation where several share the id.

        Raises
        ------
        TraceNotFoundError
            No trace has the id, or several have; the message lists their indices.
        """
        found = self._by_id.get(sample_id, [])
        if generation_index is not None:
            found = [each for each in found if self._keys[each][1] == generation_index]
        if len(found) == 1:
            return self[found[0]]
        wanted = f"sample id {sample_id!r}"
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
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Trace | Self:
        if isinstance(index, slice):
            return self._view(self._indices[index], self._layers)
        if isinstance(index, str):
            message = f"an archive is indexed by number; archive.by_id({index!r}) takes a sample id"
            raise TypeError(message)
        try:
            position = self._indices[index]
        except IndexError:
            message = f"index {index} is out of range; the archive holds {len(self)} traces"
            raise SampleIndexError(message) from None
        file, local = self._locate(position)
        return Trace(StoredTrace(file, local, self._layers), ordinal=position)

    def _locate(self, index: int) -> tuple[ArchiveFile, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        file = self._files[number]
        self._open_files.use(file)
        return file, index - self._starts[number]

    def __iter__(self) -> Iterator[Trace]:
        return (self[position] for position in range(len(self)))

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
            Which kinds of arrays; hidden states and attentions by default, or the mean over heads
            where it took the place of attentions.
        workers
            Threads; one per core by default.

        Returns
        -------
        list of dict
            For every index, a list of arrays by kind, in ascending order of layer.

        Raises
        ------
        LayerIndexError
            A layer is not stored.
        HeadsNotStoredError
            Only the mean over heads is stored; name the kind ``attention_mean``.
        ValueError
            There is no such kind.
        """
        view = self if layers is None else self.select(layers=layers)
        sequences = []
        for trace in (view[index] for index in as_numbers(indices)):
            names = trace._stored.default_kinds if kinds is None else as_names(kinds)
            for kind in names:
                trace._stored.check_kind(kind)
            sequences.append(
                {kind: LayerSequence(trace._stored, kind, view._layers) for kind in names}
            )
        wanted = [
            (sequence, position)
            for each in sequences
            for sequence in each.values()
            for position in range(len(sequence))
        ]
        arrays: list[Any] = []
        for part in _windows(wanted):
            with contextlib.ExitStack() as fetched:
                _fetch(part, fetched)
                arrays += _read_all(part, workers or os.cpu_count() or 1)
        following = iter(arrays)
        return [
            {
                kind: [next(following) for _ in range(len(sequence))]
                for kind, sequence in each.items()
            }
            for each in sequences
        ]

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
        if not any(isinstance(file.path, RemotePath) for file in self._files):
            return contextlib.nullcontext()
        chosen = self._layers if layers is None else tuple(layers)
        names, wanted, nbytes = as_names(kinds), [], 0
        for index in indices:
            for kind in names:
                sequence = LayerSequence(self[index]._stored, kind, chosen)
                for position in range(len(sequence)):
                    wanted.append((sequence, position))
                    nbytes += sum(size for _, size in sequence._ranges(position))
        with contextlib.ExitStack() as until_closed:
            if nbytes <= _MOST_FETCHED_NBYTES:
                _fetch(wanted, until_closed)
            return until_closed.pop_all()

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


def _windows(
    wanted: list[tuple[LayerSequence, int]],
) -> Iterator[list[tuple[LayerSequence, int]]]:
    """Parts whose stored bytes may lie in memory at a time; local files need no more than one."""
    if not any(sequence._trace.is_remote for sequence, _ in wanted):
        yield wanted
        return
    part: list[tuple[LayerSequence, int]] = []
    nbytes = 0
    for sequence, position in wanted:
        part.append((sequence, position))
        nbytes += sum(size for _, size in sequence._ranges(position))
        if nbytes >= _WINDOW_NBYTES:
            yield part
            part, nbytes = [], 0
    yield part


def _fetch(wanted: list[tuple[LayerSequence, int]], until_closed: contextlib.ExitStack) -> None:
    """Fetch the arrays that lie on servers, of all shards at a time."""
    ranges: dict[ArchiveFile, list[tuple[int, int]]] = {}
    samples: dict[ArchiveFile, list[int]] = {}
    for sequence, position in wanted:
        if sequence._trace.is_remote:
            file = sequence._trace.file
            ranges.setdefault(file, []).extend(sequence._ranges(position))
            samples.setdefault(file, []).append(sequence._trace.index)
    if not ranges:
        return
    with ThreadPoolExecutor(min(_FILES_AT_A_TIME, len(ranges))) as pool:
        fetching = [
            pool.submit(until_closed.enter_context, file.prefetched(parts, samples[file]))
            for file, parts in ranges.items()
        ]
    for each in fetching:
        each.result()


def _read_all(wanted: list[tuple[LayerSequence, int]], workers: int) -> list[Any]:
    """Arrays by sequence and position, in order; a few large tasks, since small ones cost more."""

    def read(part: list[tuple[LayerSequence, int]]) -> list[Any]:
        return [sequence[position] for sequence, position in part]

    if workers == 1:
        return read(wanted)
    size = max(1, math.ceil(len(wanted) / (_TASKS_PER_WORKER * workers)))
    parts = [wanted[start : start + size] for start in range(0, len(wanted), size)]
    with ThreadPoolExecutor(workers) as pool:
        return [array for part in pool.map(read, parts) for array in part]


def _most_open_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else int(soft * _MOST_OF_LIMIT)
    return max(1, min(MAX_OPEN_FILES, allowed))


class _OpenFiles:
    """Closes the file that was not used for longest when too many are open."""

    def __init__(self) -> None:
        self._local: OrderedDict[int, ArchiveFile] = OrderedDict()
        self._remote: OrderedDict[int, ArchiveFile] = OrderedDict()
        self._lock = threading.Lock()

    def use(self, file: ArchiveFile) -> None:
        """Note that `file` is about to be read."""
        is_remote = isinstance(file.path, RemotePath)
        used = self._remote if is_remote else self._local
        most = MAX_OPEN_REMOTE_FILES if is_remote else _most_open_files()
        with self._lock:
            used[id(file)] = file
            used.move_to_end(id(file))
            while len(used) > most:
                _, oldest = used.popitem(last=False)
                oldest.close()

    def __reduce__(self) -> tuple[type[_OpenFiles], tuple[()]]:
        return _OpenFiles, ()


def _fact(file: ArchiveFile, name: str) -> Any:
    """A fact of a file's metadata; its stored layers are spelled out."""
    return (file.layers or None) if name == "layers" else getattr(file.metadata, name)


def _stated(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "exact" if value is None else str(value)


def _check_alike(files: Sequence[ArchiveFile]) -> None:
    """Raise ArchiveError for archives of different models, layers or precisions."""
    if not files:
        message = "there is no archive to open"
        raise ArchiveError(message)
    first = files[0]
    for other in files[1:]:
        for name in _SHARED_OR_ABSENT:
            ours, theirs = getattr(first.metadata, name), getattr(other.metadata, name)
            if ours != theirs and first.num_samples and other.num_samples:
                message = (
                    f"{other.path} has {name} {_stated(theirs)}, but {first.path} has "
                    f"{_stated(ours)}; shards read as one must be equally precise; open them one "
                    "by one"
                )
                raise ArchiveError(message)
        for name in _SHARED_FIELDS:
            ours, theirs = _fact(first, name), _fact(other, name)
            # What a file does not know contradicts nothing: it may hold empty samples only.
            if ours != theirs and None not in (ours, theirs):
                message = (
                    f"{other.path} has {name}={theirs!r}, but {first.path} has {name}={ours!r}; "
                    "shards read as one must be of one model and one set of layers; open them "
                    "one by one"
                )
                raise ArchiveError(message)


# Facts that a new archive takes over where all its sources agree.
_FACTS: Final = ("model_id", "model_revision", "dataset", "num_layers", "extraction")


def inherited_facts(files: Sequence[ArchiveFile]) -> dict[str, Any]:
    """Facts that all sources state alike."""
    facts = {}
    for name in _FACTS:
        values = [getattr(file.metadata, name) for file in files]
        facts[name] = values[0] if all(each == values[0] for each in values) else None
    return facts


def shared_metadata(files: Sequence[ArchiveFile]) -> ArchiveMetadata:
    """Metadata of the first file with samples, which states the precision of all."""
    return next((file.metadata for file in files if file.num_samples), files[0].metadata)


def inherited_scales(files: Sequence[ArchiveFile]) -> ScaleSet | None:
    """The scales that stored integers of all files are read with; ArchiveError if they differ."""
    first: tuple[ArchiveFile, ScaleSet] | None = None
    for file in files:
        found = stored_scales(file.store) if file.num_samples else None
        if found is None:
            continue
        if first is None:
            first = file, found
        elif not found.equals(first[1]):
            message = (
                f"{file.path} and {first[0].path} have different scales, so their chunks cannot go "
                "into one archive; keep them as shards, which are read as one"
            )
            raise ArchiveError(message)
    return None if first is None else first[1]
