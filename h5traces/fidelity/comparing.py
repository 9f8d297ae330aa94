"""Compares two archives, sample by sample."""

from __future__ import annotations

import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.archive.archive import shared_metadata
from h5traces.archive.opening import open_archive
from h5traces.errors import FidelityError, LossyWarning, warn
from h5traces.fidelity.reports import (
    FidelityReport,
    KindFidelity,
    StateFidelity,
    Unmatched,
    WeightFidelity,
)
from h5traces.fidelity.states import StateErrors, ValuePair
from h5traces.fidelity.weights import WeightErrors
from h5traces.format import layout
from h5traces.format.dtypes import TypedArray
from h5traces.format.text import and_more
from h5traces.precision.head_mean import HeadMean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace
    from h5traces.paths import PathLike


# Sample id, generation and how many such came before; or index, where there is no id.
SampleKey = tuple[str | None, int | None, int]

_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class SamplePairs:
    """Samples that belong together.

    Attributes
    ----------
    indices
        Index in A and in B, in the order of A.
    only_in_a, only_in_b
        Names of the others.
    matched_by
        ``id``, ``ordinal``, or ``id and ordinal``.
    """

    indices: list[tuple[int, int]]
    only_in_a: list[str]
    only_in_b: list[str]
    matched_by: str


def pair_samples(a: Archive, b: Archive) -> SamplePairs:
    """Match samples by id and generation, those without an id by index.

    Samples that share both are matched in their order. Where one archive has no ids at all, all are
    matched by index.

    Raises
    ------
    FidelityError
        They have none in common.
    """
    keys_a, keys_b = _keys(a), _keys(b)
    if not all(any(key[0] is not None for key in keys) for keys in (keys_a, keys_b)):
        keys_a, keys_b = _ordinals(a), _ordinals(b)
    places = {key: index for index, key in enumerate(keys_b)}
    found = [(index, places[key]) for index, key in enumerate(keys_a) if key in places]
    known = set(keys_a)
    only_in_a = [_named(key) for key in keys_a if key not in places]
    only_in_b = [_named(key) for key in keys_b if key not in known]
    if not found:
        message = (
            f"{_place(a)} and {_place(b)} have no sample in common: the first has "
            f"{_listed(only_in_a)}, the second {_listed(only_in_b)}; expected archives of the same "
            "samples"
        )
        raise FidelityError(message)
    has_id = {keys_a[index][0] is not None for index, _ in found}
    ways = (["id"] if True in has_id else []) + (["ordinal"] if False in has_id else [])
    return SamplePairs(found, only_in_a, only_in_b, " and ".join(ways))


def _keys(archive: Archive) -> list[SampleKey]:
    repeats: Counter[tuple[str, int | None]] = Counter()
    keys: list[SampleKey] = []
    for index, trace in enumerate(archive):
        sample_id, generation = trace.metadata.sample_id, trace.metadata.generation_index
        if sample_id is None:
            keys.append((None, None, index))
            continue
        keys.append((sample_id, generation, repeats[sample_id, generation]))
        repeats[sample_id, generation] += 1
    return keys


def _ordinals(archive: Archive) -> list[SampleKey]:
    return [(None, None, index) for index in range(len(archive))]


def _named(key: SampleKey) -> str:
    sample_id, generation, number = key
    if sample_id is None:
        return f"index {number}"
    name = f"{sample_id} (generation {generation})" if generation else sample_id
    return f"{name}, number {number + 1} of that name" if number else name


def _place(archive: Archive) -> str:
    return and_more(archive.paths, 1)


def _listed(names: list[str]) -> str:
    return and_more(names, _MOST_NAMED) or "none"


def stored_names(trace: Trace, kind: str) -> list[str]:
    """Datasets of a kind, the embedding first, then by layer."""
    names = [layout.layer_name(layer) for layer in trace._stored.stored_layers(kind)]
    embedding = f"{kind}/{layout.EMBEDDING}" in trace._stored.objects
    return [layout.EMBEDDING, *names] if embedding else names


def stored_kinds(trace: Trace) -> list[str]:
    """Kinds of which a trace has an array, in their order in the file."""
    paths = (path.partition("/") for path in trace._stored.objects)
    found = (
        kind
        for kind, _, name in paths
        if name == layout.EMBEDDING or layout.parse_layer_name(name) is not None
    )
    return list(dict.fromkeys(found))


# Edges of graphs, where nothing else is asked for; as `h5traces.graph` has it.
THRESHOLD = 0.01


def compare(
    a: PathLike | Iterable[PathLike],
    b: PathLike | Iterable[PathLike],
    *,
    threshold: float = THRESHOLD,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FidelityReport:
    """How faithfully one archive holds what another does.

    Every array is read once. Memory stays at two layers of both archives per worker, and some sums
    per layer and channel.

    Parameters
    ----------
    a
        The reference: archives, globs or folders.
    b
        What is judged, of the same samples. Where it has ``attention_mean``, that is compared with
        the mean over heads of A's attentions (rounded to float16, averaged in float64, rounded to
        float32), or with A's ``attention_mean`` where it has no attentions.
    threshold
        An edge is where the mean weight over heads is greater.
    workers
        Threads; one per core by default.
    progress
        Called with the samples done and the samples there are.

    Raises
    ------
    FileNotFoundError
        Nothing matches.
    FidelityError
        They have no sample or no array in common, or arrays differ in shape; the message names
        file, sample and field. Or the threshold is no number.
    H5TracesError
        A file is no archive, or is damaged.

    Warns
    -----
    LossyWarning
        A lost precision itself.
    """
    if not math.isfinite(threshold):
        message = f"the threshold is {threshold}, expected a weight such as {THRESHOLD}"
        raise FidelityError(message)
    count = workers or os.cpu_count() or 1
    with (
        open_archive(a, labels=False) as first,
        open_archive(b, labels=False) as second,
        ThreadPoolExecutor(count, thread_name_prefix="h5traces-fidelity") as pool,
    ):
        _warn_of_losses(first)
        pairs = pair_samples(first, second)
        report = FidelityReport(
            a=[str(path) for path in first.paths],
            b=[str(path) for path in second.paths],
            threshold=threshold,
            num_samples=len(pairs.indices),
            matched_by=pairs.matched_by,
            only_in_a=Unmatched(pairs.only_in_a),
            only_in_b=Unmatched(pairs.only_in_b),
        )
        run = _Comparison(report, pool, count)
        for done, (index_a, index_b) in enumerate(pairs.indices, 1):
            run.add(_TracePair(first[index_a], second[index_b]))
            if progress is not None:
                progress(done, len(pairs.indices))
        run.finish()
    return report


def _warn_of_losses(reference: Archive) -> None:
    losses = shared_metadata(reference._files).losses
    if losses:
        message = (
            f"{reference.paths[0]}: the reference lost precision itself "
            f"({', '.join(map(str, losses))}), so errors are not those against its source"
        )
        warn(message, LossyWarning)


@dataclass(frozen=True, slots=True)
class _TracePair:
    """One sample in both archives."""

    a: Trace
    b: Trace

    @property
    def place(self) -> str:
        return f"{self.b._stored.place} ({self.b.metadata.sample_id!r})"

    def is_in_steps(self, kind: str) -> bool:
        return any(
            f"{kind}/{layout.STEPS_TABLE}" in each._stored.objects for each in (self.a, self.b)
        )

    def read(self, kind: str, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """The array of both."""
        a, b = _read(self.a, kind, name), _read(self.b, kind, name)
        self.check(kind, name, a.shape, b.shape)
        return a, b

    def check(self, kind: str, name: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        """Refuse arrays of different shapes."""
        if a != b:
            message = (
                f"{self.place}: {kind}/{name} has the shape {b}, but {a} in "
                f"{self.a._stored.place}; expected archives of the same samples"
            )
            raise FidelityError(message)


def _read(trace: Trace, kind: str, name: str) -> NDArray[Any]:
    layer = layout.parse_layer_name(name)
    array = trace.embedding if layer is None else trace.layer(layer, kind)
    axes = layout.KINDS[kind].axes
    if isinstance(array, list) or array.ndim != len(axes):
        message = f"{trace._stored.place}: {kind}/{name} does not have the axes {', '.join(axes)}"
        raise FidelityError(message)
    return array


class _Comparison:
    """Gathers what is measured; a layer is worked on by one thread at a time."""

    def __init__(self, report: FidelityReport, pool: ThreadPoolExecutor, workers: int) -> None:
        self._report, self._pool, self._workers = report, pool, workers
        self._states: dict[str, StateErrors] = {}
        self._weights: dict[tuple[str, str], dict[str, WeightErrors]] = {}

    def add(self, pair: _TracePair) -> None:
        """Compare one sample."""
        names_a, names_b = _names(pair.a), _names(pair.b)
        kinds = [kind for kind in layout.KINDS if kind in names_a or kind in names_b]
        in_steps = [kind for kind in kinds if pair.is_in_steps(kind)]
        for kind in in_steps:
            self._report.skipped.append(f"{pair.place}: {kind} holds generation steps")
            names_a.pop(kind, None)
            names_b.pop(kind, None)
        has_mean = layout.ATTENTION_MEAN in names_b
        source = layout.ATTENTIONS if layout.ATTENTIONS in names_a else layout.ATTENTION_MEAN
        tasks = self._state_tasks(pair, _common(names_a, names_b, layout.HIDDEN_STATES))
        both = _common(names_a, names_b, layout.ATTENTIONS)
        means = _common(names_a, names_b, layout.ATTENTION_MEAN, source) if has_mean else []
        tasks += self._weight_tasks(pair, both, means, source)
        self._note_unmatched(names_a, names_b, means)
        list(self._pool.map(_run, tasks))

    def _note_unmatched(
        self, names_a: dict[str, list[str]], names_b: dict[str, list[str]], means: list[str]
    ) -> None:
        """Count arrays that only one archive has; those of A that a mean stands for are none."""
        paths_a, paths_b = _paths(names_a), _paths(names_b)
        compared = {f"{layout.ATTENTION_MEAN}/{name}" for name in means}
        for found, paths in (
            (self._report.only_in_a, paths_a - paths_b - compared),
            (self._report.only_in_b, paths_b - paths_a - compared),
        ):
            for path in sorted(paths):
                found.arrays[path] = found.arrays.get(path, 0) + 1

    def _state_tasks(self, pair: _TracePair, names: list[str]) -> list[Callable[[], None]]:
        for name in names:
            self._states.setdefault(name, StateErrors(name))
        # A single state, as old extractors kept it, is of the last token.
        first = 0 if pair.a.metadata.coverage == "last_position" else 1
        tasks: list[Callable[[], None]] = []
        for start, part in self._parts(names):
            lead = names[start - 1] if start else None
            tasks.append(partial(self._add_states, pair, lead, part, first))
        return tasks

    def _add_states(
        self, pair: _TracePair, lead: str | None, names: Sequence[str], first: int
    ) -> None:
        kind = layout.HIDDEN_STATES
        previous = None if lead is None else _state_pair(*pair.read(kind, lead))
        for name in names:
            states = _state_pair(*pair.read(kind, name))
            errors = self._states[name]
            shape = states.error.shape
            if errors.width not in (None, shape[1]):
                message = (
                    f"{pair.place}: {kind}/{name} is {shape[1]} wide, in other samples "
                    f"{errors.width}; expected samples of one model"
                )
                raise FidelityError(message)
            alike = previous is not None and previous.error.shape == shape
            errors.add(states, previous if alike else None, first=first)
            previous = states

    def _weight_tasks(
        self, pair: _TracePair, both: list[str], means: list[str], source: str
    ) -> list[Callable[[], None]]:
        threshold = self._report.threshold
        for kind, reference, names in (
            (layout.ATTENTIONS, layout.ATTENTIONS, both),
            (layout.ATTENTION_MEAN, source, means),
        ):
            layers = self._weights.setdefault((kind, reference), {})
            for name in names:
                layers.setdefault(name, WeightErrors(name, threshold))
        return [
            partial(self._add_weights, pair, part, both, means, source)
            for _, part in self._parts(sorted({*both, *means}))
        ]

    def _add_weights(
        self,
        pair: _TracePair,
        names: Sequence[str],
        both: Sequence[str],
        means: Sequence[str],
        source: str,
    ) -> None:
        kind = layout.ATTENTIONS
        for name in names:
            array = _read(pair.a, source, name)
            if name in means:
                self._add_mean(pair, name, array, source)
            if name in both:
                restored = _read(pair.b, kind, name)
                pair.check(kind, name, array.shape, restored.shape)
                self._weights[kind, kind][name].add(array, restored)

    def _add_mean(self, pair: _TracePair, name: str, array: NDArray[Any], source: str) -> None:
        kind = layout.ATTENTION_MEAN
        restored = _read(pair.b, kind, name)
        pair.check(kind, name, array.shape[-2:], restored.shape)
        if source == layout.ATTENTIONS:
            array = HeadMean(TypedArray.of(array)).load().values
        self._weights[kind, source][name].add(array, restored)

    def _parts(self, names: list[str]) -> list[tuple[int, list[str]]]:
        """Neighbouring layers for each worker, with the place of the first."""
        size = max(1, -(-len(names) // self._workers))
        return [(start, names[start : start + size]) for start in range(0, len(names), size)]

    def finish(self) -> None:
        """Fill the report.

        Raises
        ------
        FidelityError
            Nothing could be compared.
        """
        states = [each.result() for _, each in sorted(self._states.items())]
        if states:
            kind = layout.HIDDEN_STATES
            total = StateFidelity.total(states)
            self._report.kinds.append(KindFidelity(kind, kind, total, list(states)))
        for (kind, reference), layers in self._weights.items():
            weights = [each.result() for _, each in sorted(layers.items())]
            if weights:
                whole = WeightFidelity.total(weights)
                self._report.kinds.append(KindFidelity(kind, reference, whole, list(weights)))
        if not self._report.kinds:
            message = (
                f"{self._report.a[0]} and {self._report.b[0]} have no layer of a kind in common"
            )
            if self._report.skipped:
                message += f" that can be compared: {self._report.skipped[0]}"
            raise FidelityError(message)


def _run(task: Callable[[], None]) -> None:
    # float64 archives may hold values whose squares overflow; what is infinite then is reported so.
    with np.errstate(over="ignore", invalid="ignore"):
        task()


def _state_pair(a: NDArray[Any], b: NDArray[Any]) -> ValuePair:
    is_half = a.dtype == b.dtype == np.float16
    return ValuePair.of(a, b, np.float32 if is_half else np.float64)


def _names(trace: Trace) -> dict[str, list[str]]:
    return {kind: stored_names(trace, kind) for kind in stored_kinds(trace)}


def _common(
    names_a: dict[str, list[str]],
    names_b: dict[str, list[str]],
    kind: str,
    kind_of_a: str | None = None,
) -> list[str]:
    """Arrays of a kind that both have, in order; of another kind in A, where one is named."""
    there = set(names_b.get(kind, ()))
    return [name for name in names_a.get(kind_of_a or kind, ()) if name in there]


def _paths(names: dict[str, list[str]]) -> set[str]:
    return {f"{kind}/{name}" for kind, layers in names.items() for name in layers}
