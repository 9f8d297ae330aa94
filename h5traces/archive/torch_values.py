"""Stored tensors as torch tensors; the only module of the reader that needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from h5traces.format.values import TorchValue


def to_tensor(value: TorchValue) -> torch.Tensor:
    """The tensor behind a stored value: a CPU tensor of the same dtype, shape and bits."""
    native = np.array(value.data, dtype=value.data.dtype.newbyteorder("="), order="C")
    if value.dtype == "bfloat16":
        return torch.from_numpy(native.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(native)
