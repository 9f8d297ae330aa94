"""A map-style dataset over archives: one sample per item, as tensors."""

from __future__ import annotations

import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset

from h5traces.archive.archive import Archive
from h5traces.archive.opening import open as open_archive
from h5traces.archive.selection import choose_samples
from h5traces.arguments import as_position, checked, checked_options, shown
from h5traces.errors import DatasetError, LayerIndexError, OptionError, SampleIndexError
from h5traces.format import layout
from h5traces.format.kinds import KEYS, QUERIES
from h5traces.format.text import and_more, as_names
from h5traces.meaning.lengths import covered_tokens
from h5traces.storage.files import open_regular
from h5traces.torch_data.collate import KEY_MASK, MASK
from h5traces.torch_data.tensors import (
    NonFinite,
    Preparation,
    TokenChoice,
    Tokens,
    answer_rows,
    named,
    read_tensor,
    token_axis,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from h5traces.archive.file import ArchiveFile
    from h5traces.archive.selection import SampleChoice
    from h5traces.archive.token_axis import TokenAxis
    from h5traces.archive.trace import Trace
    from h5traces.paths import PathLike
    from h5traces.storage.remote.paths import RemotePath

Item = dict[str, Any]
# A sample's id, and its generation index where several share the id.
Key = tuple[Any, int | None]
# Bytes at the end of a file that identify it: a footer ends in a checksum over all of it.
_END_NBYTES = 64


@checked_options
@dataclass(frozen=True, slots=True)
class Labels:
    """Labels of samples.

    Attributes
    ----------
    values
        By sample id, or by ``(sample_id, generation_index)`` where ids repeat; or the name of what
        the archive has: ``label``, or one of its scores.
    allow_unused
        Accept values of ids that no sample has, for shards that hold a part of the data.
    """

    values: Mapping[Any, Any] | str
    allow_unused: bool = False

    @classmethod
    def of(cls, value: Mapping[Any, Any] | str | Labels) -> Labels:
        """The labels that `value` stands for; bare values allow no unused ids."""
        return value if isinstance(value, Labels) else cls(value)


class ShardedDataset(Protocol):
    """A map-style dataset whose items lie in shards, as samplers and streams need it."""

    @property
    def shard_numbers(self) -> NDArray[np.int64]:
        """The shard of every item."""

    @property
    def fingerprint(self) -> str:
        """Identifies the items and their shards; a checkpoint holds it."""

    def __len__(self) -> int:
        """Number of items."""

    def __getitem__(self, index: int) -> Any:
        """One item."""


class TraceDataset(Dataset[Item]):
    """Samples of one or many archives as dicts of tensors, each read on access.

    Works from many threads, pickled, and in `torch.utils.data.DataLoader` workers of every start
    method. Only the layers asked for are read, one chunk each.

    Parameters
    ----------
    source
        As for `h5traces.open`: a file, a glob, a folder, a list of these; or an open `Archive` or
        a slice of one.
    kinds
        Kinds of arrays, for instance ``("hidden_states", "attentions")``.
    layers
        The model's own layer numbers, in the order of the layer axis; all that are stored by
        default. A bare number gives tensors without a layer axis.
    tokens
        ``all``; ``answer``, the tokens after the prompt; ``last``; ``mean``, over all tokens;
        ``answer_mean``. In attentions, this chooses queries. `Tokens` states the length of prompts
        as well, where the archive does not have it.
    dtype
        Type of the tensors; by default that of the file, bfloat16 included.
    labels
        Values by sample id, or the name of a label of the archive; `Labels` has more options.
    fields
        More fields of a trace to include: ``tokens`` as a tensor, others as they are.
    indices
        Samples of the source, by index or slice: for splits, or to leave samples out.
    non_finite
        ``error`` raises for samples with NaN or infinite values, ``keep`` returns them.
    threads
        Threads that read a batch, in addition to the workers of a `DataLoader`.
    transform
        Called with every item; its result is the item.

    Raises
    ------
    FileNotFoundError, ArchiveError
        As `h5traces.open`; or shards are of different models or layer sets.
    DatasetError
        There are no samples, or labels are missing or left over.
    LayerIndexError
        A shard does not store a layer.

    Notes
    -----
    An item is a dict: ``index`` (position in the source), ``sample_id``, a tensor per kind with the
    axes that `axes` names, ``label`` where there are labels, and the fields; of a sample with kept
    padding also ``mask``, bool by token, and ``key_mask``, by key. The attribute `labels` holds the
    label of every item, or is None.

    The field ``tokens`` holds those that the arrays belong to: without the last one, where
    ``generate()`` gave it no states.
    """

    @checked
    def __init__(
        self,
        source: Archive | PathLike | Iterable[PathLike],
        *,
        kinds: str | Iterable[str] = (layout.HIDDEN_STATES,),
        layers: int | Iterable[int] | None = None,
        tokens: TokenChoice | Tokens = "all",
        dtype: torch.dtype | None = None,
        labels: Mapping[Any, Any] | str | Labels | None = None,
        fields: str | Iterable[str] = (),
        indices: SampleChoice = None,
        non_finite: NonFinite = "error",
        threads: int = 1,
        transform: Callable[[Item], Any] | None = None,
    ) -> None:
        taken = tokens if isinstance(tokens, Tokens) else Tokens(tokens)
        if threads < 1:
            message = f"threads is {threads}, expected at least 1"
            raise OptionError(message)
        self.archive = source if isinstance(source, Archive) else open_archive(source)
        self.kinds, self.fields = as_names(kinds), as_names(fields)
        one_layer = isinstance(layers, int)
        wanted = (layers,) if isinstance(layers, int) else layers
        numbers = self.archive.layers if wanted is None else tuple(wanted)
        check_layers(self.archive, self.kinds, numbers)
        self.indices = _checked_indices(self.archive, indices)
        self.preparation = Preparation(numbers, not one_layer, taken, dtype, non_finite)
        self._stored_axes = {kind: axes_of(self.archive, kind) for kind in self.kinds}
        self.labels = None
        if labels is not None:
            self.labels = labels_of(self.archive, self.indices, Labels.of(labels))
        self._threads, self._transform = threads, transform
        self._guard = ShardGuard(self.archive.paths)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Names of the axes of every tensor of an item that has any."""
        axes = {kind: self.preparation.axes(stored) for kind, stored in self._stored_axes.items()}
        if layout.TOKENS in self.fields:
            axes[layout.TOKENS] = ("token",)
        return axes

    @property
    def shard_numbers(self) -> NDArray[np.int64]:
        """The shard of every item."""
        return self.archive._shard_numbers[np.asarray(self.indices, dtype=np.int64)]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the items and their shards."""
        return fingerprint_of(self.archive, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        try:
            position = self.indices[as_position(index, "a dataset")]
        except IndexError:
            message = f"item {shown(index)} is out of range; the dataset has {len(self)}"
            raise SampleIndexError(message) from None
        trace = self.archive[position]
        self._guard.check(trace.path)
        item: Item = {"index": position, "sample_id": trace.metadata.sample_id}
        with self._fetched([index]):
            for kind in self.kinds:
                item[kind] = read_tensor(trace, kind, self._stored_axes[kind], self.preparation)
        item |= self._masks(trace)
        for field in self.fields:
            item[field] = self._field(trace, field)
        if self.labels is not None:
            item["label"] = self.labels[index]
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
        """Inside the block, items on servers are in memory, fetched in parallel."""
        inside = range(-len(self), len(self))
        positions = [self.indices[index] for index in indices if index in inside]
        return self.archive.fetched(positions, kinds=self.kinds, layers=self.preparation.layers)

    def _field(self, trace: Trace, field: str) -> Any:
        if field not in trace:
            message = f"{named(trace)}: has no field {shown(field)}; stored: {', '.join(trace)}"
            raise DatasetError(message)
        value = trace._value(field, "numpy")
        if field != layout.TOKENS:
            return value
        tokens = torch.from_numpy(np.asarray(value, dtype=np.int64))
        return tokens[self._tokens_of_rows(trace, len(tokens))].clone()

    def _tokens_of_rows(self, trace: Trace, num_tokens: int) -> Any:
        """Which tokens the item's arrays belong to, where it is known."""
        _, axis = next(self._token_axes(trace), (None, None))
        covered = None if axis is None else covered_tokens(num_tokens, axis.num_keys)
        if axis is None or covered is None or self.preparation.tokens.take not in ("all", "answer"):
            return slice(None)
        if self.preparation.tokens.take == "all":
            return covered
        return axis.tokens_of(answer_rows(trace, axis, self.preparation.tokens))

    def _token_axes(self, trace: Trace) -> Iterator[tuple[str, TokenAxis]]:
        layer = self.preparation.layers[0]
        for kind in self.kinds:
            axis = token_axis(trace, kind, self._stored_axes[kind], layer)
            if axis is not None:
                yield kind, axis

    def _masks(self, trace: Trace) -> Item:
        """Which tokens and keys of the item are not padding; nothing if all are."""
        if trace.mask is None:
            return {}
        masks: Item = {}
        for kind, axis in self._token_axes(trace):
            if axis.row_mask is not None and self.preparation.tokens.take == "all":
                masks.setdefault(MASK, torch.from_numpy(axis.row_mask.copy()))
            if axis.mask is not None and "key" in self._stored_axes[kind]:
                masks.setdefault(KEY_MASK, torch.from_numpy(axis.mask.copy()))
        return masks


def fingerprint_of(archive: Archive, indices: Sequence[int]) -> str:
    """Identifies samples and their shards; it changes when a shard is written again."""
    digest = xxhash.xxh3_64()
    for file in archive._files:
        digest.update(f"{file.metadata.archive_id} {file.num_samples} ".encode())
    digest.update(np.asarray(indices, dtype="<i8").tobytes())
    return digest.hexdigest()


def _checked_indices(archive: Archive, indices: SampleChoice) -> Sequence[int]:
    """Indices from 0 on; those of all samples by default."""
    try:
        found = choose_samples(indices, len(archive))
    except SampleIndexError as error:
        message = f"{archive.paths[0]}: indices: {error}"
        raise DatasetError(message) from error
    if not found:
        message = (
            f"{and_more(archive.paths)}: there are no samples to train on"
            + (" (indices is empty)" if len(archive) else "")
            + "; name archives that hold some"
        )
        raise DatasetError(message)
    return found


def axes_of(archive: Archive, kind: str) -> tuple[str, ...]:
    """Names of the axes of one layer's array of a kind."""
    if kind in layout.KINDS:
        return layout.KINDS[kind].axes
    axes = json.loads(str(_declared(archive._files[0], kind)["axes"]))
    return tuple(str(axis) for axis in axes)


def check_layers(archive: Archive, kinds: tuple[str, ...], layers: tuple[int, ...]) -> None:
    """Check that all shards store the kinds and layers asked for."""
    if not kinds:
        message = "kinds is empty, expected for instance ('hidden_states',)"
        raise DatasetError(message)
    for file in archive._files:
        if not file.num_samples:
            continue
        for kind in kinds:
            declared = _declared(file, kind)
            # Positions if no layer is known.
            stored = declared.get("layers") or declared.get("positions")
            known = list(stored) if isinstance(stored, tuple) else []
            missing = [layer for layer in layers if layer not in known]
            if missing:
                message = (
                    f"{file.path}: layers {missing} of {kind} are not stored; stored: {known}; "
                    "choose other layers="
                )
                raise LayerIndexError(message)
    if not layers and len(archive):
        message = f"{archive.paths[0]}: layers is empty, or the archive stores no layers"
        raise DatasetError(message)


def _declared(file: ArchiveFile, kind: str) -> dict[str, object]:
    kinds = file.store.kinds
    if kind == layout.ATTENTIONS and kind not in kinds and {QUERIES, KEYS} <= kinds.keys():
        # Samples say whether the weights follow.
        return dict(kinds[QUERIES])
    if kind not in kinds:
        message = (
            f"{file.path}: stores no {kind}; stored: {', '.join(kinds) or 'no kinds'}; choose "
            "other kinds=, or name the shards that have them"
        )
        raise DatasetError(message)
    return dict(kinds[kind])


def labels_of(archive: Archive, indices: Sequence[int], labels: Labels) -> list[Any]:
    """The labels of some samples, in the order of `indices`."""
    if isinstance(labels.values, str):
        return [_stored_label(archive[index], labels.values) for index in indices]
    ids = Counter(archive.ids)
    keys = [(each, number if ids[each] > 1 else None) for each, number in archive._keys]
    where = and_more(archive.paths)
    return mapped_labels(
        keys, indices, labels, where=where, place=lambda index: named(archive[index])
    )


def _stored_label(trace: Trace, name: str) -> Any:
    metadata = trace.metadata
    value: Any = metadata.label if name == "label" else (metadata.scores or {}).get(name)
    if value is None:
        known = sorted(metadata.scores or {}) + (["label"] if metadata.label is not None else [])
        message = (
            f"{named(trace)}: has no label {shown(name)}; stored: {', '.join(known) or 'none'}; "
            "pass labels={sample_id: value}, or leave the sample out with indices="
        )
        raise DatasetError(message)
    return value


def mapped_labels(
    keys: Sequence[Key],
    indices: Sequence[int],
    labels: Labels,
    *,
    where: str,
    place: Callable[[int], str],
) -> list[Any]:
    """The labels of the samples of some `indices` by their ids; `keys` are those of all samples.

    `where` names the shards in messages, and `place` a sample by its index.
    """
    values = labels.values
    assert not isinstance(values, str)  # names of labels are for `labels_of`
    ids = Counter(sample_id for sample_id, _ in keys)
    found = []
    for index in indices:
        sample_id, _ = key = keys[index]
        if key in values:
            found.append(values[key])
        elif sample_id not in values:
            message = (
                f"{place(index)}: labels holds no value for it; a missing label is never 0: add "
                "it, or leave the sample out"
            )
            raise DatasetError(message)
        elif ids[sample_id] > 1:
            message = (
                f"{place(index)}: {ids[sample_id]} samples have that id and would all get its "
                "label; use the keys (sample_id, generation_index)"
            )
            raise DatasetError(message)
        else:
            found.append(values[sample_id])
    unused = [] if labels.allow_unused else [key for key in values if _id_of(key) not in ids]
    if unused:
        names = and_more(map(repr, unused))
        message = (
            f"{where}: labels names {names}, which no sample there has as its id; check the "
            "ids, or pass Labels(values, allow_unused=True) for shards that hold a part of the data"
        )
        raise DatasetError(message)
    return found


def _id_of(key: Any) -> Any:
    return key[0] if isinstance(key, tuple) and key else key


class ShardGuard:
    """Remembers local files, and raises if another file took the place of one.

    A check takes one `os.stat`. An open archive stays readable after another file got its name, so
    without this, one worker might train on the old file and the next one on the new. Files that
    only moved or were touched (same size, same footer) pass. Shards on servers are not watched.
    """

    def __init__(self, paths: Iterable[Path | RemotePath]) -> None:
        self._seen = {str(path): _look(str(path)) for path in paths if isinstance(path, Path)}

    def check(self, path: Path | RemotePath) -> None:
        """Raise DatasetError unless the shard is the one that the dataset was made from."""
        name = str(path)
        if name not in self._seen:
            return
        status, end = self._seen[name]
        try:
            # Once per item: Path.stat costs twice as much.
            if _identity(os.stat(name)) == status:  # noqa: PTH116
                return
            found = _look(name)
        except OSError as error:
            message = (
                f"{name}: the shard cannot be read any more ({error.strerror}); it was moved or "
                "deleted during training; put it back, or make the dataset again"
            )
            raise DatasetError(message) from error
        (nbytes, *_), (nbytes_now, *_) = status, found[0]
        if (nbytes_now, found[1]) != (nbytes, end):
            message = (
                f"{name}: the shard was replaced or edited during training ({nbytes} bytes "
                f"when the dataset was made, {nbytes_now} now); an epoch over both would mix "
                "two versions; make the dataset again and start from a checkpoint"
            )
            raise DatasetError(message)
        self._seen[name] = found


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns


def _look(path: str) -> tuple[tuple[int, int, int, int], bytes]:
    """A file's identity, size first, and its end."""
    with os.fdopen(open_regular(Path(path), DatasetError), "rb") as file:
        status = os.fstat(file.fileno())
        end = os.pread(file.fileno(), _END_NBYTES, max(0, status.st_size - _END_NBYTES))
    return _identity(status), end
