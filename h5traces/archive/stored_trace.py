"""The fields of one sample as its source held them: layers, attention, tokens and texts."""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.archive.footer_store import FooterObjects
from h5traces.archive.recomputing import attention_weights, check_shapes, weights_of_window
from h5traces.archive.restoring import restored
from h5traces.archive.stored_sample import StoredSample
from h5traces.archive.tensors import fresh_array, is_torch, to_tensor
from h5traces.arguments import shown
from h5traces.errors import (
    CorruptArchiveError,
    HeadsNotStoredError,
    LayerIndexError,
    OptionError,
)
from h5traces.format import layout, text
from h5traces.format.dtypes import TypedArray
from h5traces.format.entries import INTEGER_TYPES
from h5traces.format.kinds import ATTENTION_WINDOW, KEYS, POSITIONS, QUERIES
from h5traces.format.values import TorchValue
from h5traces.lazy import needing
from h5traces.storage.footer_rows import FooterError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from h5traces.archive.tensors import Container
    from h5traces.format.attention import AttentionRule

# Numbers of heads or positions; None for all.
Indices = Any

# Weights that are recomputed at a time: 16 MiB.
_BLOCK_WEIGHTS = 1 << 22


class StoredTrace(StoredSample):
    """A stored sample whose arrays and texts are read in the types of their source."""

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
        """Whether single heads are known only by a window of weights."""
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
        return restored(self, kind, name, *self.file.facts(self.sample, f"{kind}/{name}"))

    def read_layers(self, kind: str, names: Sequence[str], container: Container) -> list[Any]:
        """`read_layer` of several arrays, in less time where they come as they are stored."""
        paths = [f"{kind}/{name}" for name in names]
        if self._come_as_stored(kind, paths, container):
            return [self.values(path) for path in paths]
        return [self.read_layer(kind, name, container) for name in names]

    def _come_as_stored(self, kind: str, paths: Sequence[str], container: Container) -> bool:
        """Whether `read_layer` gives just the values of these arrays; False may be wrong."""
        objects = self.objects
        if not isinstance(objects, FooterObjects) or container == "torch" or self.recomputes(kind):
            return False
        if f"{kind}/{layout.STEPS_TABLE}" in objects:
            return False
        # Reading an array knows what to do about a damaged index.
        with contextlib.suppress(FooterError):
            return all(
                dtype in ("float16", "float32", "float64")
                and attrs.keys().isdisjoint(("encoding", "source_dtype", "container"))
                for dtype, attrs in objects.unlike_facts(paths)
            )
        return False

    def read_layer(self, kind: str, name: str, container: Container = "numpy") -> Any:
        """The array of a kind by its dataset name; a list of arrays where it holds steps."""
        if self.recomputes(kind):
            found = TypedArray(self.attention(name), "float32")
            held = self.file.attrs(self.sample, f"{QUERIES}/{name}").get("container")
            return fresh_array(found, container, held)
        dtype, attrs = self.file.facts(self.sample, f"{kind}/{name}")
        typed, held = restored(self, kind, name, dtype, attrs), attrs.get("container")
        if not isinstance(typed, list):
            return fresh_array(typed, container, held)
        steps = [fresh_array(step, container, held) for step in typed]
        return tuple(steps) if attrs.get("sequence") == "tuple" else steps
