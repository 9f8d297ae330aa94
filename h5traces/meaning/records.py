"""Makes trace records of dicts of any layout: the rules for the meaning of indices and axes.

`containers` takes fields of layered kinds apart, `numbering` says which decoder block each array
is, `further_kinds` finds kinds that the format does not name, `lengths` which tokens positions
cover. Fields without a place in the format go to ``extra``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from h5traces.arguments import shown
from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.format.dtypes import FLOAT_TYPES, TypedArray
from h5traces.format.record import (
    Container,
    LayerArray,
    LayeredArrays,
    StepArrays,
    TokensContainer,
    TraceRecord,
)
from h5traces.format.text import counted
from h5traces.format.values import TorchValue
from h5traces.meaning.axes import BATCH
from h5traces.meaning.checks import Finding
from h5traces.meaning.containers import (
    Apart,
    Array,
    Lengths,
    is_absent,
    steps_outermost,
    taken_apart,
    turned,
)
from h5traces.meaning.further_kinds import further_kind
from h5traces.meaning.numbering import (
    Established,
    Numbered,
    num_blocks_of,
    numbered_blocks,
    numbered_by_ids,
    numbered_states,
)
from h5traces.meaning.options import ReadingOptions
from h5traces.meaning.padding import with_padding_treated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from h5traces.format.record import SourcePosition

_NUM_LAYERS = "num_layers"


@dataclass(slots=True)
class _Fields:
    """The parts of a record."""

    named: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    layered: dict[str, LayeredArrays] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def to_record(
    item: dict[Any, Any],
    *,
    source: SourcePosition,
    layers: tuple[int, ...] | None = None,
    sites_known: bool = True,
    options: ReadingOptions = ReadingOptions(),
    established: Established | None = None,
) -> TraceRecord:
    """One dict of a source, as a record.

    Parameters
    ----------
    item
        The dict, with the names of the legacy fields.
    source
        Where it comes from.
    layers
        Decoder blocks to keep, ascending, or positions where no block is known. The embedding
        stays.
    sites_known
        Whether the last hidden state was taken after the final norm, as transformers gives it.
    options
        What the user says of the source.
    established
        What earlier samples of the source said; added to.

    Raises
    ------
    ConversionError
        The dict is not a trace, a field has no encoding, or fields contradict each other.
    """
    found, known = _Fields(), established or Established()
    _check_keys(item)
    apart = _taken_apart(item, known, found)
    numbers = _numbered(apart, item, options, known, has_sites=sites_known)
    further = _further_kinds(item, apart, known)
    axes: dict[str, tuple[str, ...]] = {}
    for kind, (each, each_axes) in further.items():
        apart[kind], axes[kind] = each, each_axes
        numbers[kind] = numbered_blocks(each)
    for kind in (key for key in item if key in apart):
        chosen = _chosen(apart[kind], numbers[kind], layers)
        found.layered[kind] = _layered(apart[kind], numbers[kind], chosen, axes.get(kind))
        found.findings += _gaps(apart[kind], numbers[kind])
        found.findings += apart[kind].findings
    for key, value in item.items():
        if key not in found.layered:
            _place(key, value, item, found)
    record = TraceRecord(
        source=source,
        fields=tuple(item),
        texts=found.texts,
        layered=found.layered,
        extra=found.extra,
        findings=tuple(found.findings),
        **found.named,
    )
    return with_padding_treated(record, options)


def _check_keys(item: dict[Any, Any]) -> None:
    for key in item:
        if not isinstance(key, str):
            message = f"field {shown(key)} is named by {type(key).__name__}, expected str"
            raise ConversionError(message)
    if all(kind not in item or item[kind] is None for kind in layout.KINDS):
        message = (
            f"fields 'hidden_states' and 'attentions' are missing; found "
            f"{', '.join(item) or 'no fields'}; expected the dict of a trace, or a mapping that "
            "says which name holds which field: 'h5traces inspect' of the file prints one to begin "
            "with"
        )
        raise ConversionError(message)


# --- layered kinds --------------------------------------------------------------------------------


def _taken_apart(item: dict[str, Any], known: Established, found: _Fields) -> dict[str, Apart]:
    """The fields of the kinds that the format names; one array of all layers comes last."""
    apart: dict[str, Apart] = {}
    present = [kind for kind in layout.KINDS if kind in item]
    for kind in present:
        if kind != layout.HIDDEN_STATES and (why := _no_weights(item[kind])) is not None:
            found.findings.append(Finding("attentions-absent", kind, why))
    wanted = [kind for kind in present if not is_absent(item[kind])]
    # Attentions have fewer readings, and tell the number of layers and of positions.
    wanted.sort(key=lambda kind: (isinstance(item[kind], Array), kind == layout.HIDDEN_STATES))
    for kind in wanted:
        lengths = _lengths(item, apart, known)
        apart[kind] = taken_apart(kind, item[kind], lengths, known.axes)
    nested = [each for each in apart.values() if _are_steps(each)]
    if nested and _steps_are_outside(nested, _stated_layers(item, known)):
        for each in nested:
            turned(each)
    return apart


def _no_weights(value: Any) -> str | None:
    """How a field of attentions says that it is empty, if it does."""
    if is_absent(value):
        return "the field holds None only"
    return "the field is empty" if isinstance(value, (list, tuple, dict)) and not value else None


def _lengths(item: dict[str, Any], apart: dict[str, Apart], known: Established) -> Lengths:
    states = apart.get(layout.HIDDEN_STATES)
    positions = (each.num_positions for each in apart.values())
    blocks = num_blocks_of(apart)
    return Lengths(
        blocks=_stated_layers(item, known) if blocks is None else blocks,
        states=None if states is None else len(states.items),
        positions=next((each for each in positions if each is not None), None),
        tokens=_num_tokens(item),
        usual=frozenset(known.first_states),
    )


def _stated_layers(item: dict[str, Any], known: Established) -> int | None:
    """Decoder blocks of the model, as the user or the sample says."""
    stated = item.get(_NUM_LAYERS)
    return known.num_layers or (stated if type(stated) is int and stated > 0 else None)


def _are_steps(apart: Apart) -> bool:
    """Whether a field is a grid of arrays, layers by steps or steps by layers."""
    return bool(apart.items) and all(
        isinstance(inner, (list, tuple))
        and not is_absent(inner)
        and all(each is None or isinstance(each, Array) for each in inner)
        for inner in apart.items
    )


def _steps_are_outside(nested: list[Apart], num_layers: int | None) -> bool:
    found = steps_outermost(nested, num_layers)
    if found is not None:
        return found
    outer, inner = len(nested[0].items), len(nested[0].items[0])
    if min(outer, inner) > 1 or (num_layers is not None and outer != inner):
        way_out = "" if num_layers is not None else "add the field num_layers, or "
        message = (
            f"field {nested[0].kind!r}: {counted(outer, 'list')} of {counted(inner, 'array')} may "
            f"be layers of steps or steps of layers; {way_out}store one array per layer"
        )
        raise ConversionError(message)
    # One list of several layers, or one step of each.
    return inner > 1


def _numbered(
    apart: dict[str, Apart],
    item: dict[str, Any],
    options: ReadingOptions,
    known: Established,
    *,
    has_sites: bool,
) -> dict[str, Numbered]:
    """Names and sites of the items of every kind."""
    num_blocks_of(apart)
    found = {
        kind: numbered_blocks(each) for kind, each in apart.items() if kind != layout.HIDDEN_STATES
    }
    blocks = next((apart[kind] for kind in found if apart[kind].items), None)
    states = apart.get(layout.HIDDEN_STATES)
    num_layers = _stated_layers(item, known)
    if states is not None and states.items and options.layer_ids is not None:
        found[layout.HIDDEN_STATES] = numbered_by_ids(states, blocks, options.layer_ids)
    elif states is not None and states.items:
        found[layout.HIDDEN_STATES] = numbered_states(
            states, blocks, options.first_state, num_layers, known, has_sites=has_sites
        )
    elif states is not None:
        found[layout.HIDDEN_STATES] = Numbered((), ())
    for each in found.values():
        known.add(each)
    return found


def _further_kinds(
    item: dict[str, Any], apart: dict[str, Apart], known: Established
) -> dict[str, tuple[Apart, tuple[str, ...]]]:
    """Fields that are layered kinds without being named by the format."""
    blocks = num_blocks_of(apart)
    positions = next((each.num_positions for each in apart.values()), None)
    if blocks is None and layout.HIDDEN_STATES in apart:
        states = len(apart[layout.HIDDEN_STATES].items)
        first = known.first_states.get(states)
        blocks = None if first is None else states - (first == "embedding")
    if blocks is None or positions is None:
        return {}
    has_batch = any(BATCH in (each.axes or ()) for each in apart.values())
    found = {
        key: further_kind(
            key,
            value,
            num_blocks=blocks,
            num_positions=positions,
            has_batch=has_batch,
            established=known,
        )
        for key, value in item.items()
        if key not in apart and isinstance(value, (Array, list, tuple, dict))
    }
    return {key: each for key, each in found.items() if each is not None}


def _chosen(apart: Apart, numbered: Numbered, layers: tuple[int, ...] | None) -> list[int]:
    """Indices of the items to keep: the embedding first, then in order of layer."""
    numbers = [layout.parse_layer_name(name) for name in numbered.names]
    available = sorted(each for each in numbers if each is not None)
    if layers is not None and numbers:
        missing = [layer for layer in layers if layer not in available]
        if missing:
            message = (
                f"field {apart.kind!r}: layer {missing[0]} was asked for, but there are "
                f"{len(available)} layers ({_listed(available)}); choose among these"
            )
            raise ConversionError(message)
    kept = [
        index
        for index, number in enumerate(numbers)
        if number is None or layers is None or number in layers
    ]
    return sorted(kept, key=lambda index: -1 if numbers[index] is None else numbers[index])  # type: ignore[arg-type,return-value]


def _gaps(apart: Apart, numbered: Numbered) -> Iterator[Finding]:
    """That items are None, as hybrid models give attentions."""
    names = zip(numbered.names, apart.items, strict=True)
    for name in (name for name, each in names if each is None):
        yield Finding("layers-absent", f"{apart.kind}/{name}", "the item is None")


def _listed(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _layered(
    apart: Apart,
    numbered: Numbered,
    chosen: list[int],
    axes: tuple[str, ...] | None,
) -> LayeredArrays:
    """The chosen items of a field as arrays of a record."""
    arrays = tuple(
        _layer(
            apart.kind,
            index,
            numbered.names[index],
            apart.items[index],
            numbered.sites[index],
        )
        for index in chosen
        if apart.items[index] is not None
    )
    if len({isinstance(each.array, StepArrays) for each in arrays}) > 1:
        message = (
            f"field {apart.kind!r} mixes arrays and lists of generation steps; expected one or the "
            "other for all layers"
        )
        raise ConversionError(message)
    form = apart.form(numbered.names, chosen, lists_embedding=numbered.has_embedding)
    return LayeredArrays(arrays, form, axes=axes)


def _layer(kind: str, index: int, name: str, value: Any, site: str | None) -> LayerArray:
    place = f"field {kind!r}, layer {index}"
    if isinstance(value, (list, tuple)):
        steps = [_typed(step, f"{place}, step {number}") for number, step in enumerate(value)]
        containers = {container for _, container in steps}
        if len(containers) > 1:
            message = f"{place}: steps mix torch tensors and numpy arrays"
            raise ConversionError(message)
        sequence: Literal["list", "tuple"] = "list" if isinstance(value, list) else "tuple"
        array = StepArrays(tuple(step for step, _ in steps), sequence)
        return LayerArray(name, array, site, next(iter(containers), None))
    typed, container = _typed(value, place)
    return LayerArray(name, typed, site, container)


def _typed(value: Any, place: str) -> tuple[TypedArray, Container | None]:
    if isinstance(value, TorchValue):
        if value.dtype not in FLOAT_TYPES:
            message = (
                f"{place}: {value.container} dtype is {value.dtype}, expected "
                f"{', '.join(FLOAT_TYPES)}"
            )
            raise ConversionError(message)
        return TypedArray(value.data, value.dtype), value.container
    if not isinstance(value, np.ndarray):
        message = (
            f"{place}: found {type(value).__name__}, expected a numpy array, a torch tensor, or "
            "a list of them (generation steps); save lists of numbers as numpy.asarray(...)"
        )
        raise ConversionError(message)
    try:
        return TypedArray.of(value), None
    except ConversionError as error:
        message = f"{place}: {error}"
        raise ConversionError(message) from error


# --- other fields ---------------------------------------------------------------------------------


def _place(key: str, value: Any, item: dict[str, Any], found: _Fields) -> None:
    """Put a field in its place if the format has one for exactly its type, else in ``extra``."""
    if key in layout.TEXT_FIELDS and type(value) is str:
        found.texts[key] = value
    elif key == layout.TOKENS and (ids := _token_ids(value)) is not None:
        found.named["tokens"], found.named["tokens_container"] = ids
    elif key == layout.TOKENS_DECODED and _is_decoded(value, _num_tokens(item)):
        found.named["tokens_decoded"] = tuple(value)
    elif key == layout.QUESTION_ID and type(value) is str:
        found.named["sample_id"] = value
    elif key == layout.LABEL and type(value) is int and abs(value) < 2**63:
        found.named["label"] = value
    elif (
        key == layout.PROMPT_LENGTH
        and type(value) is int
        and _is_prompt_length(_whole_number(value), item, found)
    ):
        found.named["prompt_len"] = value
    else:
        found.extra[key] = value
        _note_number(key, value, item, found)


def _note_number(key: str, value: Any, item: dict[str, Any], found: _Fields) -> None:
    """What an id, label or length says that is kept with its own type."""
    number = _whole_number(value)
    if key == layout.QUESTION_ID and isinstance(value, (int, np.integer, str)):
        found.named["sample_id"] = str(value)
    elif key == layout.LABEL and number is not None:
        found.named["label"] = number
    elif key == layout.PROMPT_LENGTH and _is_prompt_length(number, item, found):
        found.named["prompt_len"] = number


def _token_ids(value: Any) -> tuple[NDArray[Any], TokensContainer | None] | None:
    """Token ids as a row of integers, and what held them if no array; None if they are not such."""
    if type(value) is list and set(map(type, value)) == {int}:
        try:
            return np.array(value, np.int64), "list"
        except OverflowError:
            return None
    is_tensor = isinstance(value, TorchValue)
    array = value.data if is_tensor else value
    if not isinstance(array, np.ndarray) or array.ndim != 1:
        return None
    dtype = array.dtype
    # Numbers of uint64 need not fit into int64.
    if dtype.isnative and (dtype.kind == "i" or (dtype.kind == "u" and dtype.itemsize < 8)):
        return array, "torch" if is_tensor else None
    return None


def _num_tokens(item: dict[str, Any]) -> int | None:
    found = _token_ids(item.get(layout.TOKENS))
    return None if found is None else len(found[0])


def _is_decoded(value: Any, num_tokens: int | None) -> bool:
    if type(value) is not list or not all(type(each) is str for each in value):
        return False
    return num_tokens is None or len(value) == num_tokens


def _is_prompt_length(number: int | None, item: dict[str, Any], found: _Fields) -> bool:
    if number is None or number < 0:
        return False
    num_tokens = _num_tokens(item)
    in_steps = any(kind.in_steps for kind in found.layered.values())
    # A prompt longer than the sequence is not a prompt length; it is kept as an extra value.
    return in_steps or (num_tokens is not None and number <= num_tokens)


def _whole_number(value: Any) -> int | None:
    """The number of 64 bits that a field is, or holds in an array or tensor of one element."""
    array = value.data if isinstance(value, TorchValue) else value
    if isinstance(array, (np.ndarray, np.generic)):
        is_number = array.dtype.kind in "iub" and array.size == 1
        array = array.reshape(-1)[0].item() if is_number else None
    return int(array) if isinstance(array, int) and abs(array) < 2**63 else None
