"""Scales as datasets of an HDF5 file, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import CorruptArchiveError
from h5traces.format import layout
from h5traces.precision.scales import ChannelScale, ChannelStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from h5traces.format.entries import ObjectEntry
    from h5traces.precision.scales import Calibration, ScaleSet

CENTER: Final = "center"
STEP: Final = "step"
OFFSET: Final = "offset"
SIGMA: Final = "sigma"
NAMES: Final = frozenset({CENTER, STEP, OFFSET, SIGMA})


def scale_arrays(scales: ScaleSet) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every dataset of a set of scales: path below the root, and values ``(hidden,)``."""
    for path, scale in scales.layers.items():
        place = f"{layout.SCALES_GROUP}/{path}"
        for name, values in ((STEP, scale.step), (OFFSET, scale.offset), (SIGMA, scale.sigma)):
            yield f"{place}/{name}", np.ascontiguousarray(values, "<f4")


def statistics_arrays(calibration: Calibration) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every dataset of a calibration: path below the root, and values ``(hidden,)``."""
    for path, each in calibration.layers.items():
        place = f"{layout.SCALES_GROUP}/{path}"
        for name, values in ((CENTER, each.center), (SIGMA, each.sigma)):
            yield f"{place}/{name}", np.ascontiguousarray(values, "<f4")


def read_statistics(
    path: str, objects: Mapping[str, ObjectEntry], read: Callable[[str], NDArray[Any]]
) -> ChannelStatistics:
    """What is usual in a layer, from a calibration, or from the scales of an archive.

    Raises
    ------
    CorruptArchiveError
        An array is missing, or holds what cannot be.
    """
    place = f"{layout.SCALES_GROUP}/{path}"
    name = OFFSET if f"{place}/{OFFSET}" in objects else CENTER
    center, sigma = _arrays(place, (name, SIGMA), objects, read)
    if not ((sigma >= 0).all() and np.isfinite(sigma).all() and np.isfinite(center).all()):
        message = f"/{place}: values must be finite, and {SIGMA} not negative"
        raise CorruptArchiveError(message)
    return ChannelStatistics(center, sigma)


def read_scale(
    path: str,
    objects: Mapping[str, ObjectEntry],
    read: Callable[[str], NDArray[Any]],
) -> ChannelScale:
    """The scale of a layer.

    Parameters
    ----------
    path
        Of the layer, such as ``hidden_states/layer_005``.
    objects
        What is stored, by path below the root.
    read
        Gives the values of a dataset.

    Raises
    ------
    CorruptArchiveError
        An array is missing, or is not what a scale is made of.
    """
    place = f"{layout.SCALES_GROUP}/{path}"
    step, offset, sigma = _arrays(place, (STEP, OFFSET, SIGMA), objects, read)
    if not ((step > 0).all() and np.isfinite(step).all() and np.isfinite(offset).all()):
        message = f"/{place}: steps must be greater than zero, and all values finite"
        raise CorruptArchiveError(message)
    return ChannelScale(step, offset, sigma)


def _arrays(
    place: str,
    names: tuple[str, ...],
    objects: Mapping[str, ObjectEntry],
    read: Callable[[str], NDArray[Any]],
) -> list[NDArray[np.float32]]:
    """Arrays of one scale; none is read before all are known to be of the same width."""
    paths = [f"{place}/{name}" for name in names]
    widths = [_width(path, objects) for path in paths]
    if len(set(widths)) > 1:
        message = (
            f"/{place}: {_listed(names)} have {_listed(widths)} channels; expected as many of each"
        )
        raise CorruptArchiveError(message)
    return [read(path) for path in paths]


def _listed(items: Sequence[object]) -> str:
    return f"{', '.join(map(str, items[:-1]))} and {items[-1]}"


def _width(path: str, objects: Mapping[str, ObjectEntry]) -> int:
    entry = objects.get(path)
    if entry is None:
        message = f"/{path} is missing, which encoded layers need; restore the file from a copy"
        raise CorruptArchiveError(message)
    if entry.dtype != "float32" or len(entry.shape) != 1:
        message = f"/{path}: is {entry.dtype or 'a group'} {entry.shape}, expected float32 (hidden)"
        raise CorruptArchiveError(message)
    return entry.shape[0]


def layers_with_scales(objects: Mapping[str, ObjectEntry]) -> list[str]:
    """Paths of the layers that have a scale, or a part of one."""
    prefix = f"{layout.SCALES_GROUP}/"
    found = (
        path.removeprefix(prefix).rpartition("/") for path in objects if path.startswith(prefix)
    )
    return list(dict.fromkeys(layer for layer, _, name in found if name in NAMES))
