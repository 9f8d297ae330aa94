"""Compares two archives, sample by sample."""

from __future__ import annotations

import math
import os
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.archive.opening import open as open_archive
from h5traces.archive.shards import shared_metadata
from h5traces.archive.stored_sample import MOST_AHEAD_NBYTES
from h5traces.arguments import checked
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
from h5traces.precision.attention import HeadMean
from h5traces.storage.threads import one_blas_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace
    from h5traces.paths import PathLike

# The default threshold of edges in `h5traces.graph`.
THRESHOLD: Final = 0.01
_MOST_NAMED: Final = 3

# Sample id, generation and the number of such before; the index takes their place without an id.
_SampleKey = tuple[str | None, int | None, int]
# By kind, the names of the arrays of a sample.
_Names = dict[str, list[str]]


@checked
def compare(
    a: PathLike | Iterable[PathLike],
    b: PathLike | Iterable[PathLike],
    *,
    threshold: float = THRESHOLD,
    progress: Callable[[int, int], None] | None = None,
) -> FidelityReport:
    """Measure how faithfully one archive holds what another does.

    Every array is read once, in as many threads as there are cores. Memory stays at two layers of
    both archives per thread, two samples of up to 64 MiB of either, and some sums per channel.

    Parameters
    ----------
    a
        The reference: archives, globs or folders.
    b
        What is judged, of the same samples. Its ``attention_mean`` is compared with the mean over
        heads of A's attentions (rounded to float16, averaged in float64, rounded to float32), or
        with A's ``attention_mean`` where A has no attentions.
    threshold
        An edge is where the mean weight over heads is greater.
    progress
        Called with the number of samples done and that of all samples.

    Raises
    ------
    FileNotFoundError
        Nothing matches.
    FidelityError
        They have no sample or no array in common, or arrays differ in shape; the message names
        file, sample and field. Or the threshold is not a number.
    H5TracesError
        A file is not an archive, or is damaged.

    Warns
    -----
    LossyWarning
        A lost precision itself.
    """
    if not math.isfinite(threshold):
        message = f"the threshold is {threshold}, expected a weight such as {THRESHOLD}"
        raise FidelityError(message)
    num_threads = os.cpu_count() or 1
    with (
        open_archive(a, labels=False, container="numpy") as first,
        open_archive(b, labels=False, container="numpy") as second,
        one_blas_thread,
        ThreadPoolExecutor(num_threads, thread_name_prefix="h5traces-fidelity") as pool,
    ):
        losses = shared_metadata(first._files).losses
        if losses:
            message = (
                f"{first.paths[0]}: the reference lost precision itself "
                f"({', '.join(map(str, losses))}), so errors are not those against its source"
            )
            warn(message, LossyWarning)
        report = FidelityReport([*map(str, first.paths)], [*map(str, second.paths)], threshold)
        pairs = _paired(first, second, report)
        comparison = _Comparison(report, pool, num_threads)
        for done, (index_a, index_b) in enumerate(pairs):
            comparison.add(_TracePair(first[index_a], second[index_b]))
            if progress is not None and done:
                progress(done, len(pairs))
        comparison.finish()
        if progress is not None:
            progress(len(pairs), len(pairs))
    return report


def _paired(a: Archive, b: Archive, report: FidelityReport) -> list[tuple[int, int]]:
    """Indices in A and in B of samples that belong together, in the order of A.

    They are matched by id and generation, those without an id by index. Samples that share both are
    matched in their order. Where one archive has no ids at all, all are matched by index.
    """
    keys_a, keys_b = _keys(a), _keys(b)
    if not all(any(key[0] is not None for key in keys) for keys in (keys_a, keys_b)):
        keys_a, keys_b = ([(None, None, index) for index in range(len(each))] for each in (a, b))
    places = {key: index for index, key in enumerate(keys_b)}
    found = [(index, places[key]) for index, key in enumerate(keys_a) if key in places]
    known = set(keys_a)
    report.only_in_a = Unmatched([_named(key) for key in keys_a if key not in places])
    report.only_in_b = Unmatched([_named(key) for key in keys_b if key not in known])
    if not found:
        unmatched = (report.only_in_a, report.only_in_b)
        first, second = (and_more(each.samples, _MOST_NAMED) or "none" for each in unmatched)
        message = (
            f"{and_more(a.paths, 1)} and {and_more(b.paths, 1)} have no sample in common: the "
            f"first has {first}, the second {second}; expected archives of the same samples"
        )
        raise FidelityError(message)
    has_id = {keys_a[index][0] is not None for index, _ in found}
    ways = (["id"] if True in has_id else []) + (["ordinal"] if False in has_id else [])
    report.num_samples, report.matched_by = len(found), " and ".join(ways)
    return found


def _keys(archive: Archive) -> Sequence[_SampleKey]:
    repeats: Counter[tuple[str, int | None]] = Counter()
    keys: list[_SampleKey] = []
    for index, trace in enumerate(archive):
        sample_id, generation = trace.metadata.sample_id, trace.metadata.generation_index
        if sample_id is None:
            keys.append((None, None, index))
            continue
        keys.append((sample_id, generation, repeats[sample_id, generation]))
        repeats[sample_id, generation] += 1
    return keys


def _named(key: _SampleKey) -> str:
    sample_id, generation, number = key
    if sample_id is None:
        return f"index {number}"
    name = f"{sample_id} (generation {generation})" if generation else sample_id
    return f"{name}, number {number + 1} of that name" if number else name


@dataclass(frozen=True, slots=True)
class _TracePair:
    """One sample in both archives."""

    a: Trace
    b: Trace

    @property
    def place(self) -> str:
        return f"{self.b._stored.place} ({self.b.metadata.sample_id!r})"

    def states(self, name: str) -> ValuePair:
        """The hidden states of both."""
        kind = layout.HIDDEN_STATES
        a, b = _read(self.a, kind, name), _read(self.b, kind, name)
        self.check(kind, name, a.shape, b.shape)
        is_half = a.dtype == b.dtype == np.float16
        return ValuePair.of(a, b, np.float32 if is_half else np.float64)

    def check(self, kind: str, name: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        """Raise FidelityError for arrays of different shapes."""
        if a != b:
            message = (
                f"{self.place}: {kind}/{name} has the shape {b}, but {a} in "
                f"{self.a._stored.place}; expected archives of the same samples"
            )
            raise FidelityError(message)


def _read(trace: Trace, kind: str, name: str) -> NDArray[Any]:
    array: NDArray[Any] = trace._read_layer(kind, name)
    axes = layout.KINDS[kind].axes
    if isinstance(array, list) or array.ndim != len(axes):
        message = f"{trace._stored.place}: {kind}/{name} does not have the axes {', '.join(axes)}"
        raise FidelityError(message)
    return array


class _Comparison:
    """Gathers measurements; only one thread works on a layer at a time."""

    def __init__(self, report: FidelityReport, pool: ThreadPoolExecutor, num_threads: int) -> None:
        self._report, self._pool, self._num_threads = report, pool, num_threads
        self._states: dict[str, StateErrors] = {}
        self._weights: dict[tuple[str, str], dict[str, WeightErrors]] = {}
        # Of the sample before, its arrays in memory and who compares them.
        self._arrays, self._running = ExitStack(), list[Future[None]]()

    def add(self, pair: _TracePair) -> None:
        """Read one sample, and begin to compare it once the one before is done."""
        arrays = ExitStack()
        for trace in (pair.a, pair.b):
            stored = trace._stored
            needed = stored.needed(layout.KINDS)
            arrays.enter_context(stored.read_ahead(needed, most_nbytes=MOST_AHEAD_NBYTES))
        tasks = self._tasks(pair)
        self._wait()
        self._arrays = arrays
        self._running = [self._pool.submit(_run, task) for task in tasks]

    def _wait(self) -> None:
        with self._arrays:
            for each in self._running:
                each.result()

    def _tasks(self, pair: _TracePair) -> list[Callable[[], None]]:
        names_a, names_b = _stored_names(pair.a), _stored_names(pair.b)
        objects = {*pair.a._stored.objects, *pair.b._stored.objects}
        for kind in layout.KINDS:
            in_steps = f"{kind}/{layout.STEPS_TABLE}" in objects
            if in_steps and (kind in names_a or kind in names_b):
                self._report.skipped.append(f"{pair.place}: {kind} holds generation steps")
                names_a.pop(kind, None)
                names_b.pop(kind, None)
        source = layout.ATTENTIONS if layout.ATTENTIONS in names_a else layout.ATTENTION_MEAN
        states = _common(names_a, names_b, layout.HIDDEN_STATES)
        heads = _common(names_a, names_b, layout.ATTENTIONS)
        means = _common(names_a, names_b, layout.ATTENTION_MEAN, source)
        self._note_unmatched(names_a, names_b, means)
        for name in states:
            self._states.setdefault(name, StateErrors(name))
        for kind, reference, names in (
            (layout.ATTENTIONS, layout.ATTENTIONS, heads),
            (layout.ATTENTION_MEAN, source, means),
        ):
            layers = self._weights.setdefault((kind, reference), {})
            for name in names:
                layers.setdefault(name, WeightErrors(name, self._report.threshold))
        tasks: list[Callable[[], None]] = [
            partial(self._add_states, pair, states[start - 1] if start else None, part)
            for start, part in self._parts(states)
        ]
        tasks += [
            partial(self._add_weights, pair, part, heads, means, source)
            for _, part in self._parts(sorted({*heads, *means}))
        ]
        return tasks

    def _note_unmatched(self, names_a: _Names, names_b: _Names, means: list[str]) -> None:
        """Count arrays that only one archive has, except those of A that a mean replaces."""
        paths_a, paths_b = (
            {f"{kind}/{name}" for kind, layers in names.items() for name in layers}
            for names in (names_a, names_b)
        )
        compared = {f"{layout.ATTENTION_MEAN}/{name}" for name in means}
        for found, paths in (
            (self._report.only_in_a, paths_a - paths_b - compared),
            (self._report.only_in_b, paths_b - paths_a - compared),
        ):
            for path in sorted(paths):
                found.arrays[path] = found.arrays.get(path, 0) + 1

    def _parts(self, names: list[str]) -> list[tuple[int, list[str]]]:
        """Neighbouring layers for each thread, with the place of the first."""
        size = max(1, -(-len(names) // self._num_threads))
        return [(start, names[start : start + size]) for start in range(0, len(names), size)]

    def _add_states(self, pair: _TracePair, before: str | None, names: Sequence[str]) -> None:
        # A single state, as old extractors kept it, is of the last token.
        first = 0 if pair.a.metadata.coverage == "last_position" else 1
        previous = None if before is None else pair.states(before)
        for name in names:
            states = pair.states(name)
            errors = self._states[name]
            shape = states.error.shape
            if errors.width not in (None, shape[1]):
                message = (
                    f"{pair.place}: {layout.HIDDEN_STATES}/{name} is {shape[1]} wide, in other "
                    f"samples {errors.width}; expected samples of one model"
                )
                raise FidelityError(message)
            alike = previous is not None and previous.error.shape == shape
            errors.add(states, previous if alike else None, first=first)
            previous = states

    def _add_weights(
        self,
        pair: _TracePair,
        names: Sequence[str],
        heads: Sequence[str],
        means: Sequence[str],
        source: str,
    ) -> None:
        for name in names:
            array = _read(pair.a, source, name)
            if name in means:
                kind = layout.ATTENTION_MEAN
                restored = _read(pair.b, kind, name)
                pair.check(kind, name, array.shape[-2:], restored.shape)
                is_mean = source == kind
                mean = array if is_mean else HeadMean(TypedArray.of(array)).load().values
                self._weights[kind, source][name].add(mean, restored)
            if name in heads:
                kind = layout.ATTENTIONS
                restored = _read(pair.b, kind, name)
                pair.check(kind, name, array.shape, restored.shape)
                self._weights[kind, kind][name].add(array, restored)

    def finish(self) -> None:
        """Fill the report."""
        self._wait()
        kinds = self._report.kinds
        states = [each.result() for _, each in sorted(self._states.items())]
        if states:
            kind = layout.HIDDEN_STATES
            kinds.append(KindFidelity(kind, kind, StateFidelity.total(states), states))
        for (kind, reference), layers in self._weights.items():
            weights = [each.result() for _, each in sorted(layers.items())]
            if weights:
                total = WeightFidelity.total(weights)
                kinds.append(KindFidelity(kind, reference, total, weights))
        if not kinds:
            message = (
                f"{self._report.a[0]} and {self._report.b[0]} have no layer of a kind in common"
            )
            if self._report.skipped:
                message += f" that can be compared: {self._report.skipped[0]}"
            raise FidelityError(message)


def _run(task: Callable[[], None]) -> None:
    # Squares of float64 values may overflow; the report then says that a measure is infinite.
    with np.errstate(over="ignore", invalid="ignore"):
        task()


def _stored_names(trace: Trace) -> _Names:
    """The arrays of every kind, in the order of the file; the embedding first, then by layer."""
    found: _Names = {}
    for path in trace._stored.objects:
        kind, _, name = path.partition("/")
        is_layer = layout.parse_layer_name(name) is not None
        if kind not in found and (is_layer or name == layout.EMBEDDING):
            found[kind] = trace._stored.names_with_steps(kind)
    return found


def _common(a: _Names, b: _Names, kind: str, kind_of_a: str | None = None) -> list[str]:
    """Arrays of a kind that both have, in order; A's may be of another named kind."""
    return [name for name in a.get(kind_of_a or kind, ()) if name in b.get(kind, ())]
