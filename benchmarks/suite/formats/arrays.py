"""Formats for arrays in general: npz, torch, safetensors, zarr."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from suite.formats.base import Format, Sample, array_name, array_names, sync, texts
from suite.synthetic import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


def _num_samples(names: Iterable[str]) -> int:
    return len({name.partition("/")[0] for name in names if name[0].isdigit()})


class NumpyCompressed(Format):
    """A zip file of deflated .npy members."""

    name = "numpy.savez_compressed"
    suffix: ClassVar[str] = ".npz"

    def write(self, samples: Iterable[Sample], path: Path) -> None:
        batch = list(samples)
        document = np.array(json.dumps([texts(sample) for sample in batch]))
        arrays: dict[str, Any] = dict(array_names(batch))
        np.savez_compressed(path, texts=document, **arrays)
        sync(path)

    def scan(self, path: Path) -> None:
        with np.load(path) as file:
            for name in file.files:
                file[name]

    @contextlib.contextmanager
    def reader(self, path: Path) -> Iterator[Any]:
        with np.load(path) as file:
            yield lambda index, layer: [file[array_name(index, kind, layer)] for kind in KINDS]

    def count(self, path: Path) -> int:
        with np.load(path) as file:
            return _num_samples(file.files)


class TorchSave(Format):
    """A zip file of a pickle and uncompressed tensors; mapped into memory for single layers."""

    name = "torch.save"
    modules = ("torch",)
    suffix: ClassVar[str] = ".pt"

    def write(self, samples: Iterable[Sample], path: Path) -> None:
        import torch

        batch = [
            {
                **texts(sample),
                **{kind: [torch.from_numpy(array) for array in sample[kind]] for kind in KINDS},
                "tokens": torch.from_numpy(sample["tokens"]),
            }
            for sample in samples
        ]
        torch.save(batch, path)
        sync(path)

    def scan(self, path: Path) -> None:
        import torch

        torch.load(path, weights_only=True)

    @contextlib.contextmanager
    def reader(self, path: Path) -> Iterator[Any]:
        import torch

        batch = torch.load(path, weights_only=True, mmap=True)
        yield lambda index, layer: [batch[index][kind][layer].clone().numpy() for kind in KINDS]

    def count(self, path: Path) -> int:
        import torch

        return len(torch.load(path, weights_only=True, mmap=True))


class SafeTensors(Format):
    """Uncompressed tensors behind a JSON header: close to what memory and disk can do."""

    name = "safetensors"
    modules = ("safetensors",)
    suffix: ClassVar[str] = ".safetensors"

    def write(self, samples: Iterable[Sample], path: Path) -> None:
        from safetensors.numpy import save_file

        batch = list(samples)
        metadata = {f"{index:08d}": json.dumps(texts(each)) for index, each in enumerate(batch)}
        save_file(dict(array_names(batch)), path, metadata)
        sync(path)

    def scan(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            for name in file.keys():  # not a dict
                file.get_tensor(name)

    @contextlib.contextmanager
    def reader(self, path: Path) -> Iterator[Any]:
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            yield lambda index, layer: [
                file.get_tensor(array_name(index, kind, layer)) for kind in KINDS
            ]

    def count(self, path: Path) -> int:
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            return _num_samples(file.keys())


class Zarr(Format):
    """Zarr format 3 in a folder, chunks and codec (zstd) by default."""

    name = "zarr 3"
    modules = ("zarr",)
    suffix: ClassVar[str] = ".zarr"

    def write(self, samples: Iterable[Sample], path: Path) -> None:
        import zarr

        root = zarr.open_group(path, mode="w-")
        for index, sample in enumerate(samples):
            group = root.create_group(f"{index:08d}", attributes=texts(sample))
            group.create_array("tokens", data=sample["tokens"])
            for kind in KINDS:
                layers = group.create_group(kind)
                for layer, array in enumerate(sample[kind]):
                    layers.create_array(f"{layer:03d}", data=array)
        sync(path)

    def scan(self, path: Path) -> None:
        import zarr

        root = zarr.open_group(path, mode="r")
        for _, group in root.groups():
            for _, layers in group.groups():
                for _, array in layers.arrays():
                    array[...]

    @contextlib.contextmanager
    def reader(self, path: Path) -> Iterator[Any]:
        import zarr

        root: Any = zarr.open_group(path, mode="r")
        yield lambda index, layer: [root[array_name(index, kind, layer)][...] for kind in KINDS]

    def count(self, path: Path) -> int:
        import zarr

        return len(list(zarr.open_group(path, mode="r").group_keys()))
