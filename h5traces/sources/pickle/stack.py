"""What a pickle has built so far: its stack and its memo, within the limits of its reader."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol

import numpy as np

from h5traces.format.values import TorchValue
from h5traces.sources.pickle.calls import (
    Pending,
    Unsupported,
    is_small_int,
    plain_value,
    type_name,
)
from h5traces.sources.pickle.plain import DICTS, MAX_UNSALTED, check_hashable
from h5traces.sources.pickle.source import MalformedError, RejectedError, reject

if TYPE_CHECKING:
    from collections.abc import Iterable

    from h5traces.sources.pickle.source import PickleLimits, Source

# What an element of a batch may be, and what holds elements.
COMPOUND: Final = frozenset({list, tuple, *DICTS, np.ndarray, TorchValue})
_MISSING: Final = object()


class Storages(Protocol):
    """The storages of a file of torch.save, which its pickle refers to."""

    # Bytes of all of them in the file.
    nbytes: int

    def find(self, persistent_id: Any) -> Any:
        """The storage that a persistent id names."""


class Stack:
    """The values of a pickle that is read, and how much of its limits it has used.

    Attributes
    ----------
    stack, meta
        The values since the innermost mark, and one list per enclosing mark, so that no pop
        reaches below a mark.
    memo
        Memo slots; a dict, so that a slot number alone allocates nothing.
    """

    # Where tensors lie that are outside of the pickle, as in files of torch.save.
    storages: Storages | None = None

    def __init__(self, source: Source, limits: PickleLimits) -> None:
        self.source = source
        self.limits = limits
        self.reset()

    def reset(self) -> None:
        """Forget everything but the position in the source."""
        self.stack: list[Any] = []
        self.meta: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.next_slot = 0
        self.num_opcodes = 0
        self.num_pending = 0
        self.num_unsalted = 0
        self.read_nbytes = 0
        self.created_nbytes = 0
        self.opcode = -1
        self.halted = False
        self.stopped = False
        # Whether bytes lie between the opcodes.
        self.has_raw = False
        self.skips_unknown = False
        # Dicts that stand for objects, by id; kept, so ids stay unique.
        self._objects: dict[int, dict[Any, Any]] = {}
        self._unbuilt: set[int] = set()
        # Names of such dicts whose values were left out, in their order.
        self.left_out: dict[str, None] = {}
        self.result: Any = None

    # --- limits ---------------------------------------------------------------------------------

    def exceed(self, what: str, name: str) -> NoReturn:
        """Reject the pickle because of that limit."""
        value = getattr(self.limits, name)
        reject(
            f"more than {value:,} {what}; if the file is trusted, raise PickleLimits({name}=...)"
        )

    def unfinished(self) -> RejectedError:
        message = "an array or dtype was used without the state that completes it"
        return RejectedError(message)

    def count_payload(self, num_bytes: int) -> None:
        """Account for bytes that are about to be read."""
        self.read_nbytes += num_bytes
        if self.read_nbytes > self.limits.max_item_nbytes:
            self.exceed("bytes in one item", "max_item_nbytes")

    def charge(self, num_bytes: int) -> None:
        """Account for bytes that a shim is about to create."""
        self.created_nbytes += num_bytes
        limits = self.limits
        outside_nbytes = 0 if self.storages is None else self.storages.nbytes
        read_nbytes = self.read_nbytes + outside_nbytes
        allowed = limits.max_created_ratio * read_nbytes + limits.max_created_nbytes
        if self.created_nbytes > allowed:
            reject(
                f"copies of {self.created_nbytes:,} bytes would be made of {read_nbytes:,} "
                f"that were read; if the file is trusted, raise "
                f"PickleLimits(max_created_nbytes=...)"
            )

    # --- arguments ------------------------------------------------------------------------------

    def number(self, num_bytes: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.source.read(num_bytes), "little", signed=signed)

    def take_bytes(self, num_bytes: int) -> Any:
        self._count_object(num_bytes)
        return self.source.read(num_bytes)

    def take_buffer(self, num_bytes: int) -> Any:
        self._count_object(num_bytes)
        return self.source.read_buffer(num_bytes)

    def _count_object(self, num_bytes: int) -> None:
        if num_bytes > self.limits.max_payload_nbytes:
            self.exceed("bytes in one object", "max_payload_nbytes")
        self.count_payload(num_bytes)

    def take_text(self, num_bytes: int) -> Any:
        if num_bytes > self.limits.max_string_nbytes:
            self.exceed("bytes in one string", "max_string_nbytes")
        self.count_payload(num_bytes)
        return str(self.source.read(num_bytes), "utf-8", "surrogatepass")

    def ascii(self, data: Any) -> Any:
        """The text of a Python 2 string."""
        try:
            return data.decode("ascii")
        except UnicodeDecodeError:
            message = "a Python 2 string holds bytes; load and dump the batch once with Python 3"
            raise MalformedError(message) from None

    # --- memo -----------------------------------------------------------------------------------

    def put(self, slot: int) -> None:
        # Picklers number the slots 0, 1, 2, ... (Python 2's cPickle from 1). Other numbers would
        # escape the limits per item.
        if not 0 <= slot <= self.next_slot and not (slot == 1 and self.next_slot == 0):
            reject(f"memo slot {slot:,} is written and {self.next_slot:,} is the next: memo bomb")
        if len(self.memo) >= self.limits.max_item_memo:
            self.exceed("memo entries in one item", "max_item_memo")
        self.next_slot = max(self.next_slot, slot + 1)
        value = self.stack[-1]
        if type(value) is Pending:
            value.slots.append(slot)
        self.memo[slot] = value

    def get(self, slot: int) -> None:
        value = self.memo.get(slot, _MISSING)
        if value is _MISSING:
            value = self.recall(slot)
        self.push_again(value)

    def push_again(self, value: Any) -> None:
        if type(value) is Pending:
            raise self.unfinished()
        self.stack.append(value)
        if type(value) in COMPOUND:
            self.pushed(existing=True)

    def recall(self, slot: int) -> Any:
        """A slot that is not in the memo."""
        reject(f"memo slot {slot:,} is read and was never written")

    # --- stack ----------------------------------------------------------------------------------

    def pop_mark(self) -> list[Any]:
        if not self.meta:
            reject("it needs a mark and there is none")
        items = self.stack
        self.stack = self.meta.pop()
        return items

    def pushed(self, *, existing: bool = False) -> None:
        """Called after a value of `COMPOUND` was pushed; `existing` is complete already."""

    def drop(self, value: Any) -> None:
        """Called for a value that is popped and dropped."""

    def extend(self, values: list[Any]) -> None:
        """Append values to the list on top of the stack."""
        target = self.stack[-1]
        if type(target) is Unsupported:
            return
        if type(target) is not list and type(target) is not deque:
            reject(f"values are appended to {type_name(target)}, expected a list")
        target.extend(values)

    def set_items(self, flat: list[Any]) -> None:
        """Set keys and values, which alternate, in the dict on top of the stack."""
        target = self.stack[-1]
        if type(target) is Unsupported:
            return
        if type(target) not in DICTS:
            reject(f"items are set in {type_name(target)}, expected a dict")
        if len(flat) % 2:
            reject("items are set from an odd number of values")
        flat[1::2] = map(plain_value, flat[1::2])
        if id(target) in self._objects:
            pairs = zip(flat[::2], flat[1::2], strict=True)
            kept = []
            for key, value in pairs:
                if type(value) is Unsupported:
                    self.left_out[str(key)[:80]] = None
                else:
                    kept += [key, value]
            flat = kept
        keys = flat[::2]
        for key in keys:
            if type(key) is not str and not is_small_int(key):
                self.check_keys(keys, "a key of a dict")
                break
        if type(target) is dict:
            target.update(zip(keys, flat[1::2], strict=True))
        else:  # `update` of a Counter counts
            for key, value in zip(keys, flat[1::2], strict=True):
                target[key] = value

    def add_items(self, values: list[Any]) -> None:
        """Add values to the set on top of the stack."""
        target = self.stack[-1]
        if type(target) is Unsupported:
            return
        if type(target) is not set:
            reject(f"values are added to {type_name(target)}, expected a set")
        self.check_keys(values, "an element of a set")
        target.update(values)

    def check_keys(self, values: Iterable[Any], what: str) -> None:
        """Reject values that cannot be hashed in bounded time."""
        self.num_unsalted += check_hashable(values, what)
        if self.num_unsalted > MAX_UNSALTED:
            reject(
                f"an item has more than {MAX_UNSALTED:,} tuples, fractions or dates as keys or in "
                f"sets, whose hashes may collide"
            )

    def begin_object(self, items: dict[Any, Any]) -> None:
        """Take this dict for an object: it gets plain values only, and no state."""
        self._objects[id(items)] = items
        self._unbuilt.add(id(items))

    def is_object(self, value: Any) -> bool:
        """Whether a dict stands for an object, such as an output of a model."""
        return id(value) in self._objects
