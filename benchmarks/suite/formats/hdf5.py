"""HDF5 through h5py, as one writes it without h5traces; the same groups and names."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from suite.formats.base import Format, Sample, sync
from suite.synthetic import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

STOCK: Final = "stock h5py gzip 4 + shuffle"
STOCK_WHOLE: Final = "stock h5py gzip 4 + shuffle, one chunk per array"


class Hdf5(Format):
    """A group per sample, a dataset per layer.

    Parameters
    ----------
    name
        As in the report.
    settings
        Makes the keyword arguments of ``create_dataset``.
    whole
        Whether an array is one chunk; else h5py chooses smaller ones.
    modules
        What it needs.
    """

    suffix: ClassVar[str] = ".h5"

    def __init__(
        self,
        name: str,
        settings: Callable[[], dict[str, Any]],
        *,
        whole: bool,
        modules: tuple[str, ...] = ("h5py",),
    ) -> None:
        self.name, self.modules = name, modules
        self._settings, self._whole = settings, whole

    def write(self, samples: Iterable[Sample], path: Path) -> None:
        import h5py

        settings, text_type = self._settings(), h5py.string_dtype()
        with h5py.File(path, "x") as file:
            for index, sample in enumerate(samples):
                group = file.create_group(f"samples/{index:08d}")
                group.attrs["question_id"] = sample["question_id"]
                group.attrs["generated_answer_clean"] = sample["generated_answer_clean"]
                group.create_dataset("tokens", data=sample["tokens"])
                decoded = np.array(sample["tokens_decoded"], dtype=object)
                group.create_dataset("tokens_decoded", data=decoded, dtype=text_type)
                for kind in KINDS:
                    layers = group.create_group(kind)
                    for layer, array in enumerate(sample[kind]):
                        chunks = array.shape if self._whole else True
                        layers.create_dataset(
                            f"layer_{layer:03d}", data=array, chunks=chunks, **settings
                        )
        sync(path)

    def scan(self, path: Path) -> None:
        import h5py

        with h5py.File(path, "r") as file:
            for group in file["samples"].values():
                for kind in KINDS:
                    for dataset in group[kind].values():
                        dataset[...]

    @contextlib.contextmanager
    def reader(self, path: Path) -> Iterator[Any]:
        import h5py

        with h5py.File(path, "r") as file:
            yield lambda index, layer: [
                file[f"samples/{index:08d}/{kind}/layer_{layer:03d}"][...] for kind in KINDS
            ]

    def count(self, path: Path) -> int:
        import h5py

        with h5py.File(path, "r") as file:
            return len(file["samples"])


def _gzip() -> dict[str, Any]:
    return {"compression": "gzip", "compression_opts": 4, "shuffle": True}


def _zstd() -> dict[str, Any]:
    import hdf5plugin

    return {"shuffle": True, **hdf5plugin.Zstd(clevel=3)}


def _blosc2() -> dict[str, Any]:
    import hdf5plugin

    shuffle = hdf5plugin.Blosc2.SHUFFLE
    return dict(hdf5plugin.Blosc2(cname="zstd", clevel=5, filters=shuffle))


def stock() -> Hdf5:
    """What most people write; h5py cuts an array into chunks of some kilobytes."""
    return Hdf5(STOCK, _gzip, whole=False)


def stock_whole() -> Hdf5:
    """The same for people who know about chunks."""
    return Hdf5(STOCK_WHOLE, _gzip, whole=True)


def zstd() -> Hdf5:
    """The zstd filter, level 3, behind HDF5's shuffle."""
    modules = ("h5py", "hdf5plugin")
    return Hdf5("h5py + hdf5plugin zstd 3 + shuffle", _zstd, whole=True, modules=modules)


def blosc2() -> Hdf5:
    """The Blosc2 filter with zstd level 5 and its own shuffle."""
    modules = ("h5py", "hdf5plugin")
    return Hdf5("h5py + hdf5plugin blosc2 zstd 5", _blosc2, whole=True, modules=modules)
