"""Graphs out of archives: two chunk reads each."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch

from h5traces.errors import DatasetError
from h5traces.format import layout
from h5traces.precision.head_mean import MEAN
from h5traces.torch_data.dataset import ShardGuard, check_layers, fingerprint_of, labels_of
from h5traces.torch_data.tensors import may_be_not_finite, named, read_layer

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace
    from h5traces.torch_data.dataset import Labels
    from h5traces.torch_data.tensors import NonFinite


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """What all graphs of one sample share."""

    question_id: Any
    answer: Any
    tokens_decoded: Any


class GraphSource(Protocol):
    """Samples whose layers become graphs."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's own layer numbers."""

    @property
    def shard_numbers(self) -> NDArray[np.int64]:
        """For every sample, the shard that it lies in."""

    @property
    def fingerprint(self) -> str:
        """The same text for the same samples of the same shards."""

    def facts(self, index: int) -> SampleFacts:
        """What the graphs of a sample share."""

    def arrays(self, index: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``(seq_len, hidden_size)`` and attention of one layer of a sample."""

    def place(self, index: int) -> str:
        """Shard and sample, for messages."""

    def labels(self, labels: Labels, *, allow_unused: bool) -> list[Any]:
        """The label of every sample."""


def check_finite(array: torch.Tensor, place: str) -> None:
    """Refuse an array with NaN or infinite values."""
    if not bool(array.isfinite().all()):
        message = (
            f"{place}: values are NaN or infinite; leave the sample out, or pass non_finite='keep'"
        )
        raise DatasetError(message)


# Samples whose small facts are kept, for the other layers of the same sample.
_KEPT_SAMPLES = 256


class ArchiveSource:
    """Samples of archives: a graph is two chunk reads."""

    def __init__(
        self,
        archive: Archive,
        layers: Iterable[int] | None,
        non_finite: NonFinite,
        *,
        averages: bool,
    ) -> None:
        if not len(archive):
            message = f"{archive.paths[0]}: there are no samples; name archives that hold some"
            raise DatasetError(message)
        self._archive, self._keep = archive, non_finite == "keep"
        self.layers = archive.layers if layers is None else tuple(layers)
        self._weights = _attention_kind(archive, averages=averages)
        check_layers(archive, (layout.HIDDEN_STATES, self._weights), self.layers)
        self._guard = ShardGuard(archive.paths)
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, tuple[Trace, SampleFacts]] = OrderedDict()

    @property
    def shard_numbers(self) -> NDArray[np.int64]:
        """For every sample, the shard that it lies in."""
        return self._archive.shard_numbers

    @cached_property
    def fingerprint(self) -> str:
        """The same text for the same samples of the same shards."""
        return fingerprint_of(self._archive, range(len(self._archive)))

    def place(self, index: int) -> str:
        """Shard and sample, for messages."""
        return named(self._archive[index])

    def labels(self, labels: Labels, *, allow_unused: bool) -> list[Any]:
        """The label of every sample."""
        every = range(len(self._archive))
        return labels_of(self._archive, every, labels, allow_unused=allow_unused)

    def facts(self, index: int) -> SampleFacts:
        """What the graphs of a sample share."""
        return self._sample(index)[1]

    def _sample(self, index: int) -> tuple[Trace, SampleFacts]:
        with self._lock:
            if index in self._kept:
                self._kept.move_to_end(index)
                return self._kept[index]
        trace = self._archive[index]
        found = (
            trace,
            SampleFacts(
                trace.get("question_id", "unknown"),
                trace.get("generated_answer_clean", ""),
                trace.get("tokens_decoded", []),
            ),
        )
        with self._lock:
            self._kept[index] = found
            while len(self._kept) > _KEPT_SAMPLES:
                self._kept.popitem(last=False)
        return found

    def arrays(self, index: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and attention of one layer of a sample."""
        trace, _ = self._sample(index)
        self._guard.check(trace.path)
        found = []
        kinds = (layout.HIDDEN_STATES, self._kind_of(trace))
        with self._archive.fetched([index], kinds=kinds, layers=[layer]):
            for kind in kinds:
                array = read_layer(trace, kind, layer)
                if not self._keep and may_be_not_finite(trace, kind, layer, torch.float32):
                    check_finite(array, f"{named(trace)}: layer {layer} of {kind}")
                found.append(array)
        return found[0], found[1]

    def _kind_of(self, trace: Trace) -> str:
        """What a sample has weights in: heads that could not be averaged were kept."""
        has_none = self._weights not in trace.objects and layout.ATTENTIONS in trace.objects
        return layout.ATTENTIONS if has_none else self._weights

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_lock"], state["_kept"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _attention_kind(archive: Archive, *, averages: bool) -> str:
    """Attentions where they are stored; their mean where heads were not kept.

    Of heads that lost precision, the mean that was stored beside them is the better one.
    """
    file = archive.files[0]
    stored = set(file.store.kinds)
    if layout.ATTENTION_MEAN not in stored:
        return layout.ATTENTIONS
    is_better = bool(file.metadata.losses) and file.reduction(layout.ATTENTION_MEAN) == MEAN
    return (
        layout.ATTENTION_MEAN
        if layout.ATTENTIONS not in stored or (averages and is_better)
        else layout.ATTENTIONS
    )
