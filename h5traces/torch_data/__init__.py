"""PyTorch datasets over archives: map-style, iterable, shuffled by shard, resumable.

Examples
--------
>>> from h5traces.torch_data import TraceDataset                  # doctest: +SKIP
>>> dataset = TraceDataset("archives/", layers=[15], tokens="last")  # doctest: +SKIP
>>> dataset[0]["hidden_states"].shape                             # doctest: +SKIP
torch.Size([1, 4096])
"""

from typing import TYPE_CHECKING

from h5traces.lazy import lazy_names

if TYPE_CHECKING:
    from h5traces.torch_data.collate import PackCollate, PadCollate, pack_collate, pad_collate
    from h5traces.torch_data.dataset import Labels, TraceDataset
    from h5traces.torch_data.device import DeviceLoader, to_device
    from h5traces.torch_data.iterable import IterableTraceDataset
    from h5traces.torch_data.sampler import ShardSampler
    from h5traces.torch_data.tensors import Tokens

__all__ = [
    "DeviceLoader",
    "IterableTraceDataset",
    "Labels",
    "PackCollate",
    "PadCollate",
    "ShardSampler",
    "Tokens",
    "TraceDataset",
    "pack_collate",
    "pad_collate",
    "to_device",
]

_HOMES = {
    "DeviceLoader": "h5traces.torch_data.device",
    "IterableTraceDataset": "h5traces.torch_data.iterable",
    "Labels": "h5traces.torch_data.dataset",
    "PackCollate": "h5traces.torch_data.collate",
    "PadCollate": "h5traces.torch_data.collate",
    "ShardSampler": "h5traces.torch_data.sampler",
    "Tokens": "h5traces.torch_data.tensors",
    "TraceDataset": "h5traces.torch_data.dataset",
    "pack_collate": "h5traces.torch_data.collate",
    "pad_collate": "h5traces.torch_data.collate",
    "to_device": "h5traces.torch_data.device",
}
if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _HOMES, extra="torch")
