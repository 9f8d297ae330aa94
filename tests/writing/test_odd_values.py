"""Values that `append` cannot keep: errors name the field, and say what to do."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import h5traces
from h5traces.errors import ConversionError

if TYPE_CHECKING:
    from pathlib import Path

STATES = torch.arange(12.0).reshape(3, 4)


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        # Deprecated, and in people's files all the same.
        warnings.simplefilter("ignore", UserWarning)
        return torch.quantize_per_tensor(STATES, 0.1, 0, torch.qint8)


def inside_itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


ODD = {
    "quantised": (quantised, r"quantised tensor.*pass tensor\.dequantize\(\)"),
    "sparse": (STATES.to_sparse, r"layout torch\.sparse_coo.*pass tensor\.to_dense\(\)"),
    "meta": (lambda: STATES.to("meta"), r"device 'meta' has no values"),
    "masked": (lambda: np.ma.masked_less(np.eye(3), 1), r"masked array.*pass array\.filled"),
    "itself": (inside_itself, "nested more than 64 levels deep, or holds itself"),
    "function": (lambda: print, "has no encoding; expected plain Python values"),
}


def append(target: Path, **fields: Any) -> None:
    with h5traces.create(target) as writer:
        writer.append({"hidden_states": [np.zeros((3, 4), np.float16)], **fields})


@pytest.mark.parametrize("name", ODD)
def test_a_field_that_cannot_be_kept_is_named(tmp_path: Path, name: str) -> None:
    make, message = ODD[name]
    with pytest.raises(ConversionError, match=rf"^(?s:.*)field 'probe': (?s:.*){message}"):
        append(tmp_path / "a.h5", probe=make())
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.parametrize("name", ["quantised", "sparse", "meta", "masked"])
def test_a_layer_that_cannot_be_kept_is_named(tmp_path: Path, name: str) -> None:
    make, message = ODD[name]
    with pytest.raises(ConversionError, match=rf"field 'hidden_states'.*{message}"):
        append(tmp_path / "a.h5", hidden_states=[make()])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int32])
def test_a_layer_of_another_type_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    message = f"field 'hidden_states', layer 0: torch dtype is {name}, expected float16, bfloat16"
    with pytest.raises(ConversionError, match=message):
        append(tmp_path / "a.h5", hidden_states=[STATES.to(dtype)])
