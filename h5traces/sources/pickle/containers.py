"""What an outer dict holds: one sample, samples by id, columns, or a wrapper of one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from h5traces.format import layout
from h5traces.format.text import counted
from h5traces.format.values import TorchValue
from h5traces.meaning.options import A_MAPPING
from h5traces.sources.naming import names_layers
from h5traces.sources.pickle.calls import type_name
from h5traces.sources.pickle.plain import DICTS
from h5traces.sources.pickle.source import contradict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

TRACES_KEY: Final = "traces"
EXPECTED: Final = (
    "expected a list of dicts, one dict, dicts by id, or a dict of columns that begin with "
    "'hidden_states'"
)
# Fields that are one text or number in a sample, so that a list of them is a column.
_SINGLE: Final = (layout.QUESTION_ID, layout.LABEL, *layout.TEXT_FIELDS)
# Names of columns, by the field that they hold.
PLURALS: Final = {f"{name}s": name for name in (*_SINGLE, layout.PROMPT_LENGTH)}
_MOST_NAMES: Final = 8
# Of entries of validation_generations.pkl.
_ANSWER: Final = "most_likely_answer"
_BEFORE_END: Final = "emb_tok_before_eos"
_BEFORE_ANSWER: Final = "emb_last_tok_before_gen"


@dataclass(slots=True)
class Entry:
    """A value of the outer dict, or the facts about a list that is not in memory.

    Attributes
    ----------
    value
        The value; None for such a list.
    length
        Of a list, tuple or array; None for what has none.
    first
        Its first element; None if there is none.
    values
        All elements, where they are in memory.
    """

    value: Any = None
    length: int | None = None
    first: Any = None
    values: Sequence[Any] | None = None

    @classmethod
    def of(cls, value: Any) -> Entry:
        """The entry of a value in memory."""
        array = value.data if isinstance(value, TorchValue) else value
        is_list = type(value) in (list, tuple) or (isinstance(array, np.ndarray) and array.ndim)
        if not is_list:
            return cls(value)
        elements = elements_of(value)
        return cls(value, len(elements), elements[0] if len(elements) else None, elements)


class _ArrayElements:
    """The elements of an array along its first axis, numbers as Python's own."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._array = value.data if isinstance(value, TorchValue) else value

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> Any:
        element = self._array[index]
        if isinstance(element, np.ndarray) and isinstance(self._value, TorchValue):
            return TorchValue(element, self._value.dtype, self._value.container)
        return plain_number(element)


def elements_of(value: Any) -> Any:
    """The elements of a list, tuple, array or tensor."""
    return value if type(value) in (list, tuple) else _ArrayElements(value)


def plain_number(value: Any) -> Any:
    """A number of Python for one of numpy; anything else unchanged."""
    return value.item() if isinstance(value, np.generic) else value


@dataclass(frozen=True, slots=True)
class Understood:
    """What an outer dict is.

    Attributes
    ----------
    what
        ``trace``: it is one sample. ``cache``: it is one, with an array per layer. ``mapping``: its
        values are. ``columns``: each value holds one field of all samples. ``wrapper``: the value
        under `key` is a list of samples, or samples by id. ``pairs``: the list under `key` holds
        lists of pairs of a hidden state and an attention matrix.
    key
        Of a wrapper or of pairs.
    columns
        Field of each further entry that holds one value per sample, by the name of the entry.
    unread
        Names of entries that belong to no sample.
    """

    what: Literal["trace", "cache", "mapping", "columns", "wrapper", "pairs"]
    key: Any = None
    columns: Mapping[Any, str] = field(default_factory=dict)
    unread: tuple[Any, ...] = ()


def is_trace(value: Any) -> bool:
    """Whether a value is the dict of a sample."""
    return type(value) in DICTS and any(name in value for name in layout.KINDS)


def is_generation(value: Any) -> bool:
    """Whether a value is an entry of ``validation_generations.pkl`` of an uncertainty study."""
    answer: Any = value.get(_ANSWER) if type(value) in DICTS else None
    return type(answer) in DICTS and isinstance(answer.get(_BEFORE_END), (np.ndarray, TorchValue))


def is_cache(value: Any) -> bool:
    """Whether a value is a dict of activations, whose names hold the numbers of layers."""
    return type(value) in DICTS and not is_trace(value) and names_layers(value)


def is_sample(value: Any) -> bool:
    """Whether a value of a dict by id is a sample."""
    return is_trace(value) or is_generation(value) or is_cache(value)


def _of_generation(entry: Mapping[Any, Any]) -> dict[Any, Any]:
    """The fields of such an entry, with the states of its last tokens out of the answer's dict.

    They are arrays ``(layers + 1, 1, hidden)``, of which the first layer is the embedding: at the
    last token before the end of the answer, and at the last one before the answer.
    """
    answer = dict(entry[_ANSWER])
    states = elements_of(answer.pop(_BEFORE_END))
    sample = {layout.HIDDEN_STATES: [states[index] for index in range(len(states))]}
    if _BEFORE_ANSWER in answer:
        sample[_BEFORE_ANSWER] = answer.pop(_BEFORE_ANSWER)
    if type(answer.get("response")) is str and "generated_answer" not in entry:
        sample["generated_answer"] = answer.pop("response")
    return {**entry, _ANSWER: answer, **sample}


def understand(entries: dict[Any, Entry]) -> Understood:
    """What an outer dict with these entries is; MalformedError where it is unclear."""
    if not entries:
        contradict(f"found an empty dict, {EXPECTED}")
    if any(name in entries for name in layout.KINDS):
        return _columns(entries) if _are_columns(entries) else Understood("trace")
    if all(is_sample(entry.value) for entry in entries.values()):
        return Understood("mapping")
    if names_layers({name: entry.value for name, entry in entries.items()}):
        return Understood("cache")
    return _wrapper(entries)


# --- columns -------------------------------------------------------------------------------------


def _are_columns(entries: dict[Any, Entry]) -> bool:
    """Whether the values are fields of many samples, rather than those of one."""
    single = [name for name in entries if _is_single(name, entries[name])]
    columns = [name for name in entries if _is_column(name, entries[name])]
    sure = [name for name in columns if name in _SINGLE or name in layout.KINDS]
    if single and sure:
        contradict(
            f"the dict holds one value in {_names(single)}, and one per sample in {_names(sure)}; "
            f"expected one sample, or columns"
        )
    if single:
        return False
    nested = [name for name in layout.KINDS if _is_nested(entries.get(name))]
    if nested and not columns:
        contradict(
            f"{nested[0]!r} is a list of lists, of one list per sample or of generation steps per "
            f"layer, and no other entry tells; save a list of dicts, or add 'question_ids'"
        )
    return bool(columns)


def _is_nested(entry: Entry | None) -> bool:
    return entry is not None and type(entry.first) in (list, tuple)


def _is_single(name: Any, entry: Entry) -> bool:
    """Whether this is a field of one sample."""
    if name in _SINGLE:
        return entry.length is None and entry.value is not None
    if name == layout.TOKENS:
        return entry.length is not None and isinstance(plain_number(entry.first), int)
    return name == layout.TOKENS_DECODED and type(entry.first) is str


def _is_column(name: Any, entry: Entry) -> bool:
    """Whether this holds one value per sample."""
    if entry.length is None:
        return False
    if name in PLURALS or name in _SINGLE:
        return True
    if name in layout.KINDS:
        # A list of layers for each sample, in each layer of which are steps.
        return _is_nested(entry) and type(entry.first[:1] and entry.first[0]) in (list, tuple)
    is_row = isinstance(entry.first, (list, tuple, np.ndarray, TorchValue))
    return name in (layout.TOKENS, layout.TOKENS_DECODED) and is_row


def _columns(entries: dict[Any, Entry]) -> Understood:
    lengths = {name: entry.length for name, entry in entries.items() if entry.length is not None}
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{str(name)[:40]!r} {length}" for name, length in lengths.items())
        contradict(f"columns have unequal numbers of values: {each[:400]}; they cannot be matched")
    return Understood(
        "columns",
        columns={name: _field(name, entries) for name in lengths},
        unread=tuple(name for name in entries if name not in lengths),
    )


def _field(name: Any, entries: Mapping[Any, Entry]) -> str:
    field = PLURALS.get(name, name)
    return str(name if field in entries else field)


# --- wrappers ------------------------------------------------------------------------------------


def _wrapper(entries: dict[Any, Entry]) -> Understood:
    """A dict of which one entry holds all samples."""
    holders = [name for name, entry in entries.items() if _holds_samples(entry)]
    if TRACES_KEY in entries and not holders and _is_list(entries[TRACES_KEY]):
        return _pairs(entries)
    if not holders:
        contradict(
            f"found a dict with the keys {_names(entries)}; {EXPECTED}; or say which name holds "
            f"which field in {A_MAPPING}"
        )
    if len(holders) > 1:
        contradict(
            f"the dict holds samples in each of {_names(holders)}; save each to a separate file"
        )
    (key,) = holders
    num_samples = entries[key].length
    columns = {
        name: _field(name, entries)
        for name, entry in entries.items()
        if name != key and entry.length == num_samples and num_samples
    }
    unread = tuple(name for name in entries if name != key and name not in columns)
    return Understood("wrapper", key, columns, unread)


def _holds_samples(entry: Entry) -> bool:
    if type(entry.value) in DICTS:
        return bool(entry.value) and all(map(is_trace, entry.value.values()))
    return is_trace(entry.first) or is_cache(entry.first)


def _is_list(entry: Entry) -> bool:
    return entry.length is not None and type(entry.value) in (type(None), list)


def _pairs(entries: dict[Any, Entry]) -> Understood:
    """The layout of an old producer: a list and nothing else."""
    unknown = sorted(map(str, entries.keys() - {TRACES_KEY, "labels", "question_ids"}))
    if unknown:
        contradict(
            f"the dict has the unknown keys {', '.join(unknown)[:200]}, expected only 'traces', "
            f"'labels' and 'question_ids'"
        )
    num_items = entries[TRACES_KEY].length
    for name in ("labels", "question_ids"):
        entry = entries.get(name)
        if entry is None or (entry.length is None and entry.value is None):
            continue
        is_flat = not isinstance(entry.first, np.ndarray)
        if entry.length is None or not is_flat:
            contradict(
                f"{name!r} is {type_name(entry.value)}, expected a list with one value per trace"
            )
        if entry.length != num_items:
            contradict(
                f"{name!r} has {entry.length} values for {num_items} traces; they cannot be "
                f"matched, so remove or repair that list"
            )
    columns = {
        name: PLURALS[name]
        for name in ("labels", "question_ids")
        if name in entries and entries[name].length is not None
    }
    return Understood("pairs", TRACES_KEY, columns)


def pair_item(layers: Any, index: int) -> dict[str, Any]:
    """A sample of an old producer, as a dict; its attentions have no head axis."""
    if type(layers) not in (list, tuple):
        contradict(
            f"item {index} of the batch is {type_name(layers)}; under 'traces', a batch is a list "
            f"of dicts, or of lists of pairs of arrays"
        )
    for number, pair in enumerate(layers):
        if (
            type(pair) not in (tuple, list)
            or len(pair) != 2
            or not all(isinstance(value, (np.ndarray, TorchValue)) for value in pair)
        ):
            contradict(
                f"layer {number} of item {index} in 'traces' is {type_name(pair)}, expected a pair "
                f"(hidden states, attention)"
            )
    return {
        layout.HIDDEN_STATES: [hidden for hidden, _ in layers],
        layout.ATTENTION_MEAN: [attention for _, attention in layers],
    }


# --- arrays without names ------------------------------------------------------------------------


def bare_arrays(value: Any) -> tuple[list[Any], str]:
    """Hidden states of every sample in arrays without names, and what they were taken for.

    An array of all layers is one sample, and so are layers in a list. Lists of lists, and of arrays
    of all layers whose lengths differ, are several samples.
    """
    if _rank(value) > 2:
        return [value], "an array without a name holds hidden states"
    if type(value) not in (list, tuple) or not value:
        contradict(f"found {describe(value)}, {EXPECTED}; or name its axes in {A_MAPPING}")
    shapes = [_shape(each) for each in value]
    if all(len(shape) > 1 for shape in shapes):
        if len(shapes[0]) == 2 or all(shape[0] == 1 for shape in shapes):
            if len(set(shapes)) == 1:
                return [value], f"a list of {len(value)} arrays without names is one per layer"
        elif len({(shape[0], *shape[2:]) for shape in shapes}) == 1 < len(set(shapes)):
            return list(value), f"each of {len(value)} arrays without names is a sample"
        contradict(
            f"a list of {len(value)} arrays of shapes {shapes[0]}, {shapes[-1]} may hold layers or "
            f"samples; name its axes in {A_MAPPING}"
        )
    if all(type(each) in (list, tuple) and each and _rank(each[0]) in (2, 3) for each in value):
        if len(value) > 1 and all(_shape(each[0])[-2] == 1 for each in value[1:]):
            return [value], "lists of arrays without names are generation steps"
        return list(value), f"each of {len(value)} lists of arrays without names is a sample"
    contradict(f"found {describe(value)}, {EXPECTED}; or name its axes in {A_MAPPING}")


def _shape(value: Any) -> tuple[int, ...]:
    array = value.data if isinstance(value, TorchValue) else value
    return array.shape if isinstance(array, np.ndarray) else ()


def _rank(value: Any) -> int:
    return len(_shape(value))


# --- samples -------------------------------------------------------------------------------------


def with_id(sample: Mapping[Any, Any], key: Any, index: int) -> dict[Any, Any]:
    """A sample of a dict by id, with its id.

    Where the sample has an id already, another key is kept as the field ``key``, but for that of
    its place.
    """
    if is_generation(sample):
        sample = _of_generation(sample)
    own = sample.get(layout.QUESTION_ID)
    if own is None and layout.QUESTION_ID not in sample:
        return {**sample, layout.QUESTION_ID: key}
    if str(own) == str(key) or key == index or "key" in sample:
        return dict(sample)
    return {**sample, "key": key}


def rows(
    lists: Mapping[str, Iterator[Any]], start: Iterator[dict[Any, Any]] | None
) -> Iterator[dict[Any, Any]]:
    """Samples of columns: a value of each list for every sample."""
    index = 0
    while True:
        sample = {} if start is None else next(start, None)
        if sample is None:
            return
        for name, values in lists.items():
            try:
                value = next(values)
            except StopIteration:
                if start is None:
                    return
                raise
            if name not in sample:
                sample[name] = plain_number(value)
            del value
        yield sample
        del sample
        index += 1


def sentences(found: Understood, num_samples: int | None) -> tuple[list[str], list[str]]:
    """What was understood, and what was not read, for reports."""
    said = {
        "trace": "a dict is one sample",
        "cache": "a dict is one sample, whose names hold the numbers of layers",
        "mapping": "a dict holds samples by id",
        "columns": f"a dict holds {counted(num_samples or 0, 'sample')} as columns: "
        f"{_names(found.columns)}",
        "wrapper": f"the samples are under {found.key!r}",
        "pairs": "'traces' holds pairs of a hidden state and an attention matrix without heads",
    }[found.what]
    unread = [f"the entry {name!r} of the outer dict belongs to no sample" for name in found.unread]
    return [said], unread


def _names(names: Any) -> str:
    listed = [repr(name)[:40] for name in list(names)[:_MOST_NAMES]]
    more = len(names) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more > 0 else "")


def describe(value: Any) -> str:
    """A value that is not a batch, in words."""
    if type(value) in DICTS:
        return f"a dict with the keys {_names(value)}" if value else "an empty dict"
    if type(value) in (list, tuple) and value:
        return f"{type_name(value)} that starts with {type_name(value[0])}"
    return type_name(value)
