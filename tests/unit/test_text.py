"""The escape for strings that fixed-length UTF-8 cannot hold."""

from __future__ import annotations

import numpy as np
import pytest

from h5traces.errors import CorruptArchiveError
from h5traces.format import text


@pytest.mark.parametrize(
    ("original", "stored"),
    [
        ("", b""),
        ("plain", b"plain"),
        ("\u00e9\U0001f600", "\u00e9\U0001f600".encode()),
        ("a\0b", b"a\0b"),
        ("a\0", "a\u241b0000".encode()),
        ("a\0\0", "a\0\u241b0000".encode()),
        ("\ud83d", "\u241bD83D".encode()),
        ("\u241b", "\u241b241B".encode()),
    ],
)
def test_stored_form(original: str, stored: bytes) -> None:
    assert text.encode(original) == stored
    assert text.decode(stored) == original


@pytest.mark.parametrize(
    "stored", ["\u241b", "\u241b12", "x\u241bzzzz", "\u241bd83d", "\u241b\u241b241B"]
)
def test_a_broken_escape_is_an_error(stored: str) -> None:
    with pytest.raises(CorruptArchiveError, match=r"U\+241B without the four hexadecimal digits"):
        text.decode(stored.encode())


@pytest.mark.parametrize("stored", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"a\x80"])
def test_other_bytes_are_an_error(stored: bytes) -> None:
    with pytest.raises(CorruptArchiveError, match="not UTF-8"):
        text.decode(stored)


def test_arrays_of_text() -> None:
    stored = text.encode_all(["a", "", "b\0"])
    assert stored.dtype == np.dtype("S8")
    assert text.decode_all(stored.reshape(3, 1)) == ["a", "", "b\0"]
    assert text.encode_all([]).dtype == np.dtype("S1")
    assert text.encode_all([""]).dtype == np.dtype("S1")


def test_names_for_people() -> None:
    assert text.and_more([]) == ""
    assert text.and_more(range(5)) == "0, 1, 2, 3, 4"
    assert text.and_more(range(7)) == "0, 1, 2, 3, 4 and 2 more"
    assert text.and_more(["a", "b"], 1, separator="; ") == "a and 1 more"
