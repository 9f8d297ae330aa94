"""Stored tensors as torch tensors, where torch is installed, or as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.errors import MissingDependencyError
from h5traces.format.dtypes import bfloat16_to_float32
from h5traces.format.values import TorchValue

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def to_tensor(value: TorchValue) -> Any:
    """The torch tensor that a stored value stands for; MissingDependencyError without torch."""
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
    if isinstance(value, np.ndarray) and change_array is not None:
        return change_array(value)
    if isinstance(value, dict):
        return {key: _with_each(each, change, change_array) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_each(each, change, change_array) for each in value)
    return value
