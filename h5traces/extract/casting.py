"""Casts on the device that computed the numbers, counted as the writer would count them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from h5traces.format.dtypes import TypedArray

if TYPE_CHECKING:
    from h5traces.format.dtypes import DtypePolicy, FloatType

_TARGETS: Final[dict[str, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
NUM_COUNTS: Final = 4


def target_of(policy: DtypePolicy, dtype: torch.dtype) -> torch.dtype | None:
    """The type to cast to on the device; None where the writer should get the numbers as they are.

    Only casts that make the copy to the host no larger are worth it.
    """
    target = _TARGETS.get(policy)
    return None if target is None or target == dtype else target


def type_name(dtype: torch.dtype) -> FloatType:
    """The name of a floating-point type, as archives know it."""
    names: dict[torch.dtype, FloatType] = {
        torch.float16: "float16",
        torch.bfloat16: "bfloat16",
        torch.float32: "float32",
        torch.float64: "float64",
    }
    return names[dtype]


def cast(values: torch.Tensor, target: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of `values` in the target type, and what the cast changed.

    Parameters
    ----------
    values
        Any shape and floating-point type, on any device.
    target
        The new type; None for a copy as it is.

    Returns
    -------
    tuple of Tensor
        The contiguous copy; and int64 ``(4,)`` on the same device: overflows, values gone to zero,
        values gone subnormal, NaN of the source.
    """
    num_nan = values.isnan().sum()
    if target is None:
        copied = values.clone(memory_format=torch.contiguous_format)
        zero = torch.zeros_like(num_nan)
        return copied, torch.stack([zero, zero, zero, num_nan])
    narrow = values.to(target).contiguous()
    # Both narrow types fit into float32; float64 models are compared in their own.
    wide = values.dtype if values.dtype == torch.float64 else torch.float32
    before, after = values.to(wide), narrow.to(wide)
    tiny = torch.finfo(target).smallest_normal
    overflow = (after.isinf() & before.isfinite()).sum()
    to_zero = ((after == 0) & (before != 0)).sum()
    is_subnormal = (after.abs() < tiny) & (after != 0)
    to_subnormal = (is_subnormal & (after != before)).sum()
    return narrow, torch.stack([overflow, to_zero, to_subnormal, num_nan])


def to_host(values: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; one from CUDA is complete when the device has been synchronised."""
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return host.copy_(values, non_blocking=values.is_cuda)


def as_typed(values: torch.Tensor) -> TypedArray:
    """A tensor in host memory as numpy holds it; no copy."""
    if values.dtype == torch.bfloat16:
        return TypedArray(values.view(torch.uint16).numpy(), "bfloat16")
    return TypedArray(values.numpy(), type_name(values.dtype))
