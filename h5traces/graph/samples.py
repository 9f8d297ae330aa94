"""Samples whose layers become graphs: in archives, or in files of other formats."""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter, OrderedDict
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import xxhash

from h5traces.archive.token_axis import mask_of
from h5traces.archive.torch_values import to_tensor
from h5traces.errors import DatasetError, LayerIndexError, StoredStateWarning, warn
from h5traces.format import layout
from h5traces.format.record import StepArrays
from h5traces.precision.attention import MEAN
from h5traces.sources.opening import SOURCE_SUFFIXES, open_source
from h5traces.sources.runs import readings_of
from h5traces.torch_data.dataset import (
    ShardGuard,
    check_layers,
    fingerprint_of,
    labels_of,
    mapped_labels,
)
from h5traces.torch_data.tensors import may_be_not_finite, named, read_layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace
    from h5traces.format.record import LayerArray, TraceRecord
    from h5traces.meaning.options import ReadingOptions
    from h5traces.torch_data.dataset import Labels

_ANSWER: Final = "generated_answer_clean"
# Arrays that are kept of files that can only be read from their beginning.
_MOST_KEPT_NBYTES: Final = 512 << 20


class ArchiveSamples:
    """Samples of archives; a graph reads two chunks.

    `averages` says whether heads are reduced to their mean.
    """

    def __init__(
        self,
        archive: Archive,
        layers: Iterable[int] | None,
        *,
        keep_non_finite: bool,
        averages: bool,
    ) -> None:
        if not len(archive):
            message = f"{archive.paths[0]}: there are no samples; name archives that hold some"
            raise DatasetError(message)
        self._archive, self._keep_non_finite = archive, keep_non_finite
        self.layers = archive.layers if layers is None else tuple(layers)
        self._weights = _attention_kind(archive, averages=averages)
        check_layers(archive, (layout.HIDDEN_STATES, self._weights), self.layers)
        self._guard = ShardGuard(archive.paths)
        # The sample used last: its other layers often come next.
        self._last: tuple[int, dict[str, Any]] | None = None

    @property
    def shard_numbers(self) -> NDArray[np.int64]:
        """The shard of every sample."""
        return self._archive._shard_numbers

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the samples and their shards."""
        return fingerprint_of(self._archive, range(len(self._archive)))

    def place(self, index: int) -> str:
        """Shard and sample, for messages."""
        return named(self._archive[index])

    def labels(self, labels: Labels) -> list[Any]:
        """The label of every sample."""
        return labels_of(self._archive, range(len(self._archive)), labels)

    def facts(self, index: int) -> dict[str, Any]:
        """What the graphs of a sample share."""
        last = self._last
        if last is None or last[0] != index:
            trace = self._archive[index]
            facts = {
                "question_id": trace.get(layout.QUESTION_ID, "unknown"),
                "answer": trace.get(_ANSWER, ""),
                "tokens_decoded": _unpadded(trace.get(layout.TOKENS_DECODED, []), trace.mask),
            }
            last = self._last = index, facts
        return last[1]

    def arrays(
        self, index: int, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor | Iterator[torch.Tensor]]:
        """Hidden states ``(seq_len, hidden_size)`` and attention of one layer of a sample.

        Attention that is recomputed comes in blocks of queries ``(heads, queries, keys)``.
        """
        trace = self._archive[index]
        self._guard.check(trace.path)
        found: list[torch.Tensor] = []
        stored, weights = trace._stored.objects, self._weights
        if weights not in stored and layout.ATTENTIONS in stored:
            weights = layout.ATTENTIONS  # heads that could not be averaged are stored instead
        kinds = (layout.HIDDEN_STATES, weights)
        paths = [f"{kind}/{trace._stored.array_name(kind, layer)}" for kind in kinds]
        with (
            self._archive.fetched([index], kinds=kinds, layers=[layer]),
            trace._stored.read_ahead([path for path in paths if path in stored], 1),
        ):
            for kind in kinds:
                if trace._stored.recomputes(kind):
                    mask = trace.mask
                    states = found[0] if mask is None else _kept(found[0], 0, mask)
                    return states, self._rows(trace, layer)
                array = read_layer(trace, kind, layer)
                suspect = may_be_not_finite(trace, kind, layer, torch.float32)
                if suspect and not self._keep_non_finite:
                    _check_finite(array, f"{named(trace)}: layer {layer} of {kind}")
                found.append(array)
        return _without_padding(found[0], found[1], trace.mask)

    def _rows(self, trace: Trace, layer: int) -> Iterator[torch.Tensor]:
        """Recomputed attention of a layer, without padding."""
        stored = trace._stored
        name = stored.array_name(layout.ATTENTIONS, layer)
        kept = None if trace.mask is None else np.flatnonzero(trace.mask)
        for _, weights in stored.attention_blocks(name, kept):
            block = torch.from_numpy(weights if kept is None else weights[:, :, kept])
            if not self._keep_non_finite:
                _check_finite(block, f"{named(trace)}: layer {layer} of {layout.ATTENTIONS}")
            yield block


def _attention_kind(archive: Archive, *, averages: bool) -> str:
    """Attentions where they are stored, else their mean.

    Where heads lost precision, the mean stored beside them is the better one.
    """
    file = archive._files[0]
    stored = set(file.store.kinds)
    if layout.ATTENTION_MEAN not in stored:
        return layout.ATTENTIONS
    is_better = bool(file.metadata.losses) and file.reduction(layout.ATTENTION_MEAN) == MEAN
    takes_mean = layout.ATTENTIONS not in stored or (averages and is_better)
    return layout.ATTENTION_MEAN if takes_mean else layout.ATTENTIONS


class RecordSamples:
    """Samples of files that can only be read from their beginning, such as legacy batches."""

    def __init__(
        self,
        paths: Sequence[Path],
        layers: Iterable[int] | None,
        *,
        keep_non_finite: bool,
        reading: ReadingOptions,
        max_samples: int | None = None,
    ) -> None:
        what = (
            "legacy pickles"
            if paths[0].name.endswith(SOURCE_SUFFIXES)
            else "files that are not archives"
        )
        warn(
            f"{paths[0]}: reading {what}, which is slow unless samples come in order; "
            "'h5traces convert' makes archives of them, which give the same graphs",
            StoredStateWarning,
        )
        self._paths, self._keep_non_finite = tuple(paths), keep_non_finite
        self._ids: list[Any] = []
        starts: list[int] = []
        stored: list[int] = []
        readings = readings_of(self._paths, reading)
        for path in self._paths:
            starts.append(len(self._ids))
            left = None if max_samples is None else max_samples - len(self._ids)
            for record in itertools.islice(_records(path, readings[path]), left):
                self._ids.append(_field(record, layout.QUESTION_ID, record.sample_id))
                if len(self._ids) == 1:
                    stored = sorted(
                        {layer for kind in record.layered for layer in _by_layer(record, kind)}
                    )
        self._starts = np.array([*starts, len(self._ids)])
        if not self._ids:
            message = f"{paths[0]}: there are no samples; name files that hold some"
            raise DatasetError(message)
        self.layers = tuple(stored if layers is None else layers)
        missing = [layer for layer in self.layers if layer not in stored]
        if missing or not self.layers:
            message = f"{paths[0]}: layers {missing} are not stored; stored: {stored}"
            raise LayerIndexError(message)
        self._reader = _Reader(self._paths, readings, self._starts, ShardGuard(self._paths))

    @property
    def shard_numbers(self) -> NDArray[np.int64]:
        """The file of every sample."""
        return np.repeat(np.arange(len(self._paths)), np.diff(self._starts))

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the files by name, size and number of samples."""
        digest = xxhash.xxh3_64()
        for path, count in zip(self._paths, np.diff(self._starts), strict=True):
            digest.update(f"{path.name} {path.stat().st_size} {count} ".encode())
        return digest.hexdigest()

    def place(self, index: int) -> str:
        """File and sample, for messages."""
        number = self.shard_numbers[index]
        local = index - self._starts[number]
        return f"{self._paths[number]}: sample {local} (question id {self._ids[index]!r})"

    def labels(self, labels: Labels) -> list[Any]:
        """The label of every sample."""
        if isinstance(labels.values, str):
            message = (
                f"{self._paths[0]}: legacy batches have no labels by name; pass "
                "labels={question_id: value}"
            )
            raise DatasetError(message)
        seen: Counter[Any] = Counter()
        keys = []
        for each in self._ids:
            keys.append((each, seen[each]))
            seen[each] += 1
        every, where = range(len(keys)), str(self._paths[0])
        return mapped_labels(keys, every, labels, where=where, place=self.place)

    def facts(self, index: int) -> dict[str, Any]:
        """What the graphs of a sample share."""
        record = self._reader.record(index)
        return {
            "question_id": _field(record, layout.QUESTION_ID, record.sample_id or "unknown"),
            "answer": _field(record, _ANSWER, ""),
            "tokens_decoded": _unpadded(
                _field(record, layout.TOKENS_DECODED, record.tokens_decoded or []), _mask(record)
            ),
        }

    def arrays(self, index: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``(seq_len, hidden_size)`` and attention of one layer of a sample."""
        record = self._reader.record(index)
        has_heads = layout.ATTENTIONS in record.layered
        weights = layout.ATTENTIONS if has_heads else layout.ATTENTION_MEAN
        hidden = self._tensor(index, record, layout.HIDDEN_STATES, layer)
        attention = self._tensor(index, record, weights, layer)
        return _without_padding(hidden, attention, _mask(record))

    def _tensor(self, index: int, record: TraceRecord, kind: str, layer: int) -> torch.Tensor:
        arrays = _by_layer(record, kind)
        place = f"{self.place(index)}: layer {layer} of {kind}"
        if layer not in arrays:
            message = f"{place} is not stored; stored: {list(arrays) or 'none'}"
            raise LayerIndexError(message)
        array = arrays[layer].array
        if isinstance(array, StepArrays):
            message = (
                f"{place} is a list of generation steps, not one array; extract again, or leave "
                "the file out"
            )
            raise DatasetError(message)
        typed = array.load()
        # A copy: the record stays in memory, and its arrays may be read-only.
        tensor = to_tensor(typed.values.copy(), typed.dtype)
        if not self._keep_non_finite:
            _check_finite(tensor, place)
        return tensor


GraphSamples = ArchiveSamples | RecordSamples


class _Reader:
    """Reads a file up to the sample asked for, and keeps it open there.

    The last samples that were read stay in memory, 512 MB of them; a pickle holds none. `starts`
    holds the index of the first sample of every file, and the number of samples; `readings` how
    they are read.
    """

    def __init__(
        self,
        paths: tuple[Path, ...],
        readings: dict[Path, ReadingOptions],
        starts: NDArray[np.int64],
        guard: ShardGuard,
    ) -> None:
        self._paths, self._readings = paths, readings
        self._starts, self._guard = starts, guard
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, tuple[TraceRecord, int]] = OrderedDict()
        # Process and number of the open file: after a fork, both processes would move its position.
        self._open = (0, -1)
        self._records: Iterator[TraceRecord] = iter(())
        self._next = 0

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self._paths, self._readings, self._starts, self._guard)

    def record(self, index: int) -> TraceRecord:
        """One sample; other threads wait while it is read."""
        with self._lock:
            while index not in self._kept:
                self._read_on(index)
            self._kept.move_to_end(index)
            return self._kept[index][0]

    def _read_on(self, index: int) -> None:
        """Read one more record, from the start of the file if it was passed already."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._open != (os.getpid(), number) or self._next > index:
            self._guard.check(self._paths[number])
            self._open = os.getpid(), number
            path = self._paths[number]
            self._records, self._next = (
                _records(path, self._readings[path]),
                int(self._starts[number]),
            )
        record = next(self._records)
        arrays = (each.array for kind in record.layered.values() for each in kind.arrays)
        loaded = (each.load() for each in arrays if not isinstance(each, StepArrays))
        self._kept[self._next] = record, sum(each.values.nbytes for each in loaded)
        self._next += 1
        while len(self._kept) > 1 and sum(n for _, n in self._kept.values()) > _MOST_KEPT_NBYTES:
            self._kept.popitem(last=False)


def _records(path: Path, reading: ReadingOptions) -> Iterator[TraceRecord]:
    """The records of a file, one by one."""
    with open_source(path, reading) as source:
        yield from source.records()


def _field(record: TraceRecord, name: str, absent: Any) -> Any:
    """A field with the type that it had in its file."""
    return record.texts.get(name, record.extra.get(name, absent))


def _by_layer(record: TraceRecord, kind: str) -> dict[int, LayerArray]:
    """The arrays of a kind by the model's own layer numbers."""
    layered = record.layered.get(kind)
    arrays = layered.arrays if layered else ()
    numbered = ((layout.parse_layer_name(each.name), each) for each in arrays)
    return {layer: each for layer, each in numbered if layer is not None}


def _mask(record: TraceRecord) -> NDArray[np.bool_] | None:
    return None if record.attention_mask is None else record.attention_mask.astype(np.bool_)


def _without_padding(
    hidden: torch.Tensor, attention: torch.Tensor, mask: NDArray[np.bool_] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """States and weights of the tokens that are not padding."""
    if mask is None or hidden.ndim != 2 or attention.ndim not in (2, 3):
        return hidden, attention
    queries = _kept(attention, attention.ndim - 2, mask)
    return _kept(hidden, 0, mask), _kept(queries, attention.ndim - 1, mask)


def _kept(array: torch.Tensor, axis: int, mask: NDArray[np.bool_]) -> torch.Tensor:
    found = mask_of(mask, array.shape[axis])
    if found is None:
        return array
    return array.index_select(axis, torch.from_numpy(np.flatnonzero(found)))


def _unpadded(texts: Any, mask: NDArray[np.bool_] | None) -> Any:
    """Texts of tokens without padding, if there is one per token."""
    if mask is None or len(texts) != len(mask):
        return texts
    return [each for each, is_token in zip(texts, mask, strict=True) if is_token]


def _check_finite(array: torch.Tensor, place: str) -> None:
    if not bool(array.isfinite().all()):
        message = (
            f"{place}: values are NaN or infinite; leave the sample out, or pass non_finite='keep'"
        )
        raise DatasetError(message)
