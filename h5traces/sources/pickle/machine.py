"""A pickle machine of our own: every opcode of protocols 0 to 5, none of pickle's powers.

It builds None, bool, int, float, str, bytes, bytearray, list, tuple and dict, and calls the shims
of `sources.pickle.shims`. Nothing is imported, no attribute is looked up, no instance gets a state
that a shim did not check. `Machine` reads one pickle into memory and is the base of the
streaming machines in `h5traces.sources.pickle.items`.
"""

from __future__ import annotations

import struct
from pickletools import opcodes as described_opcodes
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from h5traces.errors import ConversionError, UnsafePickleError
from h5traces.sources.pickle.opcodes import TABLE
from h5traces.sources.pickle.shims import NUMPY_NAMES, Pending, Shim, type_name
from h5traces.sources.pickle.source import (
    MalformedError,
    MemorySource,
    RefusedError,
    Source,
    TruncatedError,
)
from h5traces.sources.pickle.torch_shims import (
    STORAGE_NAMES,
    TORCH_NAMES,
    StorageHeader,
    parse_persistent_id,
    read_storage,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from h5traces.sources.pickle.limits import PickleLimits

_MAX_KEY = 1 << 63
_MISSING = object()
_OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in described_opcodes}

NAMES: Mapping[tuple[str, str], Shim] = {**NUMPY_NAMES, **TORCH_NAMES}


class Machine:
    """Runs the opcodes of one pickle after the other from a source.

    Attributes
    ----------
    stack, meta
        The values since the innermost mark, and one list per enclosing mark: a pop can never
        reach below a mark.
    memo
        Memo slots; a dict, so that a slot number alone allocates nothing.
    """

    names: ClassVar[Mapping[tuple[str, str], Shim]] = NAMES

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
        self.read_nbytes = 0
        self.created_nbytes = 0
        self.opcode = -1
        self.halted = False
        self.stopped = False
        self.result: Any = None

    def run(self) -> bool:
        """Execute opcodes until the pickle stops or something sets ``halted``; True if stopped."""
        read = self.source.file.read
        limit = self.limits.max_item_opcodes
        self.halted = self.stopped
        while not self.halted:
            code = read(1)
            if not code:
                message = "the pickle has no end (no STOP opcode)"
                raise TruncatedError(message)
            self.opcode = code[0]
            self.num_opcodes += 1
            if self.num_opcodes > limit:
                self.exceed("opcodes in one item", "max_item_opcodes")
            TABLE[self.opcode](self)
        return self.stopped

    def load(self) -> Any:
        """The value of one whole pickle."""
        self.reset()
        self.run()
        if self.num_pending:
            raise self.unfinished()
        return self.result

    # --- limits ---------------------------------------------------------------------------------

    def exceed(self, what: str, name: str) -> NoReturn:
        """Refuse the pickle because of that limit."""
        value = getattr(self.limits, name)
        message = (
            f"more than {value:,} {what}; if the file is trusted, raise PickleLimits({name}=...)"
        )
        raise RefusedError(message)

    def unfinished(self) -> RefusedError:
        message = "an array or dtype was used without the state that completes it"
        return RefusedError(message)

    def count_payload(self, num_bytes: int) -> None:
        """Account for bytes that are about to be read."""
        self.read_nbytes += num_bytes
        if self.read_nbytes > self.limits.max_item_nbytes:
            self.exceed("bytes in one item", "max_item_nbytes")

    def charge(self, num_bytes: int) -> None:
        """Account for bytes that a shim is about to create."""
        self.created_nbytes += num_bytes
        limits = self.limits
        allowed = limits.max_created_ratio * self.read_nbytes + limits.max_created_nbytes
        if self.created_nbytes > allowed:
            message = (
                f"copies of {self.created_nbytes:,} bytes would be made of {self.read_nbytes:,} "
                f"that were read; if the file is trusted, raise "
                f"PickleLimits(max_created_nbytes=...)"
            )
            raise RefusedError(message)

    # --- arguments ------------------------------------------------------------------------------

    def number(self, num_bytes: int) -> int:
        return int.from_bytes(self.source.read(num_bytes), "little")

    def line(self, max_nbytes: int) -> bytes:
        return self.source.readline(max_nbytes)

    def take_bytes(self, num_bytes: int) -> Any:
        if num_bytes > self.limits.max_payload_nbytes:
            self.exceed("bytes in one object", "max_payload_nbytes")
        self.count_payload(num_bytes)
        return self.source.read(num_bytes)

    def take_buffer(self, num_bytes: int) -> Any:
        if num_bytes > self.limits.max_payload_nbytes:
            self.exceed("bytes in one object", "max_payload_nbytes")
        self.count_payload(num_bytes)
        return self.source.read_buffer(num_bytes)

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
        # Picklers number the slots 0, 1, 2, ... (Python 2's cPickle from 1). Anything else makes
        # slots that no item can be charged for.
        if not 0 <= slot <= self.next_slot and not (slot == 1 and self.next_slot == 0):
            message = f"memo slot {slot:,} is written and {self.next_slot:,} is the next: memo bomb"
            raise RefusedError(message)
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
        if type(value) is dict or type(value) is list:
            self.pushed(existing=True)

    def recall(self, slot: int) -> Any:
        """A slot that is not in the memo."""
        message = f"memo slot {slot:,} is read and was never written"
        raise RefusedError(message)

    # --- stack ----------------------------------------------------------------------------------

    def pop_mark(self) -> list[Any]:
        if not self.meta:
            message = "it needs a mark and there is none"
            raise RefusedError(message)
        items = self.stack
        self.stack = self.meta.pop()
        return items

    def pushed(self, *, existing: bool = False) -> None:
        """Called after a list or dict was pushed; ``existing`` if it is no new one."""

    def drop(self, value: Any) -> None:
        """Called for a value that is popped and not used."""

    def extend(self, target: Any, values: list[Any]) -> None:
        if type(target) is not list:
            message = f"values are appended to {type_name(target)}, expected a list"
            raise RefusedError(message)
        target.extend(values)

    def set_items(self, target: Any, flat: list[Any]) -> None:
        if type(target) is not dict:
            message = f"items are set in {type_name(target)}, expected a dict"
            raise RefusedError(message)
        if len(flat) % 2:
            message = "items are set from an odd number of values"
            raise RefusedError(message)
        keys = flat[::2]
        for key in keys:
            # Ints this small cannot be chosen to collide; str hashes are salted.
            if type(key) is not str and (type(key) is not int or not -_MAX_KEY < key < _MAX_KEY):
                found = "a larger int" if type(key) is int else type_name(key)
                message = f"a dict has {found} as a key, expected str or int below 2**63"
                raise RefusedError(message)
        target.update(zip(keys, flat[1::2], strict=True))

    # --- what shims build -----------------------------------------------------------------------

    def find(self, module: Any, name: Any) -> Shim:
        if type(module) is not str or type(name) is not str:
            message = f"a global is named by {type_name(module)} and {type_name(name)}"
            raise RefusedError(message)
        shim = self.names.get((module, name))
        if shim is None:
            message = (
                f"the pickle asks for {module[:80]!r} {name[:80]!r}, which batches of arrays never "
                f"need; nothing was imported. Convert only files that you trust, and export "
                f"objects of other types as arrays first"
            )
            raise RefusedError(message)
        return shim

    def call(self, function: Any, args: Any) -> None:
        if type(function) is not Shim:
            message = f"{type_name(function)} is called, expected an allowed name"
            raise RefusedError(message)
        if type(args) is not tuple:
            message = f"{function.name} is called with {type_name(args)}, expected a tuple"
            raise RefusedError(message)
        value = function.call(self, args)
        self.stack.append(value)
        if type(value) is Pending:
            self.num_pending += 1
        elif type(value) is dict:
            self.pushed()

    def build(self, target: Any, state: Any) -> None:
        if type(target) is not Pending:
            message = f"a state is given to {type_name(target)}, expected a new array or dtype"
            raise RefusedError(message)
        value = target.build(self, state)
        self.num_pending -= 1
        self.stack[-1] = value
        for slot in target.slots:
            self.memo[slot] = value

    def load_storage(self, data: bytes) -> Any:
        nested = StorageMachine(MemorySource(data), self.limits)
        return nested.read(self)

    def persistent(self, _value: Any) -> Any:
        message = "the pickle refers to objects outside of itself (a persistent id)"
        raise RefusedError(message)


class StorageMachine(Machine):
    """Reads the embedded stream of a torch storage; has no calls, so it cannot nest further."""

    names = STORAGE_NAMES

    def read(self, outer: Machine) -> Any:
        """The storage; its opcodes count as the outer machine's."""

        def load() -> Any:
            value = self.load()
            outer.num_opcodes += self.num_opcodes
            return value

        return read_storage(load, self.source)  # type: ignore[arg-type]

    def persistent(self, value: Any) -> StorageHeader:
        return parse_persistent_id(value)


def locate(
    error: Exception, machine: Machine, where: str, item: int | None = None
) -> ConversionError:
    """The error for the caller: which file, byte, opcode and item."""
    place = f"{where}: byte {machine.source.inflated_bytes:,}"
    place += f" ({name})" if (name := _OPCODE_NAMES.get(machine.opcode)) else ""
    place += f", item {item}" if item is not None else ""
    if isinstance(error, RefusedError):
        return UnsafePickleError(f"{place}: {error}")
    if isinstance(error, MalformedError):
        return ConversionError(f"{place}: {error}")
    if isinstance(error, IndexError):
        return UnsafePickleError(f"{place}: it needs a value and the stack is empty")
    return ConversionError(f"{place}: no valid pickle: {error}")


# What handlers raise on bytes that no pickler writes; all of them end in `locate`.
INVALID = (
    RefusedError,
    MalformedError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    struct.error,
)
