"""The next item is made while the current one is in use, and never more than that."""

from __future__ import annotations

import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from h5traces.format.record import SourcePosition
from h5traces.meaning.records import to_record
from h5traces.rewriting.convert_jobs import _nbytes
from h5traces.storage.threads import ReadAhead

if TYPE_CHECKING:
    from collections.abc import Iterator


class Item:
    """Can be counted while it lives."""

    def __init__(self, number: int) -> None:
        self.number = number


def wait_until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_items_come_in_order() -> None:
    with ReadAhead(lambda: iter(range(100))) as items:
        assert list(items) == list(range(100))


def test_at_most_two_items_live() -> None:
    alive: weakref.WeakSet[Item] = weakref.WeakSet()
    most = 0

    def make() -> Iterator[Item]:
        nonlocal most
        for number in range(20):
            item = Item(number)
            alive.add(item)
            most = max(most, len(alive))
            yield item
            del item

    with ReadAhead(make) as items:
        for expected in range(20):
            item = next(items)
            assert item.number == expected
            if expected < 19:
                wait_until(lambda: len(alive) == 2)
            del item
    assert most == 2


def test_the_next_item_is_made_in_another_thread_meanwhile() -> None:
    made: list[int] = []
    threads: set[int] = set()

    def make() -> Iterator[int]:
        for number in range(5):
            threads.add(threading.get_ident())
            made.append(number)
            yield number

    with ReadAhead(make) as items:
        assert next(items) == 0
        wait_until(lambda: made == [0, 1])
        time.sleep(0.02)
        assert made == [0, 1]
    assert threading.get_ident() not in threads


def test_an_error_comes_after_the_items_before_it() -> None:
    def make() -> Iterator[int]:
        yield 1
        yield 2
        message = "broken"
        raise ValueError(message)

    with ReadAhead(make) as items:
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(ValueError, match="broken"):
            next(items)


def test_an_error_of_the_start_is_passed_on() -> None:
    def make() -> Iterator[int]:
        message = "cannot start"
        raise OSError(message)

    with ReadAhead(make) as items, pytest.raises(OSError, match="cannot start"):
        next(items)


@pytest.mark.parametrize("num_taken", [0, 1, 3])
def test_closing_early_ends_the_thread(num_taken: int) -> None:
    before = set(threading.enumerate())
    items = ReadAhead(lambda: iter(range(1000)))
    assert [next(items) for _ in range(num_taken)] == list(range(num_taken))
    assert set(threading.enumerate()) - before
    items.close()
    assert set(threading.enumerate()) == before
    items.close()


def test_nothing_to_read() -> None:
    with ReadAhead(lambda: iter(())) as items:
        assert next(items, "end") == "end"


def test_as_many_items_wait_as_take_little() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for size in (10, 10, 10, 30, 5, 1):
            made.append(size)
            yield size

    with ReadAhead(make, nbytes=lambda size: size, most_nbytes=40) as items:
        # A fourth item might be as large as the third.
        wait_until(lambda: len(made) == 4)
        time.sleep(0.02)
        assert len(made) == 4
        assert list(items) == [10, 10, 10, 30, 5, 1]


def test_nothing_waits_beside_a_large_item() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for size in (50, 50, 50):
            made.append(size)
            yield size

    with ReadAhead(make, nbytes=lambda size: size, most_nbytes=40) as items:
        time.sleep(0.02)
        assert len(made) == 1
        assert next(items) == 50
        wait_until(lambda: len(made) == 2)
        time.sleep(0.02)
        assert len(made) == 2


def test_texts_and_tokens_of_a_record_count_like_arrays() -> None:
    states = [np.zeros((3, 4), np.float16)] * 2
    sample = {"question_id": "a", "hidden_states": states}
    source = SourcePosition(file=0, position=0)
    least = _nbytes(to_record(sample, source=source))
    more: dict[str, Any] = {
        "question": "x" * 1_000_000,
        "tokens": np.arange(50_000),
        "tokens_decoded": ["abc"] * 50_000,
        "note": "y" * 1_000_000,
    }
    for field, value in more.items():
        fuller = _nbytes(to_record({**sample, field: value}, source=source))
        assert fuller - least >= 300_000, field
