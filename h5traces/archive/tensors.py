"""Stored tensors as torch tensors, where torch is installed, or as arrays."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.errors import MissingDependencyError
from h5traces.format.dtypes import bfloat16_to_float32
from h5traces.format.value_types import BY_TYPE, with_content
from h5traces.format.values import TorchValue

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def to_tensor(value: TorchValue) -> Any:
    """What a stored value stands for: a torch tensor, or an array of ml_dtypes.

    MissingDependencyError without that package.
    """
    if value.container == "ml_dtypes":
        return _ml_array(value)
    try:
        from h5traces.archive import torch_values
    except ImportError as error:
        message = (
            "the source held torch tensors and torch is not installed; install h5traces[torch], "
            "or ask for arrays with to_dict(container='numpy')"
        )
        raise MissingDependencyError(message) from error
    # A copy: stored values may be read-only, and shared.
    return torch_values.to_tensor(np.array(value.data, order="C"), value.dtype)


def _ml_array(value: TorchValue) -> NDArray[Any]:
    try:
        dtype = getattr(importlib.import_module("ml_dtypes"), value.dtype)
    except ImportError as error:
        message = (
            f"the source held {value.dtype} arrays of ml_dtypes, which is not installed; install "
            "ml_dtypes, or ask for arrays of numpy with to_dict(container='numpy')"
        )
        raise MissingDependencyError(message) from error
    return np.array(value.data, order="C").view(dtype)


def with_tensors(value: Any) -> Any:
    """`value` with every stored tensor inside it turned into a torch tensor."""
    return _with_each(value, to_tensor)


def materialised(value: Any) -> Any:
    """`value` as ``pickle.load`` gives it: torch tensors, and arrays that can be written to."""
    return _with_each(value, to_tensor, _writable)


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    return array if array.flags.writeable else array.copy()


def without_tensors(value: Any) -> Any:
    """`value` with every stored tensor inside it turned into an array; bfloat16 as float32."""
    return _with_each(value, _to_array)


def _to_array(value: TorchValue) -> Any:
    return bfloat16_to_float32(value.data) if value.dtype == "bfloat16" else value.data


def _with_each(
    value: Any,
    change: Callable[[TorchValue], Any],
    change_array: Callable[[NDArray[Any]], Any] | None = None,
) -> Any:
    """`value` with its tensors and arrays changed, in lists, tuples and dicts of any depth."""
    if isinstance(value, TorchValue):
        return change(value)
    if type(value) in BY_TYPE or (isinstance(value, np.ndarray) and value.dtype.kind == "O"):
        return with_content(value, lambda content: _with_each(content, change, change_array))
    if isinstance(value, np.ndarray) and change_array is not None:
        return change_array(value)
    if isinstance(value, dict):
        return {key: _with_each(each, change, change_array) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_each(each, change, change_array) for each in value)
    return value
