"""One stored trace, which behaves as the legacy dict does in existing code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, overload

import numpy as np

from h5traces.archive.characters import Characters
from h5traces.archive.equality import equal
from h5traces.archive.notebook import described_layer, layers_page, trace_page
from h5traces.archive.read_only import ReadOnly
from h5traces.archive.selection import sliced
from h5traces.archive.source_form import in_source_form
from h5traces.archive.tensors import check_container, in_container, to_device
from h5traces.arguments import as_position, checked, shown
from h5traces.errors import CorruptArchiveError, FieldNotFoundError, LayerIndexError
from h5traces.format import layout, text
from h5traces.format.kinds import ATTENTION_WINDOW
from h5traces.format.values import decode_element
from h5traces.lazy import needing

if TYPE_CHECKING:
    from pathlib import Path

    import xarray as xr
    from numpy.typing import NDArray

    from h5traces.archive.stored_trace import StoredTrace
    from h5traces.archive.tensors import Container
    from h5traces.format.record import TraceMetadata
    from h5traces.storage.remote.paths import RemotePath

# A numpy array or a torch tensor; a list or tuple of these where a layer holds generation steps.
LayerValue = Any


class LayerSequence(ReadOnly, Sequence[LayerValue]):
    """The arrays of one kind of one trace, by position in the stored list; each read when asked."""

    _way_out: ClassVar[str] = "change a list of its arrays: list(trace[kind])"

    def __init__(
        self,
        trace: StoredTrace,
        kind: str,
        layers: tuple[int, ...] | None,
        container: Container = "numpy",
    ) -> None:
        self._trace = trace
        self.kind = kind
        self._selected = layers
        self._container = container

    @cached_property
    def _names(self) -> list[str]:
        """Dataset names in the order of the legacy list, those of items that were None included."""
        return self._trace.listed_names(self.kind, self._selected)

    @property
    def _stored_names(self) -> list[str]:
        """Names of the datasets, without items that were None."""
        return [name for name in self._names if name not in self._absent]

    @cached_property
    def _absent(self) -> frozenset[str]:
        """Names of items that were None."""
        return frozenset(self._trace.form(self.kind).absent or ())

    @cached_property
    def layers(self) -> tuple[int | None, ...]:
        """The model's own layer number of every position; None for the embedding.

        Where no layer is known, since nothing says what the first state is, the position itself.
        """
        return tuple(layout.parse_layer_name(name) for name in self._names)

    @property
    def sites(self) -> tuple[str | None, ...]:
        """Where in the model each position was taken: ``block_output`` or ``final_norm``."""
        if self._trace.recomputes(self.kind):
            return (None,) * len(self)
        attrs = (
            {} if name in self._absent else self._trace.attrs(f"{self.kind}/{name}")
            for name in self._names
        )
        sites = (each.get("site") for each in attrs)
        return tuple(None if site is None else str(site) for site in sites)

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, position: int) -> LayerValue: ...
    @overload
    def __getitem__(self, position: slice) -> list[LayerValue]: ...
    def __getitem__(self, position: int | slice) -> LayerValue | list[LayerValue]:
        if isinstance(position, slice):
            names = [self._names[each] for each in sliced(range(len(self)), position)]
            with self._trace.read_ahead(self._trace.layer_paths(self.kind, names)):
                return self._read(names)
        try:
            name = self._names[as_position(position, f"{self._trace.place}: {self.kind}")]
        except IndexError:
            message = (
                f"{self._trace.place}: position {shown(position)} of {self.kind} is out of range; "
                f"{len(self._names)} are stored, layers {list(self.layers)}; "
                "trace.layer(n) takes the model's own layer number"
            )
            raise LayerIndexError(message) from None
        return self._read([name])[0]

    def __contains__(self, value: object) -> bool:
        return any(equal(each, value) for each in self)

    @property
    def _paths(self) -> list[str]:
        """The datasets that reading all arrays needs."""
        return self._trace.layer_paths(self.kind, self._stored_names)

    def _read_all(self) -> list[LayerValue]:
        if self._absent:
            return self._read(self._names)
        return self._trace.read_layers(self.kind, self._names, self._container)

    def _read(self, names: Iterable[str]) -> list[LayerValue]:
        return [
            None
            if name in self._absent
            else self._trace.read_layer(self.kind, name, self._container)
            for name in names
        ]

    def _to_list(self) -> Any:
        """All arrays, in what held them in the source: a list, a tuple, a dict or one array."""
        with self._trace.read_ahead(self._paths):
            return in_source_form(self._trace, self.kind, self._names, self._container)

    def copy(self) -> list[LayerValue]:
        """A list of all arrays, as ``list.copy`` gives."""
        return self[:]

    def __add__(self, other: Any) -> Any:
        return self._to_list() + (other._to_list() if isinstance(other, LayerSequence) else other)

    def __radd__(self, other: Any) -> Any:
        return other + self._to_list()

    def __eq__(self, other: object) -> bool:
        return equal(self._to_list(), _plain(other))

    # As a list has none.
    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(
        cls, func: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Makes a list of the layers for ``torch.stack`` and ``torch.cat``, which take no other."""
        named = {key: _listed(value) for key, value in (kwargs or {}).items()}
        return func(*map(_listed, args), **named)

    def __repr__(self) -> str:
        return f"<{self.kind}: {len(self)} arrays, layers {list(self.layers)}>"

    def _repr_html_(self) -> str:
        return layers_page(self.kind, self.layers, list(map(self._described, self._names)))

    def _described(self, name: str) -> tuple[object, ...]:
        if name in self._absent:
            return "", "None", ""
        if self._trace.recomputes(self.kind):
            return "recomputed", str(self._trace.attention_shape(name)), "float32"
        entry = self._trace.entry(f"{self.kind}/{name}")
        return described_layer(entry.attrs, entry.shape, entry.dtype)


def _plain(value: Any) -> Any:
    return value._to_list() if isinstance(value, LayerSequence) else value


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, LayerSequence) else value


class Trace(ReadOnly, Mapping[str, Any]):
    """A lazy, read-only view of one sample: each array is read when it is asked for.

    ``trace["hidden_states"][k]`` is a new, writable, native-endian array, or a torch tensor where
    the source held one (see `h5traces.open`): hidden states ``(seq_len, hidden_size)``, attentions
    ``(num_heads, seq_len, seq_len)``; k is the position in the stored list. In numpy, bfloat16
    comes as float32.

    Traces are equal, to each other and to dicts, if their keys and all their values are: arrays of
    one shape and number type with the same numbers, NaN included. This reads them.

    Attributes
    ----------
    ordinal
        Index over all shards of its archive.
    """

    _way_out: ClassVar[str] = (
        "change a dict of it: trace.to_dict() reads all arrays, trace.copy() and trace | {...} "
        "read them when they are used"
    )

    def __init__(self, stored: StoredTrace, ordinal: int, container: Container = "source") -> None:
        self._stored, self.ordinal, self._container = stored, ordinal, container

    @property
    def metadata(self) -> TraceMetadata:
        """The sample's attributes, validated; with the labels that lie beside the archive."""
        return self._stored.metadata

    @property
    def path(self) -> Path | RemotePath:
        """The file that the trace is stored in, or its address."""
        return self._stored.file.path

    @property
    def position_in_file(self) -> int:
        """Index of the trace in its file; `ordinal` counts over all shards."""
        return self._stored.index

    @property
    def fields(self) -> tuple[str, ...]:
        """Keys of the legacy dict, in their order."""
        return self._stored.fields

    def __getitem__(self, key: str) -> Any:
        if not isinstance(key, str):
            message = (
                f"{self._stored.place}: {shown(key)} is not a field; its fields are named by text: "
            )
            message += ", ".join(self.fields)
            raise FieldNotFoundError(message)
        return self._value(key, self._container)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key in self.fields

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    def copy(self) -> dict[str, Any]:
        """A dict of the same values, as ``dict.copy`` gives; layers are read when asked."""
        return dict(self)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self, **other} if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**other, **self} if isinstance(other, Mapping) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        if self is other:
            return True
        # Layers last: the others are small, and differ first.
        fields = sorted(self.fields, key=lambda each: each in layout.KINDS)
        return self.keys() == other.keys() and all(
            equal(_plain(self[key]), _plain(other[key])) for key in fields
        )

    # So that an array asks `__eq__` above, and does not compare itself with every field.
    __array_ufunc__ = None
    # As a dict has none.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        metadata = self.metadata
        return (
            f"<Trace {self.ordinal}: sample_id={metadata.sample_id!r}, "
            f"seq_len={metadata.seq_len}, fields={', '.join(self.fields)}>"
        )

    def _repr_html_(self) -> str:
        return trace_page(self)

    def _value(self, key: str, container: Container) -> Any:
        objects = self._stored.objects
        if self._stored.recomputes(key):
            return LayerSequence(self._stored, key, self._stored.selected, container)
        # A kind that was made of others, such as the head mean, is not a key of the legacy dict.
        if key not in self.fields and not (key in self._stored.kinds and key in objects):
            self._stored.check_heads(key)
            message = f"{self._stored.place}: there is no field {shown(key)}; its fields: "
            message += ", ".join(self.fields)
            raise FieldNotFoundError(message)
        if key == layout.LABEL and self._stored.has_new_label:
            return self.metadata.label
        extra = f"{layout.EXTRA_GROUP}/{text.escape(layout.escape_key(key))}"
        if extra in objects:
            return in_container(decode_element(self._stored, extra), container)
        if key == layout.TOKENS and key in objects:
            return self._stored.tokens(container)
        if key == layout.TOKENS_DECODED and key in objects:
            return self._stored.texts(key)
        if key == layout.ATTENTION_MASK and key in objects:
            return in_container(np.array(self._stored.attention_mask()), container)
        if key in layout.TEXT_FIELDS and key in objects:
            return self._stored.text(key)
        if key in objects:
            if not self._stored.entry(key).is_group:
                message = f"{self._stored.place}/{key}: is a dataset, expected a group of layers"
                raise CorruptArchiveError(message)
            return LayerSequence(self._stored, key, self._stored.selected, container)
        value = self._stored.slots().get(key)
        if value is None:
            message = (
                f"{self._stored.place}: the field {key!r} is listed but not stored; the file was "
                "edited, or damaged; run 'h5traces validate' on it"
            )
            raise CorruptArchiveError(message)
        return value

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """Which positions are tokens, ``(seq_len,)``, and not padding; None if all are.

        Archives hold padding only where ``keep_padding`` asked for it. The field
        ``attention_mask`` is as the source had it.
        """
        found = self._stored.attention_mask()
        return None if found is None else found.astype(np.bool_)

    @property
    def embedding(self) -> LayerValue:
        """The output of the embedding, ``(seq_len, hidden_size)``.

        It is part of the legacy list only where the source's list began with it.

        Raises
        ------
        LayerIndexError
            It is not stored.
        """
        if f"{layout.HIDDEN_STATES}/{layout.EMBEDDING}" not in self._stored.objects:
            message = f"{self._stored.place}: the embedding is not stored"
            raise LayerIndexError(message)
        return self._read_layer(layout.HIDDEN_STATES, layout.EMBEDDING)

    def _read_layer(self, kind: str, name: str) -> LayerValue:
        return self._stored.read_layer(kind, name, self._container)

    @checked
    def layer(self, layer: int, kind: str = layout.HIDDEN_STATES) -> LayerValue:
        """One layer's array by the model's own 0-based layer number, or by position.

        Positions stand for layers where the source did not say whether its first hidden state was
        the embedding, see `LayerSequence.layers`.

        Raises
        ------
        LayerIndexError
            The trace does not store that layer, or ``archive.select`` left it out.
        HeadsNotStoredError
            It stores attentions averaged over heads only.
        """
        self._stored.check_layer(layer, kind)
        return self._read_layer(kind, self._stored.array_name(kind, layer))

    @checked
    def attention(
        self,
        layer: int,
        *,
        heads: int | slice | Sequence[int] | None = None,
        queries: int | slice | Sequence[int] | None = None,
        keys: int | slice | Sequence[int] | None = None,
        device: str | None = None,
    ) -> LayerValue:
        """A part of one layer's attention: some heads, rows and columns.

        Where queries and keys are stored instead of weights, no more than these rows is computed,
        in float32. Of an archive with the weights of the last keys of every query
        (``attention_window``), the others are NaN. Each of the three takes what indexes an axis of
        numpy; a number drops the axis.

        Parameters
        ----------
        layer
            The model's own 0-based layer number.
        heads, queries, keys
            What is wanted of each axis; all by default.
        device
            Where torch computes, such as ``cuda``; the result is a tensor there.

        Returns
        -------
        numpy.ndarray or torch.Tensor
            ``(heads, queries, keys)``.

        Raises
        ------
        LayerIndexError
            The trace does not store that layer, or there is no such head or position.
        HeadsNotStoredError
            It stores attentions averaged over heads only.
        """
        stored = self._stored
        kind = ATTENTION_WINDOW if stored.has_window else layout.ATTENTIONS
        stored.check_layer(layer, kind)
        name, whole = stored.array_name(kind, layer), None
        chosen = [slice(None) if each is None else each for each in (heads, queries, keys)]
        if not stored.recomputes(kind) and kind == layout.ATTENTIONS:
            whole = stored.read_layer(kind, name, self._container)
        shape = stored.attention_shape(name) if whole is None else whole.shape
        try:
            places = [np.arange(size)[each] for size, each in zip(shape, chosen, strict=True)]
        except (IndexError, TypeError) as error:
            message = f"{stored.place}: attention {shape} of layer {layer}: {error}"
            raise LayerIndexError(message) from error
        of_heads, rows, columns = (np.atleast_1d(each) for each in places)
        if stored.recomputes(kind):
            part = stored.attention(name, heads=of_heads, rows=rows, device=device)
        else:
            if whole is None:
                part = stored.attention_in_window(name, heads=of_heads, rows=rows)
            else:
                part = whole[of_heads][:, rows]
            part = part if device is None else to_device(part, device)
        if keys is not None:
            part = part[:, :, columns]
        return part.reshape(tuple(n for each in places for n in each.shape))

    @checked
    def tokens_of(self, start: int, end: int, field: str = "generated_answer") -> NDArray[np.intp]:
        """Indices of the stored tokens that have one of the characters `start` to `end` - 1.

        Parameters
        ----------
        start, end
            Characters of the text, from 0.
        field
            The text: ``generated_answer``, ``prompt``, or the ``question`` in the prompt.

        Returns
        -------
        numpy.ndarray
            Indices along the token axis, ascending; empty if no stored token has any.

        Raises
        ------
        OptionError
            The text has no such characters, or there is no such text.
        FieldNotFoundError
            The characters of tokens are not stored (the field ``char_offsets``).
        """
        return Characters(self, self._stored.place).tokens_of(start, end, field)

    @checked
    def token_labels(
        self, spans: Iterable[Any] | None = None, field: str = "generated_answer", label: int = 1
    ) -> NDArray[np.int64]:
        """A label for every stored token: `label` in spans of a text, 0 in the rest of it.

        Parameters
        ----------
        spans
            Pairs of the first character and the one after the last, or dicts with ``start`` and
            ``end``; the trace's own field ``spans`` by default.
        field
            The text, as for `tokens_of`.
        label
            That of tokens with a character of a span.

        Returns
        -------
        numpy.ndarray
            int64 ``(seq_len,)``; -100, which PyTorch's cross entropy ignores, for tokens of other
            texts and those without characters.

        Raises
        ------
        OptionError, FieldNotFoundError
            As for `tokens_of`; also where a span is none, or the trace has no spans.
        """
        return Characters(self, self._stored.place).labels(spans, field, label)

    @checked
    def to_dict(self, *, container: Container | None = None) -> dict[str, Any]:
        """The plain legacy dict: same keys in the same order, types, shapes and values.

        Parameters
        ----------
        container
            ``source``, ``numpy`` or ``torch``, as for `h5traces.open`; that of the archive by
            default.

        Raises
        ------
        MissingDependencyError
            The source held torch tensors and torch is not installed.
        OptionError
            There is no such container.
        """
        wanted = self._container if container is None else container
        check_container(wanted)
        with self._stored.read_ahead(self._stored.needed()):
            return {key: _plain(self._value(key, wanted)) for key in self.fields}

    @checked
    def to_xarray(self, kinds: str | Iterable[str] | None = None) -> xr.Dataset:
        """The layers as a data set of xarray, with named axes; values are read when they are used.

        Parameters
        ----------
        kinds
            Kinds of arrays; hidden states and attentions by default.

        Returns
        -------
        xarray.Dataset
            A variable for each kind: ``layer`` and the axes of its arrays (``token``, ``hidden``;
            ``head``, ``query``, ``key``). Coordinates: ``layer``, -1 for the embedding;
            ``token_text``, ``token_id``, ``is_prompt``, ``query_text``, ``key_text``, where they
            are stored. Layers that a kind does not have are NaN. Metadata are attributes.

        Raises
        ------
        MissingDependencyError
            xarray is not installed.
        OptionError
            The archive stores no such kind, or generation steps of it.
        """
        with needing("to_xarray", "xarray", extra="tables"):
            from h5traces.archive.labelled import trace_dataset

        return trace_dataset(self, kinds)
