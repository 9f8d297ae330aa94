"""A map-style dataset: one sample of an archive, as tensors, per item."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset

from h5traces.archive.archive import Archive
from h5traces.archive.opening import open_archive
from h5traces.errors import DatasetError
from h5traces.format import layout
from h5traces.torch_data.guard import ShardGuard
from h5traces.torch_data.kinds import axes_of, check_layers
from h5traces.torch_data.labels import Labels, labels_of
from h5traces.torch_data.tensors import (
    TOKENS_CHOICES,
    NonFinite,
    Selection,
    Tokens,
    answer_span,
    read_tensor,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from h5traces.archive.opening import PathLike
    from h5traces.archive.trace import Trace

Item = dict[str, Any]
# What an item always holds; collating knows these names.
INDEX, SAMPLE_ID, LABEL = "index", "sample_id", "label"


class ShardedDataset(Protocol):
    """A map-style dataset whose items lie in shards, as samplers and streams want it."""

    @property
    def shard_numbers(self) -> NDArray[np.int64]:
        """For every item, the shard that it lies in."""

    @property
    def fingerprint(self) -> str:
        """The same text for the same items of the same shards, to check a checkpoint against."""

    def __len__(self) -> int:
        """Number of items."""

    def __getitem__(self, index: int) -> Any:
        """One item."""


class TraceDataset(Dataset[Item]):
    """Samples of one or many archives as dicts of tensors, each read when it is asked for.

    Can be used from many threads, pickled, and handed to `torch.utils.data.DataLoader` workers of
    every start method. Only the layers asked for are read, one chunk each.

    Parameters
    ----------
    source
        What `h5traces.open` takes: a file, a glob, a folder, a list of these; or an open `Archive`
        or a slice of one.
    kinds
        Kinds of arrays, for instance ``("hidden_states", "attentions")``.
    layers
        The model's own layer numbers, in the order of the layer axis; all that are stored by
        default. A bare number gives tensors without a layer axis.
    tokens
        ``all``; ``answer``, the tokens behind the prompt; ``last``; ``mean``, over all tokens;
        ``answer_mean``. Of attentions, this chooses queries.
    dtype
        Type of the tensors; by default that of the file, bfloat16 included.
    labels
        Values by sample id (by ``(sample_id, generation_index)`` where ids repeat), or the name of
        what the archive knows itself: ``label``, or one of its scores.
    allow_unused_labels
        Accept labels of ids that no sample has.
    prompt_lens
        Tokens of the prompt by sample id, where the archive does not know.
    fields
        More fields of a trace to hand out: ``tokens`` as a tensor, others as they are.
    indices
        Which traces of the source, by index: for splits, or to leave samples out. All by default.
    non_finite
        ``error`` refuses samples with NaN or infinite values, ``keep`` hands them out.
    threads
        Threads that read a batch, beside the workers of a `DataLoader`.
    transform
        Called with every item; what it returns is handed out.

    Raises
    ------
    FileNotFoundError, ArchiveError
        As `h5traces.open`; shards of different models or layer sets are refused.
    DatasetError
        There are no samples, or labels are missing or left over.
    LayerIndexError
        A shard does not store a layer.

    Notes
    -----
    An item is a dict: ``index`` (position in the source), ``sample_id``, a tensor per kind with the
    axes that `axes` names, ``label`` where there are labels, and the fields.
    """

    def __init__(
        self,
        source: Archive | PathLike | Iterable[PathLike],
        *,
        kinds: Iterable[str] = (layout.HIDDEN_STATES,),
        layers: int | Iterable[int] | None = None,
        tokens: Tokens = "all",
        dtype: torch.dtype | None = None,
        labels: Labels | None = None,
        allow_unused_labels: bool = False,
        prompt_lens: Mapping[str, int] | None = None,
        fields: Iterable[str] = (),
        indices: Sequence[int] | None = None,
        non_finite: NonFinite = "error",
        threads: int = 1,
        transform: Callable[[Item], Any] | None = None,
    ) -> None:
        _check_options(tokens, non_finite, threads)
        self.archive = source if isinstance(source, Archive) else open_archive(source)
        self.kinds, self.fields = tuple(kinds), tuple(fields)
        one_layer = isinstance(layers, int)
        wanted = (layers,) if isinstance(layers, int) else layers
        numbers = self.archive.layers if wanted is None else tuple(wanted)
        check_layers(self.archive, self.kinds, numbers)
        self.indices = _checked_indices(self.archive, indices)
        self.selection = Selection(numbers, not one_layer, tokens, dtype, non_finite, prompt_lens)
        self._stored_axes = {kind: axes_of(self.archive, kind) for kind in self.kinds}
        self._labels = None
        if labels is not None:
            self._labels = labels_of(
                self.archive, self.indices, labels, allow_unused=allow_unused_labels
            )
        self._threads, self._transform = threads, transform
        self._guard = ShardGuard(self.archive.paths)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Names of the axes of every tensor of an item that has any."""
        axes = {kind: self.selection.axes(stored) for kind, stored in self._stored_axes.items()}
        if layout.TOKENS in self.fields:
            axes[layout.TOKENS] = ("token",)
        return axes

    @property
    def labels(self) -> list[Any] | None:
        """The label of every item, where there are labels."""
        return self._labels

    @property
    def shard_numbers(self) -> NDArray[np.int64]:
        """For every item, the shard that it lies in."""
        return self.archive.shard_numbers[np.asarray(self.indices, dtype=np.int64)]

    @cached_property
    def fingerprint(self) -> str:
        """The same text for the same items of the same shards."""
        return fingerprint_of(self.archive, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        try:
            position = self.indices[index]
        except IndexError:
            message = f"item {index} is out of range; the dataset has {len(self)}"
            raise IndexError(message) from None
        trace = self.archive[position]
        self._guard.check(trace.path)
        item: Item = {INDEX: position, SAMPLE_ID: trace.metadata.sample_id}
        with self._fetched([index]):
            for kind in self.kinds:
                item[kind] = read_tensor(trace, kind, self._stored_axes[kind], self.selection)
        for field in self.fields:
            item[field] = self._field(trace, field)
        if self._labels is not None:
            item[LABEL] = self._labels[index]
        return item if self._transform is None else self._transform(item)

    def __iter__(self) -> Iterator[Any]:
        # Without it, Python would take a LayerIndexError for the end of the dataset.
        return (self[index] for index in range(len(self)))

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The items of a batch, read in threads where the dataset has several."""
        with self._fetched(indices):
            if self._threads == 1 or len(indices) == 1:
                return [self[index] for index in indices]
            with ThreadPoolExecutor(min(self._threads, len(indices))) as pool:
                return list(pool.map(self.__getitem__, indices))

    def _fetched(self, indices: Sequence[int]) -> AbstractContextManager[object]:
        """Inside the block, items on servers lie in memory: they came side by side."""
        inside = range(-len(self), len(self))
        positions = [self.indices[index] for index in indices if index in inside]
        return self.archive.fetched(positions, kinds=self.kinds, layers=self.selection.layers)

    def _field(self, trace: Trace, field: str) -> Any:
        if field not in trace:
            message = (
                f"{trace.place} (sample id {trace.metadata.sample_id!r}): has no field {field!r}; "
                f"stored: {', '.join(trace)}"
            )
            raise DatasetError(message)
        if field != layout.TOKENS:
            return trace[field]
        tokens = torch.from_numpy(np.asarray(trace[field], dtype=np.int64))
        if self.selection.tokens == "answer":
            start, stop = answer_span(trace, self.selection.prompt_lens)
            return tokens[start:stop].clone()
        return tokens


def fingerprint_of(archive: Archive, indices: Sequence[int]) -> str:
    """The same text for the same traces of the same shards; not for one that was rewritten."""
    digest = xxhash.xxh3_64()
    for file in archive.files:
        digest.update(f"{file.metadata.archive_id} {file.num_samples} ".encode())
    digest.update(np.asarray(indices, dtype="<i8").tobytes())
    return digest.hexdigest()


def _check_options(tokens: str, non_finite: str, threads: int) -> None:
    if tokens not in TOKENS_CHOICES:
        message = f"tokens is {tokens!r}, expected one of {', '.join(TOKENS_CHOICES)}"
        raise DatasetError(message)
    if non_finite not in ("error", "keep"):
        message = f"non_finite is {non_finite!r}, expected 'error' or 'keep'"
        raise DatasetError(message)
    if threads < 1:
        message = f"threads is {threads}, expected at least 1"
        raise DatasetError(message)


def _checked_indices(archive: Archive, indices: Sequence[int] | None) -> Sequence[int]:
    """Indices from 0 on; all traces where none are given."""
    found: Sequence[int] = range(len(archive))
    if indices is not None:
        found = [int(index) for index in indices]
        outside = [index for index in found if not -len(archive) <= index < len(archive)]
        if outside:
            message = (
                f"{archive.paths[0]}: indices names {outside[0]}, but there are {len(archive)} "
                "samples"
            )
            raise DatasetError(message)
        found = [index % len(archive) for index in found]
    if not found:
        shards = ", ".join(str(path) for path in archive.paths[:5])
        message = (
            f"{shards}: there are no samples to train on"
            + (" (indices is empty)" if indices is not None and len(archive) else "")
            + "; name archives that hold some"
        )
        raise DatasetError(message)
    return found
