"""What is stored of one sample: its objects, their attributes and values, by name and layer."""

from __future__ import annotations

import contextlib
import os
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Self

from h5traces.errors import ArchiveError, CorruptArchiveError, SchemaError
from h5traces.format import layout
from h5traces.format.archive import KindMetadata
from h5traces.format.attention import RULE_ATTRS, AttentionRule
from h5traces.format.document import from_attributes
from h5traces.format.kinds import KEYS, QUERIES, WEIGHT_KINDS
from h5traces.format.record import SourceForm, TraceMetadata
from h5traces.precision.decoding import decoding_key, restoration_of
from h5traces.storage.remote.paths import RemotePath

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from h5traces.archive.file import ArchiveFile
    from h5traces.format.document import Attrs
    from h5traces.format.entries import ObjectEntry, SampleEntry
    from h5traces.precision.scales import ChannelScale
    from h5traces.storage.plans import Reading, Restoration

NUM_CORES = os.cpu_count() or 1
# Larger samples are read array by array if arrays are needed one at a time.
MOST_AHEAD_NBYTES = 64 << 20


class StoredSample:
    """What is stored of one sample, for the rooms that read more than a user's `Trace` shows.

    `selected` are the layers that ``archive.select`` chose; None for all that are stored.
    """

    def __init__(self, file: ArchiveFile, index: int, selected: tuple[int, ...] | None) -> None:
        self.file, self.index, self.selected = file, index, selected
        self._tables: dict[str, NDArray[Any]] = {}
        # What `at_hand` was given, until it is used.
        self._at_hand: dict[str, NDArray[Any]] = {}

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.file, self.index, self.selected)

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

        Reading a dataset says what is wrong with it.
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

    def table(self, path: str, make: Callable[[], NDArray[Any]] | None = None) -> NDArray[Any]:
        """A dataset that all layers of a kind need, or what `make` gives of it; kept, read-only."""
        if path not in self._tables:
            self._tables[path] = self.values(path) if make is None else make()
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
        """How the numbers of a kind are defined, if the archive says more than its name."""
        found = self.kinds.get(kind, {}).get("definition")
        return None if found in (None, layout.FURTHER_KIND, layout.BY_POSITION) else str(found)

    def form(self, kind: str) -> SourceForm:
        """What held the selected arrays in the legacy dict.

        CorruptArchiveError where the archive contradicts SPEC.
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


def begin(
    wanted: Sequence[tuple[StoredSample, Iterable[str]]], workers: int, **options: Any
) -> Reading:
    """Begin to read datasets of some samples of one file, for `StoredSample.at_hand`.

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
