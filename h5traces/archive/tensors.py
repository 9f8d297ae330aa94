"""Arrays in the container that a reader asked for: numpy, torch, or what the source held."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np

from h5traces.errors import MissingDependencyError, OptionError
from h5traces.format.dtypes import TypedArray, bfloat16_to_float32
from h5traces.format.value_types import BY_TYPE, with_content
from h5traces.format.values import ML_DTYPES, TorchValue

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from numpy.typing import NDArray

Container = Literal["source", "numpy", "torch"]

_TORCH: Final = "torch"
_ML_DTYPES: Final = "ml_dtypes"


def check_container(container: str) -> None:
    """Raise OptionError for another container, MissingDependencyError for torch without torch."""
    if container not in get_args(Container):
        message = f"container is {container!r}, expected 'source', 'numpy' or 'torch'"
        raise OptionError(message)
    if container == _TORCH and find_spec("torch") is None:
        message = "container='torch' needs torch, which is not installed; install h5traces[torch]"
        raise MissingDependencyError(message)


def is_torch(container: Container, held: object) -> bool:
    """Whether an array is to be a tensor, by what held it in the source, ``torch`` or None."""
    return container == _TORCH or (container == "source" and held == _TORCH)


def to_tensor(value: TorchValue) -> Any:
    """What a stored value stands for, in its own memory: a torch tensor, or of ml_dtypes."""
    if value.container == _ML_DTYPES:
        return _ml_array(value)
    # A copy: stored values may be read-only, and shared.
    return _torch_values().to_tensor(np.array(value.data, order="C"), value.dtype)


def _ml_array(value: TorchValue) -> NDArray[Any]:
    try:
        dtype = getattr(importlib.import_module("ml_dtypes"), value.dtype)
    except ImportError as error:
        message = (
            f"the source held {value.dtype} arrays of ml_dtypes, which is not installed; install "
            "ml_dtypes, or ask for arrays with container='numpy'"
        )
        raise MissingDependencyError(message) from error
    return np.array(value.data, order="C").view(dtype)


def fresh_array(array: TypedArray, container: Container, held: object) -> Any:
    """An array that was read for the caller alone, in its container; tensors share its memory.

    numpy has no bfloat16, so such arrays come as float32.
    """
    if is_torch(container, held):
        return _torch_values().to_tensor(array.values, array.dtype)
    if container == "source" and held == _ML_DTYPES and array.dtype in ML_DTYPES:
        return _ml_array(TorchValue(array.values, array.dtype, _ML_DTYPES))
    values = array.to_numpy()
    is_native = values.dtype.isnative
    return values if is_native else values.astype(values.dtype.newbyteorder("="))


def to_device(array: Any, device: str) -> Any:
    """An array or a tensor as a tensor on a device; MissingDependencyError without torch."""
    check_container(_TORCH)
    tensor = array if hasattr(array, "to") else _torch_values().to_tensor(array, array.dtype.name)
    return tensor.to(device)


def in_container(value: Any, container: Container) -> Any:
    """`value` with the arrays and tensors inside it in their container, at any depth.

    With ``torch``, arrays of a type that torch does not have, such as text, stay arrays.
    """
    if container == "numpy":
        return _with_each(value, _to_array)
    if container == _TORCH:
        return _with_each(value, to_tensor, _tensor_of)
    return _with_each(value, to_tensor)


def materialised(value: Any, container: Container = "source") -> Any:
    """`value` as `in_container` gives it, with arrays that can be written to."""
    return _with_each(in_container(value, container), to_tensor, _writable)


def _torch_values() -> ModuleType:
    try:
        from h5traces.archive import torch_values
    except ImportError as error:
        message = (
            "the source held torch tensors, and torch is not installed; install h5traces[torch], "
            "or ask for arrays with container='numpy'"
        )
        raise MissingDependencyError(message) from error
    return torch_values


def _to_array(value: TorchValue) -> Any:
    return bfloat16_to_float32(value.data) if value.dtype == "bfloat16" else value.data


def _tensor_of(array: NDArray[Any]) -> Any:
    try:
        return to_tensor(TorchValue(array, array.dtype.name))
    except TypeError:
        return array


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    return array if array.flags.writeable else array.copy()


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
