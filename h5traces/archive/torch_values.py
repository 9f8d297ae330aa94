"""Arrays as torch tensors and back; types that numpy has not travel as their bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from h5traces.errors import ConversionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Types that numpy has not: an integer of the same width, in torch and in numpy.
_AS_BITS: Final = {
    torch.bfloat16: (torch.int16, np.uint16),
    **dict.fromkeys(
        (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
        (torch.uint8, np.uint8),
    ),
}


def to_tensor(values: NDArray[Any], dtype: str) -> torch.Tensor:
    """A CPU tensor of the same bits; it shares the memory of values in native byte order.

    `dtype` is torch's name, such as ``bfloat16``, whose bits come as uint16, or ``float8_e4m3fn``,
    whose bits come as uint8.
    """
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    stored = getattr(torch, dtype, None)
    if stored in _AS_BITS:
        _, bits = _AS_BITS[stored]
        signed = native.view(np.int16) if bits is np.uint16 else native
        return torch.from_numpy(signed).view(stored)
    return torch.from_numpy(native)


def from_tensor(tensor: torch.Tensor) -> tuple[NDArray[Any], str]:
    """Values and torch's name for their dtype; a contiguous tensor on the CPU shares its memory.

    Raises
    ------
    ConversionError
        The tensor has no values in memory one after another, or a dtype that is not kept.
    """
    if (kind := _other_kind(tensor)) is not None:
        raise ConversionError(kind)
    found = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    dtype = str(found.dtype).removeprefix("torch.")
    if found.dtype in _AS_BITS:
        word, bits = _AS_BITS[found.dtype]
        return found.view(word).numpy().view(bits), dtype
    try:
        return found.numpy(), dtype
    except (TypeError, RuntimeError):
        message = f"a tensor of {dtype} cannot be kept; cast it to another type first"
        raise ConversionError(message) from None


def _other_kind(tensor: torch.Tensor) -> str | None:
    """Why a tensor has no plain values, and what to do; None if it has."""
    if tensor.is_quantized:
        return "a quantised tensor cannot be kept; pass tensor.dequantize(), or tensor.int_repr()"
    if tensor.is_nested:
        return "a nested tensor cannot be kept; pass tensor.unbind()"
    if tensor.layout != torch.strided:
        return f"a tensor of the layout {tensor.layout} cannot be kept; pass tensor.to_dense()"
    if tensor.is_meta:
        return "a tensor on the device 'meta' has no values; load the model's weights first"
    return None
