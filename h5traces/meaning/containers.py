"""Takes the fields of layered kinds apart: one array per layer, from any container.

Lists and tuples, dicts by layer number, arrays and tensors of all layers with the layers outermost
or behind the tokens, batches of one, one vector per layer, and lists of generation steps with
either the layers or the steps outermost. Only shapes are looked at, never values.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.format.record import SourceForm
from h5traces.format.values import TorchValue
from h5traces.meaning.axes import BATCH, LAYER, STEPS_FIRST, data_of, split, view
from h5traces.meaning.checks import Finding
from h5traces.meaning.options import A_MAPPING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Array = np.ndarray | TorchValue
# The embedding among the keys of a dict.
_EMBEDDING_KEYS: Final = frozenset({"embedding", "embeddings", "embed", "wte"})
_NUMBER_IN_KEY: Final = re.compile(r"\D*(\d{1,6})\D*\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sizes that the other fields of a sample give, as far as known.

    Attributes
    ----------
    blocks
        How many decoder blocks there are.
    states
        How many hidden states.
    positions
        Positions of the sequence, where another kind shows them.
    tokens
        Stored tokens: as many as positions, or one more.
    usual
        Numbers of hidden states in other samples of the run.
    """

    blocks: int | None = None
    states: int | None = None
    positions: int | None = None
    tokens: int | None = None
    usual: frozenset[int] = frozenset()


@dataclass(slots=True)
class Apart:
    """A field of a kind, taken apart.

    Attributes
    ----------
    items
        One array, or list of generation steps, per layer, with the axes of the kind.
    sequence, axes, keys
        As in `SourceForm`; keys in their order.
    numbers
        What the keys of a dict say of each item: a layer number, or None for the embedding.
    findings
        How it was understood.
    """

    kind: str
    items: list[Any]
    sequence: Any = None
    axes: tuple[str, ...] | None = None
    keys: list[Any] | None = None
    numbers: list[int | None] | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def in_steps(self) -> bool:
        """Whether the items are generation steps."""
        return any(isinstance(each, (list, tuple)) for each in self.items)

    @property
    def num_positions(self) -> int | None:
        """Length of the token axis of hidden states, of the query axis of attentions."""
        first = next((each for each in self.items if each is not None), None)
        axes = layout.KINDS[self.kind].axes
        if not isinstance(first, Array) or len(shape_of(first)) != len(axes):
            return None
        return shape_of(first)[next(n for n, name in enumerate(axes) if name in _SEQUENCE)]

    def note(self, check: str, message: str) -> None:
        """Say how the field was understood."""
        self.findings.append(Finding(check, self.kind, message))

    def form(
        self, names: Sequence[str], chosen: Sequence[int], *, lists_embedding: bool
    ) -> SourceForm:
        """What held the arrays, which got `names`; `chosen` are the indices of those kept."""
        absent = tuple(names[index] for index in chosen if self.items[index] is None) or None
        if (self.sequence, self.axes, lists_embedding, absent) == (None, None, False, None):
            return _PLAIN_LIST
        keys = None
        if self.keys is not None:
            # In the order of the dict, which need not be that of layers.
            keys = tuple((self.keys[index], names[index]) for index in sorted(chosen))
        return SourceForm(
            sequence=self.sequence,
            source_axes=self.axes,
            keys=keys,
            lists_embedding=lists_embedding or None,
            absent=absent,
        )


_PLAIN_LIST: Final = SourceForm()
_SEQUENCE: Final = ("token", "query")


def shape_of(value: Array) -> tuple[int, ...]:
    """Shape of an array or tensor."""
    return data_of(value).shape


def is_absent(value: Any) -> bool:
    """Whether a field holds None only, as models without the output give it: ``(None, None)``."""
    if isinstance(value, (list, tuple)) and value:
        return all(is_absent(each) for each in value)
    return value is None


def taken_apart(kind: str, value: Any, lengths: Lengths, known: dict[str, Any]) -> Apart:
    """The field `kind` as one array per layer.

    Parameters
    ----------
    kind
        One of `layout.KINDS`.
    value
        The field's value.
    lengths
        What the other fields say.
    known
        Axes that an earlier sample of the source established, by kind; they decide where the
        shapes of this one fit several. Added to.

    Raises
    ------
    ConversionError
        The value is not a container of arrays, or its shapes contradict each other, or fit several
        readings.
    """
    if isinstance(value, Array):
        return _stacked(kind, value, lengths, known)
    if isinstance(value, dict):
        found = taken_by_key(kind, value) or _reject_keys(kind, value)
    elif isinstance(value, (list, tuple)):
        found = Apart(kind, list(value), "tuple" if isinstance(value, tuple) else None)
    else:
        message = (
            f"field {kind!r} is a {type(value).__name__}, expected a list with one array per layer"
        )
        raise ConversionError(message)
    present = [each for each in found.items if each is not None]
    if present and all(isinstance(each, Array) for each in present):
        _drop_batch(found)
    return found


def taken_by_key(kind: str, value: dict[Any, Any]) -> Apart | None:
    """A dict by layer: ``0``, ``"0"``, ``"layer_0"``, and one key such as ``"embedding"``."""
    numbers = [_number_of(key) for key in value]
    if Ellipsis in numbers or len(set(numbers)) < len(numbers):
        return None
    found = Apart(kind, list(value.values()), "dict", None, list(value), numbers)
    found.note("layers-by-key", "a dict; its keys are taken for layer numbers")
    return found


def _reject_keys(kind: str, value: dict[Any, Any]) -> NoReturn:
    keys = ", ".join(repr(key)[:40] for key in list(value)[:8])
    message = f"field {kind!r} is a dict with the keys {keys}; expected one layer number per key"
    raise ConversionError(message)


def _number_of(key: Any) -> Any:
    """The layer that a key names, None for the embedding, Ellipsis for anything else."""
    if type(key) is int:
        return key if 0 <= key < 2**31 else Ellipsis
    if not isinstance(key, str):
        return Ellipsis
    if key.lower() in _EMBEDDING_KEYS:
        return None
    found = _NUMBER_IN_KEY.match(key)
    return int(found[1]) if found else Ellipsis


def _drop_batch(found: Apart) -> None:
    """Take one axis off a batch of one; one vector per layer gets a token axis of length 1."""
    axes = layout.KINDS[found.kind].axes
    shapes = [shape_of(each) for each in found.items if each is not None]
    ranks = {len(shape) for shape in shapes}
    if ranks == {len(axes) + 1}:
        sizes = {shape[0] for shape in shapes}
        if sizes != {1}:
            _reject_batch(found.kind, shapes[0], max(sizes))
        source = (BATCH, *axes)
        found.note("batch-of-one", "arrays have a batch axis of length 1, which is not stored")
    elif found.kind == layout.HIDDEN_STATES and ranks == {1}:
        source = axes[1:]
        found.note("one-vector", "one vector per layer, which is taken for one position")
    else:
        return
    found.axes = source
    found.items = [
        each if each is None else view(each, source, axes, f"field {found.kind!r}, layer {layer}")
        for layer, each in enumerate(found.items)
    ]


def _reject_batch(kind: str, shape: tuple[int, ...], size: int) -> NoReturn:
    message = (
        f"field {kind!r}: shape {shape} is a batch of {size}, expected one sequence; make one dict "
        f"of each, or name its axes, batch among them, in {A_MAPPING}"
    )
    raise ConversionError(message)


# --- all layers in one array ----------------------------------------------------------------------


def _stacked(kind: str, value: Any, lengths: Lengths, known: dict[str, Any]) -> Apart:
    """An array or tensor of all layers, whose axes follow from the other fields."""
    axes, shape = layout.KINDS[kind].axes, shape_of(value)
    possible = [each for each in _orders(kind, axes) if len(each) == len(shape)]
    if not possible:
        message = (
            f"field {kind!r}: shape {shape} has {len(shape)} axes, expected {len(axes) + 1}: "
            f"({', '.join((LAYER, *axes))})"
        )
        raise ConversionError(message)
    single = [each for each in possible if BATCH not in each or shape[each.index(BATCH)] == 1]
    if not single:
        _reject_batch(kind, shape, shape[0])
    fitting = [each for each in single if _fits(kind, each, shape, lengths)]
    fitting = fitting or [each for each in single if _fits(kind, each, shape, lengths, last=True)]
    # As many layers as other samples of the run have.
    counted = [each for each in fitting if shape[each.index(LAYER)] in lengths.usual]
    fitting = counted if kind == layout.HIDDEN_STATES and counted else fitting
    order = _one_order(kind, fitting, shape, known)
    _check_layers(kind, order, shape, lengths, known)
    layers = split(view(value, order, (LAYER, *axes), f"field {kind!r}"))
    if not layers:
        message = f"field {kind!r}: shape {shape} has no layers; leave the field out"
        raise ConversionError(message)
    earlier = known.get(kind, order)
    known[kind] = order
    found = Apart(kind, layers, "array", order)
    if _without_batch(earlier) != _without_batch(order) and {*earlier, BATCH} == {*order, BATCH}:
        axes_of = f"({', '.join(order)}), and ({', '.join(earlier)})"
        found.note("unlike-earlier", f"the axes are {axes_of} in earlier samples")
    found.note("stacked-layers", f"one array with the axes ({', '.join(order)})")
    return found


def _without_batch(order: tuple[str, ...]) -> list[str]:
    return [each for each in order if each != BATCH]


def _orders(kind: str, axes: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every order of axes that producers are known to write."""
    plain = [(LAYER, *axes)]
    if kind == layout.HIDDEN_STATES:
        # As serving engines write; and one vector per layer.
        plain += [("token", LAYER, "hidden"), (LAYER, "hidden")]
    for each in plain:
        yield each
        yield (BATCH, *each)
    yield (LAYER, BATCH, *axes)


def _fits(
    kind: str,
    order: tuple[str, ...],
    shape: tuple[int, ...],
    lengths: Lengths,
    *,
    last: bool = False,
) -> bool:
    """Whether a shape in this order has as many layers and positions as the other fields say.

    With `last`, arrays may hold one position of all.
    """
    found = dict(zip(order, shape, strict=True))
    num_layers = found[LAYER]
    is_state = kind == layout.HIDDEN_STATES
    more = (0, 1) if is_state else (0,)
    if lengths.blocks is not None and num_layers - lengths.blocks not in more:
        return False
    if not is_state and lengths.states is not None and lengths.states - num_layers not in (0, 1):
        return False
    positions = next((found[name] for name in _SEQUENCE if name in found), 1)
    if lengths.positions is not None:
        return positions == lengths.positions
    if lengths.tokens is None:
        return True
    return positions in (lengths.tokens, lengths.tokens - 1) or (last and positions == 1)


def _one_order(
    kind: str, fitting: list[tuple[str, ...]], shape: tuple[int, ...], known: dict[str, Any]
) -> tuple[str, ...]:
    if not fitting:
        message = (
            f"field {kind!r}: shape {shape} fits neither the number of layers nor that of tokens "
            "in the other fields; expected the axes (layer, "
            f"{', '.join(layout.KINDS[kind].axes)})"
        )
        raise ConversionError(message)
    if known.get(kind) in fitting:
        order: tuple[str, ...] = known[kind]
        return order
    # Orders that differ in axes of length 1 only mean the same.
    meanings = {
        tuple(name for name, size in zip(each, shape, strict=True) if size != 1): each
        for each in reversed(fitting)
    }
    if len(meanings) > 1:
        found = " and ".join(f"({', '.join(each)})" for each in reversed(meanings.values()))
        message = (
            f"field {kind!r}: shape {shape} fits {found}; make it a list with one array per layer, "
            f"or name its axes in {A_MAPPING}"
        )
        raise ConversionError(message)
    return next(iter(reversed(meanings.values())))


def _check_layers(
    kind: str,
    order: tuple[str, ...],
    shape: tuple[int, ...],
    lengths: Lengths,
    known: dict[str, Any],
) -> None:
    """Reject one vector per layer that may be one per token, as nothing says how many layers."""
    if _without_batch(order) != [LAYER, "hidden"] or lengths.blocks is not None:
        return
    num_layers = shape[order.index(LAYER)]
    positions = lengths.positions or lengths.tokens
    are_tokens = positions is None or num_layers in (positions, positions - 1)
    if are_tokens and kind not in known and num_layers not in lengths.usual:
        message = (
            f"field {kind!r}: shape {shape} fits (layer, hidden) and (token, hidden); make it a "
            f"list with one array per layer, or name its axes in {A_MAPPING}"
        )
        raise ConversionError(message)


# --- generation steps -----------------------------------------------------------------------------


def steps_outermost(found: list[Apart], num_layers: int | None) -> bool | None:
    """Whether nested lists have the steps outside; None if shapes fit both readings.

    All layers of a step have the same shape. From the second step on there is one token, or,
    without a cache, one more than in the step before.
    """
    readings = [
        steps
        for steps in (False, True)
        if all(_may_be_steps(each, steps_first=steps) for each in found)
        and _counts_fit(found, num_layers, steps_first=steps)
    ]
    if not readings and num_layers is not None:
        # Some layers of the model only.
        return steps_outermost(found, None)
    return None if len(readings) > 1 else readings == [True]


def _may_be_steps(found: Apart, *, steps_first: bool) -> bool:
    grid = [[None if each is None else shape_of(each) for each in inner] for inner in found.items]
    if len({len(inner) for inner in grid}) > 1:
        # Layers with different numbers of steps contradict each other; that is reported elsewhere.
        return not steps_first
    steps = grid if steps_first else list(zip(*grid, strict=True))
    shapes = [set(layers) - {None} for layers in steps]
    # A layer is absent at all steps, or at none.
    if any(len(each) != 1 for each in shapes) or len({_gaps(each) for each in steps}) > 1:
        return False
    tokens = [shape[-2] for (shape,) in shapes if shape is not None and len(shape) > 1]
    return all(now in (1, before + 1) for before, now in itertools.pairwise(tokens))


def _gaps(items: Sequence[Any]) -> tuple[bool, ...]:
    return tuple(each is None for each in items)


def _counts_fit(found: list[Apart], num_layers: int | None, *, steps_first: bool) -> bool:
    """Whether the kinds have the same steps, and as many layers, or one state more."""
    sizes = {}
    for each in found:
        outer, inner = len(each.items), len(each.items[0])
        sizes[each.kind] = (inner, outer) if steps_first else (outer, inner)
    if len({steps for _, steps in sizes.values()}) > 1:
        return False
    states = sizes.pop(layout.HIDDEN_STATES, (None,))[0]
    counts = {layers for layers, _ in sizes.values()}
    counts |= set() if num_layers is None else {num_layers}
    return len(counts) < 2 and all(states is None or states - each in (0, 1) for each in counts)


def turned(found: Apart) -> None:
    """Put the layers outside, the steps inside."""
    inner = found.items[0]
    layers = zip(*found.items, strict=True)
    found.items = [None if is_absent(each) else type(inner)(each) for each in layers]
    found.axes = STEPS_FIRST
    found.note("steps-outermost", "a sequence of generation steps, each with all layers")
