"""A first pass over a batch whose items share objects: which memo entries have to be kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from h5traces.sources.pickle.items import ROOT, SMALL_BYTES, SMALL_TEXT, BatchMachine
from h5traces.sources.pickle.shims import Marker, Shim
from h5traces.sources.pickle.source import RefusedError

if TYPE_CHECKING:
    from h5traces.sources.pickle.limits import PickleLimits
    from h5traces.sources.pickle.source import Source

STALE = Marker("value that the scan skips")

# A byte each is kept; a batch of 15 GB has about a million.
_MAX_SLOTS = 1 << 28


class Scanner(BatchMachine):
    """Finds the memo entries that items share; skips payloads and builds next to nothing.

    Attributes
    ----------
    shared
        Slot -> the last item that reads it, for slots that were written by an earlier item.
    """

    def __init__(self, source: Source, limits: PickleLimits) -> None:
        super().__init__(source, limits)
        self.shared: dict[int, int] = {}
        # Slots are numbered in order, so those below the item's first belong to earlier items.
        self._first_slot = 0
        # Per slot: a dict (1), a list (2) or anything else. Where items end depends on it.
        self._kinds = bytearray()

    def end_item(self) -> None:
        super().end_item()
        self._first_slot = self.next_slot

    def put(self, slot: int) -> None:
        super().put(slot)
        kind = type(self.stack[-1])
        code = 1 if kind is dict else 2 if kind is list else 0
        if slot >= _MAX_SLOTS:
            message = f"the batch has more than {_MAX_SLOTS:,} memo entries and shares some of them"
            raise RefusedError(message)
        if slot >= len(self._kinds):
            self._kinds.extend(bytes(slot + 1 - len(self._kinds)))
        self._kinds[slot] = code

    def get(self, slot: int) -> None:
        if 0 <= slot < self._first_slot:
            self.shared[slot] = self.num_items
            if len(self.shared) > self.limits.max_kept_entries:
                self.exceed("values shared between items", "max_kept_entries")
        super().get(slot)

    def recall(self, slot: int) -> Any:
        if slot in self.kept:
            return self.kept[slot]
        if 0 <= slot < len(self._kinds):
            return ({}, [])[self._kinds[slot] - 1] if self._kinds[slot] else STALE
        return super().recall(slot)

    def push_again(self, value: Any) -> None:
        if value is STALE:
            self.stack.append(value)
        else:
            super().push_again(value)

    def drop(self, value: Any) -> None:
        if value is not STALE:
            super().drop(value)

    def take_bytes(self, num_bytes: int) -> Any:
        return self._skip(num_bytes) if num_bytes > SMALL_BYTES else super().take_bytes(num_bytes)

    def take_buffer(self, num_bytes: int) -> Any:
        return self._skip(num_bytes)

    def take_text(self, num_bytes: int) -> Any:
        return self._skip(num_bytes) if num_bytes > SMALL_TEXT else super().take_text(num_bytes)

    def _skip(self, num_bytes: int) -> Marker:
        self.count_payload(num_bytes)
        self.source.skip(num_bytes)
        return STALE

    def ascii(self, data: Any) -> Any:
        return STALE if data is STALE else super().ascii(data)

    def check(self, item: Any) -> None:
        """Nothing: the items are empty."""

    def extend(self, target: Any, values: list[Any]) -> None:
        if target is ROOT:
            super().extend(target, values)

    def set_items(self, target: Any, flat: list[Any]) -> None:
        """Nothing: only the number of items matters."""

    def find(self, module: Any, name: Any) -> Any:
        return STALE if STALE in (module, name) else super().find(module, name)

    def call(self, function: Any, args: Any) -> None:
        if type(function) is Shim and function.name == "collections.OrderedDict":
            super().call(function, args)
        else:
            self.stack.append(STALE)

    def build(self, target: Any, state: Any) -> None:
        """Nothing: the value stays what it is."""
