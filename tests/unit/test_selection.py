"""Choices of layers and samples, as text and as numbers."""

from __future__ import annotations

import numpy as np
import pytest

from h5traces.archive.selection import Selection, choose_layers, choose_samples
from h5traces.errors import LayerIndexError, SampleIndexError


@pytest.mark.parametrize(
    ("choice", "available", "expected"),
    [
        (None, (0, 5, 10), (0, 5, 10)),
        ("last", (0, 5, 10), (10,)),
        ("0, 5-5,last", (0, 5, 10), (0, 5, 10)),
        ("0,2-last", range(4), (0, 2, 3)),
        ("last-last", range(4), (3,)),
        ([2, 0, 2], range(4), (0, 2)),
        ([], range(4), ()),
    ],
)
def test_layers(choice, available, expected):
    assert choose_layers(choice, available) == expected


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("4", r"layer 4 was asked for, but the model has 4 layers \(0 to 3\)"),
        ("2-99999999999", "layer 4 was asked for"),
        ("9-last", "layer 9 was asked for"),
        ([-1], "layer -1 was asked for"),
        ("2-1", "'2-1' runs backwards"),
        ("last-1", "'last-1' runs backwards"),
        ("9" * 5000, "is not a layer"),
        *((text, "is not a layer") for text in ("", "a", "1-", "-1", "0,,1", "²", "1-2-3", "1.5")),
    ],
)
def test_layers_that_are_none(choice, message):
    with pytest.raises(LayerIndexError, match=message):
        choose_layers(choice, range(4))


def test_the_error_lists_what_is_stored():
    with pytest.raises(LayerIndexError, match=r"run\.h5 stores 2 layers \(0, 5\)"):
        choose_layers("0-5", (0, 5), "run.h5 stores")
    with pytest.raises(LayerIndexError, match=r"0 layers \(none\)"):
        choose_layers("last", ())


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("0,3", [0, 3]),
        ("3, -1,0", [3, 4, 0]),
        ("1:3", [1, 2]),
        ("::2", [0, 2, 4]),
        ("3:100", [3, 4]),
        (slice(None, None, -2), [4, 2, 0]),
        ([4, 0], [4, 0]),
    ],
)
def test_samples(choice, expected):
    assert list(choose_samples(choice, 5)) == expected


@pytest.mark.parametrize("choice", ["", "a", "a:b", "1:2:3:4", "1.5", "0,", "::0", "5", [-6]])
def test_samples_that_are_none(choice):
    with pytest.raises(SampleIndexError, match=r"expected indices|was asked for"):
        choose_samples(choice, 5)


def test_text_is_checked_before_anything_is_opened():
    with pytest.raises(LayerIndexError):
        Selection(layers="x")
    with pytest.raises(SampleIndexError):
        Selection(samples="a:b")
    assert Selection(layers="0,last", samples="0:100").layers == "0,last"


def test_one_number_is_a_choice():
    assert choose_layers(2, range(4)) == (2,)
    assert choose_layers(np.int64(2), range(4)) == (2,)
    assert choose_samples(-1, 4) == (3,)
    with pytest.raises(LayerIndexError, match="layer 4 was asked for"):
        choose_layers(4, range(4))
    with pytest.raises(TypeError, match="float"):
        choose_layers(1.5, range(4))
