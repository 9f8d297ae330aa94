"""Graphs out of legacy batches, until they are converted."""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from h5traces.archive.torch_values import to_tensor
from h5traces.errors import DatasetError, LayerIndexError, StoredStateWarning
from h5traces.format import layout
from h5traces.graph.archive_source import SampleFacts, check_finite
from h5traces.loading import load
from h5traces.sources.opening import open_source
from h5traces.torch_data.dataset import ShardGuard, mapped_labels

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.torch_data.dataset import Labels
    from h5traces.torch_data.tensors import NonFinite


class PickleSource:
    """Samples of legacy batches; slow, since a pickle has no part that can be read alone.

    Batches are read by the reader that executes nothing. A few whole files are kept in memory, as
    the legacy class did.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        layers: Iterable[int] | None,
        non_finite: NonFinite,
        cached_files: int,
    ) -> None:
        warnings.warn(
            f"{paths[0]}: reading legacy pickles, each of them whole; 'h5traces convert' makes "
            "archives of them, which give the same graphs without that",
            StoredStateWarning,
            stacklevel=4,
        )
        self._paths, self._cached_files = list(paths), cached_files
        self._keep = non_finite == "keep"
        contents = [_look_through(path) for path in self._paths]
        self._ids = [each for ids, _ in contents for each in ids]
        self._counts = [len(ids) for ids, _ in contents]
        num_layers = next((layers for ids, layers in contents if ids), 0)
        if not self._ids:
            message = f"{paths[0]}: there are no samples; name batches that hold some"
            raise DatasetError(message)
        self._starts = np.cumsum([0, *self._counts])
        self.layers = tuple(range(num_layers)) if layers is None else tuple(layers)
        beyond = [layer for layer in self.layers if not 0 <= layer < num_layers]
        if beyond or not self.layers:
            message = f"{paths[0]}: layers {beyond} are not stored; stored: 0 to {num_layers - 1}"
            raise LayerIndexError(message)
        self._guard = ShardGuard(self._paths)
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()

    @property
    def shard_numbers(self) -> NDArray[np.int64]:
        """For every sample, the shard that it lies in."""
        return np.repeat(np.arange(len(self._paths)), self._counts)

    @cached_property
    def fingerprint(self) -> str:
        """The same text for the same files by name, size and number of samples."""
        digest = xxhash.xxh3_64()
        for path, count in zip(self._paths, self._counts, strict=True):
            digest.update(f"{path.name} {path.stat().st_size} {count} ".encode())
        return digest.hexdigest()

    def place(self, index: int) -> str:
        """Shard and sample, for messages."""
        number, local = self._locate(index)
        return f"{self._paths[number]}: sample {local} (question id {self._ids[index]!r})"

    def labels(self, labels: Labels, *, allow_unused: bool) -> list[Any]:
        """The label of every sample."""
        if isinstance(labels, str):
            message = (
                f"{self._paths[0]}: legacy batches know no labels by name; pass "
                "labels={question_id: value}"
            )
            raise DatasetError(message)
        seen: Counter[Any] = Counter()
        keys = []
        for each in self._ids:
            keys.append((each, seen[each]))
            seen[each] += 1
        return mapped_labels(
            keys,
            range(len(keys)),
            labels,
            place=self.place,
            where=str(self._paths[0]),
            allow_unused=allow_unused,
        )

    def facts(self, index: int) -> SampleFacts:
        """What the graphs of a sample share."""
        sample = self._sample(index)
        return SampleFacts(
            sample.get("question_id", "unknown"),
            sample.get("generated_answer_clean", ""),
            sample.get("tokens_decoded", []),
        )

    def arrays(self, index: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and attention of one layer of a sample."""
        sample = self._sample(index)
        weights = sample.get(layout.ATTENTIONS, sample.get(layout.ATTENTION_MEAN))
        found = []
        for kind, arrays in ((layout.HIDDEN_STATES, sample[layout.HIDDEN_STATES]), ("", weights)):
            what = kind or layout.ATTENTIONS
            if arrays is None or layer >= len(arrays):
                message = (
                    f"{self.place(index)}: layer {layer} of {what} is not stored; stored: "
                    f"{len(arrays or ())} layers"
                )
                raise LayerIndexError(message)
            found.append(self._tensor(index, what, layer, arrays[layer]))
        return found[0], found[1]

    def _tensor(self, index: int, kind: str, layer: int, array: Any) -> torch.Tensor:
        place = f"{self.place(index)}: layer {layer} of {kind}"
        if isinstance(array, np.ndarray):
            array = to_tensor(array, array.dtype.name)
        if not isinstance(array, torch.Tensor):
            message = (
                f"{place}: is a list of generation steps, not one array; extract again, or leave "
                "the file out"
            )
            raise DatasetError(message)
        if not self._keep:
            check_finite(array, place)
        return array

    def _locate(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, index - int(self._starts[number])

    def _sample(self, index: int) -> dict[str, Any]:
        number, local = self._locate(index)
        # One thread loads a file, the others wait for it.
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
            else:
                while len(self._kept) >= self._cached_files:
                    self._kept.popitem(last=False)
                self._guard.check(self._paths[number])
                self._kept[number] = load(self._paths[number])
            return self._kept[number][local]

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_lock"], state["_kept"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _look_through(path: Path) -> tuple[list[Any], int]:
    """Question ids of a batch, and layers of its first sample; one pass in bounded memory."""
    ids: list[Any] = []
    num_layers = 0
    with open_source(path) as source:
        for sample in source.dicts():
            num_layers = num_layers if ids else source.num_layers
            ids.append(sample.get(layout.QUESTION_ID))
    return ids, num_layers
