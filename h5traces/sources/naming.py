"""Which name of a group of arrays is which field of a sample, where names say so by themselves.

A name of the legacy dict is that field, ``token_ids`` and ``input_ids`` are its tokens. Names that
differ in a layer's number only, such as ``model.layers.3`` or ``blocks.3.hook_resid_post``, are the
layers of a field. All others are extra fields.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.format.text import and_more
from h5traces.format.values import TorchValue
from h5traces.meaning.options import A_MAPPING
from h5traces.sources.engine_names import by_field, is_of_engine

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from h5traces.meaning.numbering import Established

Arrays = dict[str, Any]

TOKENS: Final = (layout.TOKENS, "token_ids", "input_ids")
_METADATA: Final = "__metadata__"
# Fields that are one text or number.
_SINGLE: Final = (
    *(layout.QUESTION_ID, layout.LABEL, layout.PROMPT_LENGTH),
    *layout.TEXT_FIELDS,
)
_NUMBERED: Final = re.compile(
    r"(?P<before>(?:.*[^A-Za-z])?)(?P<word>layers?|blocks?|h|hidden_states?|attentions?|attn)"
    r"(?P<sign>[._/-]?)(?P<number>\d{1,4})(?P<after>(?:[._/-]\D*)?)\Z",
    re.IGNORECASE,
)
# Words whose number is a module's: block 3 is the fourth block. Numbers of other words may count
# the embedding as the first.
_MODULES: Final = frozenset({"layers", "blocks", "h"})
_COUNTED: Final = re.compile(r"hidden_?states?\Z", re.IGNORECASE)
_STATES_AFTER: Final = frozenset(
    ("", "output", "outputs", "hidden_states", "hook_resid_post", "resid_post", "block_output")
)
_ATTENTION: Final = re.compile(r"attn|attention|hook_pattern", re.IGNORECASE)
_ATTENTIONS_AFTER: Final = frozenset(
    (
        *("", "attn", "attentions", "attention", "attn_weights", "attention_weights"),
        *("hook_pattern", "attn.hook_pattern", "self_attn"),
    )
)
_LABELS: Final = re.compile(r"(?:y|(?:.*_)?(?:labels?|targets?|correct))\Z", re.IGNORECASE)
_EMBEDDINGS: Final = frozenset(("embedding", "embeddings", "embed", "wte", "embed_tokens"))
# TransformerLens: the residual stream before block 0 is the embedding with that of positions.
_POST: Final = "hook_resid_post"
_PRE: Final = "hook_resid_pre"


class Naming:
    """Makes samples of named arrays of one source.

    Parameters
    ----------
    path
        Of the file, for messages.
    established
        What samples of the source have told; added to.
    understood
        Sentences for reports; added to.
    """

    def __init__(self, path: Path, established: Established, understood: list[str]) -> None:
        self.path = path
        self.established = established
        self.understood = understood

    def sample(
        self, name: str, arrays: Arrays, facts: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """A sample's fields; its id is `name` where no field is."""
        if is_of_engine(arrays):
            arrays, told = by_field(arrays)
            for sentence in told:
                self.note(sentence)
        item = self._with_layers(arrays)
        if not any(kind in item for kind in layout.KINDS):
            self._reject(arrays)
        self._place_tokens(item)
        for key in _SINGLE:
            if key in item and not isinstance(item[key], str):
                item[key] = _single(item[key])
        self._check_rows(item)
        decoded = item.get(layout.TOKENS_DECODED)
        if isinstance(decoded, np.ndarray) and decoded.dtype.kind == "U":
            item[layout.TOKENS_DECODED] = decoded.tolist()
        if facts:
            item.setdefault(_METADATA, dict(facts))
        item.setdefault(layout.QUESTION_ID, name)
        return item

    def _reject(self, arrays: Arrays) -> None:
        names = and_more([f"{name[:60]} {_shape(value)}" for name, value in arrays.items()], 12)
        message = (
            f"{self.path}: holds {names or 'no arrays'}, and no name says that it holds hidden "
            "states or attentions; expected 'hidden_states' or one array per layer, such as "
            "'model.layers.3', or a mapping that says which name holds which field"
        )
        raise ConversionError(message)

    def _check_rows(self, item: Arrays) -> None:
        """Reject one array per layer whose rows may be samples, as each has a label."""
        states = item.get(layout.HIDDEN_STATES)
        if isinstance(states, dict):
            states = list(states.values())
        found = states if isinstance(states, list) else []
        shapes = {_shape(each) for each in found if isinstance(each, (np.ndarray, TorchValue))}
        rows = next(iter(shapes))[0] if len(shapes) == 1 and len(min(shapes)) == 2 else 0
        if rows < 2 or layout.TOKENS in item:
            return
        labels = next(
            (key for key in item if _LABELS.match(key) and _shape(item[key]) == (rows,)), ""
        )
        if labels:
            message = (
                f"{self.path}: {labels!r} has a value for each of the {rows} rows of the layers, "
                "so rows may be samples and not tokens; say which, axes = 'sample hidden' or "
                f"'token hidden', in {A_MAPPING}"
            )
            raise ConversionError(message)

    def _place_tokens(self, item: Arrays) -> None:
        name = next((each for each in TOKENS if each in item), None)
        if name is None:
            return
        value = item.pop(name)
        array = value.data if isinstance(value, TorchValue) else value
        if isinstance(array, np.ndarray) and array.ndim == 2 and len(array) == 1:
            array = array[0]
        if isinstance(array, np.ndarray):
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
            value = TorchValue(array, value.dtype) if isinstance(value, TorchValue) else array
        item[layout.TOKENS] = value
        if name != layout.TOKENS:
            self.note(f"{name!r} holds the tokens")

    def _with_layers(self, arrays: Arrays) -> dict[str, Any]:
        """Names that differ in a number only, as one field each."""
        item = dict(arrays)
        by_field: defaultdict[str, list[tuple[str, dict[int, str]]]] = defaultdict(list)
        for (_, word, after), names in _numbered(arrays).items():
            field = _field_of(word, after, [arrays[name] for name in names.values()])
            if field is not None and field not in arrays:
                by_field[field].append((word, names))
        for field, found in by_field.items():
            if len(found) > 1:
                examples = " and ".join(repr(next(iter(names.values()))) for _, names in found)
                message = (
                    f"{self.path}: names such as {examples} may all be {field}; say which are in "
                    f"{A_MAPPING}"
                )
                raise ConversionError(message)
            ((word, names),) = found
            for name in names.values():
                del item[name]
            item[field] = self._layers(field, word, names, item, arrays)
        return item

    def _layers(
        self, field: str, word: str, names: dict[int, str], item: Arrays, arrays: Arrays
    ) -> Any:
        ordered = dict(sorted(names.items()))
        example = next(iter(ordered.values()))
        if _COUNTED.match(word):
            if list(ordered) != list(range(len(ordered))):
                message = (
                    f"{self.path}: {example!r} and others count hidden states, and some are "
                    f"missing, so that nothing says which blocks they are of; say so in {A_MAPPING}"
                )
                raise ConversionError(message)
            return [arrays[name] for name in ordered.values()]
        layers = {name: arrays[name] for name in ordered.values()}
        if any(len(re.findall(r"\d+", name)) > 1 for name in layers):
            layers = {number: arrays[name] for number, name in ordered.items()}  # type: ignore[misc]
        self.note(f"names such as {example!r} are the layers of {field}")
        if field == layout.HIDDEN_STATES:
            pre = example.removesuffix(_POST).replace(str(next(iter(ordered))), "0") + _PRE
            embedding = pre if example.endswith(_POST) and pre in item else None
            embedding = embedding or next((name for name in item if _is_embedding(name)), None)
            if embedding is not None:
                layers = {"embedding": item.pop(embedding), **layers}
            elif word.lower() in _MODULES:
                # Module 0 is the first block.
                self.established.first_states[len(layers)] = "block"
        return layers

    def note(self, sentence: str) -> None:
        """Say once how the source was understood."""
        if sentence not in self.understood:
            self.understood.append(sentence)


def names_layers(arrays: Mapping[Any, Any]) -> bool:
    """Whether some names say that they are layers of hidden states or attentions."""
    if not all(type(name) is str for name in arrays):
        return False
    return any(
        all(isinstance(arrays[name], (np.ndarray, TorchValue)) for name in names.values())
        and _field_of(word, after, [arrays[name] for name in names.values()]) is not None
        for (_, word, after), names in _numbered(arrays).items()
    )


def is_numbered(name: str) -> bool:
    """Whether a name holds a layer's number."""
    return _NUMBERED.match(name) is not None


def _numbered(names: Iterable[str]) -> dict[tuple[str, str, str], dict[int, str]]:
    """Names by the text around a layer's number, and by that number."""
    groups: defaultdict[tuple[str, str, str], dict[int, str]] = defaultdict(dict)
    for name in names:
        match = _NUMBERED.match(name)
        if match is not None:
            key = match["before"], match["word"], match["after"].strip("._/-")
            groups[key].setdefault(int(match["number"]), name)
    return groups


def _field_of(word: str, after: str, values: list[Any]) -> str | None:
    """The field whose layers names with this word and ending are, by the axes of the arrays."""
    ranks = {len(_shape(value)) for value in values}
    if _ATTENTION.search(word) or _ATTENTION.search(after):
        is_square = all(
            len(_shape(each)) > 2 and len(set(_shape(each)[-2:])) == 1 for each in values
        )
        fits = after.lower() in _ATTENTIONS_AFTER and ranks <= {3, 4} and is_square
        return layout.ATTENTIONS if fits else None
    fits = after.lower() in _STATES_AFTER and ranks <= {1, 2, 3}
    return layout.HIDDEN_STATES if fits else None


def _is_embedding(name: str) -> bool:
    if name.lower().endswith("hook_embed"):
        # The axis of positions has another name, and may be missing in it.
        return False
    last = re.split(r"[./]", name.lower())[-1]
    return last in _EMBEDDINGS or last.rpartition("_")[2] in _EMBEDDINGS


def _single(value: Any) -> Any:
    """The number or text in an array of one element; other values as they are."""
    array = value.data if isinstance(value, TorchValue) else value
    if not isinstance(array, np.ndarray) or array.size != 1 or array.dtype.kind not in "biuSU":
        return value
    found = array.reshape(()).item()
    return found.decode("utf-8", "replace") if isinstance(found, bytes) else found


def _shape(value: Any) -> tuple[int, ...]:
    array = value.data if isinstance(value, TorchValue) else value
    return tuple(getattr(array, "shape", ()))
