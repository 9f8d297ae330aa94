"""What tables and labelled arrays need of a trace, so that traces can offer these themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.archive.stored_trace import StoredTrace
    from h5traces.archive.tensors import Container
    from h5traces.format.record import TraceMetadata
    from h5traces.storage.remote.paths import RemotePath


class Row(Protocol):
    """One trace; see `h5traces.Trace`."""

    ordinal: int
    _stored: StoredTrace

    @property
    def metadata(self) -> TraceMetadata: ...
    @property
    def path(self) -> Path | RemotePath: ...
    @property
    def position_in_file(self) -> int: ...
    @property
    def mask(self) -> NDArray[Any] | None: ...
    def __contains__(self, key: object) -> bool: ...
    def get(self, key: str) -> Any: ...
    def _value(self, key: str, container: Container) -> Any: ...
