"""Tokens in lists and labels of any integer type are what they say, and come back as they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import h5traces

if TYPE_CHECKING:
    from pathlib import Path


def written(folder: Path, **fields: Any) -> h5traces.Trace:
    item = {"question_id": "a", "hidden_states": [np.ones((3, 2), "f2")], **fields}
    folder.mkdir(exist_ok=True)
    with h5traces.create(folder / "run.h5") as writer:
        writer.append(item)
    (trace,) = h5traces.open(folder / "run.h5")
    assert list(trace.to_dict()) == list(item)
    return trace


def test_a_list_of_ids_is_tokens(tmp_path: Path) -> None:
    trace = written(tmp_path, tokens=[5, 2**40, 7], tokens_decoded=["a", "b", "c"])
    assert trace.metadata.coverage == "full"
    assert trace["tokens"] == [5, 2**40, 7]
    assert type(trace["tokens"]) is list
    assert set(map(type, trace["tokens"])) == {int}
    as_array = h5traces.open(trace.path, container="numpy")[0]["tokens"]
    np.testing.assert_array_equal(as_array, np.array([5, 2**40, 7]))
    as_tensor = h5traces.open(trace.path, container="torch")[0]["tokens"]
    assert torch.equal(as_tensor, torch.tensor([5, 2**40, 7]))


def test_a_copy_keeps_the_list(tmp_path: Path) -> None:
    trace = written(tmp_path, tokens=[5, 6, 7])
    h5traces.merge([trace.path], tmp_path / "merged.h5")
    precision = h5traces.PrecisionOptions(tier="fine")
    h5traces.repack(tmp_path / "merged.h5", tmp_path / "again.h5", precision=precision)
    assert h5traces.open(tmp_path / "again.h5")[0]["tokens"] == [5, 6, 7]


@pytest.mark.parametrize("tokens", [[], [1, 2.0, 3], [1, True, 3], [1, 2**63, 3], (1, 2, 3)])
def test_other_lists_stay_what_they_were(tmp_path: Path, tokens: Any) -> None:
    found = written(tmp_path, tokens=tokens)["tokens"]
    assert found == tokens
    assert list(map(type, found)) == list(map(type, tokens))


@pytest.mark.parametrize(
    ("label", "number"),
    [
        (np.int64(1), 1),
        (np.uint8(3), 3),
        (True, 1),
        (np.False_, 0),
        (np.array(1), 1),
        (np.array([0]), 0),
        (torch.tensor(1), 1),
        (torch.tensor([True]), 1),
        (1.0, None),
        ("1", None),
        (None, None),
        (np.array([0, 1]), None),
    ],
    ids=repr,
)
def test_a_label_of_any_integer_type_is_a_label(
    tmp_path: Path, label: Any, number: int | None
) -> None:
    trace = written(tmp_path, label=label)
    assert trace.metadata.label == number
    assert type(trace["label"]) is type(label)
    assert np.array_equal(trace["label"], label)
    assert h5traces.open(trace.path).labels == (number,)


@pytest.mark.parametrize("length", [np.int64(2), torch.tensor(2), 2], ids=repr)
def test_the_prompt_ends_where_a_number_of_any_type_says(tmp_path: Path, length: Any) -> None:
    trace = written(tmp_path, tokens=[5, 6, 7], prompt_length=length)
    assert trace.metadata.prompt_len == 2
    assert type(trace["prompt_length"]) is type(length)
    assert written(tmp_path / "long", tokens=[5], prompt_length=length).metadata.prompt_len is None
