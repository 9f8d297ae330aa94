"""Samples of named arrays, as safetensors and npz hold them: which name is which field.

A name of the legacy dict is that field, ``token_ids`` and ``input_ids`` are its tokens. Names that
differ in a layer's number only, such as ``model.layers.3``, are the layers of a field. Names such
as ``q0/hidden_states`` belong to sample ``q0``. All others are extra fields.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.format.text import and_more
from h5traces.format.values import TorchValue
from h5traces.meaning.options import ReadingOptions
from h5traces.meaning.records import to_record
from h5traces.sources.engine_names import by_field, is_of_engine
from h5traces.sources.opening import source_stem
from h5traces.sources.source import TraceSource

if TYPE_CHECKING:
    import os

    from h5traces.format.record import SourcePosition, TraceRecord
    from h5traces.sources.mapped import MappedFile

Arrays = dict[str, Any]
Loaders = Mapping[str, Callable[[], Any]]

_TOKENS: Final = (layout.TOKENS, "token_ids", "input_ids")
_METADATA: Final = "__metadata__"
# Of one sample.
_MOST_ARRAYS: Final = 10_000
_FIELDS: Final = (*layout.KINDS, *_TOKENS, layout.TOKENS_DECODED)
_OF_SAMPLE: Final = re.compile(rf"(.+)[/.]({'|'.join(_FIELDS)})\Z")
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
_EMBEDDINGS: Final = frozenset(
    ("embedding", "embeddings", "embed", "wte", "hook_embed", "embed_tokens")
)


class NamedArraysSource(TraceSource):
    """A file of named arrays: one sample, or one per prefix of names.

    Attributes
    ----------
    arrays
        By name, what loads each array.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, options: ReadingOptions = ReadingOptions()
    ) -> None:
        super().__init__(path, options=options)
        self._samples: list[tuple[str, Loaders]] = []
        self._file: MappedFile
        self.arrays: Loaders = {}

    def take(self, arrays: Loaders, facts: Mapping[str, str], file: MappedFile) -> None:
        """Say what the file holds: arrays by name, text about them, and the file they lie in."""
        self._file = file
        self.arrays = arrays
        self._facts = {key: value for key, value in facts.items() if key != "format"}
        self._samples = self._split(arrays)
        self.num_samples = len(self._samples)

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes read so far, by samples, and the size of the file."""
        nbytes = self._file.nbytes
        return nbytes * self.num_read // max(self.num_samples or 0, 1), nbytes

    def close(self) -> None:
        """Close the file; samples that were returned stay valid."""
        self._samples, self.arrays = [], {}
        self._file.close()

    def release(self, nbytes: int = 0) -> None:
        """Give back pages of the file, of which so many bytes were read as views."""
        self._file.release(nbytes)

    def __next__(self) -> dict[Any, Any]:
        if not self._samples:
            raise StopIteration
        self.release()
        name, loaders = self._samples.pop(0)
        if len(loaders) > _MOST_ARRAYS:
            message = (
                f"{self.path}: holds {len(loaders):,} arrays of sample {name[:80]!r}, at most "
                f"{_MOST_ARRAYS:,} are read; name samples as in 'q0/hidden_states', or save each "
                "to a file of its own"
            )
            raise ConversionError(message)
        self.num_read += 1
        return self._sample(name, self.prepared({key: load() for key, load in loaders.items()}))

    def prepared(self, arrays: Arrays) -> Arrays:
        """The arrays of one sample, as a format changes them before they are named."""
        return arrays

    def to_record(
        self, item: dict[Any, Any], place: SourcePosition, layers: tuple[int, ...] | None
    ) -> TraceRecord:
        """One sample as a record; where its last hidden state was taken is not known."""
        return to_record(
            item,
            source=place,
            layers=layers,
            sites_known=False,
            options=self.options,
            established=self.established,
        )

    # --- names -----------------------------------------------------------------------------------

    def _split(self, arrays: Loaders) -> list[tuple[str, Loaders]]:
        """Arrays by sample, each with the sample's id."""
        stem = source_stem(self.path.name)
        if any(name in layout.KINDS for name in arrays):
            return [(stem, arrays)]
        found: defaultdict[str, dict[str, Callable[[], Any]]] = defaultdict(dict)
        for name, value in arrays.items():
            match = _OF_SAMPLE.match(name)
            if match is None or _NUMBERED.match(match[1]):
                return [(stem, arrays)]
            found[match[1]][match[2]] = value
        return list(found.items())

    def _sample(self, name: str, arrays: Arrays) -> dict[str, Any]:
        if is_of_engine(arrays):
            arrays, told = by_field(arrays)
            for sentence in told:
                self._note(sentence)
        item = self._with_layers(arrays)
        if not any(kind in item for kind in layout.KINDS):
            self._reject(arrays)
        self._place_tokens(item)
        for key in _SINGLE:
            if key in item and not isinstance(item[key], str):
                item[key] = _single(item[key])
        for kind in layout.KINDS:
            self._check_axes(kind, item)
        decoded = item.get(layout.TOKENS_DECODED)
        if isinstance(decoded, np.ndarray) and decoded.dtype.kind == "U":
            item[layout.TOKENS_DECODED] = decoded.tolist()
        if self._facts:
            item.setdefault(_METADATA, dict(self._facts))
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

    def _check_axes(self, kind: str, item: Arrays) -> None:
        """Reject what looks like one array of all layers, and need not be one."""
        value = item.get(kind)
        axes = layout.KINDS[kind].axes
        if isinstance(value, (np.ndarray, TorchValue)) and len(_shape(value)) <= len(axes):
            message = (
                f"{self.path}: {kind!r} of shape {_shape(value)} has no axis for layers, or none "
                f"for {axes[0]}s; name its axes in a mapping"
            )
            raise ConversionError(message)

    def _place_tokens(self, item: Arrays) -> None:
        name = next((each for each in _TOKENS if each in item), None)
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
            self._note(f"{name!r} holds the tokens")

    def _with_layers(self, arrays: Arrays) -> dict[str, Any]:
        """Names that differ in a number only, as one field each."""
        groups: defaultdict[tuple[str, str, str], dict[int, str]] = defaultdict(dict)
        for name in arrays:
            match = _NUMBERED.match(name)
            if match is not None:
                key = match["before"], match["word"], match["after"].strip("._/-")
                groups[key].setdefault(int(match["number"]), name)
        item = dict(arrays)
        by_field: defaultdict[str, list[tuple[str, dict[int, str]]]] = defaultdict(list)
        for (_, word, after), names in groups.items():
            field = _field_of(word, after, [arrays[name] for name in names.values()])
            if field is not None and field not in arrays:
                by_field[field].append((word, names))
        for field, found in by_field.items():
            if len(found) > 1:
                examples = " and ".join(repr(next(iter(names.values()))) for _, names in found)
                message = (
                    f"{self.path}: names such as {examples} may all be {field}; say in a mapping "
                    "which are"
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
                    "missing, so that nothing says which blocks they are of; say so in a mapping"
                )
                raise ConversionError(message)
            return [arrays[name] for name in ordered.values()]
        layers = {name: arrays[name] for name in ordered.values()}
        if any(len(re.findall(r"\d+", name)) > 1 for name in layers):
            layers = {number: arrays[name] for number, name in ordered.items()}  # type: ignore[misc]
        self._note(f"names such as {example!r} are the layers of {field}")
        if field == layout.HIDDEN_STATES:
            embedding = next((name for name in item if _is_embedding(name)), None)
            if embedding is not None:
                layers = {"embedding": item.pop(embedding), **layers}
            if word.lower() in _MODULES:
                # Module 0 is the first block.
                self.established.first_states[len(layers)] = "block"
        return layers

    def _note(self, sentence: str) -> None:
        if sentence not in self.understood:
            self.understood.append(sentence)


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
    return re.split(r"[._/]", name.lower())[-1] in _EMBEDDINGS


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
