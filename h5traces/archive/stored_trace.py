"""What is stored of one sample, and its arrays in the types of their source."""

from __future__ import annotations

import contextlib
import math
import os
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.archive.footer_store import FooterObjects
from h5traces.archive.recomputing import attention_weights, check_shapes, weights_of_window
from h5traces.archive.tensors import fresh_array, is_torch, to_tensor
from h5traces.arguments import shown
from h5traces.errors import (
    ArchiveError,
    CorruptArchiveError,
    HeadsNotStoredError,
    LayerIndexError,
    OptionError,
    SchemaError,
    UnsupportedEncodingError,
)
from h5traces.format import layout, text
from h5traces.format.archive import KindMetadata
from h5traces.format.attention import RULE_ATTRS, AttentionRule
from h5traces.format.document import from_attributes
from h5traces.format.dtypes import CARRIERS, FLOAT_TYPES, FloatType, TypedArray, cast_values
from h5traces.format.entries import INTEGER_TYPES
from h5traces.format.kinds import ATTENTION_WINDOW, KEYS, POSITIONS, QUERIES, WEIGHT_KINDS
from h5traces.format.record import SourceForm, TraceMetadata
from h5traces.format.values import TorchValue
from h5traces.lazy import needing
from h5traces.precision.decoding import (
    EXCEPTION_COLUMNS,
    decode,
    decoding_key,
    is_encoded,
    num_exceptions,
    restoration_of,
)
from h5traces.storage.remote.paths import RemotePath

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from h5traces.archive.file import ArchiveFile
    from h5traces.archive.tensors import Container
    from h5traces.format.document import Attrs
    from h5traces.format.entries import ObjectEntry, SampleEntry
    from h5traces.precision.scales import ChannelScale
    from h5traces.storage.plans import Reading, Restoration

# Numbers of heads or positions; None for all.
Indices = Any

NUM_CORES = os.cpu_count() or 1
# Of larger samples, those who need one array at a time read it alone.
MOST_AHEAD_NBYTES = 64 << 20
_STEPS_TABLE_AXES = 3
# Weights that are recomputed at a time: 16 MiB.
_BLOCK_WEIGHTS = 1 << 22
_FLAT_AXES = 2


class StoredTrace:
    """What is stored of one sample, for the rooms that read more than a user's `Trace` shows.

    `selected` are the layers that ``archive.select`` chose; None for all that are stored.
    """

    def __init__(self, file: ArchiveFile, index: int, selected: tuple[int, ...] | None) -> None:
        self.file, self.index, self.selected = file, index, selected
        self._tables: dict[str, NDArray[Any]] = {}
        # What `at_hand` read, until it is asked for.
        self._at_hand: dict[str, NDArray[Any]] = {}

    def __reduce__(self) -> tuple[type[StoredTrace], tuple[Any, ...]]:
        return StoredTrace, (self.file, self.index, self.selected)

    @cached_property
    def sample(self) -> SampleEntry:
        """Its attributes and objects."""
        return self.file.sample(self.index)

    @cached_property
    def place(self) -> str:
        """File and HDF5 path, for messages."""
        return f"{self.file.path}: {layout.sample_path(self.sample.ordinal)}"

    @cached_property
    def metadata(self) -> TraceMetadata:
        """The sample's attributes, validated; with the labels that lie beside the archive."""
        # Of all that is stored of the sample, most readers need no more.
        return self.validated(self.file.sample_attrs(self.index))

    def validated(self, attrs: Attrs) -> TraceMetadata:
        """The metadata that its attributes hold."""
        labels = self.file.labels
        try:
            found = from_attributes(TraceMetadata, attrs)
            return found if labels is None else labels.labelled(found, self.sample.ordinal)
        except SchemaError as error:
            message = f"{self.place}: {error}"
            raise SchemaError(message, error.problems) from error

    @property
    def has_new_label(self) -> bool:
        """Whether its label lies beside the archive."""
        labels = self.file.labels
        return labels is not None and labels.has_label(self.sample.ordinal)

    @property
    def is_remote(self) -> bool:
        """Whether the trace lies on a server."""
        return isinstance(self.file.path, RemotePath)

    @cached_property
    def objects(self) -> Mapping[str, ObjectEntry]:
        """All objects of the sample by path."""
        return self.sample.objects

    @property
    def raw_nbytes(self) -> int:
        """Bytes of all uncompressed arrays."""
        return self.file.raw_nbytes(self.sample)

    @property
    def digests(self) -> dict[str, Any]:
        """Digests of all objects by path; None of one without."""
        return self.file.digests(self.sample)

    def entry(self, path: str) -> ObjectEntry:
        """The object at `path` below the sample's group."""
        return self.file.entry(self.sample, path)

    def attrs(self, path: str) -> Attrs:
        """Attributes of the object at `path` below the sample's group."""
        return self.entry(path).attrs

    def values(self, path: str) -> NDArray[Any]:
        """Stored values of the dataset at `path`, as they lie in the file."""
        found = self._at_hand.pop(path, None)
        return self.file.read(self.sample, path) if found is None else found

    def restorations(self, paths: Iterable[str]) -> dict[str, Restoration]:
        """How the kernels decode those of some datasets that are encoded; the others are left out.

        What is wrong with one is said when it is read.
        """
        if self.file.metadata.precision is None:
            return {}
        found, known, unrounded = {}, self.file.restorations, self.file.unrounded
        for path in paths:
            with contextlib.suppress(ArchiveError):
                dtype, attrs = self.file.facts(self.sample, path)
                if "encoding" not in attrs:
                    continue
                key = dtype, decoding_key(attrs)
                if key not in known:
                    known[key] = restoration_of(dtype, attrs, self.scale, unrounded=unrounded)
                found[path] = known[key]
        return {path: each for path, each in found.items() if each is not None}

    def scale(self, path: str) -> ChannelScale:
        """The scale at a path such as ``/scales/hidden_states/layer_005``."""
        return self.file.scale(path.removeprefix(f"/{layout.SCALES_GROUP}/"))

    @contextlib.contextmanager
    def at_hand(self, found: dict[str, NDArray[Any]]) -> Iterator[None]:
        """Inside the block, `values` gives what was found by path, each once."""
        self._at_hand |= found
        try:
            yield
        finally:
            for path in found:
                self._at_hand.pop(path, None)

    @contextlib.contextmanager
    def read_ahead(
        self, paths: Iterable[str], workers: int | None = None, **options: Any
    ) -> Iterator[None]:
        """Inside the block, `values` of these datasets come from memory: they are read here.

        `workers` are threads, one per core by default; options are those of `FooterStore.begin`.
        """
        wanted = [path for path in dict.fromkeys(paths) if path not in self._at_hand]
        ranges = (each for path in wanted for each in self.ranges(path))
        with self.prefetched(ranges if self.is_remote else ()):
            found = {}
            if len(wanted) > 1:
                found = begin([(self, wanted)], workers or NUM_CORES, **options).arrays()
            with self.at_hand(found):
                yield

    @cached_property
    def _children(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in self.objects:
            parent, _, name = path.rpartition("/")
            found.setdefault(parent, []).append(name)
        return found

    def children(self, path: str) -> list[str]:
        """Names directly below the group at `path`, sorted."""
        if not self.entry(path).is_group:
            message = f"{self.place}/{path}: is a dataset, expected a group"
            raise CorruptArchiveError(message)
        return sorted(self._children.get(path, ()))

    def table(self, path: str, *, check: Callable[[], None] | None = None) -> NDArray[Any]:
        """A dataset that all layers of a kind need; kept, read-only, after `check` was called."""
        if path not in self._tables:
            if check is not None:
                check()
            self._tables[path] = self.values(path)
        return self._tables[path]

    def ranges(self, path: str) -> list[tuple[int, int]]:
        """Offset and size of the stored chunks of the dataset at `path`."""
        chunks = self.entry(path).chunks
        return [] if chunks is None else chunks.ranges

    def prefetched(self, ranges: Iterable[tuple[int, int]]) -> AbstractContextManager[None]:
        """Inside the block, these ranges of the file are read from memory; on servers only."""
        return self.file.prefetched(ranges, [self.sample.ordinal])

    @property
    def default_kinds(self) -> tuple[str, ...]:
        """Hidden states, and attentions or what took their place: no squares are computed."""
        if self.recomputes(layout.ATTENTIONS):
            return layout.HIDDEN_STATES, QUERIES, KEYS
        objects = self.sample.objects
        stored = (kind for kind in WEIGHT_KINDS if kind in objects)
        return layout.HIDDEN_STATES, next(stored, layout.ATTENTIONS)

    @property
    def kinds(self) -> dict[str, Attrs]:
        """Attributes of every kind of the archive, by name."""
        return self.file.store.kinds

    def axes(self, kind: str) -> tuple[str, ...]:
        """Names of the axes of one layer's array; CorruptArchiveError where the kind lacks them."""
        if kind in layout.KINDS:
            return layout.KINDS[kind].axes
        try:
            return from_attributes(KindMetadata, self.kinds.get(kind, {})).axes
        except SchemaError as error:
            message = f"{self.file.path}: /{layout.KINDS_GROUP}/{kind}: {error}"
            raise CorruptArchiveError(message) from error

    def definition(self, kind: str) -> str | None:
        """What the numbers of a kind are, where it is more than that they are of a kind."""
        found = self.kinds.get(kind, {}).get("definition")
        return None if found in (None, layout.FURTHER_KIND, layout.BY_POSITION) else str(found)

    def form(self, kind: str) -> SourceForm:
        """What held the selected arrays in the legacy dict.

        CorruptArchiveError where the archive does not say it as it should.
        """
        try:
            attrs = self.file.attrs(self.sample, kind) if kind in self.objects else {}
            form = _form_of(tuple(attrs.items()))
        except SchemaError as error:
            message = f"{self.place}/{kind}: {error}"
            raise CorruptArchiveError(message) from error
        if self.selected is None or (form.keys, form.absent) == (None, None):
            return form
        kept = (None, *self.selected)
        keys = [each for each in form.keys or () if layout.parse_layer_name(each[1]) in kept]
        absent = [each for each in form.absent or () if layout.parse_layer_name(each) in kept]
        update = {
            "keys": None if form.keys is None else tuple(keys),
            "absent": tuple(absent) or None,
        }
        return form.model_copy(update=update)

    def stored_layers(self, kind: str) -> tuple[int, ...]:
        """Numbers stored of a kind, selected or not, ascending: of layers, else of positions.

        Of attention that is recomputed, the layers that have it.
        """
        if self.recomputes(kind):
            return self.recomputed_layers
        return _stored_layers(kind, tuple(self.objects))

    def array_name(self, kind: str, number: int) -> str:
        """The name of the dataset that holds a layer, or a position where no layer is known."""
        position = layout.position_name(number)
        return position if f"{kind}/{position}" in self.objects else layout.layer_name(number)

    def names_with_steps(self, kind: str) -> list[str]:
        """Names of all stored arrays in the order of the table of generation steps."""
        names = _names_of(kind, tuple(self.objects), None)
        has_embedding = f"{kind}/{layout.EMBEDDING}" in self.objects
        return [layout.EMBEDDING, *names] if has_embedding else names

    def listed_names(self, kind: str, chosen: tuple[int, ...] | None) -> list[str]:
        """Names of the chosen arrays in the order of the legacy list; None chooses all."""
        form = self.form(kind)
        if self.recomputes(kind):
            return [
                layout.layer_name(each)
                for each in self.recomputed_layers
                if chosen is None or each in chosen
            ]
        if not form.absent:
            names = _names_of(kind, tuple(self.objects), chosen)
            return [layout.EMBEDDING, *names] if form.lists_embedding else [*names]
        absent = {layout.parse_layer_name(each): each for each in form.absent}
        embedding = [layout.EMBEDDING] if form.lists_embedding or None in absent else []
        numbers = {*self.stored_layers(kind), *(each for each in absent if each is not None)}
        return embedding + [
            absent.get(each) or self.array_name(kind, each)
            for each in sorted(numbers)
            if chosen is None or each in chosen
        ]

    def rule(self, name: str) -> AttentionRule | None:
        """How queries and keys of a layer make its attention; None if it is not stored.

        CorruptArchiveError where it makes no sense.
        """
        path = f"{QUERIES}/{name}"
        attrs = self.file.attrs(self.sample, path) if path in self.objects else {}
        if "mask" not in attrs:
            return None
        try:
            return _rule_of(tuple(each for each in attrs.items() if each[0] in RULE_ATTRS))
        except SchemaError as error:
            message = f"{self.place}/{path}: {error}"
            raise CorruptArchiveError(message) from error

    @cached_property
    def recomputed_layers(self) -> tuple[int, ...]:
        """Layers whose attention follows from queries and keys, and is not stored itself."""
        if layout.ATTENTIONS in self.objects or QUERIES not in self.objects:
            return ()
        both = set(self.stored_layers(QUERIES)) & set(self.stored_layers(KEYS))
        return tuple(n for n in sorted(both) if self.rule(self.array_name(QUERIES, n)) is not None)

    def recomputes(self, kind: str) -> bool:
        """Whether the arrays of a kind are computed when they are read."""
        return kind == layout.ATTENTIONS and bool(self.recomputed_layers)

    def attention(
        self, name: str, *, heads: Indices = None, rows: Indices = None, device: Any = None
    ) -> Any:
        """Recomputed weights ``(heads, rows, S)`` of a layer in float32; a tensor on a device.

        Of the chosen heads and query positions, all by default.
        """
        queries, keys, rule = self._attention_parts(name)
        chosen = {
            "heads": np.arange(len(queries)) if heads is None else np.asarray(heads, np.int64),
            "rows": np.arange(queries.shape[1]) if rows is None else np.asarray(rows, np.int64),
        }
        if device is None:
            return attention_weights(queries, keys, rule, **chosen)
        with needing("device", "torch", extra="torch"):
            from h5traces.archive import torch_values
        return torch_values.attention_weights(queries, keys, rule, **chosen, device=device)

    def attention_blocks(
        self, name: str, rows: Indices = None
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Query positions, and their recomputed weights ``(heads, rows, S)``, some at a time.

        Of the chosen positions, all by default.
        """
        queries, keys, rule = self._attention_parts(name)
        chosen = np.arange(queries.shape[1]) if rows is None else np.asarray(rows, np.int64)
        heads = np.arange(len(queries))
        size = max(1, _BLOCK_WEIGHTS // max(1, len(heads) * keys.shape[1]))
        for start in range(0, max(1, len(chosen)), size):
            some = chosen[start : start + size]
            yield some, attention_weights(queries, keys, rule, heads=heads, rows=some)

    @property
    def has_window(self) -> bool:
        """Whether weights of some keys of every query are all that is known of heads."""
        is_whole = layout.ATTENTIONS in self.objects or self.recomputes(layout.ATTENTIONS)
        return ATTENTION_WINDOW in self.objects and not is_whole

    def attention_in_window(self, name: str, *, heads: Indices, rows: Indices) -> NDArray[Any]:
        """Weights ``(heads, rows, S)`` of a layer, NaN where only others are stored."""
        window = self._plain(f"{ATTENTION_WINDOW}/{name}")
        place = f"{layout.EXTRA_GROUP}/{POSITIONS}"
        positions = self.values(place) if place in self.objects else np.arange(window.shape[1])
        if window.ndim != 3 or len(positions) != window.shape[1]:
            message = f"{self.place}/{ATTENTION_WINDOW}/{name}: {window.shape} is not a window"
            raise CorruptArchiveError(message)
        return weights_of_window(window[heads][:, rows], positions[rows], positions)

    def _attention_parts(self, name: str) -> tuple[NDArray[Any], NDArray[Any], AttentionRule]:
        """Queries, keys and rule of a layer that has one, as `recomputed_layers` says."""
        rule = self.rule(name)
        assert rule is not None
        with self.read_ahead([f"{QUERIES}/{name}", f"{KEYS}/{name}"], 1):
            queries, keys = (self._plain(f"{kind}/{name}") for kind in (QUERIES, KEYS))
        check_shapes(queries.shape, keys.shape, rule, f"{self.place}/{QUERIES}/{name}")
        return queries, keys, rule

    def attention_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a layer's weights that are recomputed, or stored in a window."""
        kind = QUERIES if self.recomputes(layout.ATTENTIONS) else ATTENTION_WINDOW
        heads, num_tokens, *_ = (*self.entry(f"{kind}/{name}").shape, 0, 0)
        return heads, num_tokens, num_tokens

    def _plain(self, path: str) -> NDArray[Any]:
        """An array as numpy has it."""
        found = self.typed_layer(*path.split("/"))
        if isinstance(found, list):
            message = f"{self.place}/{path}: holds generation steps, expected one array"
            raise CorruptArchiveError(message)
        return found.to_numpy()

    def check_kind(self, kind: str) -> None:
        """Raise OptionError for a kind that is not stored, or as `check_heads`."""
        self.check_heads(kind)
        if self.recomputes(kind):
            return
        stored = self.file.store.kinds
        if kind not in stored:
            known = "not stored" if kind in layout.KINDS else "unknown"
            names = ", ".join(stored) or "no kinds"
            message = f"kind {shown(kind)} is {known}; {self.file.path} stores {names}"
            raise OptionError(message)

    def check_layer(self, layer: int, kind: str) -> None:
        """Raise LayerIndexError for a layer that is not stored, or not selected."""
        selected, stored = self.selected, self.stored_layers(kind)
        if layer not in stored:
            self.check_kind(kind)
            chosen = [each for each in stored if selected is None or each in selected]
            message = f"{self.place}: layer {layer} of {kind} is not stored; stored: {chosen}"
            raise LayerIndexError(message)
        if selected is not None and layer not in selected:
            message = (
                f"{self.place}: layer {layer} of {kind} is not selected; this view has the layers "
                f"{list(selected)}"
            )
            raise LayerIndexError(message)

    def check_heads(self, kind: str) -> None:
        """Raise HeadsNotStoredError for ``attentions`` of which a mean or a window is stored."""
        objects = self.sample.objects
        if kind != layout.ATTENTIONS or kind in objects or self.recomputes(kind):
            return
        if ATTENTION_WINDOW in objects:
            message = (
                f"{self.place}: attentions are stored of the last keys of every query only; "
                f"trace[{ATTENTION_WINDOW!r}] holds these, and trace.attention(layer) puts them "
                "into rows of keys, with NaN for the others"
            )
            raise HeadsNotStoredError(message)
        if layout.ATTENTION_MEAN in objects:
            precision = self.file.metadata.precision
            kept = f" (tier {precision.tier})" if precision is not None else ""
            message = (
                f"{self.place}: attentions of single heads are not stored{kept}; "
                f"trace[{layout.ATTENTION_MEAN!r}] holds their reduction over heads, (query, key)"
            )
            raise HeadsNotStoredError(message)

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Keys of the legacy dict, in their order."""
        named = self.metadata.fields or self.file.metadata.fields
        if named is None:
            return self._present_fields()
        is_further = self.has_new_label and layout.LABEL not in named
        return (*named, layout.LABEL) if is_further else named

    def _present_fields(self) -> tuple[str, ...]:
        """Keys for a trace without a legacy dict."""
        objects, found = self.sample.objects, []
        found += [kind for kind in self.file.store.kinds if kind in objects]
        datasets = (
            *(layout.TOKENS, layout.TOKENS_DECODED, layout.ATTENTION_MASK),
            *layout.TEXT_FIELDS,
        )
        found += [name for name in datasets if name in objects]
        found += [key for key, value in self.slots().items() if value is not None]
        prefix = f"{layout.EXTRA_GROUP}/"
        found += [
            layout.unescape_key(text.unescape(path.removeprefix(prefix)))
            for path in objects
            if path.startswith(prefix) and "/" not in path.removeprefix(prefix)
        ]
        return tuple(dict.fromkeys(found))

    def slots(self) -> dict[str, Any]:
        """Values of the legacy keys that are attributes here; None for what is not stored."""
        metadata = self.metadata
        return {
            layout.QUESTION_ID: metadata.sample_id,
            layout.PROMPT_LENGTH: metadata.prompt_len,
            layout.LABEL: metadata.label,
        }

    def tokens(self, container: Container = "numpy") -> Any:
        """The tokens in the type of their source; CorruptArchiveError unless a row of integers."""
        attrs, values = self.file.attrs(self.sample, layout.TOKENS), self.values(layout.TOKENS)
        source_dtype = attrs.get("source_dtype")
        if values.ndim != 1 or values.dtype.kind not in "iu":
            message = f"{self.place}/{layout.TOKENS}: holds no row of integers"
            raise CorruptArchiveError(message)
        if source_dtype is not None:
            if source_dtype not in INTEGER_TYPES:
                message = (
                    f"{self.place}/tokens: source_dtype {source_dtype!r} is not an integer type"
                )
                raise CorruptArchiveError(message)
            values = values.astype(np.dtype(source_dtype))
        if container == "source" and attrs.get("container") == "list":
            return values.tolist()
        if is_torch(container, attrs.get("container")):
            return to_tensor(TorchValue(values, values.dtype.name))
        return values

    def attention_mask(self) -> NDArray[np.uint8] | None:
        """The mask by position, not to be changed; None if not stored.

        CorruptArchiveError unless it is a row of 0 and 1.
        """
        if layout.ATTENTION_MASK not in self.objects:
            return None
        values = self.table(layout.ATTENTION_MASK)
        if values.ndim != 1 or values.dtype != np.uint8 or values.max(initial=0) > 1:
            message = f"{self.place}/{layout.ATTENTION_MASK}: holds no row of 0 and 1"
            raise CorruptArchiveError(message)
        return values

    def text(self, key: str) -> str:
        """The one text of a dataset; CorruptArchiveError where it holds something else."""
        found = self.texts(key)
        if len(found) != 1:
            message = f"{self.place}/{key}: holds {len(found)} texts, expected one"
            raise CorruptArchiveError(message)
        return found[0]

    def texts(self, key: str) -> list[str]:
        """The texts of a dataset; CorruptArchiveError where it holds something else."""
        values = self.values(key)
        if values.dtype.kind != "S":
            message = f"{self.place}/{key}: holds {values.dtype}, expected text"
            raise CorruptArchiveError(message)
        try:
            return text.decode_all(values)
        except CorruptArchiveError as error:
            message = f"{self.place}/{key}: {error}"
            raise CorruptArchiveError(message) from error

    def needed(self, kinds: Iterable[str] | None = None) -> list[str]:
        """The datasets that reading the selected arrays of these kinds needs.

        Of the whole legacy dict by default.
        """
        objects = self.objects
        if kinds is not None or not isinstance(objects, FooterObjects):
            return self._needed(kinds)
        # Samples that are alike need the same.
        key = self.selected, self.fields
        return list(objects.needed(key, lambda: tuple(self._needed(None))))

    def _needed(self, kinds: Iterable[str] | None) -> list[str]:
        paths: list[str] = []
        known, objects = self.kinds, self.objects
        if kinds is None:
            paths = [path for path in objects if path.partition("/")[0] not in known]
            kinds = (each for each in self.fields if each in known)
        for kind in kinds:
            if kind in objects or self.recomputes(kind):
                paths += self.layer_paths(kind, self.listed_names(kind, self.selected))
        return paths

    def layer_paths(self, kind: str, names: Iterable[str]) -> list[str]:
        """The datasets that reading the named arrays of a kind needs."""
        if self.recomputes(kind):
            return [f"{each}/{name}" for name in names for each in (QUERIES, KEYS)]
        paths, objects = (f"{kind}/{name}" for name in (*names, *layout.TABLES)), self.objects
        return [path for path in paths if path in objects]

    def typed_layer(self, kind: str, name: str) -> TypedArray | list[TypedArray]:
        """The array of a kind by its dataset name, in its source's type; a list where in steps."""
        if self.recomputes(kind):
            return TypedArray(self.attention(name), "float32")
        return self._typed_layer(kind, name, *self.file.facts(self.sample, f"{kind}/{name}"))

    def _typed_layer(
        self, kind: str, name: str, dtype: str, attrs: Attrs
    ) -> TypedArray | list[TypedArray]:
        path = f"{kind}/{name}"
        stored = self.values(path)
        if "encoding" in attrs and self._is_encoded(path, attrs):
            return _decoded(self, kind, name, dtype, attrs, stored)
        if f"{kind}/{layout.STEPS_TABLE}" in self.objects:
            steps = _steps(self, kind, name, stored)
            return [_cast_back(self, step, dtype, attrs, path) for step in steps]
        return _cast_back(self, stored, dtype, attrs, path)

    def _is_encoded(self, path: str, attrs: Attrs) -> bool:
        """Whether a dataset with the attribute ``encoding`` has to be decoded."""
        try:
            encoded = is_encoded(attrs)
        except UnsupportedEncodingError as error:
            message = f"{self.place}/{path}: {error}"
            raise UnsupportedEncodingError(message) from error
        if self.file.metadata.precision is None:
            message = (
                f"{self.place}/{path}: is encoded as {attrs['encoding']}, but the archive "
                "does not say so (the root attribute 'precision' is missing); restore the file "
                "from a copy"
            )
            raise CorruptArchiveError(message)
        return encoded

    def read_layer(self, kind: str, name: str, container: Container = "numpy") -> Any:
        """The array of a kind by its dataset name; a list of arrays where it holds steps."""
        if self.recomputes(kind):
            found = TypedArray(self.attention(name), "float32")
            held = self.file.attrs(self.sample, f"{QUERIES}/{name}").get("container")
            return fresh_array(found, container, held)
        dtype, attrs = self.file.facts(self.sample, f"{kind}/{name}")
        typed, held = self._typed_layer(kind, name, dtype, attrs), attrs.get("container")
        if not isinstance(typed, list):
            return fresh_array(typed, container, held)
        steps = [fresh_array(step, container, held) for step in typed]
        return tuple(steps) if attrs.get("sequence") == "tuple" else steps


def begin(
    wanted: Sequence[tuple[StoredTrace, Iterable[str]]], workers: int, **options: Any
) -> Reading:
    """Begin to read datasets of some samples of one file, for `StoredTrace.at_hand`.

    Options are those of `FooterStore.begin`. Tables of exceptions are left out: they may claim any
    number of rows.
    """
    ending = f"/{layout.EXCEPTIONS_TABLE}"
    chosen = [
        (trace, [each for each in paths if not each.endswith(ending)]) for trace, paths in wanted
    ]
    return wanted[0][0].file.begin(
        [(trace.sample, paths) for trace, paths in chosen],
        workers,
        restorations=[trace.restorations(paths) for trace, paths in chosen],
        **options,
    )


@lru_cache(maxsize=256)
def _stored_layers(kind: str, paths: tuple[str, ...]) -> tuple[int, ...]:
    """Cached, since all samples of an archive are alike."""
    prefix = f"{kind}/"
    names = (path.removeprefix(prefix) for path in paths if path.startswith(prefix))
    layers = (layout.parse_layer_name(name) for name in names)
    return tuple(sorted(each for each in layers if each is not None))


@lru_cache(maxsize=256)
def _names_of(kind: str, paths: tuple[str, ...], chosen: tuple[int, ...] | None) -> list[str]:
    """Names of the chosen arrays in order of layer, or of position where no layer is known."""
    known, names = set(paths), []
    for number in _stored_layers(kind, paths):
        if chosen is None or number in chosen:
            position = layout.position_name(number)
            is_position = f"{kind}/{position}" in known
            names.append(position if is_position else layout.layer_name(number))
    return names


@lru_cache(maxsize=256)
def _rule_of(attrs: tuple[tuple[str, Any], ...]) -> AttentionRule:
    return from_attributes(AttentionRule, dict(attrs))


@lru_cache(maxsize=256)
def _form_of(attrs: tuple[tuple[str, Any], ...]) -> SourceForm:
    return from_attributes(SourceForm, dict(attrs))


def _cast_back(
    trace: StoredTrace, stored: NDArray[Any], dtype: str, attrs: Attrs, path: str
) -> TypedArray:
    """Stored values in the type they are to be read in."""
    array = TypedArray(stored, _float_type(trace, path, dtype))
    source = attrs.get("source_dtype")
    return array if source is None else cast_values(array, _float_type(trace, path, source))


def _float_type(trace: StoredTrace, path: str, name: object) -> FloatType:
    if name not in FLOAT_TYPES:
        message = f"{trace.place}/{path}: stored type {name!r} is not one of {', '.join(CARRIERS)}"
        raise CorruptArchiveError(message)
    return name


def _decoded(
    trace: StoredTrace, kind: str, name: str, dtype: str, attrs: Attrs, stored: NDArray[Any]
) -> TypedArray:
    file = trace.file
    try:
        return decode(
            stored,
            attrs,
            scale=trace.scale,
            exceptions=lambda: _exceptions(trace, kind, name),
            unrounded=file.unrounded,
            stored_type=dtype,
        )
    except CorruptArchiveError as error:
        what = str(error).removeprefix(f"{file.path}: ")
        message = f"{trace.place}/{kind}/{name}: {what}"
        raise type(error)(message) from error


def _exceptions(trace: StoredTrace, kind: str, name: str) -> NDArray[np.float64]:
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


def _check_table(trace: StoredTrace, kind: str, path: str) -> None:
    """Rows are counted by the layers; a table may claim any number."""
    entry = trace.entry(path)
    layers = (each for each in trace.objects if each.startswith(f"{kind}/"))
    count = num_exceptions(trace.file.attrs(trace.sample, each) for each in layers)
    if entry.dtype != "float64" or entry.shape != (count, EXCEPTION_COLUMNS):
        message = (
            f"{path} is {entry.dtype or 'a group'} {entry.shape}, expected float64 "
            f"({count}, {EXCEPTION_COLUMNS}), as layers list {count} exceptions"
        )
        raise CorruptArchiveError(message)


def _steps(trace: StoredTrace, kind: str, name: str, stored: NDArray[Any]) -> list[NDArray[Any]]:
    """Generation steps out of the flat dataset that holds them."""
    names = trace.names_with_steps(kind)
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
