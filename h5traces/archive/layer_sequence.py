"""The arrays of one kind of a trace, as a sequence that reads each when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, overload

from numpy.typing import NDArray

from h5traces.errors import LayerIndexError
from h5traces.format import layout

if TYPE_CHECKING:
    from h5traces.archive.trace import Trace

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
