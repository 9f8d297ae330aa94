"""Reads legacy batches item by item, in bounded memory and without trusting the file.

A batch is a pickled list of dicts, or a dict of parallel lists under ``traces``, ``labels`` and
``question_ids``; plain or inside gzip; pickle protocols 0 to 5.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.format.values import TorchValue
from h5traces.meaning.options import ReadingOptions
from h5traces.meaning.records import to_record
from h5traces.sources.pickle.items import (
    ROOT,
    TRACES_KEY,
    BatchMachine,
    Scanner,
    SharedEntryError,
    check_item,
)
from h5traces.sources.pickle.machine import INVALID, locate
from h5traces.sources.pickle.shims import type_name
from h5traces.sources.pickle.source import FileSource, PickleLimits, TruncatedError, contradict
from h5traces.sources.source import TraceSource

if TYPE_CHECKING:
    import os

    from h5traces.format.record import SourcePosition, TraceRecord
    from h5traces.sources.pickle.machine import Storages

_DEFAULT_LIMITS = PickleLimits()
_EXPECTED = "expected a list of dicts, or a dict with the list 'traces'"
# Files of the same folders whose first byte happens to be an opcode.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip file, as torch.save and numpy.savez write",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a file of numpy.save",
}
# PROTO, FRAME, and every opcode that needs nothing on the stack.
_FIRST_OPCODES: Final = frozenset(
    b"\x80\x95(])}cPNIJKMLSTUVXFGBC\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x96"
)
# A sentence; V, which is left out, begins a str in protocol 0.
_SENTENCE: Final = re.compile(rb"[A-UW-Z][a-z]+[ a-z]")


class BatchStream(TraceSource):
    """The items of a batch as dicts, one by one; a context manager.

    It keeps no reference to an item that it has returned. Arrays may be read-only views of the
    pickle's payload, in the byte order of the file; tensors are `TorchValue`.

    Attributes
    ----------
    num_passes
        How often the file has been opened: more than once if items share objects, or for a
        container.
    """

    kind = "pickle"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        limits: PickleLimits = _DEFAULT_LIMITS,
        options: ReadingOptions = ReadingOptions(),
    ) -> None:
        super().__init__(path, options=options)
        self.num_passes = 0
        self._limits = limits
        self._shared: dict[int, int] | None = None
        self._columns: tuple[Any, Any] | None = None
        self._source: FileSource | None = None
        self._storages: Storages | None = None
        self._done = False
        self._closed_at = (0, 0)
        try:
            self._open()
            self._check_magic()
            self._guard(self._machine.find_root)
            if self._machine.kind is None:
                self._advance()
        except BaseException:
            self.close()
            raise

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes of the file read in this pass, and the size of the file."""
        if self._source is None:
            return self._closed_at
        return self._source.compressed_position, self._source.compressed_size

    def __next__(self) -> Any:
        if self._source is None and not self._done:
            message = f"{self.path}: the batch is closed; open it again"
            raise ValueError(message)
        if self._done:
            raise StopIteration
        try:
            if self._machine.kind != "list" and self._columns is None:
                self._read_columns()
            if self._advance_to(self.num_read):
                item = self._machine.take()
                if self._columns is not None:
                    item = self._container_item(item, *self._columns)
                self.num_read += 1
                return item
        except BaseException:
            # Nothing after an error in the stream can be trusted.
            self.close()
            raise
        self._done = True
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Close the file; items that were returned stay valid."""
        if self._source is not None:
            self._closed_at = self.progress
            self._source.close()
            self._source = None

    def to_record(
        self, item: dict[Any, Any], place: SourcePosition, layers: tuple[int, ...] | None
    ) -> TraceRecord:
        """One item as a record."""
        # No producer of containers is known, nor where their last hidden state was taken.
        is_list = self._columns is None
        return to_record(
            item,
            source=place,
            layers=layers,
            sites_known=is_list,
            options=self.options,
            established=self.established,
        )

    def _check_magic(self) -> None:
        assert self._source is not None
        head = self._source.file.peek(8)[:8]
        for magic, kind in _OTHER_FORMATS.items():
            if head.startswith(magic):
                message = f"{self.path}: found {kind}, {_EXPECTED} in a pickle"
                raise ConversionError(message)
        # Else text would end in an error about an opcode.
        if head and (head[0] not in _FIRST_OPCODES or _SENTENCE.match(head)):
            message = f"{self.path}: is not a pickle (it starts with {head!r}); {_EXPECTED}"
            raise ConversionError(message)

    # --- passes ---------------------------------------------------------------------------------

    def _open(self, *, scan: bool = False) -> None:
        self.close()
        self._source = self._make_source()
        self.num_passes += 1
        self._taken = 0
        if scan:
            self._machine: BatchMachine = Scanner(self._source, self._limits)
        else:
            self._machine = BatchMachine(self._source, self._limits, self._shared)
        self._machine.storages = self._storages

    def _make_source(self) -> FileSource:
        """The bytes of the pickle, from its start; files of torch.save hold it among others."""
        return FileSource(self.path, self._limits)

    def _advance_to(self, index: int) -> bool:
        """Read up to the item with that index; False if the batch has fewer."""
        while True:
            try:
                while self._advance():
                    self._taken += 1
                    if self._taken > index:
                        return True
                    self._machine.take()
                return False
            except SharedEntryError:
                self._learn_shared()

    def _learn_shared(self) -> None:
        self._open(scan=True)
        scanner = self._machine
        while self._guard(scanner.advance):
            scanner.take()
        assert isinstance(scanner, Scanner)
        self._shared = scanner.shared
        self._open()

    def _advance(self) -> bool:
        if self._guard(self._machine.advance):
            return True
        self._guard(self._finish)
        return False

    def _finish(self) -> None:
        """Check that the pickle was a batch and that nothing follows it."""
        machine = self._machine
        found = machine.result
        root = found.get(TRACES_KEY) if type(found) is dict else found
        if machine.kind is None or root is not ROOT:
            contradict(f"found {_describe(found)}, {_EXPECTED}")
        if machine.num_pending:
            raise machine.unfinished()
        self._check_end()

    def _check_end(self) -> None:
        """Check that nothing follows the pickle."""
        assert self._source is not None
        if not self._source.at_end():
            contradict(
                "data follows the end of the pickle. If several pickle.dump calls wrote into "
                "this file, write one file per call; otherwise the file is damaged"
            )

    def _guard(self, step: Any) -> Any:
        source = self._source
        assert source is not None
        try:
            return step()
        except TruncatedError as error:
            detail = f"byte {source.inflated_bytes:,}, item {self._machine.num_items}: {error}"
            raise source.truncated_error(detail) from None
        except INVALID as error:
            raise locate(error, self._machine, str(self.path), self._machine.num_items) from error

    # --- containers -----------------------------------------------------------------------------

    def _read_columns(self) -> None:
        """Read the lists that follow ``traces`` in the file, and rewind."""
        while self._advance_to(self._taken):
            self._machine.take()
        found = {key: value for key, value in self._machine.result.items() if key != TRACES_KEY}
        num_items = self._machine.num_items

        def check() -> tuple[Any, Any]:
            check_item(found, self._limits)
            unknown = sorted(map(str, found.keys() - {"labels", "question_ids"}))
            if unknown:
                contradict(
                    f"the dict has the unknown keys {', '.join(unknown)[:200]}, expected only "
                    f"'traces', 'labels' and 'question_ids'"
                )
            return (
                _column(found.get("labels"), "labels", num_items),
                _column(found.get("question_ids"), "question_ids", num_items),
            )

        self._columns = self._guard(check)
        self._open()

    def _container_item(self, layers: list[Any], labels: Any, question_ids: Any) -> dict[str, Any]:
        """An element of ``traces`` as a dict; its attentions have no head axis."""
        index = self.num_read
        for number, pair in enumerate(layers):
            if (
                type(pair) not in (tuple, list)
                or len(pair) != 2
                or not all(isinstance(value, (np.ndarray, TorchValue)) for value in pair)
            ):
                message = (
                    f"{self.path}: layer {number} of item {index} in 'traces' is "
                    f"{type_name(pair)}, expected a pair (hidden states, attention)"
                )
                raise ConversionError(message)
        item: dict[str, Any] = {
            layout.HIDDEN_STATES: [hidden for hidden, _ in layers],
            layout.ATTENTION_MEAN: [attention for _, attention in layers],
        }
        for key, values in ((layout.LABEL, labels), (layout.QUESTION_ID, question_ids)):
            if values is not None and values[index] is not None:
                item[key] = values[index]
        return item


def _column(values: Any, name: str, num_items: int) -> list[Any] | None:
    if values is None:
        return None
    if isinstance(values, TorchValue):
        values = values.data
    if type(values) not in (list, tuple) and not (
        isinstance(values, np.ndarray) and values.ndim == 1
    ):
        contradict(f"{name!r} is {type_name(values)}, expected a list with one value per trace")
    if len(values) != num_items:
        contradict(
            f"{name!r} has {len(values)} values for {num_items} traces; they cannot be matched, "
            f"so remove or repair that list"
        )
    return [value.item() if isinstance(value, np.generic) else value for value in values]


def _describe(value: Any) -> str:
    if type(value) is dict:
        keys = ", ".join(repr(key)[:40] for key in list(value)[:8])
        return f"a dict with the keys {keys}" if value else "an empty dict"
    if type(value) in (list, tuple) and value:
        first = "a batch" if value[0] is ROOT else type_name(value[0])
        return f"{type_name(value)} that starts with {first}"
    return type_name(value)
