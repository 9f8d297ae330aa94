"""The machine that returns the items of a batch while its pickle is still being read.

A pickler pushes the items of a list on the stack, one after the other, and then writes APPENDS. So
an item is complete as soon as the next one lies directly above it, or at the APPENDS. The item is
then returned, a marker takes its place, and its memo entries are dropped, except small values that
items may share. If a later item needs a dropped entry, `SharedEntryError` makes the caller look for
the last use of every entry (`h5traces.sources.pickle.scan`) and start again.

The outer container may be a list, a tuple or a dict. Of a dict, the items are its values; of a
value that is a list, the elements of that list.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import numpy as np

from h5traces.format.values import TorchValue
from h5traces.sources.pickle.calls import Marker, Shim, plain_value, type_name
from h5traces.sources.pickle.machine import Machine
from h5traces.sources.pickle.plain import DICTS, NAMESPACES
from h5traces.sources.pickle.shims import MlDtype, Storage
from h5traces.sources.pickle.source import contradict, reject
from h5traces.sources.pickle.stack import COMPOUND
from h5traces.sources.pickle.trees import (
    KNOWN_LEAVES,
    SPARE_VALUES,
    check_item,
    has_children,
    leaf_nbytes,
    spare_nbytes,
    touched,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.sources.pickle.source import PickleLimits, Source


SMALL_TEXT: Final = 256
SMALL_BYTES: Final = 64
_SMALL_INT: Final = 1 << 64
# Of arrays, lists and dicts that later items may refer to, all together.
_ALL_SPARE_NBYTES: Final = 16 << 20
# A container begins within this many bytes.
_HEAD_NBYTES: Final = 64 << 10
# Picklers name the callables and dtypes of arrays in the first item only.
_SHARED: Final = (Shim, np.dtype, MlDtype)

ROOT: Final = Marker("root list")
EMITTED: Final = Marker("item that was handed out")

_MUTABLE: Final = frozenset({list, deque, set, *DICTS, *NAMESPACES})
# Objects that several items may share.
_SPARE: Final = frozenset({str, tuple, *_MUTABLE, np.ndarray, TorchValue})
# What the items of a dict may be, and thus when one ends. A pickler writes the parts of a tuple as
# if they were items, so where that was taken for granted in error, less is.
ITEM_TYPES: Final[tuple[frozenset[Any], ...]] = (
    COMPOUND,
    frozenset({list, tuple, *DICTS}),
    frozenset(),
)


class Found(NamedTuple):
    """An item, and the list or entry of the outer dict that it came from.

    Attributes
    ----------
    key
        Of the outer dict; None if the outer container is a list or a tuple.
    value
        The item.
    is_element
        Of the list under that key; else it is the entry's value.
    """

    key: Any
    value: Any
    is_element: bool = True


class SharedEntryError(Exception):
    """An item refers to a memo entry that was dropped with an earlier item."""


class ShortTupleError(Exception):
    """The pickle is a tuple of two or three dicts, which begins as a dict does."""


class NoDictsError(Exception):
    """The pickle is a list whose first item is not a dict, but an array or a list."""


class TooLargeError(Exception):
    """A pickle of unknown content is larger than what may be read into memory."""


def _is_small(value: Any) -> bool:
    kind = type(value)
    if kind is str:
        return len(value) <= SMALL_TEXT
    if kind is bytes:
        return len(value) <= SMALL_BYTES
    if kind is int:
        return bool(-_SMALL_INT < value < _SMALL_INT)
    return kind in (type(None), float) or value is ROOT or isinstance(value, _SHARED)


def _is_key(value: Any) -> bool:
    return type(value) in (str, int)


class BatchMachine(Machine):
    """Reads a batch: call `advance` until it returns False, and `take` the item each time.

    Parameters
    ----------
    last_reads
        Position after the last read of each memo slot, as `scan.last_reads` finds them. By
        default small values are kept, and reading another one raises `SharedEntryError`.
    whole_nbytes
        Read a pickle that is not a list into memory as a whole, and raise `TooLargeError` where it
        takes more than this; None streams it.
    item_types
        One of `ITEM_TYPES`.

    Attributes
    ----------
    kind
        ``list``, ``tuple`` or ``dict``: the outer container; None if the pickle is none of them, or
        not known yet.
    num_items
        Items of all pickles.
    columns
        Per key of the outer dict whose value is a list, the number of its elements so far.
    is_list_whole
        Whether a list is read as a whole, too, as its items are not dicts.
    """

    is_list_whole = False

    def __init__(
        self,
        source: Source,
        limits: PickleLimits,
        *,
        last_reads: NDArray[np.int64] | None = None,
        whole_nbytes: int | None = None,
        item_types: frozenset[type] = ITEM_TYPES[0],
    ) -> None:
        super().__init__(source, limits)
        self.num_items = 0
        self._last_reads = last_reads
        self._whole_nbytes = whole_nbytes
        self._item_types = item_types
        self._unfolded_nbytes = 0
        self._begin()

    def _begin(self) -> None:
        self.kind: str | None = None
        self.is_whole = False
        self.ready: deque[Found] = deque()
        self.columns: dict[Any, int] = {}
        self.kept: dict[int, Any] = {}
        self._kept_nbytes = 0
        # Slots that are kept until a position, the first to be dropped first.
        self._expiring: list[tuple[int, int]] = []
        # Further small values with their bytes, the least recently used first.
        self._spare: OrderedDict[int, tuple[Any, int]] = OrderedDict()
        self._spare_nbytes = 0
        # Values of earlier items that this one refers to, by id; kept, so ids stay unique.
        self._frozen: dict[int, Any] = {}
        self._root_dict: Any = None
        self._root_depth = -1
        self._root_index = 0
        self._root_seen = False
        self._key: Any = None

    def outermost(self) -> str:
        """What the pickle begins with, in words."""
        stack = self.meta[0] if self.meta else self.stack
        return type_name(stack[0]) if stack else "a value"

    def next_pickle(self, whole_nbytes: int) -> None:
        """Go on with the pickle that follows in the source."""
        self.reset()
        self._whole_nbytes = whole_nbytes
        self._begin()

    def advance(self) -> bool:
        """Read until an item is ready; False if there are no more."""
        while not self.ready:
            if self.run():
                return False
        return True

    def take(self) -> Found:
        """The item that is ready; the machine keeps no reference to it, unless it is small."""
        return self.ready.popleft()

    def find_root(self) -> None:
        """Read until `kind` is decided; to the end where the pickle is not a container."""
        while not self._root_seen and not self.run():
            pass

    def exceed(self, what: str, name: str) -> NoReturn:
        if self.is_whole and self._whole_nbytes is not None:
            raise TooLargeError
        super().exceed(what, name)

    def count_payload(self, num_bytes: int) -> None:
        super().count_payload(num_bytes)
        is_unknown = self.is_whole or self.kind is None
        if is_unknown and self._whole_nbytes is not None:
            least = 0 if self.is_whole else _HEAD_NBYTES
            if self.read_nbytes > max(self._whole_nbytes, least):
                raise TooLargeError

    # --- the outer container --------------------------------------------------------------------

    def _look_for_root(self) -> None:
        stack, top = self.stack, self.stack[-1]
        if len(self.meta) == 1 and not self.meta[0] and len(stack) == 1 and type(top) in DICTS:
            self.kind = "tuple"
            self._root_depth = 0
            self._root_seen = self.halted = True
            return
        if self.meta or len(stack) != 1 or (type(top) is not list and type(top) not in DICTS):
            return
        self._root_seen = self.halted = True
        if top:  # filled by LIST or DICT, which Python's picklers never write here
            self.is_whole = True
        elif type(top) is list:
            self.kind = "list"
            if self.is_list_whole:
                self.is_whole = True
            else:
                self._set_root()
        else:
            self.kind = "dict"
            self._root_dict = top
            self.is_whole = self._whole_nbytes is not None

    def _set_root(self, key: Any = None) -> None:
        self._root_depth = len(self.meta)
        self._root_index = len(self.stack) - 1
        self.stack[-1] = ROOT
        self._key = key
        if self.kind == "dict":
            self.columns[key] = 0

    def _is_entry(self) -> bool:
        """Whether the top of the stack is where values of the outer dict lie."""
        stack = self.stack
        if not self.meta:  # the only entry, or one after the other
            return len(stack) == 3 and stack[0] is self._root_dict and _is_key(stack[1])
        position = len(stack) - 1
        if len(self.meta) > 1 or len(self.meta[0]) != 1 or self.meta[0][0] is not self._root_dict:
            return False
        # A dict of one entry is written without a mark: its key and value lie above it.
        is_inner = position >= 3 and type(stack[position - 2]) in DICTS and not stack[position - 2]
        return position % 2 == 1 and _is_key(stack[position - 1]) and not is_inner

    def _entry_pushed(self, *, existing: bool) -> None:
        stack = self.stack
        lower = len(stack) - 3
        if self.meta and lower >= 0 and type(stack[lower]) in _MUTABLE:
            found = Found(stack[lower - 1], stack[lower], is_element=False)
            self._emit(lower, found, existing=existing)
        if not existing and type(stack[-1]) is list:
            self._set_root(stack[-2])

    # --- items ----------------------------------------------------------------------------------

    def pushed(self, *, existing: bool = False) -> None:
        depth = len(self.meta)
        # Most values lie deeper than items do.
        if self.is_whole or (depth > 1 and depth - self._root_depth > 1 and self._root_seen):
            return
        if not self._root_seen:
            self._look_for_root()
            return
        if self._root_dict is not None and len(self.meta) <= 1 and self._is_entry():
            self._entry_pushed(existing=existing)
            return
        first = self._first_element()
        # Only items lie below an item; a dict above a key is a value inside an item.
        lower = len(self.stack) - 2
        if first is None or lower < first:
            return
        if lower > first and self.stack[lower - 1] is not EMITTED:
            return
        item, top = self.stack[lower], self.stack[-1]
        if self._is_complete(item, top):
            if lower - first > self.limits.max_portion_items:
                self.exceed("items in one portion of the list", "max_portion_items")
            self._emit(lower, Found(self._key, item), existing=existing)

    def _first_element(self) -> int | None:
        """Where the elements of the current list begin on the stack, if they lie there."""
        above_root = len(self.meta) - self._root_depth
        if self._root_depth < 0 or above_root not in (0, 1):
            return None
        if self.kind == "tuple":
            return 0 if above_root == 1 else None
        if above_root == 0:
            return self._root_index + 1
        # Of a list that closed, nothing is an element any more.
        return 0 if self.meta[-1] and self.meta[-1][-1] is ROOT else len(self.stack)

    def _is_complete(self, item: Any, top: Any) -> bool:
        """Whether an item ends where `top` lies above it."""
        kind = type(item)
        if self.kind != "dict":
            # The state of an object lies above it, too.
            return kind in DICTS and type(top) in _MUTABLE and id(item) not in self._unbuilt
        if kind not in self._item_types:
            return False
        # A new list or dict ends whatever lies below; an array is a part of a tuple, or the next.
        return type(top) in _MUTABLE or type(top) is kind

    def _emit(self, index: int, found: Found, *, existing: bool) -> None:
        self.stack[index] = EMITTED
        self._complete(found)
        top = self.stack[-1]
        if existing and type(top) in _MUTABLE:
            # The same object twice in the list: returned again, but never changed again.
            self._frozen[id(top)] = top

    def extend(self, values: list[Any]) -> None:
        if self.stack[-1] is not ROOT:
            self._check_frozen()
            super().extend(values)
            return
        for value in values:
            if value is not EMITTED:
                self._complete(Found(self._key, value))

    def set_items(self, flat: list[Any]) -> None:
        self._check_frozen()
        if self._root_dict is None or self.stack[-1] is not self._root_dict or self.is_whole:
            super().set_items(flat)
            return
        if len(flat) % 2:
            reject("items are set from an odd number of values")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if value is not EMITTED and value is not ROOT:
                self.check_keys([key], "a key of a dict")
                self._complete(Found(key, plain_value(value), is_element=False))
        # Elements of its last list are complete.
        self._root_depth = -1

    def add_items(self, values: list[Any]) -> None:
        self._check_frozen()
        super().add_items(values)

    def build(self, state: Any) -> None:
        self._check_frozen()
        super().build(state)

    def finish(self) -> bool:
        """Check what the pickle was, at its end; True where items of a tuple are left."""
        found = self.result
        expected: Any = {"list": ROOT, "dict": self._root_dict}.get(self.kind or "")
        if self.kind == "tuple" and type(found) is tuple:
            self.result = expected = None
            for value in found:
                if value is not EMITTED:
                    self._complete(Found(None, value))
            found = None
        if self.kind == "dict" and type(found) is tuple and all(type(e) in DICTS for e in found):
            raise ShortTupleError
        if found is not expected:
            what = "a batch" if type(found) is tuple and found[:1] == (ROOT,) else ""
            described = f"a tuple that starts with {what}" if what else type_name(found)
            contradict(f"found {described}, expected a list of dicts")
        if self.num_pending:
            raise self.unfinished()
        return bool(self.ready)

    def _complete(self, found: Found) -> None:
        if self.num_pending:
            raise self.unfinished()
        if self.kind != "dict" and type(found.value) not in DICTS:
            if type(found.value) is Marker:
                raise touched(found.value)
            if not self.num_items and type(found.value) in COMPOUND:
                raise NoDictsError
            contradict(
                f"item {self.num_items} of the batch is {type_name(found.value)}; a batch is a "
                f"list of dicts"
            )
        self.check(found.value)
        self._objects.pop(id(found.value), None)
        self.end_item()
        self.ready.append(found)
        if found.is_element and self.kind == "dict":
            self.columns[found.key] += 1
        self.halted = True

    def check(self, value: Any) -> None:
        """Check an item, and that all items together do not unfold too far."""
        if has_children(value):
            self._unfolded_nbytes += check_item(value, self.limits)
        elif type(value) in KNOWN_LEAVES:
            self._unfolded_nbytes += leaf_nbytes(value)
        elif type(value) is Marker:
            raise touched(value)
        else:
            reject(f"an item is {type_name(value)}, which no trace holds")
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
        if self._last_reads is None:
            self._keep_small()
        else:
            self._keep_needed(self._last_reads)
        self.memo = {}
        self._frozen.clear()
        self.num_items += 1
        self.num_opcodes = self.read_nbytes = self.created_nbytes = self.num_unsalted = 0

    def _keep_small(self) -> None:
        kept = self.kept
        for slot, value in self.memo.items():
            if type(value) is tuple and (not value or type(value[0]) is int):
                continue  # a shape, or what an array is made of: every array has its own
            if _is_small(value):
                kept[slot] = value
            elif type(value) in _SPARE and (nbytes := spare_nbytes(value)) is not None:
                self._spare[slot] = (value, nbytes)
                self._spare_nbytes += nbytes
        while self._spare_nbytes > _ALL_SPARE_NBYTES or len(self._spare) > SPARE_VALUES:
            self._spare_nbytes -= self._spare.popitem(last=False)[1][1]
        excess = len(kept) - self.limits.max_kept_entries
        if excess > 0:
            # Drop the oldest, which a scan can restore; names last, since all arrays need them.
            excess += self.limits.max_kept_entries // 10
            oldest = sorted(kept, key=lambda slot: (isinstance(kept[slot], Shim), slot))
            for slot in oldest[:excess]:
                del kept[slot]

    def _keep_needed(self, last_reads: NDArray[np.int64]) -> None:
        here = self.source.inflated_bytes
        for slot, value in self.memo.items():
            last = int(last_reads[slot]) if slot < len(last_reads) else 0
            if last > here:
                self.kept[slot] = value
                heapq.heappush(self._expiring, (last, slot))
                self._kept_nbytes += self.nbytes(value)
        if len(self.kept) > self.limits.max_kept_entries:
            self.exceed("values shared between items", "max_kept_entries")
        if self._kept_nbytes > self.limits.max_kept_nbytes:
            self.exceed("bytes shared between items", "max_kept_nbytes")
        while self._expiring and self._expiring[0][0] <= here:
            _, slot = heapq.heappop(self._expiring)
            self._kept_nbytes -= self.nbytes(self.kept.pop(slot))

    def nbytes(self, value: Any) -> int:
        """Bytes of a value, counting every use of a shared one."""
        if has_children(value):
            return check_item(value, self.limits)
        return value.nbytes if type(value) is Storage else leaf_nbytes(value)

    # --- memo and stack -------------------------------------------------------------------------

    def put(self, slot: int) -> None:
        if self.stack[-1] is EMITTED:
            raise touched(EMITTED)
        super().put(slot)

    def recall(self, slot: int) -> Any:
        value = self.kept.get(slot, EMITTED)
        if value is EMITTED and slot in self._spare:
            value = self._spare[slot][0]
            self._spare.move_to_end(slot)
        if value is not EMITTED:
            if type(value) in _MUTABLE:
                self._frozen[id(value)] = value
            return value
        if 0 <= slot < self.next_slot and self._last_reads is None:
            raise SharedEntryError
        return super().recall(slot)

    def push_again(self, value: Any) -> None:
        if type(value) is Marker:
            raise touched(value)
        super().push_again(value)

    def drop(self, value: Any) -> None:
        if type(value) is Marker:
            raise touched(value)

    def _check_frozen(self) -> None:
        if id(self.stack[-1]) in self._frozen:
            reject("an item that was complete is changed afterwards, which no pickler does")
