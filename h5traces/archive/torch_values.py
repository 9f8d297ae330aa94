"""Arrays as torch tensors and back; bfloat16, which numpy has not, as uint16 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray


def to_tensor(values: NDArray[Any], dtype: str) -> torch.Tensor:
    """A CPU tensor of the same bits; it shares the memory of values in native byte order.

    `dtype` is torch's name, such as ``bfloat16``, whose bits come as uint16.
    """
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    if dtype == "bfloat16":
        return torch.from_numpy(native.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(native)


def from_tensor(tensor: torch.Tensor) -> tuple[NDArray[Any], str]:
    """Values and torch's name for their dtype; a contiguous tensor on the CPU shares its memory."""
    found = tensor.detach().cpu().contiguous()
    dtype = str(found.dtype).removeprefix("torch.")
    if found.dtype == torch.bfloat16:
        return found.view(torch.int16).numpy().view(np.uint16), dtype
    return found.numpy(), dtype
