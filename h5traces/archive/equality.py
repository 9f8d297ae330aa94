"""Whether two traces, or values of traces, are equal; plain ``==`` fails on arrays and on NaN."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np


def equal(one: Any, other: Any) -> bool:
    """Whether two values are equal, arrays of any depth included.

    Arrays are equal if type, shape, number type and every number are; NaN equals NaN, and 0 equals
    -0. The order of the keys of a dict does not count; a list equals no tuple, as in Python.
    """
    if one is other:
        return True
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return _equal_arrays(one, other)
    if _is_tensor(one) or _is_tensor(other):
        return _equal_tensors(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    for kind in (list, tuple):
        if isinstance(one, kind) and isinstance(other, kind):
            return len(one) == len(other) and all(map(equal, one, other))
    try:
        # NaN is the only value that is not equal to itself.
        return bool(one == other) or (bool(one != one) and bool(other != other))
    except (TypeError, ValueError, RuntimeError):
        return False


def _equal_arrays(one: Any, other: Any) -> bool:
    if not (isinstance(one, np.ndarray) and isinstance(other, np.ndarray)):
        return False
    types = [each.dtype.newbyteorder("=") for each in (one, other)]
    if types[0] != types[1] or one.shape != other.shape:
        return False
    if types[0].kind == "O":
        return all(map(equal, one.ravel().tolist(), other.ravel().tolist()))
    return bool(np.array_equal(one, other, equal_nan=types[0].kind in "fc"))


def _is_tensor(value: Any) -> bool:
    # Where torch was not imported, there are no tensors.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _equal_tensors(one: Any, other: Any) -> bool:
    if not (_is_tensor(one) and _is_tensor(other)):
        return False
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = one.detach().cpu(), other.detach().cpu()
    return bool(((one == other) | ((one != one) & (other != other))).all())  # NaN
