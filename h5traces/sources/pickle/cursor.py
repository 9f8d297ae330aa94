"""Reads the items of one pickle of a file, and starts again where items share objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from h5traces.sources.pickle.items import (
    ITEM_TYPES,
    BatchMachine,
    Found,
    SharedEntryError,
)
from h5traces.sources.pickle.locating import INVALID, locate
from h5traces.sources.pickle.scan import last_reads
from h5traces.sources.pickle.source import TruncatedError, contradict
from h5traces.sources.pickle.trees import TouchedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from h5traces.sources.pickle.source import FileSource, PickleLimits
    from h5traces.sources.pickle.stack import Storages


# PROTO, FRAME, and every opcode that needs nothing on the stack.
FIRST_OPCODES: Final = frozenset(
    b"\x80\x95(])}cPNIJKMLSTUVXFGBC\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x96"
)


class Cursor:
    """A place in a file of one or more pickles.

    Parameters
    ----------
    path, limits
        Its name for messages, and how much it may ask for.
    open_source
        Opens the bytes of the pickle, and says where the tensors outside of it lie.
    start
        Where the pickle begins, in uncompressed bytes.
    whole_nbytes
        As `BatchMachine` takes it.
    level
        Of `ITEM_TYPES`.
    """

    def __init__(
        self,
        path: Path,
        limits: PickleLimits,
        open_source: Callable[[], tuple[FileSource, Storages | None]],
        *,
        start: int = 0,
        whole_nbytes: int | None = None,
        level: int = 0,
    ) -> None:
        self._path = path
        self._limits = limits
        self._start = start
        self._whole_nbytes = whole_nbytes
        self._open_source = open_source
        self._last_reads: NDArray[np.int64] | None = None
        self._level = level
        self._num_found = 0
        self._num_before = 0
        self._source: FileSource | None = None
        self._machine: BatchMachine
        self._closed_at = (0, 0)
        self._open()

    @property
    def start(self) -> int:
        """Where the pickle begins, in uncompressed bytes."""
        return self._start

    @property
    def machine(self) -> BatchMachine:
        """The machine of this pass."""
        return self._machine

    @property
    def source(self) -> FileSource:
        """The open file."""
        assert self._source is not None
        return self._source

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes of the file read in this pass, and the size of the file."""
        if self._source is None:
            return self._closed_at
        return self._source.compressed_position, self._source.compressed_size

    def close(self) -> None:
        """Close the file."""
        if self._source is not None:
            self._closed_at = self.progress
            self._source.close()
            self._source = None

    def find_root(self) -> str | None:
        """The outer container: ``list``, ``tuple``, ``dict``, or None for another value."""
        self._guard(self._machine.find_root)
        return self._machine.kind

    def whole(self) -> Any:
        """The value of the whole pickle, checked; TooLargeError where it takes too much memory."""
        machine = self._machine

        def load() -> Any:
            while not machine.run():
                pass
            if machine.num_pending:
                raise machine.unfinished()
            if machine.kind is None and not machine.is_whole:
                return machine.result  # of what type it is, the caller says
            machine.check(machine.result)
            machine.num_items += 1
            return machine.result

        return self._guard(load)

    def whole_checked(self) -> Any:
        """As `whole`, with every value checked, also of what is not a container."""
        value = self.whole()
        self._guard(lambda: self._machine.check(value))
        return value

    def restart(self, *, whole_nbytes: int | None, is_list_whole: bool = False) -> None:
        """Read the pickle from its beginning, in another way."""
        self._whole_nbytes = whole_nbytes
        self._num_found = 0
        self._open()
        self._machine.is_list_whole = is_list_whole
        self.find_root()

    def survey(self, see: Callable[[Found | None], None]) -> int:
        """Call `see` for every item, in another pass; which level of `ITEM_TYPES` that takes.

        Where a level turns out to be wrong, None is seen, and then all items again.
        """
        for self._level in range(len(ITEM_TYPES)):
            self.restart(whole_nbytes=None)
            try:
                while self.advance(strict=False):
                    see(self.take())
            except TouchedError as error:
                if self._level + 1 == len(ITEM_TYPES):
                    raise self._located(error) from error
                see(None)
            else:
                break
        return self._level

    def advance(self, *, strict: bool = True) -> bool:
        """Read until the next item is ready; False at the end of the pickle."""
        while True:
            try:
                while self._machine_advance():
                    self._num_taken += 1
                    if self._num_taken > self._num_found:
                        self._num_found += 1
                        return True
                    self._machine.take()
            except SharedEntryError:
                self._learn_shared()
            except TouchedError as error:
                if not strict:
                    raise
                raise self._located(error) from error
            else:
                return False

    def take(self) -> Found:
        """The item that is ready."""
        return self._machine.take()

    def ends(self, whole_nbytes: int) -> bool:
        """Whether nothing follows the pickle; else the next one is current, to be read so."""
        if self.source.at_end():
            return True
        if self.source.file.peek(1)[0] not in FIRST_OPCODES:
            self._guard(_no_pickle)
        self._start = self.source.inflated_bytes
        self._whole_nbytes = whole_nbytes
        self._machine.next_pickle(whole_nbytes)
        self._last_reads = None
        self._num_before = self._machine.num_items
        self._num_found = self._num_taken = 0
        return False

    def check(self, step: Callable[[], Any]) -> Any:
        """The result of a step, whose errors are located in this file."""
        return self._guard(step)

    # --- passes ---------------------------------------------------------------------------------

    def _open(self) -> None:
        self.close()
        self._source, storages = self._open_source()
        self._num_taken = 0
        self._machine = BatchMachine(
            self._source,
            self._limits,
            last_reads=self._last_reads,
            whole_nbytes=self._whole_nbytes,
            item_types=ITEM_TYPES[self._level],
        )
        self._machine.storages = storages
        self._machine.num_items = self._num_before
        if self._start:
            self._guard(lambda: self.source.skip(self._start))

    def _machine_advance(self) -> bool:
        machine = self._machine
        if self._guard(machine.advance):
            return True
        return bool(self._guard(machine.finish))

    def _learn_shared(self) -> None:
        if self._machine.has_raw:
            self._guard(_no_scan)
        self._open()
        self._last_reads = self._guard(lambda: last_reads(self.source))
        self._open()

    def _guard(self, step: Callable[[], Any]) -> Any:
        source, machine = self.source, self._machine
        try:
            return step()
        except TruncatedError as error:
            detail = f"byte {source.inflated_bytes:,}, item {machine.num_items}: {error}"
            raise source.truncated_error(detail) from None
        except TouchedError:
            raise
        except INVALID as error:
            raise self._located(error) from error

    def _located(self, error: Exception) -> Exception:
        return locate(error, self._machine, str(self._path), self._machine.num_items)


def _no_pickle() -> None:
    contradict("other bytes than those of a pickle follow the end of the pickle")


def _no_scan() -> None:
    contradict(
        "samples share large objects, which is read of pickles only, not of joblib's files; load "
        "the file with joblib, and dump it with pickle"
    )
