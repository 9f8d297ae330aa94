"""Arrays as torch tensors and back; types that numpy has not travel as their bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from h5traces.archive.recomputing import attention_weights as in_numpy
from h5traces.archive.recomputing import row_blocks
from h5traces.errors import ConversionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.format.attention import AttentionRule

# Of attention that is computed at a time.
_HEADS: Final = 8

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


def attention_weights(
    queries: NDArray[Any],
    keys: NDArray[Any],
    rule: AttentionRule,
    *,
    heads: NDArray[np.int64],
    rows: NDArray[np.int64],
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """As `h5traces.archive.recomputing.attention_weights`, on a device; numpy computes on CPUs."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(in_numpy(queries, keys, rule, heads=heads, rows=rows))
    return _on_device(queries, keys, rule, heads, rows, device)


def _on_device(
    queries: NDArray[Any],
    keys: NDArray[Any],
    rule: AttentionRule,
    heads: NDArray[np.int64],
    rows: NDArray[np.int64],
    device: str | torch.device,
) -> torch.Tensor:
    asked = torch.from_numpy(queries.astype(np.float32, copy=False)).to(device)
    known = torch.from_numpy(keys.astype(np.float32, copy=False)).to(device)
    found = torch.zeros((len(heads), len(rows), keys.shape[1]), device=device)
    for start in range(0, len(heads), _HEADS):
        some = torch.from_numpy(heads[start : start + _HEADS]).to(device)
        of_heads = asked[some] * rule.scale
        of_groups = known[some * len(keys) // len(queries)]
        slopes, sinks = (
            None if each is None else torch.tensor(each, device=device)[some][:, None, None]
            for each in (rule.slopes, rule.sinks)
        )
        for block in row_blocks(rule, rows, keys.shape[1]):
            low, high = block.low, block.high
            of_rows = of_heads[:, torch.from_numpy(block.rows).to(device)]
            scores = of_rows @ of_groups[:, low:high].mT
            if rule.soft_cap is not None:
                scores = (scores / rule.soft_cap).tanh_().mul_(rule.soft_cap)
            if slopes is not None:
                scores += slopes * torch.from_numpy(block.distances).to(device)
            first, end = (torch.from_numpy(each).to(device) for each in (block.first, block.end))
            for begin, stop in block.edges:
                columns = torch.arange(begin, stop, device=device)
                hidden = (columns < first[:, None]) | (columns >= end[:, None])
                scores[..., begin - low : stop - low].masked_fill_(hidden, -torch.inf)
            out = found[start : start + _HEADS, block.place, low:high]
            if sinks is None:
                out.copy_(scores.softmax(-1))
            else:
                taken = sinks.expand(*scores.shape[:2], 1)
                out.copy_(torch.cat([scores, taken], -1).softmax(-1)[..., :-1])
    return found
