"""Machines that return the items of a batch while its pickle is still being read.

A pickler pushes the items of a list on the stack, one after the other, and then writes APPENDS. So
an item of the root list is complete as soon as the next list or dict lies directly above it, or at
the APPEND. The item is then returned, a marker takes its place, and its memo entries are dropped,
except the small strings and numbers that picklers share between items. If a later item needs a
dropped entry, `SharedEntryError` makes the caller scan the pickle once with `Scanner` and start
again with the exact set of entries to keep.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.format.values import TorchValue
from h5traces.sources.pickle.machine import Machine
from h5traces.sources.pickle.shims import Marker, Shim, Storage, Unsupported, type_name
from h5traces.sources.pickle.source import RejectedError, contradict, reject

if TYPE_CHECKING:
    from collections.abc import Mapping

    from h5traces.sources.pickle.source import PickleLimits, Source


TRACES_KEY = "traces"
SMALL_TEXT = 256
SMALL_BYTES = 64
_SMALL_INT = 1 << 64
# The scan keeps a byte per slot; a batch of 15 GB has about a million slots.
_MAX_SLOTS = 1 << 28
# Picklers name the callables and dtypes of arrays in the first item only.
_SHARED = (Shim, np.dtype)

ROOT = Marker("root list")
EMITTED = Marker("item that was handed out")
STALE = Marker("value that the scan skips")

_NUMPY_SCALARS = frozenset(np.sctypeDict.values()) - {np.void, np.object_}
_SIMPLE = frozenset({type(None), bool, int, float})
_LEAVES = _SIMPLE | _NUMPY_SCALARS | {str, bytes, bytearray, np.ndarray, TorchValue}
_CONTAINERS = frozenset({list, tuple, dict})


class SharedEntryError(Exception):
    """An item refers to a memo entry that was dropped with an earlier item."""


def check_item(item: Any, limits: PickleLimits) -> int:
    """Check that an item is a finite tree of known types, and return its bytes.

    A pickle of a hundred bytes can hold a list that contains itself, or tuples that share their
    halves and unfold to 2**100 leaves.
    """
    level = [item]
    nbytes = 0
    num_values = 0
    for _ in range(limits.max_depth + 1):
        inner = []
        for container in level:
            values = container.values() if type(container) is dict else container
            num_values += len(values)
            if num_values > limits.max_item_opcodes:
                reject(
                    f"an item unfolds to more than {limits.max_item_opcodes:,} values; if the "
                    f"file is trusted, raise PickleLimits(max_item_opcodes=...)"
                )
            kinds = set(map(type, values))
            if kinds <= _SIMPLE:
                nbytes += 64 * len(values)
                continue
            for value in values:
                kind = type(value)
                if kind in _CONTAINERS:
                    inner.append(value)
                elif kind in _LEAVES:
                    nbytes += _leaf_nbytes(value)
                elif kind is Unsupported:
                    place = _place_of(item, value)
                    contradict(f"{place} is {value.what}, which no trace holds; {value.remedy}")
                else:
                    reject(f"an item holds {type_name(value)}, which no trace holds")
        if not inner:
            return nbytes
        level = inner
    reject(
        f"an item contains itself or is nested deeper than {limits.max_depth} levels; if the "
        f"file is trusted, raise PickleLimits(max_depth=...)"
    )


def _place_of(item: Any, wanted: Any) -> str:
    """Where in an item a value is, such as ``field 'hidden_states', index 3``."""
    level: list[tuple[str, Any]] = [("", item)]
    while level:
        inner = []
        for place, container in level:
            named = type(container) is dict
            for key, value in container.items() if named else enumerate(container):
                here = f"{place}, {'key' if named else 'index'} {key!r}"
                if value is wanted:
                    return here.removeprefix(", ").replace("key", "field", 1)
                if type(value) in _CONTAINERS:
                    inner.append((here, value))
        level = inner
    return "a value"


def _leaf_nbytes(value: Any) -> int:
    if type(value) is np.ndarray:
        return value.nbytes
    if type(value) is TorchValue:
        return value.data.nbytes
    return 64 + (len(value) if isinstance(value, (str, bytes, bytearray)) else 0)


def _is_small(value: Any) -> bool:
    kind = type(value)
    if kind is str:
        return len(value) <= SMALL_TEXT
    if kind is bytes:
        return len(value) <= SMALL_BYTES
    if kind is int:
        return bool(-_SMALL_INT < value < _SMALL_INT)
    return kind in (type(None), float) or value is ROOT or isinstance(value, _SHARED)


class BatchMachine(Machine):
    """Reads a batch: call `advance` until it returns False, and `take` the item each time.

    Parameters
    ----------
    needed
        Memo slots to keep and the last item that reads each, as `Scanner` finds them. By
        default small values are kept, and reading another one raises `SharedEntryError`.

    Attributes
    ----------
    kind
        ``list`` for a list of dicts, ``container`` for a dict with the list under ``traces``;
        None if the pickle is neither, or not known yet.
    """

    def __init__(
        self, source: Source, limits: PickleLimits, needed: Mapping[int, int] | None = None
    ) -> None:
        super().__init__(source, limits)
        self.kind: str | None = None
        self.num_items = 0
        self.ready: list[Any] = []
        self.needed = needed
        self.kept: dict[int, Any] = {}
        self._kept_nbytes = 0
        self._unfolded_nbytes = 0
        self._expiring: defaultdict[int, list[int]] = defaultdict(list)
        # Containers of earlier items that this one refers to, by id; kept, so ids stay unique.
        self._frozen: dict[int, Any] = {}
        self._item_type: type = dict
        self._root_dict: dict[Any, Any] | None = None
        self._root_depth = -1
        self._root_index = 0
        self._root_seen = False

    def advance(self) -> bool:
        """Read until an item is ready; False if there are no more."""
        while not self.ready:
            if self.run():
                return False
        return True

    def take(self) -> Any:
        """The item that is ready; the machine keeps no reference to it."""
        return self.ready.pop(0)

    def find_root(self) -> None:
        """Read until `kind` is decided."""
        while not self._root_seen and not self.run():
            pass

    # --- the root -------------------------------------------------------------------------------

    def _look_for_root(self) -> None:
        stack = self.stack
        top = stack[-1]
        if not self._root_seen:
            if self.meta or len(stack) != 1:
                return
            self._root_seen = self.halted = True
            if top:  # filled by LIST or DICT, which Python's picklers never write here
                return
            if type(top) is list:
                self.kind = "list"
                self._set_root()
            else:
                self.kind = "container"
                self._root_dict = top
                self._item_type = list
        elif self._root_dict is not None and type(top) is list and not top:
            outer = self.meta[0] if self.meta else stack[:1]
            if (
                len(self.meta) <= 1
                and len(stack) > 1
                and type(stack[-2]) is str
                and stack[-2] == TRACES_KEY
                and len(outer) == 1
                and outer[0] is self._root_dict
                and len(stack) % 2 == (0 if self.meta else 1)
            ):
                self._set_root()

    def _set_root(self) -> None:
        self._root_depth = len(self.meta)
        self._root_index = len(self.stack) - 1
        self.stack[-1] = ROOT

    # --- items ----------------------------------------------------------------------------------

    def pushed(self, *, existing: bool = False) -> None:
        above_root = len(self.meta) - self._root_depth
        if self._root_depth < 0:
            if not existing:
                self._look_for_root()
            return
        stack = self.stack
        if above_root == 1:
            first = 0 if self.meta[-1][-1] is ROOT else len(stack)
        elif above_root == 0:
            first = self._root_index + 1
        else:
            return
        # Only items lie below an item; a dict above a key is a value inside an item.
        lower = len(stack) - 2
        if lower < first or (lower > first and stack[lower - 1] is not EMITTED):
            return
        item = stack[lower]
        if type(item) is self._item_type:
            if lower - first > self.limits.max_portion_items:
                self.exceed("items in one portion of the list", "max_portion_items")
            top = stack[-1]
            stack[lower] = EMITTED
            self._complete(item)
            if existing:
                # The same object twice in the list: returned again, but never changed again.
                self._frozen[id(top)] = top

    def extend(self, values: list[Any]) -> None:
        if self.stack[-1] is not ROOT:
            self._check_frozen()
            super().extend(values)
            return
        for value in values:
            if type(value) is self._item_type:
                self._complete(value)
            elif value is not EMITTED:
                expected = "dicts" if self.kind == "list" else "lists of pairs of arrays"
                contradict(
                    f"item {self.num_items} of the batch is {type_name(value)}; "
                    f"a batch is a list of {expected}"
                )

    def _complete(self, item: Any) -> None:
        if self.num_pending:
            raise self.unfinished()
        self.check(item)
        self.end_item()
        self.ready.append(item)
        self.halted = True

    def check(self, item: Any) -> None:
        self._unfolded_nbytes += check_item(item, self.limits)
        limits, read_nbytes = self.limits, self.source.inflated_bytes
        if self.storages is not None:
            read_nbytes += self.storages.nbytes
        most = limits.max_unfolded_ratio * read_nbytes + limits.unfolded_grace_nbytes
        if self._unfolded_nbytes > most:
            # They share memory here, but written to a file they would fill a disk.
            reject(
                f"{read_nbytes:,} bytes of pickle unfold to more than {most:,}, as the same arrays "
                "are used again and again; if the file is trusted, raise "
                "PickleLimits(max_unfolded_ratio=...)"
            )

    def end_item(self) -> None:
        """Drop what belongs to the item and keep what later items may refer to."""
        if self.needed is None:
            self._keep_small()
        else:
            self._keep_needed(self.needed)
        self.memo = {}
        self._frozen.clear()
        self.num_items += 1
        self.num_opcodes = self.read_nbytes = self.created_nbytes = 0

    def _keep_small(self) -> None:
        kept = self.kept
        for slot, value in self.memo.items():
            if _is_small(value):
                kept[slot] = value
        excess = len(kept) - self.limits.max_kept_entries
        if excess > 0:
            # Drop the oldest, which a scan can restore; names last, since all arrays need them.
            excess += self.limits.max_kept_entries // 10
            oldest = sorted(kept, key=lambda slot: (isinstance(kept[slot], Shim), slot))
            for slot in oldest[:excess]:
                del kept[slot]

    def _keep_needed(self, needed: Mapping[int, int]) -> None:
        for slot, value in self.memo.items():
            last = needed.get(slot, -1)
            if last > self.num_items:
                self.kept[slot] = value
                self._expiring[last].append(slot)
                self._kept_nbytes += self._nbytes(value)
        if self._kept_nbytes > self.limits.max_kept_nbytes:
            self.exceed("bytes shared between items", "max_kept_nbytes")
        for slot in self._expiring.pop(self.num_items, ()):
            self._kept_nbytes -= self._nbytes(self.kept.pop(slot))

    def _nbytes(self, value: Any) -> int:
        if type(value) in _CONTAINERS:
            return check_item(value, self.limits)
        return value.nbytes if type(value) is Storage else _leaf_nbytes(value)

    # --- memo and stack -------------------------------------------------------------------------

    def put(self, slot: int) -> None:
        if self.stack[-1] is EMITTED:
            raise self._touched(EMITTED)
        super().put(slot)

    def recall(self, slot: int) -> Any:
        if slot in self.kept:
            value = self.kept[slot]
            if type(value) in (list, dict):
                self._frozen[id(value)] = value
            return value
        if 0 <= slot < self.next_slot and self.needed is None:
            raise SharedEntryError
        return super().recall(slot)

    def push_again(self, value: Any) -> None:
        if type(value) is Marker:
            raise self._touched(value)
        super().push_again(value)

    def drop(self, value: Any) -> None:
        if type(value) is Marker:
            raise self._touched(value)

    def set_items(self, flat: list[Any]) -> None:
        self._check_frozen()
        super().set_items(flat)

    def _check_frozen(self) -> None:
        if id(self.stack[-1]) in self._frozen:
            reject("an item that was complete is changed afterwards, which no pickler does")

    def _touched(self, marker: Marker) -> RejectedError:
        message = f"the pickle uses the {marker.what} as a value, which no pickler of a batch does"
        return RejectedError(message)


class Scanner(BatchMachine):
    """Finds the memo entries that items share; skips payloads and builds almost nothing.

    Attributes
    ----------
    shared
        Slot -> the last item that reads it, for slots that were written by an earlier item.
    """

    def __init__(self, source: Source, limits: PickleLimits) -> None:
        super().__init__(source, limits)
        self.shared: dict[int, int] = {}
        # Slots are numbered in order: those below an item's first belong to earlier items.
        self._first_slot = 0
        # Per slot: a dict (1), a list (2) or anything else (0), as ends of items depend on it.
        self._kinds = bytearray()

    def end_item(self) -> None:
        super().end_item()
        self._first_slot = self.next_slot

    def put(self, slot: int) -> None:
        super().put(slot)
        kind = type(self.stack[-1])
        code = 1 if kind is dict else 2 if kind is list else 0
        if slot >= _MAX_SLOTS:
            reject(f"the batch has more than {_MAX_SLOTS:,} memo entries and shares some of them")
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
        """Do nothing: the items are empty."""

    def extend(self, values: list[Any]) -> None:
        if self.stack[-1] is ROOT:
            super().extend(values)

    def set_items(self, flat: list[Any]) -> None:
        """Do nothing: only the number of items matters."""

    def find(self, module: Any, name: Any) -> Any:
        return STALE if STALE in (module, name) else super().find(module, name)

    def persistent(self, value: Any) -> Any:
        return STALE if self.storages is not None else super().persistent(value)

    def call(self, function: Any, args: Any) -> None:
        if type(function) is Shim and function.name == "collections.OrderedDict":
            super().call(function, args)
        else:
            self.stack.append(STALE)

    def build(self, state: Any) -> None:
        """Do nothing: the value stays what it is."""
