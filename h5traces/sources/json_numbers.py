"""Objects of JSON whose lists of numbers become arrays, without an object for every number."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.sources.arrays import narrowed
from h5traces.sources.rows import DECODER, without_repeats

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Numbers are parsed in parts of this many characters: as Python's, each takes 32 bytes.
_PART: Final = 1 << 16
_BEGIN: Final = re.compile(r"[ \t\r\n]*\{[ \t\r\n]*")
_COLON: Final = re.compile(r"[ \t\r\n]*:[ \t\r\n]*")
_AFTER: Final = re.compile(r"[ \t\r\n]*(?:,[ \t\r\n]*|(\})[ \t\r\n]*\Z)")
_OPENING: Final = re.compile(r"(?:\[[ \t\r\n]*)+")
_CLOSING: Final = re.compile(r"((?:\][ \t\r\n]*)+)(?:,[ \t\r\n]*((?:\[[ \t\r\n]*)+))?")


def parse_with_arrays(text: str) -> Any:
    """What a text of JSON holds, where lists of numbers in an object are arrays.

    They are those of `h5traces.sources.arrays.as_array`; what it keeps as lists may stay lists.

    Raises
    ------
    ValueError
        It is not JSON, or an object has a name twice.
    """
    pairs: list[tuple[str, Any]] = []
    begin = _BEGIN.match(text)
    place = len(text) if begin is None else begin.end()
    while text.startswith('"', place):
        name, place = DECODER.raw_decode(text, place)
        colon = _COLON.match(text, place)
        if colon is None:
            break
        value, place = _numbers(text, colon.end()) or DECODER.raw_decode(text, colon.end())
        pairs.append((name, value))
        after = _AFTER.match(text, place)
        if after is None:
            break
        if after[1]:
            return without_repeats(pairs)
        place = after.end()
    # No object, or no JSON: the error names the place.
    return DECODER.decode(text)


def _numbers(text: str, start: int) -> tuple[Any, int] | None:
    """The array that begins at `start`, and where it ends; None if it is not a regular one."""
    opening = _OPENING.match(text, start)
    if opening is None:
        return None
    depth, place = opening[0].count("["), opening.end()
    parts: list[NDArray[Any]] = []
    widths, closed = set(), []
    while True:
        end = text.find("]", place)
        row = None if end < 0 else _row(text, place, end)
        closing = _CLOSING.match(text, end)
        if row is None or closing is None:
            return None
        parts += row
        widths.add(sum(map(len, row)))
        closed.append(closing[1].count("]"))
        if closed[-1] == depth:
            break
        if closing[2] is None or closing[2].count("[") != closed[-1]:
            return None
        place = closing.end()
    shape = _shape(np.array(closed), depth)
    if shape is None or len(widths) > 1:
        return None
    return narrowed(_joined(parts)).reshape(*shape, *widths), closing.end(1)


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """One array of them; the parts are released one by one."""
    found = np.empty(sum(map(len, parts)), np.result_type(*{each.dtype for each in parts}))
    end = len(found)
    while parts:
        part = parts.pop()
        found[end - len(part) : end] = part
        end -= len(part)
    return found


def _row(text: str, place: int, end: int) -> list[NDArray[Any]] | None:
    """Numbers between brackets, in parts; None if they are anything else."""
    found = []
    while place <= end:
        comma = text.find(",", place + _PART, end)
        upto = end if comma < 0 else comma
        try:
            part = np.asarray(json.loads(f"[{text[place:upto]}]"))
        except (ValueError, OverflowError):
            return None
        if part.ndim != 1 or not part.size or part.dtype.kind not in "bif":
            return None
        found.append(narrowed(part))
        place = upto + 1
    return found


def _shape(closed: NDArray[Any], depth: int) -> list[int] | None:
    """Lengths of all axes but the last, as `closed` brackets after each row tell them.

    None if they are not the same everywhere.
    """
    shape: list[int] = []
    period, expected = 1, np.ones(len(closed), int)
    for more in range(2, depth + 1):
        ends = int(np.argmax(closed >= more)) + 1
        if ends % period:
            return None
        shape.insert(0, ends // period)
        period = ends
        expected[period - 1 :: period] += 1
    return shape if np.array_equal(expected, closed) else None
