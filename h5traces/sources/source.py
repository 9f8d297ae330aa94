"""What every source of traces offers: samples one by one as dicts, or as records."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from h5traces.errors import ConversionError, H5TracesError, SchemaError
from h5traces.format.record import SourcePosition
from h5traces.meaning.numbering import Established
from h5traces.meaning.options import ReadingOptions
from h5traces.meaning.records import to_record

if TYPE_CHECKING:
    import os

    from h5traces.format.record import TraceRecord


@contextlib.contextmanager
def errors_of(reader: type[TraceSource], path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever a reader of another package raises inside the block, as a ConversionError."""
    try:
        yield
    except (H5TracesError, OSError, MemoryError):
        raise
    except Exception as error:
        name = f"{reader.__module__}.{reader.__qualname__}"
        if name.startswith(f"{__package__}."):
            raise
        message = f"{path}: the reader {name} failed: {type(error).__name__}: {error}"
        raise ConversionError(message) from error


class TraceSource(ABC, Iterator[dict[Any, Any]]):
    """A file, or a folder that is one set, of traces; a context manager.

    It iterates over samples as dicts with the names of the legacy fields: arrays are numpy arrays
    (also memory-mapped, also read-only), tensors are `TorchValue`. It keeps no reference to a
    sample that it has returned.

    Attributes
    ----------
    kind
        Of file, for messages and reports: ``pickle``, ``safetensors`` and so on.
    path
        The file or folder.
    options
        What the user says about it.
    num_read
        Index of the next sample.
    num_samples
        How many there are, where that is known before they are read.
    num_layers
        Decoder blocks of the samples that were returned, the largest number.
    established
        What the samples that were made records have told of layers and axes.
    understood
        Sentences that say how the file was understood, for reports.
    unread
        What of the file was not read, and why; a conversion reports it and does not end well.
    """

    kind: ClassVar[str]

    def __init__(
        self, path: str | os.PathLike[str], *, options: ReadingOptions = ReadingOptions()
    ) -> None:
        self.path = Path(path)
        self.options = options
        self.num_read = 0
        self.num_samples: int | None = None
        self.num_layers = 0
        self.established = Established.of(options.run)
        self.understood: list[str] = []
        self.unread: list[str] = []

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        """Whether this reader takes a file or folder; for readers that other packages add.

        Parameters
        ----------
        path
            The file, or a folder.
        head
            The first bytes of the file, at most 4,096; empty for a folder.
        """
        return False

    @abstractmethod
    def __next__(self) -> dict[Any, Any]:
        """The next sample."""

    def requests(self) -> tuple[str, ...]:
        """Names of the samples to which responses of a server belong."""
        return ()

    @property
    @abstractmethod
    def progress(self) -> tuple[int, int]:
        """Bytes read so far, and the size of the source, both in bytes."""

    @abstractmethod
    def close(self) -> None:
        """Close the source; samples that were returned stay valid."""

    def __iter__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with errors_of(type(self), self.path):
            self.close()

    def next_sample(self) -> dict[Any, Any] | None:
        """The next sample, None at the end; what a reader of another package raises is ours."""
        with errors_of(type(self), self.path):
            try:
                item = next(self)
            except StopIteration:
                return None
            if not isinstance(item, dict):
                message = f"a sample is {type(item).__name__}, expected dict"
                raise TypeError(message)
            return item

    def records(
        self, *, file: int = 0, layers: tuple[int, ...] | None = None
    ) -> Iterator[TraceRecord]:
        """Every sample as a record: of `layers` only, with `file` as its source's number."""
        while (item := self.next_sample()) is not None:
            place = SourcePosition(file=file, position=self.num_read - 1)
            try:
                record = self.to_record(item, place, layers)
            except (ConversionError, SchemaError) as error:
                message = f"{self.path}: sample {place.position}: {error}"
                raise ConversionError(message) from error
            del item
            self.num_layers = self.established.num_blocks
            yield record
            # Free the arrays before the next sample is read.
            del record

    def to_record(
        self, item: dict[Any, Any], place: SourcePosition, layers: tuple[int, ...] | None
    ) -> TraceRecord:
        """One sample as a record, by the rules of `h5traces.meaning`."""
        return to_record(
            item, source=place, layers=layers, options=self.options, established=self.established
        )
