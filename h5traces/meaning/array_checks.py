"""What the numbers of layers show: statistics of some or all values, and findings from these.

Statistics are computed for several layers at once, from blocks ``(layers, tokens, hidden)`` or
``(layers, heads, queries, keys)`` in float32, so that small samples cost few calls of numpy and
large ones little memory. Blocks of one layer are joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from h5traces.format import layout
from h5traces.format.dtypes import TypedArray
from h5traces.format.record import StepArrays
from h5traces.meaning.checks import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from h5traces.format.record import LayerArray, LayeredArrays

Floats = NDArray[np.float32]

# Of each layer, what a quick look reads: tokens of states, heads and queries of attentions.
_QUICK_TOKENS: Final = 8
_QUICK_HEADS: Final = 4
_QUICK_QUERIES: Final = 8
# Values that become float32 at a time.
_BLOCK_VALUES: Final = 1 << 21
# A row of weights may miss or exceed its sum by so much: softmax in bfloat16, whose values are off
# by up to 0.4 %, stays within 0.5 % (benchmarks/checks.py).
ROW_TOLERANCE: Final = 0.01
# Weights above 1 by rounding alone.
_RANGE_TOLERANCE: Final = 1e-3
# A causal model gives later tokens exactly 0; coding may add a little.
_LATER_TOLERANCE: Final = 1e-3
# Of norms of neighbouring layers; benchmarks/checks.py has what models show.
_NORM_FACTOR: Final = 8.0
_NEIGHBOURS: Final = 2
_MIN_RUN: Final = 2


@dataclass(slots=True)
class _States:
    """Statistics of the states of some layers, one value per layer.

    ``alike`` says whether all tokens have the state of the first; ``norms`` are of tokens.
    """

    names: list[str]
    low: Floats
    high: Floats
    alike: NDArray[np.bool_]
    first: Floats
    norms: list[Floats]
    num_tokens: int
    num_values: int

    @classmethod
    def of(cls, names: list[str], block: Floats, first: Floats | None = None) -> _States:
        """Of a block ``(layers, tokens, hidden)`` that is not empty."""
        first = block[:, :1] if first is None else first
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.einsum("lth,lth->lt", block, block))
        return cls(
            names,
            block.min(axis=(1, 2)),
            block.max(axis=(1, 2)),
            (block == first).all(axis=(1, 2)),
            first,
            [norms],
            block.shape[1],
            block[0].size,
        )

    def add(self, other: _States) -> None:
        """Join further tokens of the same layers."""
        self.low = np.minimum(self.low, other.low)
        self.high = np.maximum(self.high, other.high)
        self.alike = self.alike & other.alike
        self.norms += other.norms
        self.num_tokens += other.num_tokens
        self.num_values += other.num_values

    def typical_norms(self) -> Floats:
        """The median over tokens, without the first, whose state is often a massive activation."""
        norms = np.concatenate(self.norms, axis=1)
        with np.errstate(invalid="ignore"):
            found: Floats = np.median(norms[:, 1:] if norms.shape[1] > 1 else norms, axis=1)
        return found


@dataclass(slots=True)
class _Weights:
    """Statistics of the attention weights of some layers, one value per layer."""

    names: list[str]
    low: Floats
    high: Floats
    # Rows of zeros; rows with another sum than 1, and the sums of these.
    num_zero: NDArray[np.int64]
    num_odd: NDArray[np.int64]
    smallest: Floats
    largest: Floats
    # Rows that attend to later tokens, the largest share of these, and what is left for others.
    num_later: NDArray[np.int64]
    later: Floats
    earlier: Floats

    @classmethod
    def of(
        cls, names: list[str], block: Floats, positions: NDArray[np.int64], tolerance: float
    ) -> _Weights:
        """Of a block ``(layers, heads, queries, keys)``; `positions` are those of the queries."""
        with np.errstate(over="ignore", invalid="ignore"):
            sums = block.sum(axis=3)
            keys = np.arange(block.shape[3])
            after = (keys > positions[:, None]).astype(np.float32)
            later = np.einsum("lhqk,qk->lhq", block, after)
            own = np.einsum("lhqk,qk->lhq", block, (keys == positions[:, None]).astype(np.float32))
            zero = ~block.any(axis=3)
            odd = (np.abs(sums - 1) > tolerance) & ~zero
            is_later = later > _LATER_TOLERANCE
            rest = np.where(is_later, sums - later - own, 0)
        axes = (1, 2)
        return cls(
            names,
            block.min(axis=(1, 2, 3)),
            block.max(axis=(1, 2, 3)),
            zero.sum(axis=axes),
            odd.sum(axis=axes),
            np.where(odd, sums, np.inf).min(axis=axes),
            np.where(odd, sums, -np.inf).max(axis=axes),
            is_later.sum(axis=axes),
            later.max(axis=axes),
            np.abs(rest).max(axis=axes),
        )

    def add(self, other: _Weights) -> None:
        """Join further rows of the same layers."""
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        self.num_zero = self.num_zero + other.num_zero
        self.num_odd = self.num_odd + other.num_odd
        self.smallest = np.minimum(self.smallest, other.smallest)
        self.largest = np.maximum(self.largest, other.largest)
        self.num_later = self.num_later + other.num_later
        self.later = np.maximum(self.later, other.later)
        self.earlier = np.maximum(self.earlier, other.earlier)


def state_findings(
    kind: str, layered: LayeredArrays, *, num_axes: int, quick: bool
) -> list[Finding]:
    """Findings about layers of `num_axes` axes, the first of them tokens."""
    found: list[Finding] = []
    norms: dict[str, float] = {}
    sites = {each.name: each.site for each in layered.arrays}
    for stats in _state_stats(layered.arrays, num_axes, quick=quick):
        typical = stats.typical_norms()
        for index, name in enumerate(stats.names):
            place = f"{kind}/{name}"
            low, high = float(stats.low[index]), float(stats.high[index])
            if low == high and stats.num_values > 1:
                found.append(Finding("constant-layer", place, _all_values(low, quick=quick)))
            elif stats.alike[index] and stats.num_tokens > 1 and name != layout.EMBEDDING:
                message = "all tokens have the same state"
                found.append(Finding("constant-layer", place, message))
            elif sites[name] != layout.SITE_FINAL_NORM:
                norms[name] = float(typical[index])
    if kind == layout.HIDDEN_STATES:
        found += _norm_findings(kind, norms)
    return found


def _all_values(value: float, *, quick: bool) -> str:
    return f"{'every value looked at' if quick else 'every value'} is {value:.6g}"


def _state_stats(arrays: Sequence[LayerArray], num_axes: int, *, quick: bool) -> Iterator[_States]:
    usable = [
        (name, TypedArray(array.values.reshape(len(array.values), -1), array.dtype))
        for name, array in _arrays_of(arrays, num_axes=num_axes)
    ]
    if quick:
        for names, block in _stacked([(name, _some(array)) for name, array in usable]):
            yield _States.of(names, block)
        return
    for name, array in usable:
        rows = max(1, _BLOCK_VALUES // array.shape[1])
        whole: _States | None = None
        for start in range(0, array.shape[0], rows):
            part = _numbers(array, slice(start, start + rows))[None]
            stats = _States.of([name], part, None if whole is None else whole.first)
            if whole is None:
                whole = stats
            else:
                whole.add(stats)
        assert whole is not None
        yield whole


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
            yield Finding(
                "norm-outlier",
                f"{kind}/{name}",
                f"the norm of a token is {'huge' if norm > high else 'tiny'} beside those of the "
                "layers around it: {span} times as large",
                span=(norm / (high if norm > high else low),) * 2,
            )


def weight_findings(
    kind: str,
    layered: LayeredArrays,
    *,
    quick: bool,
    num_axes: int,
    is_causal: bool,
    tolerance: float = ROW_TOLERANCE,
) -> list[Finding]:
    """Findings about layers of weights ``(heads, queries, keys)`` or ``(queries, keys)``.

    `is_causal` says that the sample was generated token by token; `tolerance` is how far sums of
    rows may be from 1.
    """
    found: list[Finding] = []
    # Layers with rows: whether these attend to later tokens, and only to these.
    later: dict[str, tuple[int, bool]] = {}
    num_layers = 0
    for stats in _weight_stats(layered.arrays, num_axes, quick=quick, tolerance=tolerance):
        for index, name in enumerate(stats.names):
            place = f"{kind}/{name}"
            low, high = float(stats.low[index]), float(stats.high[index])
            num_layers += 1
            if low == high == 0:
                found.append(Finding("constant-layer", place, _all_values(0, quick=quick)))
                continue
            found += _range_findings(place, low, high)
            found += _row_findings(place, stats, index)
            if stats.num_later[index]:
                only = float(stats.earlier[index]) <= _LATER_TOLERANCE
                later[name] = int(stats.num_later[index]), only
    if later and (is_causal or len(later) < num_layers or all(only for _, only in later.values())):
        found += [
            Finding("attention-not-causal", f"{kind}/{name}", _LATER[only], number)
            for name, (number, only) in later.items()
        ]
    return found


_LATER: Final = {
    False: "{number} rows attend to later tokens",
    True: "{number} rows attend to later tokens only, as if query and key were exchanged",
}


def _range_findings(place: str, low: float, high: float) -> Iterator[Finding]:
    if low < 0 or high > 1 + _RANGE_TOLERANCE:
        message = "weights lie outside 0 to 1: {span}"
        yield Finding("attention-out-of-range", place, message, span=(low, high))


def _row_findings(place: str, stats: _Weights, index: int) -> Iterator[Finding]:
    if num_zero := int(stats.num_zero[index]):
        yield Finding("attention-rows", place, "{number} rows are all 0", num_zero)
    if num_odd := int(stats.num_odd[index]):
        span = float(stats.smallest[index]), float(stats.largest[index])
        yield Finding("attention-rows", place, "{number} rows sum to {span}, not 1", num_odd, span)


def _weight_stats(
    arrays: Sequence[LayerArray], num_axes: int, *, quick: bool, tolerance: float
) -> Iterator[_Weights]:
    usable = [
        (name, TypedArray(array.values.reshape(-1, *array.shape[-2:]), array.dtype))
        for name, array in _arrays_of(arrays, num_axes=num_axes)
    ]
    if quick:
        for names, block, positions in _stacked_weights(usable):
            yield _Weights.of(names, block, positions, tolerance)
        return
    for name, array in usable:
        whole: _Weights | None = None
        for part, positions in _weight_blocks(array):
            stats = _Weights.of([name], part[None], positions, tolerance)
            if whole is None:
                whole = stats
            else:
                whole.add(stats)
        assert whole is not None
        yield whole


def _stacked_weights(
    usable: list[tuple[str, TypedArray]],
) -> Iterator[tuple[list[str], Floats, NDArray[np.int64]]]:
    """Some heads and rows of all layers, by shape."""
    by_shape: dict[tuple[int, ...], list[tuple[str, TypedArray]]] = {}
    for name, array in usable:
        by_shape.setdefault(array.shape, []).append((name, array))
    for (heads, queries, keys), alike in by_shape.items():
        chosen = slice(None, None, -(-heads // _QUICK_HEADS)), _strided(queries, _QUICK_QUERIES)
        positions = np.arange(queries)[chosen[1]] + (keys - queries)
        blocks = [(name, TypedArray(array.values[chosen], array.dtype)) for name, array in alike]
        for names, block in _stacked(blocks):
            yield names, block, positions


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


def run_lengths(layered: LayeredArrays) -> tuple[int, int]:
    """How many positions at the start and at the end have one and the same state in some layer.

    Layers that are the same everywhere, and the embedding, do not count; 0 for no run.
    """
    start = end = 0
    for name, array in _arrays_of(layered.arrays, num_axes=2):
        values = array.values
        if name == layout.EMBEDDING or len(values) < _MIN_RUN + 1:
            continue
        start = max(start, _run(values))
        end = max(end, _run(values[::-1]))
    return start, end


def _run(values: NDArray[Any]) -> int:
    """Rows at the beginning that equal the first; 0 if that is the first alone, or all rows."""
    if not np.array_equal(values[0], values[1]):
        return 0
    length = _MIN_RUN
    while length < len(values) and np.array_equal(values[0], values[length]):
        length += 1
    return length if length < len(values) else 0


def _arrays_of(arrays: Sequence[LayerArray], *, num_axes: int) -> Iterator[tuple[str, TypedArray]]:
    """The layers that are in memory, hold values and have so many axes."""
    for each in arrays:
        if isinstance(each.array, StepArrays) or len(each.array.shape) != num_axes:
            continue
        if isinstance(each.array, TypedArray) and 0 not in each.array.shape:
            yield each.name, each.array


def _some(array: TypedArray) -> TypedArray:
    return TypedArray(array.values[_strided(array.shape[0], _QUICK_TOKENS)], array.dtype)


def _strided(length: int, most: int) -> slice:
    """At most so many of `length` positions, the last one among them."""
    step = -(-length // most)
    return slice((length - 1) % step, None, step)


def _stacked(arrays: list[tuple[str, TypedArray]]) -> Iterator[tuple[list[str], Floats]]:
    """Arrays of one shape in one block ``(layers, …)``, of bounded size."""
    by_shape: dict[tuple[int, ...], list[tuple[str, TypedArray]]] = {}
    for name, array in arrays:
        by_shape.setdefault(array.shape, []).append((name, array))
    for shape, alike in by_shape.items():
        most = max(1, _BLOCK_VALUES // int(np.prod(shape)))
        for start in range(0, len(alike), most):
            part = alike[start : start + most]
            block = np.empty((len(part), *shape), dtype=np.float32)
            for index, (_, array) in enumerate(part):
                with np.errstate(over="ignore"):
                    block[index] = array.to_numpy()
            yield [name for name, _ in part], block


def _numbers(array: TypedArray, part: Any) -> Floats:
    with np.errstate(over="ignore"):
        return TypedArray(array.values[part], array.dtype).to_numpy().astype(np.float32, copy=False)
