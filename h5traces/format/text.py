"""Any Python string survives as null-padded UTF-8 of fixed length, by one in-band escape.

HDF5 fixed-length strings lose trailing NULs and hold no lone surrogates. ``escape`` replaces just
those, and its own introducer U+241B (``␛``), with ``␛`` and four hexadecimal digits; all other
text is stored unchanged. ``schema/SPEC.md``, section Text, is normative.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.errors import ConversionError, CorruptArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


INTRODUCER = "\u241b"
MAX_TEXT_NBYTES = 128 << 20
MAX_COLUMN_NBYTES = 1 << 30
_NEEDS_ESCAPE = re.compile(f"[{INTRODUCER}\ud800-\udfff]")
_BLANK = re.compile(r"[\s\x00-\x1f\x7f]+")
# Characters that an excerpt looks at, and that it has.
_LOOKED_AT, _EXCERPT = 1000, 64
# Up to 80 characters, the last of them white space where there is any. No text of a model has more
# lines.
_PIECE = re.compile(r".{1,79}(?:\s|\Z)|.{1,80}", re.DOTALL)
_MOST_LINES = 100_000
_ESCAPED = re.compile(f"{INTRODUCER}([0-9A-F]{{4}})?")


def escape(text: str) -> str:
    """The storable form of `text`: valid UTF-8 that does not end in NUL."""
    escaped = _NEEDS_ESCAPE.sub(lambda found: f"{INTRODUCER}{ord(found[0]):04X}", text)
    if escaped.endswith("\0"):
        escaped = f"{escaped[:-1]}{INTRODUCER}0000"
    return escaped


def unescape(text: str) -> str:
    """The original of `escape`'s result; CorruptArchiveError for a broken escape."""
    if INTRODUCER not in text:
        return text

    def original(found: re.Match[str]) -> str:
        if found[1] is None:
            message = f"text {text!r} holds U+241B without the four hexadecimal digits of an escape"
            raise CorruptArchiveError(message)
        return chr(int(found[1], 16))

    return _ESCAPED.sub(original, text)


def encode(text: str) -> bytes:
    """`text` escaped, as UTF-8."""
    return (text if text.isascii() and text[-1:] != "\0" else escape(text)).encode("utf-8")


def decode(stored: bytes) -> str:
    """The string in the bytes of a fixed-length field, with or without its padding.

    CorruptArchiveError where they are not UTF-8, or hold a broken escape.
    """
    try:
        text = stored.rstrip(b"\0").decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"stored text is not UTF-8: {error}"
        raise CorruptArchiveError(message) from error
    return unescape(text)


def encode_all(texts: Sequence[str]) -> np.ndarray:
    """`texts` as an array ``(len(texts),)`` of dtype ``S<n>``, n at least 1.

    ConversionError where they are longer than archives hold.
    """
    encoded = [encode(text) for text in texts]
    width = max((len(text) for text in encoded), default=1)
    if width > MAX_TEXT_NBYTES or width * len(encoded) > MAX_COLUMN_NBYTES:
        message = (
            f"{len(encoded)} texts, the longest of {width} bytes, take {width * len(encoded)} "
            f"bytes in fields of one length; at most {MAX_TEXT_NBYTES} bytes each and "
            f"{MAX_COLUMN_NBYTES} together can be stored"
        )
        raise ConversionError(message)
    return np.array(encoded, dtype=f"S{max(width, 1)}")


def decode_all(stored: np.ndarray) -> list[str]:
    """The strings of an array of dtype ``S<n>``, in C order."""
    return [decode(item) for item in stored.ravel().tolist()]


def utf8(text: str) -> str:
    """A text as formats of UTF-8 hold it, which is without lone surrogates."""
    return text.encode("utf-8", "replace").decode()


def excerpt(text: str) -> str:
    """The beginning of a text as one line of at most 64 characters, for tables."""
    line = _BLANK.sub(" ", text[:_LOOKED_AT]).strip()
    is_whole = len(text) <= _LOOKED_AT and len(line) <= _EXCERPT
    return line if is_whole else f"{line[: _EXCERPT - 1]}…"


def wrapped(text: str) -> list[str]:
    """A text as lines of at most 80 characters, for viewers that show a line as a row."""
    found: list[str] = []
    for line in text.splitlines():
        found += _PIECE.findall(line) or [""]
        if len(found) > _MOST_LINES:
            return [*found[:_MOST_LINES], "…"]
    return found


def utc_now() -> str:
    """The time as files record it: UTC, such as ``2026-11-28T18:00:00Z``.

    ``SOURCE_DATE_EPOCH`` (seconds since 1970) takes its place: https://reproducible-builds.org.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.fromtimestamp(int(given), UTC) if given.isdecimal() else datetime.now(UTC)
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: ``1 sample``, ``2 samples``."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def as_names(names: str | Iterable[str]) -> tuple[str, ...]:
    """The names that a caller gave; text is one name, not its letters."""
    return (names,) if isinstance(names, str) else tuple(names)


def short_repr(options: Any) -> str:
    """A dataclass with those of its fields only that are not the default."""
    default = type(options)()
    stated = {each.name: getattr(options, each.name) for each in fields(options)}
    told = [f"{name}={it!r}" for name, it in stated.items() if it != getattr(default, name)]
    return f"{type(options).__name__}({', '.join(told)})"


def and_more(names: Iterable[object], most: int = 5, *, separator: str = ", ") -> str:
    """The first names of a list for people, and how many more there are."""
    every = list(names)
    listed = separator.join(str(each) for each in every[:most])
    return f"{listed} and {len(every) - most} more" if len(every) > most else listed
