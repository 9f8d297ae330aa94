"""Features of the samples of an archive, computed in threads and in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.archive.stored_sample import MOST_AHEAD_NBYTES
from h5traces.archive.token_axis import NoAnswerError, TokenAxis
from h5traces.arguments import checked
from h5traces.errors import FeatureError, warn
from h5traces.features.components import fit_components
from h5traces.features.reductions import FEATURES, RowMeans, definition_of
from h5traces.format import layout
from h5traces.format.dtypes import widened
from h5traces.format.kinds import KEYS, QUERIES
from h5traces.format.text import as_names, counted
from h5traces.meaning.sample_checks import row_tolerance

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace
    from h5traces.features.components import PrincipalComponents
    from h5traces.features.reductions import FeatureDefinition

# Samples that may be computed ahead of the one in use, per worker.
_AHEAD_PER_WORKER = 2
# Values of a layer that become float32 at a time.
_SMALL = 1 << 22


@dataclass(slots=True)
class SampleFeatures:
    """The features of one sample.

    Attributes
    ----------
    index
        Index in the archive.
    values
        By name of feature, float32 ``(layers, width)``; width is hidden size, or heads.
    problems
        Which values are NaN or infinite, one line each; empty if all are finite.
    odd_sums
        The least and the largest sum of attention rows that do not sum to 1, which features took
        as shares of their sum; None if all do.
    """

    index: int
    values: dict[str, NDArray[np.float32]]
    problems: list[str] = field(default_factory=list)
    odd_sums: tuple[float, float] | None = None


def definitions_of(names: str | Iterable[str]) -> list[FeatureDefinition]:
    """The definitions of features by name, each once."""
    wanted = list(dict.fromkeys(as_names(names)))
    found = {name: definition_of(name) for name in wanted}
    unknown = [name for name, each in found.items() if each is None]
    if unknown or not wanted:
        message = f"no feature is called {', '.join(unknown)}" if unknown else "no feature is named"
        msg = f"{message}; there are {', '.join(FEATURES)}"
        raise FeatureError(msg)
    return [each for each in found.values() if each is not None]


@checked
def iterate_features(
    archive: Archive,
    names: Iterable[str],
    *,
    layers: Iterable[int] | None = None,
    workers: int | None = None,
) -> Iterator[SampleFeatures]:
    """The features of every sample, in order.

    Memory stays at the arrays of one sample, or at one of them where they take more than 64 MB, and
    the features of a few samples per worker.

    Parameters
    ----------
    archive
        The archive, or a view of it.
    names
        Features, of `FEATURES`; those of states also of another kind, ``mlp_output.last_token``.
    layers
        The model's own layer numbers; all that are stored by default.
    workers
        Threads; one per core by default.

    Raises
    ------
    FeatureError
        A feature does not exist, or is of a kind that is not stored, or a sample cannot have it:
        its layers differ in width, it holds generation steps, or its answer cannot be cut out.
    LayerIndexError
        A layer is not stored.
    """
    wanted = definitions_of(names)
    view = archive if layers is None else archive.select(layers=layers)
    if not view.layers:
        message = f"{archive!r}: no layer is stored, so there are no features"
        raise FeatureError(message)
    check_stored(view, wanted)
    count = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(count, thread_name_prefix="h5traces-features") as pool:
        running: deque[Future[SampleFeatures]] = deque()
        try:
            for index in range(len(view)):
                running.append(pool.submit(_sample_features, view, index, wanted))
                if len(running) > _AHEAD_PER_WORKER * count:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for each in running:
                each.cancel()


def check_stored(archive: Archive, wanted: Sequence[FeatureDefinition]) -> None:
    """Raise FeatureError for features of a kind that no sample has."""
    stored = {kind for file in archive._files for kind in file.store.kinds}
    if layout.ATTENTION_MEAN in stored or {QUERIES, KEYS} <= stored:
        stored.add(layout.ATTENTIONS)  # averaged, or recomputed: samples say how to read them
    for each in wanted:
        if each.kind not in stored:
            message = (
                f"{archive!r}: {each.name} is made of {each.kind}, which is not stored; stored: "
                f"{', '.join(sorted(stored)) or 'no kinds'}"
            )
            raise FeatureError(message)


@checked
def compute_features(
    archive: Archive,
    names: Iterable[str],
    *,
    layers: Iterable[int] | None = None,
    workers: int | None = None,
) -> dict[str, NDArray[np.float32]]:
    """The features of all samples in memory: by name, ``(samples, layers, width)``.

    The row of a sample without the feature is NaN; `iterate_features` says why. `extract_features`
    writes more than fits into memory.

    Raises
    ------
    FeatureError, LayerIndexError
        As `iterate_features`; or samples differ in width, or all are empty.
    """
    columns: dict[str, list[NDArray[np.float32]]] = {}
    sums = RowSums()
    for each in iterate_features(archive, names, layers=layers, workers=workers):
        sums.add(each)
        for name, values in each.values.items():
            columns.setdefault(name, []).append(values)
    if sums.note:
        warn(f"{archive!r}: {sums.note}", UserWarning)
    widths = {name: max(each.shape[1] for each in rows) for name, rows in columns.items()}
    return {
        name: np.stack([fitted(each, widths[name], f"{archive!r}: {name}") for each in rows])
        for name, rows in columns.items()
    }


@dataclass(slots=True)
class RowSums:
    """Sums of attention rows that are not 1, over samples."""

    num_samples: int = 0
    low: float = np.inf
    high: float = -np.inf

    def add(self, sample: SampleFeatures) -> None:
        """Add the values of a sample."""
        if sample.odd_sums is not None:
            self.num_samples += 1
            self.low = min(self.low, sample.odd_sums[0])
            self.high = max(self.high, sample.odd_sums[1])

    @property
    def note(self) -> str:
        """One sentence; empty if all rows sum to 1."""
        if not self.num_samples:
            return ""
        return (
            f"{counted(self.num_samples, 'sample')} with attention rows that do not sum to 1, but "
            f"to {self.low:.3g} to {self.high:.3g}, as with learned attention sinks; entropy and "
            "sink mass are of these rows divided by their sum"
        )


def fitted(values: NDArray[np.float32], width: int, place: str) -> NDArray[np.float32]:
    """A sample's values; NaN of the right width without any."""
    if values.shape[1] == width:
        return values
    if values.shape[1]:
        message = f"{place}: has the width {values.shape[1]}, other samples have {width}"
        raise FeatureError(message)
    return np.full((values.shape[0], width), np.nan, dtype=np.float32)


def _sample_features(
    archive: Archive, index: int, wanted: Sequence[FeatureDefinition]
) -> SampleFeatures:
    trace = archive[index]
    found = SampleFeatures(index, {})
    kinds = list(dict.fromkeys(each.kind for each in wanted))
    stored = trace._stored
    with (
        archive.fetched([index], kinds=kinds),
        stored.read_ahead(stored.needed(kinds), 1, most_nbytes=MOST_AHEAD_NBYTES),
    ):
        for kind in kinds:
            _add_kind(found, trace, archive.layers, [each for each in wanted if each.kind == kind])
    return found


def _add_kind(
    found: SampleFeatures, trace: Trace, layers: Sequence[int], wanted: Sequence[FeatureDefinition]
) -> None:
    """Add the features of one kind of array; each layer is read once."""
    kind = wanted[0].kind
    rows: dict[str, list[NDArray[np.float32]]] = {each.name: [] for each in wanted}
    sums: list[float] = []
    for layer in layers:
        if trace._stored.recomputes(kind):
            of_layer = _recomputed(trace, layer, wanted, sums)
        else:
            of_layer = _reduced(trace, layer, wanted, sums)
        for name, values in of_layer.items():
            rows[name].append(values)
    if sums:
        found.odd_sums = min(sums), max(sums)
    for name, of_layers in rows.items():
        widths = sorted({len(part) for part in of_layers})
        if len(widths) > 1:
            message = (
                f"{place_of(trace)}: layers differ in width ({widths}) in {name}; choose layers of "
                "one width"
            )
            raise FeatureError(message)
        found.values[name] = np.stack(of_layers)
        wrong = [
            layer
            for layer, part in zip(layers, of_layers, strict=True)
            if not (len(part) and np.isfinite(part).all())
        ]
        if wrong:
            where = f"layers {wrong}" if len(wrong) < len(layers) else "all layers"
            found.problems.append(f"{place_of(trace)}: {name} of {where} is NaN or infinite")


def _reduced(
    trace: Trace, layer: int, wanted: Sequence[FeatureDefinition], sums: list[float]
) -> dict[str, NDArray[np.float32]]:
    """The features of a layer that is stored; sums of rows that are not 1 join `sums`."""
    kind = wanted[0].kind
    whole = _layer(trace, layer, kind)
    if whole is None:
        return {each.name: np.zeros(0, np.float32) for each in wanted}
    array, prompt_len = _real(whole, trace, kind, wanted)
    if any(each.scales_rows for each in wanted):
        if array.size <= _SMALL:
            # Once, and not for the sums and again for each feature.
            array = widened(array).astype(np.float32, copy=False)
        sums += _odd_sums(array, trace)
    with np.errstate(invalid="ignore", over="ignore"):
        return {each.name: each.reduce(array, prompt_len) for each in wanted}


def _recomputed(
    trace: Trace, layer: int, wanted: Sequence[FeatureDefinition], sums: list[float]
) -> dict[str, NDArray[np.float32]]:
    """The same of attention that follows from queries and keys, some rows at a time."""
    stored = trace._stored
    stored.check_layer(layer, layout.ATTENTIONS)
    name = stored.array_name(QUERIES, layer)
    num_heads, *square = stored.attention_shape(name)
    axis, prompt_len = _axis(trace, layout.ATTENTIONS, (num_heads, *square), wanted)
    rows = np.arange(square[0])[axis.rows]
    means = {
        each.name: RowMeans(each.of_rows, num_heads, prompt_len)
        for each in wanted
        if each.of_rows is not None
    }
    scaled = any(each.scales_rows for each in wanted)
    done = 0
    for some, block in stored.attention_blocks(name, rows):
        weights = block if axis.mask is None else block[:, :, axis.keys]
        sums += _odd_sums(weights, trace) if scaled else ()
        queries = np.arange(len(some)) + done
        done += len(some)
        for each in means.values():
            each.add(weights, queries)
    return {name: each.value for name, each in means.items()}


def _real(
    array: NDArray[Any], trace: Trace, kind: str, wanted: Sequence[FeatureDefinition]
) -> tuple[NDArray[Any], int]:
    """An array without padding, and the length of the prompt in it where a feature needs it."""
    axes = trace._stored.axes(kind)
    axis, prompt_len = _axis(trace, kind, array.shape, wanted)
    for number, name in enumerate(axes if axis.mask is not None else ()):
        if name in ("token", "query", "key"):
            chosen = axis.keys if name == "key" else axis.rows
            array = array[(slice(None),) * number + (chosen,)]
    return array, prompt_len


def _axis(
    trace: Trace, kind: str, shape: tuple[int, ...], wanted: Sequence[FeatureDefinition]
) -> tuple[TokenAxis, int]:
    """The token axis of arrays of a shape, and the prompt's length where a feature needs it."""
    axes = trace._stored.axes(kind)
    axis = TokenAxis.of(trace, axes, shape)
    if axis is None or (axes[0] != "token" and kind != layout.ATTENTIONS) or len(axes) == 1:
        message = (
            f"{place_of(trace)}: {kind} has the axes {', '.join(axes)}; expected token and one "
            "more, of which features are made"
        )
        raise FeatureError(message)
    needing = [each.name for each in wanted if each.needs_prompt]
    try:
        return axis, axis.prompt_len(trace) if needing else 0
    except NoAnswerError as error:
        message = f"{place_of(trace)}: {', '.join(needing)}: {error}; leave such samples out"
        raise FeatureError(message) from error


def _odd_sums(array: NDArray[Any], trace: Trace) -> list[float]:
    """The least and the largest sum of rows that sum to neither 1, up to rounding, nor 0."""
    sums = array.sum(axis=-1, dtype=np.float32)
    tolerance = row_tolerance(trace._stored.file.metadata.losses, array.shape[-1])
    odd = sums[(np.abs(sums - 1) > tolerance) & (sums != 0)]
    return [float(odd.min()), float(odd.max())] if odd.size else []


def _layer(trace: Trace, layer: int, kind: str) -> NDArray[Any] | None:
    """A layer's array; None if the sample holds nothing of the kind."""
    if not trace._stored.stored_layers(kind):
        trace._stored.check_heads(kind)
        return None
    trace._stored.check_layer(layer, kind)
    name = trace._stored.array_name(kind, layer)
    array: NDArray[Any] = trace._stored.read_layer(kind, name)
    axes = trace._stored.axes(kind)
    in_steps = isinstance(array, (list, tuple))
    if in_steps or array.ndim != len(axes):
        what = "generation steps" if in_steps else f"the shape {array.shape}"
        message = (
            f"{place_of(trace)}: layer {layer} of {kind} has {what}, expected the axes "
            f"{', '.join(axes)}; leave these samples out"
        )
        raise FeatureError(message)
    return array


def place_of(trace: Trace) -> str:
    """File, sample and id, for messages."""
    return f"{trace._stored.place} ({trace.metadata.sample_id!r})"


@checked
def fit_pca(
    archive: Archive, layer: int, num_components: int, *, indices: Iterable[int] | None = None
) -> PrincipalComponents:
    """Principal components of the hidden states of one layer, over all tokens of all samples.

    Parameters
    ----------
    archive
        The archive.
    layer
        The model's own layer number.
    num_components
        How many directions to return.
    indices
        Samples to fit on, such as those of a training split; all by default.

    Raises
    ------
    FeatureError
        A sample has NaN or infinite values or another width, which the message names; or more
        components are asked for than the tokens have.
    MissingDependencyError
        scikit-learn is not installed.
    """
    chosen = range(len(archive)) if indices is None else indices
    return fit_components(_token_states(archive, layer, chosen), num_components)


def _token_states(archive: Archive, layer: int, indices: Iterable[int]) -> Iterator[NDArray[Any]]:
    width = None
    for index in indices:
        trace = archive[index]
        states = _layer(trace, layer, layout.HIDDEN_STATES)
        if states is None:
            continue
        if not np.isfinite(states).all():
            message = f"{place_of(trace)}: layer {layer} holds NaN or infinite values"
            raise FeatureError(message)
        width = width or states.shape[1]
        if states.shape[1] != width:
            message = (
                f"{place_of(trace)}: layer {layer} is {states.shape[1]} wide, in other samples "
                f"{width}"
            )
            raise FeatureError(message)
        yield states
