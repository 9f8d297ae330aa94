"""Lists of numbers in JSON become the arrays that json and numpy make, in less memory."""

from __future__ import annotations

import json
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest

from h5traces.sources import json_numbers
from h5traces.sources.arrays import as_array
from h5traces.sources.json_numbers import parse_with_arrays
from h5traces.sources.rows import DECODER

ODD = (10**17, 2**63, 10**30, 0.1, float(np.float16(0.3)), True, None, float("nan"), "]", [1], {})


def odd_value(rng: random.Random, shape: list[int]) -> Any:
    """Nested lists, mostly regular, mostly of numbers."""
    if not shape:
        return rng.choice(ODD) if rng.random() < 0.08 else rng.choice([1, 0.5, -3e-5])
    length = shape[0] + (rng.random() < 0.02)
    return [odd_value(rng, shape[1:]) for _ in range(length)]


def outcome(parse: Any, text: str) -> Any:
    """Each value as type, shape and numbers; the error's text where it is not JSON."""
    try:
        found = {key: as_array(value) for key, value in parse(text).items()}
    except ValueError as error:
        return str(error)
    return {
        key: (str(each.dtype), each.shape, repr(each.tolist()))
        if isinstance(each, np.ndarray)
        else repr(each)
        for key, each in found.items()
    }


@pytest.mark.parametrize("part", [1, 20, 1 << 16])
def test_values_and_errors_are_those_of_json(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(json_numbers, "_PART", part)
    rng = random.Random(part)
    num_arrays = 0
    for _ in range(3000):
        shapes = [[rng.randint(0, 4) for _ in range(rng.randint(0, 4))] for _ in range(2)]
        row = {f"k{n}": odd_value(rng, shape) for n, shape in enumerate(shapes)}
        spaces = rng.choice([(",", ":"), (" , ", " : ")])
        text = json.dumps(row, indent=rng.choice([None, 1]), separators=spaces)
        if rng.random() < 0.3:
            place = rng.randrange(len(text))
            text = text[:place] + rng.choice(',[]"}1 e-') + text[place + rng.randint(0, 1) :]
        expected = outcome(DECODER.decode, text)
        assert outcome(parse_with_arrays, text) == expected, text
        num_arrays += isinstance(expected, dict) and any(
            isinstance(each, tuple) for each in expected.values()
        )
    assert num_arrays > 1000


def test_memory_is_that_of_the_array_not_of_its_numbers() -> None:
    array = np.random.default_rng(0).normal(size=(4, 128, 512)).astype(np.float16)
    text = json.dumps({"hidden_states": array.tolist(), "flat": array.reshape(-1).tolist()})
    tracemalloc.start()
    found = parse_with_arrays(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found["hidden_states"], array.astype(np.float32))
    np.testing.assert_array_equal(found["flat"], array.reshape(-1).astype(np.float32))
    # As numbers of Python, they take more than 30 bytes each.
    assert peak < 16 * 2 * array.size
