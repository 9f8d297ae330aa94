"""Reads files as a mapping says: named arrays become the fields of samples."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.format.text import and_more
from h5traces.format.values import TorchValue
from h5traces.meaning.axes import BATCH, LAYER, Axes, data_of, layers_of, view, with_data
from h5traces.meaning.options import ReadingOptions
from h5traces.meaning.records import to_record
from h5traces.sources.array_files import open_arrays
from h5traces.sources.array_folder import FolderFile
from h5traces.sources.mapping import CARRIERS, Template, read_mapping
from h5traces.sources.opening import source_stem
from h5traces.sources.source import TraceSource

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from h5traces.format.record import SourcePosition, TraceRecord
    from h5traces.sources.arrays import Group, NamedArray
    from h5traces.sources.mapping import FieldMapping, MappingDocument

_EMBEDDING: Final = "embedding"
# Arrays of a field by layer: one, of the key None, where its name has no place for a number.
_Parts = dict[Any, tuple[str, "NamedArray"]]


@dataclass(slots=True)
class _Fields:
    """Arrays of one sample, or of several along their batch axes, by field."""

    id: str | None
    parts: dict[str, _Parts]


class MappedSource(TraceSource):
    """The samples of a file that a mapping describes."""

    kind = "mapping"

    def __init__(
        self, path: str | os.PathLike[str], *, options: ReadingOptions = ReadingOptions()
    ) -> None:
        super().__init__(path, options=options)
        assert options.mapping is not None
        self._mapping: MappingDocument = read_mapping(options.mapping)
        first_state = options.first_state or self._mapping.first_state
        self.options = replace(options, first_state=first_state)
        self._stem = self._id_of_file()
        is_folder = self._mapping.folder and self.path.is_dir()
        self._arrays = (FolderFile if is_folder else open_arrays)(self.path, self._mapping)
        self.kind = self._arrays.kind  # type: ignore[misc]
        self.understood += self._arrays.understood
        self._samples = self._read()
        # Bytes of arrays that the last sample was made of.
        self._nbytes = 0

    def _id_of_file(self) -> str:
        template = self._mapping.file_template
        if template is None:
            return source_stem(self.path.name)
        parts = template.text.count("/") + 1
        name = "/".join(self.path.absolute().parts[-parts:])
        found = template.match(name)
        if found is None:
            self._fail(f"the file name {name!r} does not fit file = {template.text!r}")
        return found[0] or source_stem(self.path.name)

    def __next__(self) -> dict[Any, Any]:
        item = next(self._samples)
        self.num_read += 1
        return item

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes read so far, and the size of the file."""
        done, total = self._arrays.progress
        if self.num_samples and not self._arrays.has_rows:
            done = total * self.num_read // self.num_samples
        return done, total

    def close(self) -> None:
        """Close the file; samples that were returned stay valid."""
        self._samples = iter(())
        self._arrays.close()

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

    def _fail(self, message: str) -> NoReturn:
        message = f"{self.path}: {message} (mapping {self.options.mapping})"
        raise ConversionError(message)

    # --- samples ---------------------------------------------------------------------------------

    def _read(self) -> Iterator[dict[str, Any]]:
        for row, group in enumerate(self._arrays.groups()):
            found = self._found(group)
            if not self._arrays.has_rows:
                self.num_samples = sum(max(self._num_elements(each), 1) for each in found)
            for each in found:
                yield from self._samples_of(each, row)

    def _samples_of(self, found: _Fields, row: int) -> Iterator[dict[str, Any]]:
        count = self._num_elements(found)
        for index in range(max(count, 1)):
            self._arrays.release(self._nbytes)
            self._nbytes = 0
            yield self._item(found, index if count else None, row, is_one=count < 2)

    def _item(self, found: _Fields, index: int | None, row: int, *, is_one: bool) -> dict[str, Any]:
        item = {}
        for field, parts in found.parts.items():
            item[field] = self._value(field, parts, index)
        sample_id = found.id or self._stem
        if not is_one:
            sample_id = f"{sample_id}_{index}"
        elif self._arrays.has_rows and found.id is None:
            sample_id = f"{sample_id}_{row}"
        item.setdefault(layout.QUESTION_ID, sample_id)
        return item

    def _num_elements(self, found: _Fields) -> int:
        """How many samples lie along batch axes; 0 without one."""
        sizes: dict[str, int] = {}
        for field, parts in found.parts.items():
            for key, (name, array) in parts.items():
                axes = self._axes(field, key)
                if BATCH in axes:
                    self._check_rank(field, name, array, axes)
                    sizes[field] = array.shape[axes.index(BATCH)]
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{field} {size}" for field, size in sizes.items())
            self._fail(f"batch axes have unequal lengths: {told}; expected one length")
        return next(iter(sizes.values()), 0)

    # --- names -----------------------------------------------------------------------------------

    def _found(self, group: Group) -> list[_Fields]:
        """The fields of every sample in a group, by the ids in names."""
        by_id: dict[str | None, dict[str, _Parts]] = {}
        shared: dict[str, _Parts] = {}
        used: set[str] = set()
        for field, spec in self._mapping.fields.items():
            matches = self._matches(field, spec, group)
            for sample, parts in matches.items():
                used.update(name for name, _ in parts.values())
                if sample is None:
                    shared[field] = parts
                else:
                    by_id.setdefault(sample, {})[field] = parts
        self._note_others(group, used, has_ids=bool(by_id))
        if not by_id:
            if not any(kind in shared for kind in layout.KINDS):
                self._fail(f"holds neither hidden states nor attentions; found {_listed(group)}")
            others = {
                name: {None: (name, group[name])}
                for name in group
                if name not in used and not self._mapping.ignores(name)
            }
            return [_Fields(None, {**shared, **self._extras(others)})]
        return self._by_id(by_id, shared)

    def _by_id(
        self, by_id: dict[str | None, dict[str, _Parts]], shared: dict[str, _Parts]
    ) -> list[_Fields]:
        ids = list(by_id)
        if all(each is not None and each.isdecimal() for each in ids):
            ids.sort(key=lambda each: int(each or 0))
        found = []
        for number, sample in enumerate(ids):
            fields = by_id[sample]
            for field, spec in self._mapping.fields.items():
                if field in fields or field in shared or spec.optional:
                    continue
                self._fail(f"field {field!r}: sample {sample!r} has no {spec.name!r}")
            common = {
                field: self._of_sample(field, parts, number, len(ids))
                for field, parts in shared.items()
            }
            found.append(_Fields(sample, {**common, **fields}))
        return found

    def _of_sample(self, field: str, parts: _Parts, number: int, count: int) -> _Parts:
        """What one array holds for each of the samples that names tell apart."""
        found: _Parts = {}
        for key, (name, array) in parts.items():
            axes = self._axes(field, key)
            if BATCH not in axes:
                return parts
            axis = axes.index(BATCH)
            self._check_rank(field, name, array, axes)
            if array.shape[axis] != count:
                self._fail(
                    f"field {field!r}: {name!r} of shape {array.shape} has {array.shape[axis]} on "
                    f"the batch axis, expected {count}, one per id in the names"
                )
            found[key] = name, _Element(array, axis, number)
        return found

    def _matches(self, field: str, spec: FieldMapping, group: Group) -> dict[str | None, _Parts]:
        """Arrays of a field by sample and layer."""
        found: dict[str | None, _Parts] = {}
        if not spec.template.places:
            if spec.name in group:
                found[None] = {None: (spec.name, group[spec.name])}
        else:
            for name, array in group.items():
                match = spec.template.match(name)
                if match is not None and not self._mapping.ignores(name):
                    self._add(field, found.setdefault(match[0], {}), match[1], name, array)
        if not found and not spec.optional:
            self._fail(f"field {field!r}: nothing is named {spec.name!r}; found {_listed(group)}")
        if spec.embedding is not None:
            self._add_embedding(field, spec.embedding, found, group)
        return found

    def _add(
        self, field: str, parts: _Parts, layer: int | None, name: str, array: NamedArray
    ) -> None:
        if layer in parts:
            self._fail(f"field {field!r}: {parts[layer][0]!r} and {name!r} are the same layer")
        parts[layer] = name, array

    def _add_embedding(
        self, field: str, name: str, found: dict[str | None, _Parts], group: Group
    ) -> None:
        template = Template(name)
        matches = {match[0]: each for each in group if (match := template.match(each)) is not None}
        for sample, parts in found.items():
            each = matches.get(sample)
            if each is None:
                self._fail(f"field {field!r}: nothing is named {name!r}; found {_listed(group)}")
            parts[_EMBEDDING] = each, group[each]

    def _extras(self, others: dict[str, _Parts]) -> dict[str, _Parts]:
        """Arrays that the mapping does not name: each an extra field, unless of several samples."""
        several = any(
            each.parsed is not None and BATCH in each.parsed.names
            for each in self._mapping.fields.values()
        )
        return {} if several else others

    def _note_others(self, group: Group, used: set[str], *, has_ids: bool) -> None:
        """Say what is not read because nothing tells its sample."""
        several = has_ids or not self._extras({"": {}})
        if not several:
            return
        others = [name for name in group if name not in used and not self._mapping.ignores(name)]
        arrays = [name for name in others if not name.rpartition("/")[2].startswith("@")]
        if arrays:
            self._say(
                self.unread,
                f"{and_more(map(repr, arrays), 8)}: in no field of the mapping; name it in fields, "
                "or in ignore",
            )
        if len(others) > len(arrays):
            self._say(self.understood, "attributes that the mapping does not name are not kept")

    def _say(self, sentences: list[str], sentence: str) -> None:
        if sentence not in sentences:
            sentences.append(sentence)

    # --- values ----------------------------------------------------------------------------------

    def _axes(self, field: str, key: Any = None) -> tuple[str, ...]:
        """Axes of an array of a field; none where the mapping names none."""
        spec = self._mapping.fields.get(field)
        names = () if spec is None or spec.parsed is None else spec.parsed.names
        return tuple(each for each in names if key != _EMBEDDING or each != LAYER)

    def _check_rank(self, field: str, name: str, array: NamedArray, axes: tuple[str, ...]) -> None:
        if len(array.shape) != len(axes):
            self._fail(
                f"field {field!r}: {name!r} of shape {array.shape} and type {array.dtype} has "
                f"{len(array.shape)} axes, expected {len(axes)}: {Axes(axes)}"
            )

    def _value(self, field: str, parts: _Parts, index: int | None) -> Any:
        spec = self._mapping.fields.get(field)
        is_one_layer = spec is not None and field in layout.KINDS and spec.parsed is not None
        if spec is None or not (spec.is_layered or is_one_layer):
            return self._plain(field, self._array(field, None, parts[None], index))
        try:
            return self._layers(field, spec, parts, index)
        except ConversionError as error:
            self._fail(str(error).removeprefix(f"{self.path}: "))

    def _array(self, field: str, key: Any, part: tuple[str, NamedArray], index: int | None) -> Any:
        """An array of one sample, without a batch axis."""
        name, array = part
        axes, spec = self._axes(field, key), self._mapping.fields.get(field)
        if axes:
            self._check_rank(field, name, array, axes)
        if isinstance(array, _Element) or index is None or BATCH not in axes:
            value = array.read()
        else:
            value = array.read(axes.index(BATCH), index)
        if isinstance(value, (np.ndarray, TorchValue)):
            self._nbytes += data_of(value).nbytes
        return value if spec is None else self._typed(field, name, value, spec.dtype)

    def _typed(self, field: str, name: str, value: Any, dtype: str | None) -> Any:
        """The value with the type that the mapping says its bits are."""
        if dtype is None or not isinstance(value, (np.ndarray, TorchValue)):
            return value
        data, carrier = data_of(value), np.dtype(CARRIERS.get(dtype, dtype))
        if data.dtype.itemsize != carrier.itemsize:
            self._fail(
                f"field {field!r}: {name!r} has the type {data.dtype}, whose "
                f"{8 * data.dtype.itemsize} bits cannot be those of {dtype}"
            )
        bits = data.view(carrier)
        return TorchValue(bits, dtype) if dtype in CARRIERS else bits

    def _layers(self, field: str, spec: FieldMapping, parts: _Parts, index: int | None) -> Any:
        """A layered field: a list of its layers, or a dict by number where numbers are known."""
        names = tuple(each for each in self._axes(field) if each != BATCH)
        arrays = {key: self._array(field, key, part, index) for key, part in parts.items()}
        embedding = arrays.pop(_EMBEDDING, None)
        if None in arrays and not spec.is_layered:
            layers = [self._layer(field, names, parts[None][0], arrays[None])]
            numbers = spec.layers
        elif None in arrays:
            layers = layers_of(arrays[None], Axes(names), field)
            numbers = spec.layers
            if numbers is None and embedding is not None:
                numbers = tuple(range(len(layers)))
        else:
            ordered = sorted(arrays)
            layers = [self._layer(field, names, parts[each][0], arrays[each]) for each in ordered]
            numbers = spec.layers or tuple(ordered)
        if numbers is None:
            return layers
        if len(numbers) != len(layers):
            self._fail(
                f"field {field!r}: layers has {len(numbers)} numbers for {len(layers)} layers"
            )
        found: dict[Any, Any] = {}
        if embedding is not None:
            rest = tuple(each for each in names if each != LAYER)
            found[_EMBEDDING] = self._layer(field, rest, parts[_EMBEDDING][0], embedding)
        return {**found, **dict(zip(numbers, layers, strict=True))}

    def _layer(self, field: str, names: tuple[str, ...], name: str, value: Any) -> Any:
        kind = layout.KINDS.get(field)
        if not names:
            return value
        wanted = kind.axes if kind else names
        if not set(names) <= set(wanted):
            self._fail(
                f"field {field!r}: axes are ({', '.join(names)}), expected some of "
                f"{', '.join(wanted)}"
            )
        return view(value, names, wanted, f"{name!r}")

    def _plain(self, field: str, value: Any) -> Any:
        """A field that is not an array of layers, with the type that the format has a place for."""
        if field in (layout.QUESTION_ID, layout.LABEL, layout.PROMPT_LENGTH, *layout.TEXT_FIELDS):
            return single(value)
        if field == layout.TOKENS:
            return tokens_of(value)
        if field == layout.TOKENS_DECODED and isinstance(value, np.ndarray):
            return [str(each) for each in value.tolist()]
        return value


class _Element:
    """One element of an array along an axis, as an array."""

    def __init__(self, array: NamedArray, axis: int, index: int) -> None:
        self._array, self._axis, self._index = array, axis, index

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole, with 1 on the axis."""
        shape = list(self._array.shape)
        shape[self._axis] = 1
        return tuple(shape)

    @property
    def dtype(self) -> str:
        """Type of its elements."""
        return self._array.dtype

    def read(self, axis: int | None = None, index: int = 0) -> Any:
        """The element."""
        return self._array.read(self._axis, self._index)


def single(value: Any) -> Any:
    """The number or text in an array of one element; other values as they are."""
    array = data_of(value) if isinstance(value, (np.ndarray, TorchValue)) else value
    if isinstance(array, np.ndarray) and array.size == 1 and array.dtype.kind in "biuSU":
        array = array.reshape(()).item()
    elif isinstance(array, np.generic):
        array = array.item()
    else:
        array = value
    if isinstance(array, bytes):
        return array.decode("utf-8", "replace")
    return int(array) if type(array) is bool else array


def tokens_of(value: Any) -> Any:
    """Token ids as ``(tokens,)`` integers of this machine; other values as they are."""
    if isinstance(value, (list, tuple)) and value and all(type(each) is int for each in value):
        value = np.asarray(value)
    if not isinstance(value, (np.ndarray, TorchValue)):
        return value
    array = data_of(value)
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return with_data(value, array)


def _listed(group: Group) -> str:
    named = (f"{name[:60]} {array.shape}" for name, array in itertools.islice(group.items(), 12))
    more = f", and {len(group) - 12} more" if len(group) > 12 else ""
    return (", ".join(named) + more) or "nothing"
