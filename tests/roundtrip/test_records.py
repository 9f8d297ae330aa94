"""Whatever a legacy dict holds beside its arrays comes back with its types and bits."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from legacy_batches import assert_same, make_archive
from strategies import (
    ODD_KEYS,
    ODD_TEXTS,
    arrays,
    extra_fields,
    floats,
    numpy_scalars,
    plain_values,
    texts,
    values,
)

import h5traces
from h5traces.checking.validate import validate
from h5traces.format import layout, text
from h5traces.format.entries import carrier_dtype
from h5traces.format.values import decode_element, encode_element

if TYPE_CHECKING:
    from h5traces.format.document import Attrs


def sample(**fields: Any) -> dict[str, Any]:
    """A small trace with further fields."""
    return {
        "hidden_states": [np.full((2, 3), 0.5, np.float16)],
        "attentions": [np.full((1, 2, 2), 0.5, np.float16)],
        "tokens": np.array([5, 6]),
        "tokens_decoded": ["a", "b"],
        **fields,
    }


class Stored:
    """Encoded objects as a file would give them back."""

    def __init__(self, value: Any) -> None:
        self.objects = {each.path: each for each in encode_element("extra/x", value)}

    def attrs(self, path: str) -> Attrs:
        return self.objects[path].attrs

    def values(self, path: str) -> np.ndarray:
        entry = self.objects[path]
        assert entry.values is not None
        stored = np.frombuffer(entry.values.tobytes(), carrier_dtype(entry.dtype))
        return stored.reshape(entry.values.shape).copy()

    def children(self, path: str) -> list[str]:
        names = (each.removeprefix(f"{path}/") for each in self.objects if each != path)
        return sorted(
            name for name in names if "/" not in name and f"{path}/{name}" in self.objects
        )


def there_and_back(value: Any) -> Any:
    return decode_element(Stored(value), "extra/x")


@given(values)
@settings(max_examples=400)
@example({"$int": "0x1"})
@example({"$tuple": [1], "": {"$": None}})
@example([{"a": np.zeros((0, 2))}, ({},), [[]], -0.0, 2**53, -(2**64)])
def test_elements_come_back(value: Any) -> None:
    assert_same(there_and_back(value), value)


@given(plain_values)
@settings(max_examples=200)
def test_plain_values_take_one_dataset(value: Any) -> None:
    stored = Stored(value)
    assert list(stored.objects) == ["extra/x"]
    assert_same(decode_element(stored, "extra/x"), value)


@given(st.floats())
def test_a_float_by_itself_keeps_every_bit(value: float) -> None:
    assert_same(there_and_back(value), value)


@given(arrays() | numpy_scalars)
@settings(max_examples=300)
def test_arrays_come_back(value: Any) -> None:
    assert_same(there_and_back(value), value)


@given(extra_fields)
@settings(max_examples=25)
@example({key: number for number, key in enumerate(ODD_KEYS)})
@example({f"text {number}": odd for number, odd in enumerate(ODD_TEXTS)})
@example({"x": {odd: odd for odd in (*ODD_KEYS, *ODD_TEXTS, 5, -5)}, "y": [1, 1.0, True, None]})
@example({"x": {odd: np.arange(2) for odd in (*ODD_KEYS, *ODD_TEXTS, 5, -5)}})
def test_extra_fields_come_back_from_a_file(fields: dict[str, Any]) -> None:
    batch = [sample(**fields), sample(), sample(**dict(reversed(fields.items())))]
    with tempfile.TemporaryDirectory() as folder:
        target = make_archive(Path(folder), batch)
        assert_same(h5traces.load(target), batch)
        with h5traces.open(target) as archive:
            for key in fields:
                assert key in archive[0]
                assert_same(archive[0][key], fields[key])
                assert archive[1].get(key, "absent") == "absent"
        found = validate(target)
        assert found.ok, found.problems


@given(st.lists(texts, max_size=8), texts, floats, st.integers(-(2**63) + 1, 2**63 - 1))
@settings(max_examples=20)
def test_named_fields_come_back_from_a_file(
    decoded: list[str], answer: str, score: float, label: int
) -> None:
    trace = {
        "question": answer,
        "hidden_states": [np.ones((len(decoded), 3), np.float16)],
        "tokens": np.arange(len(decoded)),
        "tokens_decoded": decoded,
        "generated_text": answer[::-1],
        "score": score,
        "label": label,
    }
    with tempfile.TemporaryDirectory() as folder:
        target = make_archive(Path(folder), [trace])
        assert_same(h5traces.load(target), [trace])


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": np.array([1, 2], np.int32)},
        {"tokens": np.array([1, 2], np.uint8)},
        {"tokens": np.array([1, 2**64 - 1], np.uint64)},
        {"tokens": np.array([1, 2], ">i8")},
        {"tokens": np.array([[1, 2]])},
        {"tokens": [1, 2]},
        {"tokens": None},
        {"tokens_decoded": ("a", "b")},
        {"tokens_decoded": np.array(["a", "b"])},
        {"tokens_decoded": ["a"]},
        {"tokens_decoded": ["a", 1]},
        {"tokens_decoded": None},
        {"question": None},
        {"generated_answer_clean": ["a", "b"]},
        {"question_id": 5},
        {"question_id": np.int64(5)},
        {"question_id": np.str_("q")},
        {"question_id": None},
        {"question_id": ""},
        {"question_id": "x" * 100_000},
        {"question_id": "a\0"},
        {"label": True},
        {"label": 0},
        {"label": -1},
        {"label": 2**63},
        {"label": 0.5},
        {"label": np.int64(1)},
        {"prompt_length": 1},
        {"prompt_length": 99},
        {"prompt_length": -1},
        {"prompt_length": 1.5},
        {"prompt_length": True},
        {"x" * 70_000: 1},
        {f"field {number}": number for number in range(800)},
        {"deep": [[[[[[[[[[np.arange(2)]]]]]]]]]]},
        {"many": {f"key {number}": np.arange(2) for number in range(500)}},
        {"sequence": tuple(range(100_000))},
        {"longdouble": np.array([1.1, -0.0], np.longdouble)},
    ],
    ids=lambda fields: next(iter(fields))[:20],
)
def test_fields_of_unusual_types_come_back(tmp_path: Path, fields: dict[str, Any]) -> None:
    batch = [{**sample(), **fields}]
    target = make_archive(tmp_path, batch)
    assert_same(h5traces.load(target), batch)
    found = validate(target)
    assert found.ok, found.problems


@pytest.mark.parametrize("missing", ["attentions", "tokens", "tokens_decoded"])
def test_fields_may_be_missing(tmp_path: Path, missing: str) -> None:
    batch = [sample(), {key: value for key, value in sample().items() if key != missing}]
    assert_same(h5traces.load(make_archive(tmp_path, batch)), batch)


def test_layouts_may_be_mixed(tmp_path: Path) -> None:
    batch = [
        sample(a=1),
        sample(hidden_states=(np.ones((2, 3), np.float16),)),
        {"b": 2, **sample(hidden_states=[[np.ones((5, 1, 3)), np.zeros((5, 1, 3))]])},
        sample(attentions=[np.ones((1, 2, 2), np.float32)]),
    ]
    target = make_archive(tmp_path, batch, dtype="auto")
    assert_same(h5traces.load(target), batch)


@given(texts)
@settings(max_examples=400)
def test_text_survives_fixed_length_fields(value: str) -> None:
    stored = text.encode(value)
    assert not stored.endswith(b"\0")
    assert text.decode(stored) == value
    assert text.decode(stored + bytes(7)) == value
    assert text.unescape(text.escape(value)) == value
    if text.escape(value) != value:
        assert text.INTRODUCER in text.escape(value)


@given(st.lists(texts, max_size=6))
def test_texts_survive_arrays(strings: list[str]) -> None:
    stored = text.encode_all(strings)
    assert stored.shape == (len(strings),)
    assert stored.dtype.kind == "S"
    assert stored.dtype.itemsize >= 1
    assert text.decode_all(stored) == strings


@given(st.sampled_from(ODD_KEYS) | st.text(max_size=12))
@settings(max_examples=300)
def test_keys_are_names_that_hdf5_takes_literally(key: str) -> None:
    name = layout.escape_key(key)
    assert layout.unescape_key(name) == key
    assert name
    assert name.strip(".")
    assert not set(name) & {"/", "\0"}


@given(st.lists(st.sampled_from(ODD_KEYS) | st.text("%2F./\0a", max_size=5), unique=True))
def test_keys_stay_different(keys: list[str]) -> None:
    assert len({layout.escape_key(key) for key in keys}) == len(keys)
