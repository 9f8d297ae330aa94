"""PyTorch datasets over archives: map-style, iterable, shuffled by shard, resumable.

Examples
--------
>>> from h5traces.torch_data import TraceDataset                  # doctest: +SKIP
>>> dataset = TraceDataset("archives/", layers=[15], tokens="last")  # doctest: +SKIP
>>> dataset[0]["hidden_states"].shape                             # doctest: +SKIP
torch.Size([1, 4096])
"""

from h5traces.errors import MissingDependencyError

try:
    import torch  # noqa: F401  # only to see whether it is installed
except ImportError as error:
    message = "h5traces.torch_data needs torch, which is not installed; install h5traces[torch]"
    raise MissingDependencyError(message) from error

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
