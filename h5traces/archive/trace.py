"""One stored trace, which behaves as the legacy dict does in existing code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from h5traces.archive.tensors import to_tensor, with_tensors, without_tensors
from h5traces.errors import (
    CorruptArchiveError,
    HeadsNotStoredError,
    LayerIndexError,
    SchemaError,
    UnsupportedEncodingError,
)
from h5traces.format import layout, text
from h5traces.format.document import from_attributes
from h5traces.format.dtypes import CARRIERS, FLOAT_TYPES, FloatType, TypedArray, cast_values
from h5traces.format.trace import TraceMetadata
from h5traces.format.values import TorchValue, decode_element
from h5traces.precision.decoding import EXCEPTION_COLUMNS, decode, is_encoded, num_exceptions
from h5traces.storage.remote.paths import RemotePath

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from h5traces.archive.file import ArchiveFile
    from h5traces.format.archive import ArchiveMetadata
    from h5traces.format.document import Attrs
    from h5traces.format.entries import ObjectEntry, SampleEntry
    from h5traces.storage.files import ByteFile


LayerValue = NDArray[Any] | list[NDArray[Any]]


class LayerSequence(Sequence[LayerValue]):
    """The arrays of one kind of one trace, by position in the stored list; each read when asked."""

    def __init__(self, trace: Trace, kind: str, layers: tuple[int, ...] | None) -> None:
        self._trace = trace
        self.kind = kind
        self._selected = layers

    @cached_property
    def names(self) -> list[str]:
        """Dataset names, in order of position; the embedding is not part of the list."""
        names = _layer_names(self.kind, tuple(self._trace.objects))
        if self._selected is None:
            return list(names)
        selected = {layout.layer_name(layer) for layer in self._selected}
        return [name for name in names if name in selected]

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's own layer number of every position."""
        return tuple(int(name.removeprefix("layer_")) for name in self.names)

    @property
    def sites(self) -> tuple[str | None, ...]:
        """Where in the model each position was taken: ``block_output`` or ``final_norm``."""
        sites = (self._trace.attrs(f"{self.kind}/{name}").get("site") for name in self.names)
        return tuple(None if site is None else str(site) for site in sites)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, position: int) -> LayerValue: ...
    @overload
    def __getitem__(self, position: slice) -> list[LayerValue]: ...
    def __getitem__(self, position: int | slice) -> LayerValue | list[LayerValue]:
        if isinstance(position, slice):
            return self._read_slice(position)
        try:
            name = self.names[position]
        except IndexError:
            message = (
                f"{self._trace.place}: position {position} of {self.kind} is out of range; "
                f"{len(self.names)} are stored, layers {list(self.layers)}; "
                "trace.layer(n) takes the model's own layer number"
            )
            raise LayerIndexError(message) from None
        return self._read(name)

    def _read_slice(self, positions: slice) -> list[LayerValue]:
        numbers = range(len(self))[positions]
        ranges = (each for number in numbers for each in self.ranges(number))
        with self._trace.prefetched(ranges):
            return [self._read(self.names[number]) for number in numbers]

    @property
    def is_remote(self) -> bool:
        """Whether the arrays lie on a server."""
        return self._trace.is_remote

    @property
    def trace(self) -> Trace:
        """The trace that the arrays belong to."""
        return self._trace

    def ranges(self, position: int) -> list[tuple[int, int]]:
        """Offset and size of the stored chunks of one array."""
        found = self._trace.ranges(f"{self.kind}/{self.names[position]}")
        tables = (f"{self.kind}/{name}" for name in layout.TABLES)
        for table in tables:
            found += self._trace.ranges(table) if table in self._trace.objects else []
        return found

    def _read(self, name: str) -> LayerValue:
        value: LayerValue = self._trace.read_layer(self.kind, name)
        return value

    def to_list(self, *, torch_tensors: bool = False) -> list[Any] | tuple[Any, ...]:
        """All arrays, in a list or tuple as the source had them."""
        values = [
            self._trace.read_layer(self.kind, name, torch_tensors=torch_tensors)
            for name in self.names
        ]
        is_tuple = self._trace.attrs(self.kind).get("sequence") == "tuple"
        return tuple(values) if is_tuple else values

    def __repr__(self) -> str:
        return f"<{self.kind}: {len(self)} arrays, layers {list(self.layers)}>"


@lru_cache(maxsize=256)
def _layer_names(kind: str, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Layer datasets of a kind, by layer; cached, since all samples of an archive are alike."""
    prefix = f"{kind}/"
    names = (path.removeprefix(prefix) for path in paths if path.startswith(prefix))
    layers = (layout.parse_layer_name(name) for name in names)
    return tuple(
        layout.layer_name(layer) for layer in sorted(each for each in layers if each is not None)
    )


_STEPS_TABLE_AXES = 3
_FLAT_AXES = 2


def restored_layer(trace: Trace, kind: str, name: str) -> TypedArray | list[TypedArray]:
    """The array of a kind by its dataset name, in its source's type; a list where in steps.

    Raises
    ------
    CorruptArchiveError
        What is stored does not go together.
    UnsupportedEncodingError
        This release does not know how to decode it.
    """
    path = f"{kind}/{name}"
    entry, stored = trace.entry(path), trace.stored(path)
    try:
        encoded = is_encoded(entry.attrs)
    except UnsupportedEncodingError as error:
        message = f"{trace.place}/{path}: {error}"
        raise UnsupportedEncodingError(message) from error
    if "encoding" in entry.attrs and trace.archive_file.metadata.precision is None:
        message = (
            f"{trace.place}/{entry.path}: is encoded as {entry.attrs['encoding']}, but the archive "
            "does not say that it is less than exact (the root attribute 'precision' is missing); "
            "restore the file from a copy"
        )
        raise CorruptArchiveError(message)
    if encoded:
        return _decoded(trace, kind, name, entry, stored)
    if f"{kind}/{layout.STEPS_TABLE}" in trace.objects:
        steps = _steps(trace, kind, name, stored)
        return [_cast_back(trace, step, entry) for step in steps]
    return _cast_back(trace, stored, entry)


def _cast_back(trace: Trace, stored: NDArray[Any], entry: ObjectEntry) -> TypedArray:
    """Stored values in the type they are to be read in."""
    place = f"{trace.place}/{entry.path}"
    array = TypedArray(stored, _float_type(entry.dtype, place))
    source = entry.attrs.get("source_dtype")
    return cast_values(array, _float_type(source, place)) if source is not None else array


def _float_type(name: object, place: str) -> FloatType:
    if name not in FLOAT_TYPES:
        message = f"{place}: stored type {name!r} is none of {', '.join(CARRIERS)}"
        raise CorruptArchiveError(message)
    return name


def _decoded(
    trace: Trace, kind: str, name: str, entry: ObjectEntry, stored: NDArray[Any]
) -> TypedArray:
    file = trace.archive_file
    try:
        return decode(
            stored,
            entry.attrs,
            scale=lambda path: file.scale(path.removeprefix(f"/{layout.SCALES_GROUP}/")),
            exceptions=lambda: _exceptions(trace, kind, name),
            unrounded=file.unrounded,
        )
    except CorruptArchiveError as error:
        what = str(error).removeprefix(f"{file.path}: ")
        message = f"{trace.place}/{entry.path}: {what}"
        raise type(error)(message) from error


def _exceptions(trace: Trace, kind: str, name: str) -> NDArray[np.float64]:
    """Flat index and value of every exception of a layer."""
    path = f"{kind}/{layout.EXCEPTIONS_TABLE}"
    if path not in trace.objects:
        message = f"its exceptions are missing; expected the table {path}"
        raise CorruptArchiveError(message)
    table = trace.table(path, check=lambda: _check_table(trace, kind, path))
    layer = layout.parse_layer_name(name)
    found: NDArray[np.float64] = table[
        table[:, 0] == (layout.EMBEDDING_LAYER if layer is None else layer)
    ]
    return found[:, 1:]


def _check_table(trace: Trace, kind: str, path: str) -> None:
    """Rows are counted by the layers; a table may claim any number."""
    entry = trace.entry(path)
    count = num_exceptions(trace.all_attrs(f"{kind}/"))
    if entry.dtype != "float64" or entry.shape != (count, EXCEPTION_COLUMNS):
        message = (
            f"{path} is {entry.dtype or 'a group'} {entry.shape}, expected float64 "
            f"({count}, {EXCEPTION_COLUMNS}), as layers list {count} exceptions"
        )
        raise CorruptArchiveError(message)


def _steps(trace: Trace, kind: str, name: str, stored: NDArray[Any]) -> list[NDArray[Any]]:
    """Generation steps out of the flat dataset that holds them."""
    names = [layout.layer_name(layer) for layer in trace.stored_layers(kind)]
    table = trace.table(f"{kind}/{layout.STEPS_TABLE}")
    fits = table.ndim == _STEPS_TABLE_AXES and table.dtype.kind == "i" and name in names
    steps, start = [], 0
    try:
        shapes = table[names.index(name)].tolist() if fits and stored.ndim == _FLAT_AXES else []
        for shape in shapes:
            if min(shape, default=0) < 0:
                break
            stop = start + math.prod(shape) // max(1, stored.shape[0])
            steps.append(np.ascontiguousarray(stored[:, start:stop]).reshape(shape))
            start = stop
    except (ValueError, IndexError, OverflowError):
        shapes = []
    if not fits or len(steps) != len(shapes) or start != stored.shape[-1]:
        message = f"{trace.place}/{kind}/{name}: {stored.shape} does not fit its steps table"
        raise CorruptArchiveError(message)
    return steps


_INTEGER_TYPES = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


class Trace(Mapping[str, Any]):
    """A lazy, read-only view of one sample: each array is read when it is asked for.

    ``trace["hidden_states"][k]`` is a new, writable, native-endian array: hidden states
    ``(seq_len, hidden_size)``, attentions ``(num_heads, seq_len, seq_len)``; k is the position in
    the stored list. bfloat16 comes as float32, since numpy has no such type.
    """

    def __init__(
        self,
        file: ArchiveFile,
        index: int,
        *,
        ordinal: int | None = None,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        self._file = file
        self._index = index
        self._layers = layers
        self._tables: dict[str, NDArray[Any]] = {}
        self.ordinal = index if ordinal is None else ordinal

    @cached_property
    def _sample(self) -> SampleEntry:
        return self._file.sample(self._index)

    @property
    def place(self) -> str:
        """File and HDF5 path, for messages."""
        return f"{self._file.path}: {layout.sample_path(self._sample.ordinal)}"

    @cached_property
    def metadata(self) -> TraceMetadata:
        """The sample's attributes, validated; with the labels that lie beside the archive."""
        labels = self._file.labels
        try:
            found = from_attributes(TraceMetadata, self._sample.attrs)
            return found if labels is None else labels.labelled(found, self._sample.ordinal)
        except SchemaError as error:
            message = f"{self.place}: {error}"
            raise SchemaError(message, error.problems) from error

    @property
    def path(self) -> Path | RemotePath:
        """The file that the trace is stored in, or its address."""
        return self._file.path

    @property
    def position_in_file(self) -> int:
        """Index of the trace in its file; `ordinal` counts over all shards."""
        return self._index

    @property
    def has_new_label(self) -> bool:
        """Whether the trace was labelled later than it was stored."""
        labels = self._file.labels
        return labels is not None and labels.has_label(self._sample.ordinal)

    @property
    def archive_metadata(self) -> ArchiveMetadata:
        """Metadata of the archive file that the trace is stored in."""
        return self._file.metadata

    @property
    def selected(self) -> tuple[int, ...] | None:
        """The layers that ``archive.select`` chose; None where all that are stored."""
        return self._layers

    @property
    def byte_file(self) -> ByteFile:
        """The bytes that chunk tables point into."""
        return self._file.store.file

    @property
    def default_kinds(self) -> tuple[str, str]:
        """Hidden states, and attentions or what took their place."""
        objects = self._sample.objects
        has_heads = layout.ATTENTIONS in objects or layout.ATTENTION_MEAN not in objects
        return layout.HIDDEN_STATES, layout.ATTENTIONS if has_heads else layout.ATTENTION_MEAN

    def check_heads(self, kind: str) -> None:
        """Refuse to look for attention heads that were given up for their mean.

        Raises
        ------
        HeadsNotStoredError
            `kind` is ``attentions``, and only their mean is stored.
        """
        objects = self._sample.objects
        has_mean = kind == layout.ATTENTIONS and layout.ATTENTION_MEAN in objects
        if has_mean and kind not in objects:
            precision = self._file.metadata.precision
            kept = f" (tier {precision.tier})" if precision is not None else ""
            message = (
                f"{self.place}: attentions of single heads are not stored{kept}; "
                f"trace[{layout.ATTENTION_MEAN!r}] holds their reduction over heads, (query, key)"
            )
            raise HeadsNotStoredError(message)

    def stored_layers(self, kind: str) -> tuple[int, ...]:
        """Layer numbers stored of a kind, selected or not."""
        return LayerSequence(self, kind, None).layers

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Keys of the legacy dict, in their order."""
        named = self.metadata.fields or self._file.metadata.fields
        if named is None:
            return self._present_fields()
        is_further = self.has_new_label and layout.LABEL not in named
        return (*named, layout.LABEL) if is_further else named

    def _present_fields(self) -> tuple[str, ...]:
        """Keys for a trace that no legacy dict was the source of."""
        objects, found = self._sample.objects, []
        found += [kind for kind in self._file.metadata_kinds if kind in objects]
        datasets = (layout.TOKENS, layout.TOKENS_DECODED, *layout.TEXT_FIELDS)
        found += [name for name in datasets if name in objects]
        for key, value in self._slots().items():
            found += [key] if value is not None else []
        prefix = f"{layout.EXTRA_GROUP}/"
        found += [
            layout.unescape_key(text.unescape(path.removeprefix(prefix)))
            for path in objects
            if path.startswith(prefix) and "/" not in path.removeprefix(prefix)
        ]
        return tuple(dict.fromkeys(found))

    def _slots(self) -> dict[str, Any]:
        metadata = self.metadata
        return {
            layout.QUESTION_ID: metadata.sample_id,
            layout.PROMPT_LENGTH: metadata.prompt_len,
            layout.LABEL: metadata.label,
        }

    def __getitem__(self, key: str) -> Any:
        return self._value(key, torch_tensors=False)

    def __contains__(self, key: object) -> bool:
        return key in self.fields

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    def __repr__(self) -> str:
        metadata = self.metadata
        return (
            f"<Trace {self.ordinal}: sample_id={metadata.sample_id!r}, "
            f"seq_len={metadata.seq_len}, fields={', '.join(self.fields)}>"
        )

    def _value(self, key: str, *, torch_tensors: bool) -> Any:
        objects = self._sample.objects
        # A kind that was made of others, such as the head mean, is no key of the legacy dict.
        if key not in self.fields and not (key in layout.KINDS and key in objects):
            self.check_heads(key)
            raise KeyError(key)
        if key == layout.LABEL and self.has_new_label:
            return self.metadata.label
        extra = f"{layout.EXTRA_GROUP}/{text.escape(layout.escape_key(key))}"
        if extra in objects:
            value = self.extra(extra)
            return with_tensors(value) if torch_tensors else without_tensors(value)
        if key == layout.TOKENS and key in objects:
            return self.tokens(torch_tensors=torch_tensors)
        if key == layout.TOKENS_DECODED and key in objects:
            return self.texts(key)
        if key in layout.TEXT_FIELDS and key in objects:
            return self.text(key)
        if key in objects:
            if not self.entry(key).is_group:
                message = f"{self.place}/{key}: is a dataset, expected a group of layers"
                raise CorruptArchiveError(message)
            return LayerSequence(self, key, self._layers)
        value = self._slots().get(key)
        if value is None:
            message = (
                f"{self.place}: the field {key!r} is listed but not stored; the file was edited, "
                "or damaged; run 'h5traces validate' on it"
            )
            raise CorruptArchiveError(message)
        return value

    def extra(self, path: str) -> Any:
        """The value of an extra field by its path; torch tensors as `TorchValue`."""
        return decode_element(_Elements(self), path)

    def tokens(self, *, torch_tensors: bool = False) -> Any:
        """The stored tokens in the type of their source, whether or not it is among `fields`.

        Raises
        ------
        CorruptArchiveError
            They are no row of integers.
        """
        attrs, values = self.attrs(layout.TOKENS), self.stored(layout.TOKENS)
        source_dtype = attrs.get("source_dtype")
        if values.ndim != 1 or values.dtype.kind not in "iu":
            message = f"{self.place}/{layout.TOKENS}: holds no row of integers"
            raise CorruptArchiveError(message)
        if source_dtype is not None:
            if source_dtype not in _INTEGER_TYPES:
                message = f"{self.place}/tokens: source_dtype {source_dtype!r} is no type"
                raise CorruptArchiveError(message)
            values = values.astype(np.dtype(source_dtype))
        if torch_tensors and attrs.get("container") == "torch":
            return to_tensor(TorchValue(values, values.dtype.name))
        return values

    def text(self, key: str) -> str:
        """The one text of a dataset of the sample.

        Raises
        ------
        CorruptArchiveError
            It holds something else.
        """
        found = self.texts(key)
        if len(found) != 1:
            message = f"{self.place}/{key}: holds {len(found)} texts, expected one"
            raise CorruptArchiveError(message)
        return found[0]

    def texts(self, key: str) -> list[str]:
        """The texts of a dataset of the sample.

        Raises
        ------
        CorruptArchiveError
            It holds something else.
        """
        values = self.stored(key)
        if values.dtype.kind != "S":
            message = f"{self.place}/{key}: holds {values.dtype}, expected text"
            raise CorruptArchiveError(message)
        try:
            return text.decode_all(values)
        except CorruptArchiveError as error:
            message = f"{self.place}/{key}: {error}"
            raise CorruptArchiveError(message) from error

    def attrs(self, path: str) -> Attrs:
        """Attributes of the object at `path` below the sample's group."""
        return self.entry(path).attrs

    def entry(self, path: str) -> ObjectEntry:
        """The object at `path` below the sample's group."""
        return self._file.entry(self._sample, path)

    def stored(self, path: str) -> NDArray[Any]:
        """Stored values of the dataset at `path`, as they lie in the file."""
        return self._file.read(self._sample, path)

    def table(self, path: str, *, check: Callable[[], None] | None = None) -> NDArray[Any]:
        """A dataset that all layers of a kind are read with; kept, and not to be written to.

        Parameters
        ----------
        path
            Below the sample's group.
        check
            Called before it is read.
        """
        if path not in self._tables:
            if check is not None:
                check()
            self._tables[path] = self.stored(path)
        return self._tables[path]

    def all_attrs(self, prefix: str) -> Iterator[Attrs]:
        """Attributes of all objects whose path begins so; perhaps without their digests."""
        objects = self._sample.objects
        found = (path for path in objects if path.startswith(prefix))
        return (self._file.attrs(self._sample, path) for path in found)

    @property
    def objects(self) -> Mapping[str, ObjectEntry]:
        """All objects of the sample by path."""
        return self._sample.objects

    @property
    def embedding(self) -> LayerValue:
        """The output of the embedding, ``(seq_len, hidden_size)``; no part of the legacy list.

        Raises
        ------
        LayerIndexError
            It is not stored.
        """
        if f"{layout.HIDDEN_STATES}/{layout.EMBEDDING}" not in self._sample.objects:
            message = f"{self.place}: the embedding is not stored"
            raise LayerIndexError(message)
        value: LayerValue = self.read_layer(layout.HIDDEN_STATES, layout.EMBEDDING)
        return value

    def layer(self, layer: int, kind: str = layout.HIDDEN_STATES) -> LayerValue:
        """One layer's array by the model's own 0-based layer number.

        Raises
        ------
        LayerIndexError
            The trace does not store that layer.
        HeadsNotStoredError
            It stores attentions averaged over heads only.
        """
        name = layout.layer_name(layer)
        if f"{kind}/{name}" not in self._sample.objects:
            self.check_heads(kind)
            stored = LayerSequence(self, kind, self._layers).layers
            message = f"{self.place}: layer {layer} of {kind} is not stored; stored: "
            msg = f"{message}{list(stored)}"
            raise LayerIndexError(msg)
        value: LayerValue = self.read_layer(kind, name)
        return value

    def typed_layer(self, kind: str, name: str) -> TypedArray | list[TypedArray]:
        """The array of a kind by its dataset name, in its source's type; a list where in steps."""
        return restored_layer(self, kind, name)

    def read_layer(self, kind: str, name: str, *, torch_tensors: bool = False) -> Any:
        """The array of a kind by its dataset name; a list of arrays where it holds steps.

        bfloat16 comes as float32, or, with `torch_tensors` and from a tensor, as a tensor.
        """
        typed = self.typed_layer(kind, name)
        as_tensor = torch_tensors and self.attrs(f"{kind}/{name}").get("container") == "torch"

        def plain(array: TypedArray) -> Any:
            if as_tensor:
                return to_tensor(TorchValue(array.values, array.dtype))
            values = array.to_numpy()
            return values.astype(values.dtype.newbyteorder("="), copy=False)

        if not isinstance(typed, list):
            return plain(typed)
        steps = [plain(step) for step in typed]
        in_tuple = self.attrs(f"{kind}/{name}").get("sequence") == "tuple"
        return tuple(steps) if in_tuple else steps

    def to_dict(self, *, container: Literal["source", "numpy"] = "source") -> dict[str, Any]:
        """The plain legacy dict: same keys in the same order, types, shapes and values.

        Parameters
        ----------
        container
            ``source`` gives torch tensors where the source held them (bfloat16 included);
            ``numpy`` gives arrays everywhere.

        Raises
        ------
        MissingDependencyError
            The source held torch tensors and torch is not installed.
        """
        torch_tensors = container == "source"
        plain: dict[str, Any] = {}
        with self.prefetched(self._selected_ranges()):
            for key in self.fields:
                value = self._value(key, torch_tensors=torch_tensors)
                if isinstance(value, LayerSequence):
                    value = value.to_list(torch_tensors=torch_tensors)
                plain[key] = value
        return plain

    def _selected_ranges(self) -> list[tuple[int, int]]:
        """Where everything lies that `to_dict` reads; nothing for a file on disk."""
        if not self.is_remote:
            return []
        layers = None if self._layers is None else set(self._layers)
        ranges: list[tuple[int, int]] = []
        for path in self._sample.objects:
            layer = layout.parse_layer_name(path.rpartition("/")[2])
            if layers is None or layer is None or layer in layers:
                ranges += self.ranges(path)
        return ranges

    @property
    def is_remote(self) -> bool:
        """Whether the trace lies on a server."""
        return isinstance(self._file.path, RemotePath)

    @property
    def archive_file(self) -> ArchiveFile:
        """The file that the trace is stored in, opened."""
        return self._file

    def prefetched(self, ranges: Iterable[tuple[int, int]]) -> AbstractContextManager[None]:
        """Inside the block, these ranges of the file are read from memory; on servers only."""
        return self._file.prefetched(ranges, [self._sample.ordinal])

    def ranges(self, path: str) -> list[tuple[int, int]]:
        """Offset and size of the stored chunks of the dataset at `path`."""
        chunks = self.entry(path).chunks
        return [] if chunks is None else chunks.ranges


class _Elements:
    """What decoding an extra field reads of its trace."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    @cached_property
    def _children(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in self._trace.objects:
            parent, _, name = path.rpartition("/")
            found.setdefault(parent, []).append(name)
        return found

    def attrs(self, path: str) -> Attrs:
        return self._trace.attrs(path)

    def values(self, path: str) -> NDArray[Any]:
        return self._trace.stored(path)

    def children(self, path: str) -> list[str]:
        if not self._trace.entry(path).is_group:
            message = f"{self._trace.place}/{path}: is a dataset, expected a group"
            raise CorruptArchiveError(message)
        return sorted(self._children.get(path, ()))
