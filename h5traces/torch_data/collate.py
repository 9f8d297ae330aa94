"""Samples of unequal length as one batch: padded with masks, or packed with offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from h5traces.arguments import checked
from h5traces.errors import DatasetError
from h5traces.torch_data.tensors import TOKEN_AXES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Item = dict[str, Any]
Axes = tuple[tuple[str, tuple[str, ...]], ...]
MASK, KEY_MASK, LENGTHS = "mask", "key_mask", "lengths"


class HasAxes(Protocol):
    """A dataset that names the axes of its items' tensors."""

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """Names of axes by the names of tensors."""


@checked
def pad_collate(dataset: HasAxes, *, pad_value: float = 0.0) -> PadCollate:
    """The ``collate_fn`` that pads the sequences of a dataset's items to the longest one."""
    return PadCollate(tuple(dataset.axes.items()), pad_value)


@checked
def pack_collate(dataset: HasAxes) -> PackCollate:
    """The ``collate_fn`` that concatenates the sequences of a dataset's items."""
    return PackCollate(tuple(dataset.axes.items()))


@dataclass(frozen=True, slots=True)
class PadCollate:
    """Pads token, query and key axes to the longest of the batch.

    The batch holds every entry of the items (tensors stacked, numbers as a tensor, other values as
    a list), and

    - ``mask``: bool ``(batch, tokens)``, true where there is a token, and no padding of the batch
      or of the sample itself;
    - ``lengths``: int64 ``(batch,)``, tokens of each sample;
    - ``key_mask``: bool ``(batch, keys)``, where a tensor has keys.

    Attributes
    ----------
    axes
        Names of tensors and of their axes.
    pad_value
        Value of the padding.
    """

    axes: Axes
    pad_value: float = 0.0

    def __call__(self, items: Sequence[Item]) -> Item:
        """The batch of some items."""
        batch = _other_entries(items, self.axes)
        for name, axes in self.axes:
            tensors = [item[name] for item in items]
            batch[name] = _padded(tensors, name, axes, self.pad_value)
            lengths = _lengths(tensors, axes, TOKEN_AXES)
            if lengths is not None and LENGTHS not in batch:
                batch[MASK] = _mask(lengths, items, MASK)
                batch[LENGTHS] = batch[MASK].sum(dim=1)
            keys = _lengths(tensors, axes, ("key",))
            if keys is not None and KEY_MASK not in batch:
                batch[KEY_MASK] = _mask(keys, items, KEY_MASK)
        return batch


@dataclass(frozen=True, slots=True)
class PackCollate:
    """Concatenates sequences, without padding, also without that of the samples.

    Tensors with a token axis are joined along it. Tensors with keys (attentions) have two axes of
    unequal length: they become one flat tensor, with ``<name>_offsets`` ``(batch + 1,)`` and
    ``<name>_shapes`` ``(batch, axes)``. The batch also holds:

    - ``cu_seqlens``: int32 ``(batch + 1,)``, the beginning of each sample, for FlashAttention;
    - ``max_seqlen``: the largest length, an int;
    - ``lengths``: int64 ``(batch,)``;
    - ``sample_index``: int64 ``(tokens,)``, the sample of the batch that each token belongs to.

    Attributes
    ----------
    axes
        Names of tensors and of their axes.
    """

    axes: Axes

    def __call__(self, items: Sequence[Item]) -> Item:
        """The batch of some items."""
        batch = _other_entries(items, self.axes)
        for name, axes in self.axes:
            tensors = [_without_padding(item, name, axes) for item in items]
            lengths = _lengths(tensors, axes, TOKEN_AXES)
            axis = _axis(axes, TOKEN_AXES)
            if "key" in axes:
                batch |= _flattened(tensors, name)
            elif axis is None:
                _check_alike(tensors, name, axes)
                batch[name] = torch.stack(tensors)
            else:
                batch[name] = torch.cat(tensors, dim=axis)
            if lengths is not None and LENGTHS not in batch:
                batch |= _sequence_bounds(lengths)
        return batch


def _sequence_bounds(lengths: torch.Tensor) -> Item:
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, out=bounds[1:])
    return {
        LENGTHS: lengths,
        "cu_seqlens": bounds,
        "max_seqlen": int(lengths.max()),
        "sample_index": torch.repeat_interleave(torch.arange(len(lengths)), lengths),
    }


def _flattened(tensors: list[torch.Tensor], name: str) -> Item:
    sizes = torch.tensor([0, *(tensor.numel() for tensor in tensors)])
    return {
        name: torch.cat([tensor.reshape(-1) for tensor in tensors]),
        f"{name}_offsets": sizes.cumsum(0),
        f"{name}_shapes": torch.tensor([tuple(tensor.shape) for tensor in tensors]),
    }


def _axis(axes: tuple[str, ...], wanted: tuple[str, ...]) -> int | None:
    return next((number for number, name in enumerate(axes) if name in wanted), None)


def _lengths(
    tensors: list[torch.Tensor], axes: tuple[str, ...], wanted: tuple[str, ...]
) -> torch.Tensor | None:
    axis = _axis(axes, wanted)
    return None if axis is None else torch.tensor([tensor.shape[axis] for tensor in tensors])


def _mask(lengths: torch.Tensor, items: Sequence[Item], name: str) -> torch.Tensor:
    """Where there are tokens: within each length, and in the mask of an item that has one."""
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    for row, item in zip(mask, items, strict=True):
        if name in item:
            row[: len(item[name])] &= item[name]
    return mask


def _without_padding(item: Item, name: str, axes: tuple[str, ...]) -> torch.Tensor:
    """A tensor without the tokens and keys that the item's masks leave out."""
    tensor: torch.Tensor = item[name]
    for mask, wanted in ((MASK, TOKEN_AXES), (KEY_MASK, ("key",))):
        axis = _axis(axes, wanted)
        if mask in item and axis is not None:
            tensor = tensor.index_select(axis, item[mask].nonzero().squeeze(1))
    return tensor


def _padded(
    tensors: list[torch.Tensor], name: str, axes: tuple[str, ...], pad_value: float
) -> torch.Tensor:
    """One tensor with a batch axis in front; each sample is copied once, to its place."""
    _check_alike(tensors, name, axes)
    shapes = [tensor.shape for tensor in tensors]
    if len(set(shapes)) == 1:
        return torch.stack(tensors)
    longest = [max(lengths) for lengths in zip(*shapes, strict=True)]
    padded = torch.full((len(tensors), *longest), pad_value, dtype=tensors[0].dtype)
    for place, tensor in zip(padded, tensors, strict=True):
        place[tuple(slice(0, length) for length in tensor.shape)] = tensor
    return padded


def _check_alike(tensors: list[torch.Tensor], name: str, axes: tuple[str, ...]) -> None:
    """Raise DatasetError where layers, heads or channels differ, which cannot be padded."""
    first = tensors[0]
    for number, tensor in enumerate(tensors):
        differing = [
            axis
            for axis, ours, theirs in zip(axes, first.shape, tensor.shape, strict=True)
            if ours != theirs and axis not in (*TOKEN_AXES, "key")
        ]
        if differing or tensor.dtype != first.dtype:
            message = (
                f"{name}: item {number} of the batch is {tuple(tensor.shape)} {tensor.dtype}, item "
                f"0 is {tuple(first.shape)} {first.dtype}; only token, query and key axes are "
                "padded: choose layers= that are alike, and a dtype="
            )
            raise DatasetError(message)


def _other_entries(items: Sequence[Item], axes: Axes) -> Item:
    """Entries without named axes: numbers as a tensor, the rest as a list."""
    collated = {MASK, KEY_MASK, *(name for name, _ in axes)}
    batch: Item = {}
    for name in items[0]:
        if name in collated:
            continue
        values = [item[name] for item in items]
        if all(isinstance(value, torch.Tensor) for value in values):
            batch[name] = torch.stack(values)
        elif all(isinstance(value, (int, float)) for value in values):
            batch[name] = torch.tensor(values)
        else:
            batch[name] = values
    return batch
