"""Further layered kinds: fields with one array per decoder block and an axis of the tokens.

MLP outputs, outputs of heads, logits of every layer and the like. A field that is not clearly one
stays an extra field.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from h5traces.format import layout
from h5traces.format.dtypes import FLOAT_TYPES
from h5traces.format.values import TorchValue
from h5traces.meaning.axes import BATCH, LAYER, split, view
from h5traces.meaning.containers import Apart, Array, shape_of, taken_by_key

if TYPE_CHECKING:
    from h5traces.meaning.numbering import Established

# A single array says nothing about layers.
_FEWEST_LAYERS = 2


def further_kind(
    name: str,
    value: Any,
    *,
    num_blocks: int,
    num_positions: int,
    has_batch: bool,
    established: Established,
) -> tuple[Apart, tuple[str, ...]] | None:
    """The field taken apart, and the axes of one layer's array; None if it is not a layered kind.

    Parameters
    ----------
    name, value
        The field.
    num_blocks
        Decoder blocks of the model.
    num_positions
        Positions of the other kinds.
    has_batch
        Whether the other kinds have a batch axis of length 1.
    established
        Axes of further kinds in earlier samples; added to.
    """
    if num_blocks < _FEWEST_LAYERS or not layout.may_be_kind(name):
        return None
    found = _taken_apart(name, value, num_blocks)
    if found is None or len(found.items) != num_blocks or not _are_alike(found.items):
        return None
    known = established.axes.get(name)
    axes = None
    if has_batch and shape_of(found.items[0])[0] == 1:
        axes = _axes(shape_of(found.items[0])[1:], num_positions, known)
        if axes is not None:
            source = (BATCH, *axes)
            found.items = [view(each, source, axes, name) for each in found.items]
            found.axes = source if found.sequence != "array" else (LAYER, *source)
    axes = axes or _axes(shape_of(found.items[0]), num_positions, known)
    if axes is None:
        return None
    established.axes[name] = axes
    found.note("further-kind", f"one array per block, with the axes ({', '.join(axes)})")
    return found, axes


def _taken_apart(name: str, value: Any, num_blocks: int) -> Apart | None:
    if isinstance(value, Array):
        shape = shape_of(value)
        is_stack = len(shape) > 1 and shape[0] == num_blocks
        return Apart(name, split(value), "array") if is_stack else None
    if isinstance(value, dict):
        return taken_by_key(name, value)
    if isinstance(value, (list, tuple)):
        return Apart(name, list(value), "tuple" if isinstance(value, tuple) else None)
    return None


def _are_alike(items: list[Any]) -> bool:
    """Whether all are arrays of one float type and, but for their width, one shape."""
    if not all(isinstance(each, Array) and shape_of(each) for each in items):
        return False
    types = {each.dtype if isinstance(each, TorchValue) else each.dtype.name for each in items}
    shapes = {(len(shape_of(each)), shape_of(each)[:-1]) for each in items}
    return len(types) == len(shapes) == 1 and types <= set(FLOAT_TYPES)


def _axes(
    shape: tuple[int, ...], num_positions: int, known: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    """Axes of one layer's array, where exactly one of them is as long as the sequence."""
    if known is not None and len(known) == len(shape):
        return known if shape[known.index("token")] == num_positions else None
    if shape.count(num_positions) != 1:
        return None
    axes = {1: ("token",), 2: ("token", "channel"), 3: ("head", "token", "channel")}.get(len(shape))
    return axes if axes and shape[axes.index("token")] == num_positions else None
