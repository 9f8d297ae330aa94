"""Tables as text: CSV, TSV and JSON Lines, told apart by their content."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import reprlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from h5traces.errors import Problem, SchemaError
from h5traces.format.text import and_more, counted
from h5traces.sources.signatures import identify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

_OBJECT: Final = re.compile(r"\s*\{")
_ARRAY: Final = re.compile(r"\s*\[")
# What 'surrogateescape' makes of UTF-16's byte order marks.
_UTF16: Final = ("\udcff\udcfe", "\udcfe\udcff")
# What 'surrogateescape' makes of a byte that is not UTF-8.
_NOT_UTF8: Final = re.compile("[\udc80-\udcff]")
_SAVE: Final = "save the file as UTF-8 (in spreadsheets: 'CSV UTF-8')"
# Kinds of files, as `identify` names them, that may be tables; and those it knows how to make one.
_TABLES: Final = ("csv", "json", "jsonl", "text", "empty", "unknown")
_REMEDIES: Final = ("office", "zip", "git-lfs", "git-annex", "html", "xml")
_DIGITS: Final = re.compile(r"\s*[+-]?[0-9]+\s*", re.ASCII)
# Characters of a row: a sample of Llama-2-7B's shape has 100 million in JSON.
_LARGEST_ROW: Final = 256 << 20
# Values of a row of JSON, at about 32 bytes of memory each, or 8 in arrays; lists and objects count
# as three. A sample of that shape has 8 million.
_MOST_VALUES: Final = 1 << 24
_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = 40
_SHORT.maxlong = 40


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table.

    Attributes
    ----------
    place
        Where it begins, for messages: ``line 3``; in a JSON array, ``row 2``.
    cells
        Values by column: text in CSV and TSV, anything of JSON otherwise.
    """

    place: str
    cells: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TextTable:
    """A file of rows.

    Attributes
    ----------
    path
        Of the file, for messages.
    format
        ``CSV``, ``CSV with semicolons``, ``TSV``, ``JSON Lines`` or ``JSON``.
    columns
        Of the header, or of the first object.
    rows
        One at a time, once. SchemaError where one is wrong; the message names its line.
    """

    path: Path
    format: str
    columns: tuple[str, ...]
    rows: Iterator[Row]


def text_of(file: BinaryIO) -> io.TextIOWrapper:
    """A file as text, for `read_rows`; closing one closes the other."""
    return io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="\n")


def read_rows(
    path: Path, file: io.TextIOWrapper, parse: Callable[[str], Any] | None = None
) -> TextTable:
    """Read the rows of a file of text in UTF-8; its content decides what it is, not its name.

    JSON Lines where it begins with a brace, a JSON array of objects where it begins with a bracket,
    TSV where its first line has more tabs than commas, else CSV, with semicolons where its first
    line has these and no commas. In CSV and TSV, every row must have as many cells as the header.
    Cells are of any length; no other line separators than those of CSV end a row.

    Parameters
    ----------
    path
        Its name, for messages.
    file
        What `text_of` gives, also of a pipe.
    parse
        Makes values of JSON, by default those of Python; raises ValueError.

    Raises
    ------
    SchemaError
        The file, or its first row, is no such table.
    """
    lines = _lines(path, file)
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip("\r\n"))
    begin, first = next(numbered, (1, ""))
    every = itertools.chain([first], lines)
    if _ARRAY.match(first):
        rows, kind = _array(path, every, parse or DECODER.decode), "JSON"
    elif _OBJECT.match(first):
        rows, kind = _objects(path, every, begin, parse or DECODER.decode), "JSON Lines"
    else:
        return _separated(path, every, begin, _delimiter(first))
    head = list(itertools.islice(rows, 1))
    columns = tuple(head[0].cells) if head else ()
    return TextTable(path, kind, columns, itertools.chain(head, rows))


def _delimiter(header: str) -> str:
    if header.count("\t") > header.count(","):
        return "\t"
    # Spreadsheets write semicolons where the comma is the decimal sign.
    return ";" if ";" in header and "," not in header else ","


def foreign(path: Path) -> str | None:
    """Says what a file is if it is not a table of text; None if it may be one."""
    if not path.is_file():
        return None
    kind = identify(path)
    if kind.compression is None and kind.id in _TABLES:
        return None
    message = f"{path}: is {kind}, expected CSV, TSV or JSON Lines"
    return f"{message}; {kind.remedy}" if kind.id in _REMEDIES else message


def short(value: object) -> str:
    """A cell for messages: its repr, cut in the middle where it is long."""
    return _SHORT.repr(value)


def listed(columns: Iterable[str]) -> str:
    """Names of columns, for messages."""
    return and_more(map(short, columns), 30) or "none"


def no_column(place: str, names: Iterable[str], columns: Iterable[str], separated: str = "") -> str:
    """That columns are missing, with those that there are, and how they are `separated`."""
    missing = " and no column ".join(map(repr, names))
    return f"{place}: has no column {missing}; its columns{separated} are {listed(columns)}"


def bad_row(path: Path, place: str, message: str) -> SchemaError:
    """An error about one row."""
    return SchemaError(f"{path}: {place}: {message}", [Problem(place, message, "bad_row")])


def _lines(path: Path, file: io.TextIOWrapper) -> Iterator[str]:
    """Lines with their ends, each of them UTF-8."""
    every = _bounded(path, file)
    first = next(every, "")
    # Old Macs end lines so. Elsewhere, a carriage return inside a line ends none.
    is_mac = "\r" in first.rstrip("\r\n")
    every = itertools.chain([first], every)
    # A line may be large: none is kept when the next is read.
    del first
    if is_mac:
        every = (line for text in every for line in io.StringIO(text, newline=""))
    number = 0
    while line := next(every, ""):
        number += 1
        wrong = None if line.isascii() else _NOT_UTF8.search(line)
        if wrong is not None:
            other = foreign(path)
            if other is not None:
                raise SchemaError(other)
            if number == 1 and line.startswith(_UTF16):
                message = f"{path}: is not UTF-8 text but UTF-16; {_SAVE}"
                raise SchemaError(message)
            message = f"byte 0x{ord(wrong[0]) - 0xDC00:02x} is not UTF-8 text; {_SAVE}"
            raise bad_row(path, f"line {number}", message)
        yield line
        del line


def _bounded(path: Path, file: io.TextIOWrapper) -> Iterator[str]:
    for number in itertools.count(1):
        line = file.readline(_LARGEST_ROW + 1)
        if not line:
            return
        if len(line) > _LARGEST_ROW:
            raise _too_long(path, f"line {number}")
        yield line
        del line


def _too_long(path: Path, place: str) -> SchemaError:
    message = (
        f"has more than {_LARGEST_ROW:,} characters; write shorter rows, or the table as Parquet"
    )
    return bad_row(path, place, message)


def _separated(path: Path, lines: Iterable[str], begin: int, delimiter: str) -> TextTable:
    csv.field_size_limit(_LARGEST_ROW)
    kind = {"\t": "TSV", ";": "CSV with semicolons"}.get(delimiter, "CSV")
    cells = _cells(path, lines, begin, delimiter, kind)
    _, header = next(cells, ("", []))
    return TextTable(path, kind, tuple(header), _fitting(path, header, cells))


def _cells(
    path: Path, lines: Iterable[str], begin: int, delimiter: str, kind: str
) -> Iterator[tuple[str, list[str]]]:
    """The place and cells of every row, the header first; blank lines are none."""
    length = 0

    def counted_lines() -> Iterator[str]:
        nonlocal length
        for line in lines:
            length += len(line)
            if length > _LARGEST_ROW:
                raise _too_long(path, place)
            yield line

    reader = csv.reader(counted_lines(), delimiter=delimiter, strict=True)
    while True:
        place, length = f"line {begin + reader.line_num}", 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = str(error)
            if what.startswith("new-line character"):
                what = "a cell without quotes holds a carriage return; put it into quotes"
            raise bad_row(path, place, f"is not {kind}: {what}") from error
        if cells:
            yield place, cells


def _fitting(path: Path, header: list[str], rows: Iterable[tuple[str, list[str]]]) -> Iterator[Row]:
    for place, cells in rows:
        if len(cells) != len(header):
            found = and_more(map(short, cells), 8)
            message = (
                f"has {counted(len(cells), 'cell')} ({found}), expected {len(header)} "
                f"({and_more(map(short, header), 8)})"
            )
            pairs = itertools.pairwise(cells)
            if len(cells) > len(header) and any(all(map(_DIGITS.fullmatch, two)) for two in pairs):
                message += "; did a decimal comma split a cell? Write numbers with a point"
            elif len(cells) > len(header):
                message += "; put text with separators into quotes"
            raise bad_row(path, place, message)
        yield Row(place, dict(zip(header, cells, strict=True)))


def _objects(
    path: Path, lines: Iterable[str], begin: int, parse: Callable[[str], Any]
) -> Iterator[Row]:
    number = begin - 1
    for line in lines:
        number += 1
        if line.isspace():
            continue
        place = f"line {number}"
        value = _parsed(path, place, line, parse)
        del line
        yield Row(place, _object(path, place, value))
        del value


def _array(path: Path, lines: Iterable[str], parse: Callable[[str], Any]) -> Iterator[Row]:
    parts, length = [], 0
    for line in lines:
        parts.append(line)
        length += len(line)
        if length > _LARGEST_ROW:
            raise _too_long(path, "content")
    for number, value in enumerate(_parsed(path, "content", "".join(parts), parse), start=1):
        yield Row(f"row {number}", _object(path, f"row {number}", value))


def _parsed(path: Path, place: str, text: str, parse: Callable[[str], Any]) -> Any:
    if text.count(",") + 3 * (text.count("[") + text.count("{")) > _MOST_VALUES:
        message = "holds too many values at once; write shorter rows, or the table as Parquet"
        raise bad_row(path, place, message)
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        raise bad_row(path, place, f"is not JSON: {error}") from error


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError for a name that comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        ((repeated, _),) = Counter(name for name, _ in pairs).most_common(1)
        message = f"an object has {repeated!r} twice"
        raise ValueError(message)
    return found


# Makes what JSON says, with an error for a name that an object has twice.
DECODER: Final = json.JSONDecoder(object_pairs_hook=without_repeats)


def _object(path: Path, place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_row(path, place, f"holds {type(value).__name__}, expected an object")
    return value
