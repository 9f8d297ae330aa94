"""Finds where a pickle reads each memo entry for the last time, without building any value."""

from __future__ import annotations

import pickletools
from typing import TYPE_CHECKING, Final

import numpy as np

from h5traces.sources.pickle.source import TruncatedError, contradict, reject

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.sources.pickle.source import Source

# Eight bytes each; a batch of 15 GB has about a million slots.
_MAX_SLOTS: Final = 1 << 25
_MAX_LINE_NBYTES: Final = 512 << 20
_PREFIXES: Final = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_STOP: Final = ord(".")
_MEMOIZE: Final = 0x94
_PUTS: Final = {ord("q"): 1, ord("r"): 4}
_GETS: Final = {ord("h"): 1, ord("j"): 4}
_TEXT_PUT, _TEXT_GET = ord("p"), ord("g")


def _arguments() -> list[tuple[int, int, int] | None]:
    """Per opcode: bytes of a fixed argument, of a length before a longer one, and lines."""
    table: list[tuple[int, int, int] | None] = [None] * 256
    for opcode in pickletools.opcodes:
        argument = opcode.arg
        if argument is None:
            found = (0, 0, 0)
        elif argument.n == pickletools.UP_TO_NEWLINE:
            found = (0, 0, 2 if "pair" in argument.name else 1)
        elif argument.n < 0:
            found = (0, _PREFIXES[argument.n], 0)
        else:
            found = (argument.n, 0, 0)
        table[ord(opcode.code)] = found
    return table


_ARGUMENTS: Final = _arguments()


def last_reads(source: Source) -> NDArray[np.int64]:
    """For every memo slot of the pickle that begins here, the position after its last read; or 0.

    It reads the pickle up to its STOP.
    """
    found = np.zeros(1024, np.int64)
    next_slot = 0
    read = source.file.read
    while True:
        code = read(1)
        if not code:
            message = "the pickle has no end (no STOP opcode)"
            raise TruncatedError(message)
        opcode = code[0]
        if opcode == _STOP:
            return found
        if opcode == _MEMOIZE:
            next_slot += 1
        elif opcode in _PUTS:
            next_slot = max(next_slot, _number(source, _PUTS[opcode]) + 1)
        elif opcode == _TEXT_PUT:
            next_slot = max(next_slot, _text_number(source) + 1)
        elif opcode in _GETS or opcode == _TEXT_GET:
            slot = _number(source, _GETS[opcode]) if opcode in _GETS else _text_number(source)
            if slot >= next_slot:
                reject(f"memo slot {slot:,} is read and was never written")
            if slot >= len(found):
                grown = np.zeros(max(2 * len(found), slot + 1), np.int64)
                grown[: len(found)] = found
                found = grown
            found[slot] = source.inflated_bytes
        else:
            _skip_argument(source, opcode)
        if next_slot > _MAX_SLOTS:
            reject(f"the batch has more than {_MAX_SLOTS:,} memo entries and shares some of them")


def _skip_argument(source: Source, opcode: int) -> None:
    argument = _ARGUMENTS[opcode]
    if argument is None:
        contradict(f"byte 0x{opcode:02x} is not a pickle opcode")
    fixed, prefix, lines = argument
    if prefix:
        fixed = _number(source, prefix)
    if fixed:
        source.skip(fixed)
    for _ in range(lines):
        source.readline(_MAX_LINE_NBYTES)


def _number(source: Source, num_bytes: int) -> int:
    return int.from_bytes(source.read(num_bytes), "little")


def _text_number(source: Source) -> int:
    line = source.readline(20)
    if not line.isdigit():
        contradict(f"the text of an int is {line[:40]!r}")
    return int(line)
