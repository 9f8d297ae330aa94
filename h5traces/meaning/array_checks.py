"""Statistics of some or all values of layers, and findings from these.

Statistics are of several layers at once, from blocks ``(layers, tokens, hidden)`` or ``(layers,
heads, queries, keys)`` in float32: small samples cost few calls of numpy, large ones little memory.
A quick look takes one such block of some rows of all layers; a full one joins blocks of each layer.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from h5traces.format import layout
from h5traces.format.dtypes import TypedArray, count_not_finite
from h5traces.format.record import StepArrays
from h5traces.meaning.checks import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from h5traces.format.record import ArraySource, LayeredArrays

    # Applies a function to every layer, in threads or not, in order.
    Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

Floats = NDArray[np.float32]

# Of each layer, what a quick look reads at most: tokens and channels of states, heads and queries
# of attentions.
_QUICK_TOKENS: Final = 8
_QUICK_CHANNELS: Final = 256
_QUICK_HEADS: Final = 4
_QUICK_QUERIES: Final = 8
# Values that become float32 at a time.
_BLOCK_VALUES: Final = 1 << 20
# A row of weights may miss or exceed its sum by this much: softmax in bfloat16, with values off by
# up to 0.4 %, stays within it (benchmarks/checks.py).
ROW_TOLERANCE: Final = 0.01
# Weights above 1 by rounding alone.
_RANGE_TOLERANCE: Final = 1e-3
# A causal model gives later tokens exactly 0; lossy tiers may add a little.
_LATER_TOLERANCE: Final = 1e-3
# Of norms of neighbouring layers; benchmarks/checks.py has what models show.
_NORM_FACTOR: Final = 8.0
_NEIGHBOURS: Final = 2
_MIN_RUN: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Layers of one kind and how they are looked at.

    Attributes
    ----------
    kind, layered
        Their kind, and their arrays.
    axes
        Of one array.
    mapper
        For a full look, at every value: how a function is applied to each layer. None for a quick
        look, which reads only what is in memory.
    mask
        Which positions are tokens, ``(positions,)``; None if all are. Rows and columns of
        weights at padded ends are not looked at: models fill them as they like.
    """

    kind: str
    layered: LayeredArrays
    axes: tuple[str, ...]
    mapper: Mapper | None = None
    mask: NDArray[Any] | None = None

    @property
    def is_quick(self) -> bool:
        """Whether only some rows are looked at."""
        return self.mapper is None

    def arrays(self) -> list[tuple[str, ArraySource]]:
        """Names and arrays with these axes and at least one value."""
        return [
            (each.name, each.array)
            for each in self.layered.arrays
            if not isinstance(each.array, StepArrays)
            and len(each.array.shape) == len(self.axes)
            and 0 not in each.array.shape
            and (isinstance(each.array, TypedArray) or not self.is_quick)
        ]

    def weights(self, source: ArraySource) -> TypedArray:
        """Weights ``(heads, queries, keys)`` of tokens; means over heads are one head."""
        array = source.load()
        values = array.values.reshape(-1, *array.shape[-2:])
        kept = np.flatnonzero(() if self.mask is None else self.mask)
        if self.mask is not None and len(kept) and values.shape[1:] == 2 * self.mask.shape:
            ends = slice(int(kept[0]), int(kept[-1]) + 1)
            values = values[:, ends, ends]
        return TypedArray(values, array.dtype)

    def all_values(self, value: float) -> str:
        """The message of a layer that is constant."""
        return f"{'every value looked at' if self.is_quick else 'every value'} is {value:.6g}"


@dataclass(slots=True)
class _States:
    """Statistics of the states of some layers, one value per layer.

    ``alike`` says whether all tokens have the state of the ``first``; ``norms`` are of tokens.
    """

    low: Floats
    high: Floats
    alike: NDArray[np.bool_]
    first: Floats
    norms: Floats

    @classmethod
    def of(cls, block: Floats, first: Floats | None = None) -> _States:
        """Of a block ``(layers, tokens, hidden)`` that is not empty."""
        first = block[:, :1] if first is None else first
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.einsum("lth,lth->lt", block, block))
        low, high = block.min(axis=(1, 2)), block.max(axis=(1, 2))
        # Most layers differ in one token already.
        alike = (block[:, -1:] == first).all(axis=(1, 2))
        if alike.any():
            alike = (block == first).all(axis=(1, 2))
        return cls(low, high, alike, first, norms)

    def joined(self, other: _States) -> _States:
        """With further tokens of the same layers."""
        return _States(
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.alike & other.alike,
            self.first,
            np.concatenate((self.norms, other.norms), axis=1),
        )

    def typical_norms(self) -> Floats:
        """The median over tokens, without the first, whose state is often a massive activation."""
        norms = self.norms[:, 1:] if self.norms.shape[1] > 1 else self.norms
        # np.median takes longer to load than all checks of a small batch.
        found: Floats = np.sort(norms, axis=1)[:, norms.shape[1] // 2]
        return found


@dataclass(frozen=True, slots=True)
class _StateLayer:
    """Statistics of one layer of states; runs are positions at either end that share one state."""

    name: str
    low: float
    high: float
    is_alike: bool
    norm: float
    runs: tuple[int, int]
    not_finite: tuple[int, int] = (0, 0)


def state_findings(layers: Layers, *, is_masked: bool = False) -> list[Finding]:
    """Findings about states, whose first axis is that of tokens.

    Padding is suspected in hidden states only, and not where a mask marks it (`is_masked`).
    """
    found: list[Finding] = []
    norms: dict[str, float] = {}
    sites = {each.name: each.site for each in layers.layered.arrays}
    sizes = {name: array.shape for name, array in layers.arrays()}
    runs = [0, 0]
    for each in (_quick_states if layers.mapper is None else _full_states)(layers):
        place, name = f"{layers.kind}/{each.name}", each.name
        found += not_finite_findings(place, *each.not_finite)
        if each.low == each.high and math.prod(sizes[name]) > 1:
            found.append(Finding("constant-layer", place, layers.all_values(each.low)))
            continue
        if name == layout.EMBEDDING:
            continue
        if each.is_alike and sizes[name][0] > 1:
            found.append(Finding("constant-layer", place, "all tokens have the same state"))
            continue
        runs = [max(pair) for pair in zip(runs, each.runs, strict=True)]
        if sites[name] != layout.SITE_FINAL_NORM:
            norms[name] = each.norm
    if layers.kind == layout.HIDDEN_STATES:
        found += _norm_findings(layers.kind, norms)
        found += [] if is_masked else _run_findings(layers.kind, *runs)
    return found


def _quick_states(layers: Layers) -> Iterator[_StateLayer]:
    runs: dict[str, tuple[int, int]] = {}
    some = []
    for name, source in layers.arrays():
        array = _rows(source.load())
        values = array.values
        runs[name] = _run(values), _run(values[::-1])
        some.append((name, TypedArray(values[_some(values.shape)], array.dtype)))
    for names, block in _stacked(some):
        yield from _state_layers(names, _States.of(block), [runs[name] for name in names])


def _full_states(layers: Layers) -> Iterable[_StateLayer]:
    def look(group: list[tuple[str, ArraySource]]) -> list[_StateLayer]:
        names = [name for name, _ in group]
        arrays = [_rows(source.load()) for _, source in group]
        if len(group) == 1:
            (array,) = arrays
            size = max(1, _BLOCK_VALUES // array.shape[1])
            stats = _States.of(_numbers(array, slice(size))[None])
            for start in range(size, array.shape[0], size):
                part = _numbers(array, slice(start, start + size))[None]
                stats = stats.joined(_States.of(part, stats.first))
        else:
            stats = _States.of(_block(arrays))
        runs = [(_run(array.values), _run(array.values[::-1])) for array in arrays]
        return list(_state_layers(names, stats, runs, _not_finite(arrays, stats)))

    assert layers.mapper is not None
    return itertools.chain.from_iterable(layers.mapper(look, _groups(layers.arrays())))


def _groups(arrays: list[tuple[str, ArraySource]]) -> Iterator[list[tuple[str, ArraySource]]]:
    """Arrays of one shape that follow each other, as many as make one block."""
    for shape, alike in itertools.groupby(arrays, lambda each: each[1].shape):
        most = max(1, _BLOCK_VALUES // math.prod(shape))
        while group := list(itertools.islice(alike, most)):
            yield group


def _block(arrays: list[TypedArray]) -> Floats:
    """Arrays of one shape, one after the other, in float32."""
    block = np.empty((len(arrays), *arrays[0].shape), dtype=np.float32)
    with np.errstate(over="ignore"):
        for index, array in enumerate(arrays):
            block[index] = array.to_numpy()
    return block


def _not_finite(arrays: list[TypedArray], stats: _States | _Weights) -> list[tuple[int, int]]:
    """Numbers of NaN and infinite values of each array; a range that is finite has none."""
    is_finite = np.isfinite(stats.low) & np.isfinite(stats.high)
    return [
        (0, 0) if fits else count_not_finite(array)
        for array, fits in zip(arrays, is_finite.tolist(), strict=True)
    ]


def _state_layers(
    names: list[str],
    stats: _States,
    runs: list[tuple[int, int]],
    not_finite: list[tuple[int, int]] | None = None,
) -> Iterator[_StateLayer]:
    columns = (stats.low, stats.high, stats.alike, stats.typical_norms())
    numbers, rows = not_finite or [(0, 0)] * len(names), (each.tolist() for each in columns)
    return itertools.starmap(_StateLayer, zip(names, *rows, runs, numbers, strict=True))


def _rows(array: TypedArray) -> TypedArray:
    if array.values.ndim == 2:
        return array
    return TypedArray(array.values.reshape(len(array.values), -1), array.dtype)


def not_finite_findings(place: str, num_nan: int, num_inf: int) -> Iterator[Finding]:
    """Findings about values of an array that are not finite, by their numbers."""
    if num_nan:
        yield Finding("not-finite", place, "{number NaN value}", num_nan)
    if num_inf:
        yield Finding("not-finite", place, "{number infinite value}", num_inf)


def _norm_findings(kind: str, norms: dict[str, float]) -> Iterator[Finding]:
    """Layers whose norm is far from those of the layers on both sides."""
    numbered = sorted(
        (number, name, norm)
        for name, norm in norms.items()
        if (number := layout.parse_layer_name(name)) is not None and 0 < norm < np.inf
    )
    for index, (_, name, norm) in enumerate(numbered):
        before = [each for *_, each in numbered[max(0, index - _NEIGHBOURS) : index]]
        after = [each for *_, each in numbered[index + 1 : index + 1 + _NEIGHBOURS]]
        if not before or not after:
            continue
        low, high = min(before + after), max(before + after)
        if norm > _NORM_FACTOR * high or norm * _NORM_FACTOR < low:
            is_huge = norm > high
            yield Finding(
                "norm-outlier",
                f"{kind}/{name}",
                f"the norms of tokens are {'huge' if is_huge else 'tiny'}: {{span}} times those of "
                "the layers around",
                span=(norm / (high if is_huge else low),) * 2,
            )


def _run_findings(kind: str, start: int, end: int) -> Iterator[Finding]:
    for number, where in ((start, "begins"), (end, "ends")):
        if number:
            message = f"{where} with {{number position}} of the same state"
            yield Finding("padding-suspected", kind, message, number)


def _run(values: NDArray[Any]) -> int:
    """Rows at the beginning that equal the first; 0 if that is the first alone, or all rows."""
    if len(values) <= _MIN_RUN or not _same(values[0], values[1]):
        return 0
    length = _MIN_RUN
    while length < len(values) and _same(values[0], values[length]):
        length += 1
    return length if length < len(values) else 0


def _same(left: NDArray[Any], right: NDArray[Any]) -> bool:
    """Whether two rows have the same bits; most differ in their first value."""
    return left[:1].tobytes() == right[:1].tobytes() and left.tobytes() == right.tobytes()


@dataclass(slots=True)
class _Weights:
    """Statistics of the attention weights of some layers, one value per layer."""

    low: Floats
    high: Floats
    # Rows of zeros; rows with another sum than 1, and the sums of these.
    num_zero: NDArray[np.int64]
    num_odd: NDArray[np.int64]
    smallest: Floats
    largest: Floats
    # Rows that attend to later tokens, and the most that one of these gives to earlier ones.
    num_later: NDArray[np.int64]
    earlier: Floats

    @classmethod
    def of(cls, block: Floats, positions: NDArray[np.int64], tolerance: float) -> _Weights:
        """Of a block ``(layers, heads, queries, keys)``; `positions` are those of the queries."""
        with np.errstate(over="ignore", invalid="ignore"):
            sums = block.sum(axis=3)
            later, earlier = _later(block, positions)
            odd = np.abs(sums - 1) > tolerance
        none = np.zeros(len(block), dtype=np.int64)
        found = cls(
            block.min(axis=(1, 2, 3)),
            block.max(axis=(1, 2, 3)),
            num_zero=none,
            num_odd=none,
            smallest=np.full(len(block), np.inf, dtype=np.float32),
            largest=np.full(len(block), -np.inf, dtype=np.float32),
            num_later=none if later is None else later.sum(axis=(1, 2)),
            earlier=none.astype(np.float32) if earlier is None else earlier.max(axis=(1, 2)),
        )
        if odd.any():
            zero = ~block.any(axis=3)
            odd &= ~zero
            found.num_zero, found.num_odd = zero.sum(axis=(1, 2)), odd.sum(axis=(1, 2))
            found.smallest = np.where(odd, sums, np.inf).min(axis=(1, 2))
            found.largest = np.where(odd, sums, -np.inf).max(axis=(1, 2))
        return found

    def joined(self, other: _Weights) -> _Weights:
        """With further rows of the same layers."""
        return _Weights(
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.num_zero + other.num_zero,
            self.num_odd + other.num_odd,
            np.minimum(self.smallest, other.smallest),
            np.maximum(self.largest, other.largest),
            self.num_later + other.num_later,
            np.maximum(self.earlier, other.earlier),
        )


def _later(
    block: Floats, positions: NDArray[np.int64]
) -> tuple[NDArray[np.bool_] | None, Floats | None]:
    """Which rows attend to later tokens, and these tokens' weights; None if none do."""
    keys = np.arange(block.shape[3])
    after = (keys > positions[:, None]).astype(np.float32)
    later = np.einsum("lhqk,qk->lhq", block, after) > _LATER_TOLERANCE
    if not later.any():
        return None, None
    before = (keys < positions[:, None]).astype(np.float32)
    return later, np.einsum("lhqk,qk->lhq", block, before) * later


@dataclass(frozen=True, slots=True)
class _WeightLayer:
    """Statistics of one layer of weights, see `_Weights`."""

    name: str
    low: float
    high: float
    num_zero: int
    num_odd: int
    smallest: float
    largest: float
    num_later: int
    earlier: float
    not_finite: tuple[int, int] = (0, 0)


def weight_findings(
    layers: Layers, *, is_causal: bool, tolerance: float = ROW_TOLERANCE
) -> list[Finding]:
    """Findings about weights, whose last axes are queries and keys.

    `is_causal` says that the sample was generated token by token; `tolerance` is how far sums of
    rows may be from 1.
    """
    found: list[Finding] = []
    # Layers with rows that attend to later tokens: how many do, and whether to these only.
    later: dict[str, tuple[int, bool]] = {}
    num_layers = 0
    looks = _quick_weights if layers.is_quick else _full_weights
    for each in looks(layers, tolerance):
        place = f"{layers.kind}/{each.name}"
        found += not_finite_findings(place, *each.not_finite)
        if each.low == each.high == 0:
            found.append(Finding("constant-layer", place, layers.all_values(0)))
            continue
        num_layers += 1
        found += _weight_layer_findings(place, each)
        if each.num_later:
            later[each.name] = each.num_later, each.earlier <= _LATER_TOLERANCE
    if is_causal or len(later) < num_layers or all(only for _, only in later.values()):
        found += [
            Finding("attention-not-causal", f"{layers.kind}/{name}", _LATER[only], number)
            for name, (number, only) in later.items()
        ]
    return found


_LATER: Final = {
    False: "{number row} with attention to later tokens",
    True: "{number row} with attention to later tokens and none to earlier ones, as if query and "
    "key were exchanged",
}


def _weight_layer_findings(place: str, layer: _WeightLayer) -> Iterator[Finding]:
    if layer.low < 0 or layer.high > 1 + _RANGE_TOLERANCE:
        message, span = "weights from {span}, expected 0 to 1", (layer.low, layer.high)
        yield Finding("attention-out-of-range", place, message, span=span)
    if layer.num_zero:
        yield Finding("attention-rows", place, "{number row} of zeros", layer.num_zero)
    if layer.num_odd:
        message, span = "{number row} with a sum of {span}, not 1", (layer.smallest, layer.largest)
        yield Finding("attention-rows", place, message, layer.num_odd, span)


def _quick_weights(layers: Layers, tolerance: float) -> Iterator[_WeightLayer]:
    by_shape: dict[tuple[int, ...], list[tuple[str, TypedArray]]] = {}
    for name, source in layers.arrays():
        array = layers.weights(source)
        by_shape.setdefault(array.shape, []).append((name, array))
    for (heads, queries, keys), alike in by_shape.items():
        chosen = slice(None, None, -(-heads // _QUICK_HEADS)), _strided(queries, _QUICK_QUERIES)
        positions = np.arange(queries)[chosen[1]] + (keys - queries)
        some = [(name, TypedArray(array.values[chosen], array.dtype)) for name, array in alike]
        for names, block in _stacked(some):
            yield from _weight_layers(names, _Weights.of(block, positions, tolerance))


def _full_weights(layers: Layers, tolerance: float) -> Iterable[_WeightLayer]:
    def look(group: list[tuple[str, ArraySource]]) -> list[_WeightLayer]:
        names = [name for name, _ in group]
        arrays = [layers.weights(source) for _, source in group]
        if len(group) == 1:
            parts = (
                _Weights.of(block[None], positions, tolerance)
                for block, positions in _weight_blocks(arrays[0])
            )
            stats = functools.reduce(_Weights.joined, parts)
        else:
            _, queries, keys = arrays[0].shape
            positions = np.arange(queries) + (keys - queries)
            stats = _Weights.of(_block(arrays), positions, tolerance)
        return list(_weight_layers(names, stats, _not_finite(arrays, stats)))

    assert layers.mapper is not None
    return itertools.chain.from_iterable(layers.mapper(look, _groups(layers.arrays())))


def _weight_layers(
    names: list[str], stats: _Weights, not_finite: list[tuple[int, int]] | None = None
) -> Iterator[_WeightLayer]:
    columns = (getattr(stats, each).tolist() for each in _Weights.__slots__)
    numbers = not_finite or [(0, 0)] * len(names)
    return itertools.starmap(_WeightLayer, zip(names, *columns, numbers, strict=True))


def _weight_blocks(array: TypedArray) -> Iterator[tuple[Floats, NDArray[np.int64]]]:
    """All heads and rows, some at a time, with the positions of the queries."""
    num_heads, num_queries, num_keys = array.shape
    heads = max(1, _BLOCK_VALUES // (num_queries * num_keys))
    rows = max(1, _BLOCK_VALUES // num_keys)
    for head in range(0, num_heads, heads):
        for row in range(0, num_queries, rows):
            queries = slice(row, min(row + rows, num_queries))
            block = _numbers(array, (slice(head, head + heads), queries))
            yield block, np.arange(queries.start, queries.stop) + (num_keys - num_queries)


def _some(shape: tuple[int, ...]) -> tuple[slice, slice]:
    return _strided(shape[0], _QUICK_TOKENS), _strided(shape[1], _QUICK_CHANNELS)


def _strided(length: int, most: int) -> slice:
    """At most `most` of `length` positions, the last one among them."""
    step = -(-length // most)
    return slice((length - 1) % step, None, step)


def _stacked(arrays: list[tuple[str, TypedArray]]) -> Iterator[tuple[list[str], Floats]]:
    """Arrays of one shape in one block ``(layers, …)``, of bounded size."""
    by_shape: dict[tuple[int, ...], list[tuple[str, TypedArray]]] = {}
    for name, array in arrays:
        by_shape.setdefault(array.shape, []).append((name, array))
    for shape, alike in by_shape.items():
        most = max(1, _BLOCK_VALUES // math.prod(shape))
        for start in range(0, len(alike), most):
            part = alike[start : start + most]
            yield [name for name, _ in part], _block([array for _, array in part])


def _numbers(array: TypedArray, part: Any) -> Floats:
    with np.errstate(over="ignore"):
        return TypedArray(array.values[part], array.dtype).to_numpy().astype(np.float32, copy=False)
