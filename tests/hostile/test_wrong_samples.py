"""Values that no archive can hold, in every field of a sample: the error names the field."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import h5traces
from h5traces.errors import H5TracesError

MAPPED = np.float32(1)


class BadLength:
    def __len__(self):
        message = "no length"
        raise RuntimeError(message)

    def __iter__(self):
        message = "no items"
        raise RuntimeError(message)


class BadRepr:
    def __repr__(self):
        message = "no repr"
        raise RuntimeError(message)


class BadArray:
    def __array__(self, *_, **__):
        message = "no array"
        raise RuntimeError(message)


def itself():
    found = {}
    found["a"] = found
    return found


def deep():
    found = []
    for _ in range(100_000):
        found = [found]
    return found


def tensor(dtype=torch.float32):
    return torch.ones(3, 4).to(dtype)


VALUES = {
    "float8": lambda: tensor(torch.float8_e4m3fn),
    "float8 of another kind": lambda: tensor(torch.float8_e5m2),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8),
    "complex": lambda: tensor(torch.complex64),
    "conjugated": lambda: tensor(torch.complex64).conj(),
    "negated": lambda: torch._neg_view(torch.ones(3, 4)),
    "complex array": lambda: np.ones((3, 4), complex),
    "sparse": lambda: torch.ones(3, 4).to_sparse(),
    "compressed rows": lambda: torch.ones(3, 4).to_sparse_csr(),
    "without memory": lambda: torch.ones(3, 4, device="meta"),
    "with gradient": lambda: torch.ones(3, 4, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.ones(3, 4)),
    "transposed": lambda: torch.ones(4, 3).T,
    "strided": lambda: torch.ones(6, 4)[::2],
    "uint16": lambda: tensor(torch.uint16),
    "bool": lambda: tensor(torch.bool),
    "bfloat16": lambda: tensor(torch.bfloat16),
    "one number": lambda: torch.tensor(1.0),
    "objects": lambda: np.array([[1, None], [2, "a"]], dtype=object),
    "numbers as objects": lambda: np.array([[1.0] * 4] * 3, dtype=object),
    "structured": lambda: np.zeros((3,), dtype=[("a", "f4"), ("b", "i4")]),
    "ragged": lambda: [[1, 2], [3], [4, 5, 6]],
    "ragged and deep": lambda: [[[1.0]], [2.0]],
    "lists": lambda: [[1.0] * 4] * 3,
    "text array": lambda: np.array([["a"] * 4] * 3),
    "bytes array": lambda: np.array([[b"a"] * 4] * 3),
    "times": lambda: np.zeros((3, 4), "M8[s]"),
    "raw bytes": lambda: np.zeros((3, 4), "V8"),
    "long double": lambda: np.ones((3, 4), np.longdouble),
    "big-endian": lambda: np.ones((3, 4), ">f4"),
    "largest integers": lambda: np.full((3, 4), 2**64 - 1, np.uint64),
    "masked": lambda: np.ma.masked_array(np.ones((3, 4)), mask=np.eye(3, 4)),
    "matrix": lambda: np.asmatrix(np.ones((3, 4))),
    "no rows": lambda: np.ones((0, 4), np.float32),
    "no columns": lambda: np.ones((3, 0), np.float32),
    "one axis": lambda: np.ones(4, np.float32),
    "five axes": lambda: np.ones((1, 1, 1, 3, 4), np.float32),
    "petabytes": lambda: np.broadcast_to(MAPPED, (10**9, 10**6)),
    "nan": lambda: np.full((3, 4), np.nan, np.float32),
    "inf": lambda: np.full((3, 4), np.inf, np.float32),
    "generator": lambda: (each for each in range(3)),
    "set": lambda: {1, 2},
    "dict": lambda: {"a": 1},
    "itself": itself,
    "deep": deep,
    "None": lambda: None,
    "text": lambda: "x",
    "surrogate": lambda: "\ud800",
    "NUL": lambda: "a\0b",
    "bytes": lambda: b"x",
    "number": lambda: 5,
    "large number": lambda: 10**400,
    "path": lambda: Path("x"),
    "object": object,
    "class": lambda: dict,
    "function": lambda: len,
    "module": lambda: pickle,
    "bad length": BadLength,
    "bad repr": BadRepr,
    "bad array": BadArray,
}
STATES = np.ones((3, 4), np.float32)
WEIGHTS = np.full((2, 3, 3), 1 / 3, np.float32)


def sample(**fields):
    found = {"hidden_states": [STATES] * 2, "attentions": [WEIGHTS] * 2, "tokens": np.arange(3)}
    return {**found, "question_id": "q", **fields}


PLACES = {
    "hidden_states": lambda value: sample(hidden_states=value),
    "hidden_states, one": lambda value: sample(hidden_states=[STATES, value]),
    "attentions": lambda value: sample(attentions=value),
    "attentions, one": lambda value: sample(attentions=[WEIGHTS, value]),
    "tokens": lambda value: sample(tokens=value),
    "tokens_decoded": lambda value: sample(tokens_decoded=value),
    "question_id": lambda value: sample(question_id=value),
    "label": lambda value: sample(label=value),
    "prompt_length": lambda value: sample(prompt_length=value),
    "generated_answer_clean": lambda value: sample(generated_answer_clean=value),
    "attention_mask": lambda value: sample(attention_mask=value),
    "more": lambda value: sample(more=value),
    "more, inside": lambda value: sample(more={"deep": [value]}),
    "": lambda value: value,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("ignore")
def test_the_field_is_named(tmp_path, place):
    bad = []
    for number, (name, make) in enumerate(VALUES.items()):
        path = tmp_path / f"{number}.h5"
        try:
            with h5traces.create(path, spool=False) as writer:
                writer.append(PLACES[place](make()))
        except H5TracesError as error:
            text = str(error)
            if place.partition(",")[0] not in text or len(text) > 3000:
                bad.append(f"{name}: {text[:300]}")
            assert not path.exists(), name
        except Exception as error:
            bad.append(f"{name}: {error!r:.300}")
        else:
            with h5traces.open(path) as archive:
                archive[0].to_dict()
    assert bad == []


@pytest.mark.parametrize(
    "key", [5, None, b"tokens", ("a",), 0.5, BadRepr()], ids=lambda key: type(key).__name__
)
def test_keys_are_text(tmp_path, key):
    with (
        pytest.raises(H5TracesError, match=f"named by {type(key).__name__}, expected str"),
        h5traces.create(tmp_path / "a.h5", spool=False) as writer,
    ):
        writer.append({**sample(), key: 1})


def test_an_error_keeps_the_samples_before(tmp_path):
    with h5traces.create(tmp_path / "a.h5") as writer:
        writer.append(sample())
        for make in (VALUES["petabytes"], VALUES["sparse"], VALUES["float8"], VALUES["object"]):
            with pytest.raises(H5TracesError):
                writer.append(sample(question_id="bad", hidden_states=[make()] * 2))
        writer.append(sample(question_id="r"))
    with h5traces.open(tmp_path / "a.h5") as archive:
        assert archive.ids == ("q", "r")
        assert archive[1]["tokens"].tolist() == [0, 1, 2]
