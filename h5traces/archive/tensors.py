"""Gives stored tensors back as torch tensors, where torch is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from h5traces.dtypes import bfloat16_to_float32
from h5traces.encodings import TorchValue
from h5traces.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable


def to_tensor(value: TorchValue) -> Any:
    """The torch tensor behind a stored value.

    Raises
    ------
    MissingDependencyError
        torch is not installed.
    """
    try:
        from h5traces.archive import torch_values
    except ImportError as error:
        message = (
            "the source held torch tensors and torch is not installed; install h5traces[torch], "
            "or ask for arrays with to_dict(container='numpy')"
        )
        raise MissingDependencyError(message) from error
    return torch_values.to_tensor(value)


def with_tensors(value: Any) -> Any:
    """`value` with every stored tensor inside it turned into a torch tensor."""
    return _with_each(value, to_tensor)


def without_tensors(value: Any) -> Any:
    """`value` with every stored tensor inside it turned into an array; bfloat16 as float32."""
    return _with_each(value, _to_array)


def _to_array(value: TorchValue) -> Any:
    return bfloat16_to_float32(value.data) if value.dtype == "bfloat16" else value.data


def _with_each(value: Any, change: Callable[[TorchValue], Any]) -> Any:
    if isinstance(value, TorchValue):
        return change(value)
    if isinstance(value, dict):
        return {key: _with_each(each, change) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_each(each, change) for each in value)
    return value
