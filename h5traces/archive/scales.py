"""The scales that an archive, or a file of scales, holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import numpy as np

from h5traces.errors import CorruptArchiveError, HostileFileError, SchemaError
from h5traces.format import layout
from h5traces.format.digests import DIGEST, difference
from h5traces.format.document import from_attributes
from h5traces.format.precision import CalibrationRecord
from h5traces.precision.scales import (
    CENTER,
    NAMES,
    OFFSET,
    SIGMA,
    STEP,
    Calibration,
    ChannelScale,
    ChannelStatistics,
    ScaleSet,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from h5traces.archive.hdf5_store import Store
    from h5traces.format.entries import ObjectEntry, SampleEntry

# All scales of a file together; those of the largest models take a tenth of it.
MAX_SCALES_NBYTES: Final = 256 << 20


# Of stores in use: every layer asks for its own scale.
_GROUPS: Final[WeakKeyDictionary[Store, SampleEntry | None]] = WeakKeyDictionary()


def stored_scale(store: Store, path: str) -> ChannelScale:
    """The scale of a layer such as ``hidden_states/layer_005``; an error without one."""
    group = _group(store)
    if group is None:
        message = (
            f"/{layout.SCALES_GROUP} is missing, which encoded layers need; restore the file from "
            "a copy"
        )
        raise CorruptArchiveError(message)
    return _scale(store, group, path)


def stored_scales(store: Store) -> ScaleSet | None:
    """All scales of a file, None if it holds none; CorruptArchiveError if one is not whole."""
    group = _group(store)
    if group is None:
        return None
    chunks = (each.chunks for each in group.objects.values() if each.chunks is not None)
    with store.file.prefetched(part for each in chunks for part in each.ranges):
        layers = {path: _scale(store, group, path) for path in layers_with_scales(group.objects)}
    return ScaleSet(layers, _record(store, group))


def stored_statistics(store: Store) -> Calibration | None:
    """The statistics in an archive or a file of scales, None without any.

    CorruptArchiveError where an array is missing, or holds what cannot be.
    """
    group = _group(store)
    if group is None:
        return None
    layers = {path: _statistics(store, group, path) for path in layers_with_scales(group.objects)}
    return Calibration(layers, _record(store, group))


def layers_with_scales(objects: Mapping[str, ObjectEntry]) -> list[str]:
    """Paths of the layers that have a scale, or a part of one."""
    prefix = f"{layout.SCALES_GROUP}/"
    found = (
        path.removeprefix(prefix).rpartition("/") for path in objects if path.startswith(prefix)
    )
    return list(dict.fromkeys(layer for layer, _, name in found if name in NAMES))


def _group(store: Store) -> SampleEntry | None:
    """The objects of the scales, if they are few enough to be held in memory."""
    if store in _GROUPS:
        return _GROUPS[store]
    group = store.scales()
    nbytes = 0 if group is None else sum(each.raw_nbytes for each in group.objects.values())
    if nbytes > MAX_SCALES_NBYTES:
        message = (
            f"{store.file.name}: /{layout.SCALES_GROUP}: scales take {nbytes} bytes; the limit is "
            f"{MAX_SCALES_NBYTES}"
        )
        raise HostileFileError(message)
    _GROUPS[store] = group
    return group


def _scale(store: Store, group: SampleEntry, path: str) -> ChannelScale:
    step, offset, sigma = _arrays(store, group, path, (STEP, OFFSET, SIGMA))
    if not ((step > 0).all() and np.isfinite(step).all() and np.isfinite(offset).all()):
        raise _error(store, path, "steps must be greater than zero, and all values finite")
    return ChannelScale(step, offset, sigma)


def _statistics(store: Store, group: SampleEntry, path: str) -> ChannelStatistics:
    """From a calibration, or from the scales of an archive."""
    has_scale = f"{layout.SCALES_GROUP}/{path}/{OFFSET}" in group.objects
    center, sigma = _arrays(store, group, path, (OFFSET if has_scale else CENTER, SIGMA))
    if not ((sigma >= 0).all() and np.isfinite(sigma).all() and np.isfinite(center).all()):
        raise _error(store, path, f"values must be finite, and {SIGMA} not negative")
    return ChannelStatistics(center, sigma)


def _arrays(
    store: Store, group: SampleEntry, path: str, names: tuple[str, ...]
) -> list[NDArray[np.float32]]:
    """Arrays of one layer; none is read before all are known to be of the same width."""
    widths = [_width(store, group, f"{path}/{name}") for name in names]
    if len(set(widths)) > 1:
        message = f"{_listed(names)} have {_listed(widths)} channels; expected as many of each"
        raise _error(store, path, message)
    return [_values(store, group, f"{path}/{name}") for name in names]


def _width(store: Store, group: SampleEntry, path: str) -> int:
    entry = group.objects.get(f"{layout.SCALES_GROUP}/{path}")
    if entry is None:
        message = "is missing, which encoded layers need; restore the file from a copy"
        raise _error(store, path, message)
    if entry.dtype != "float32" or len(entry.shape) != 1:
        message = f"is {entry.dtype or 'a group'} {entry.shape}, expected float32 (hidden)"
        raise _error(store, path, message)
    return entry.shape[0]


def _values(store: Store, group: SampleEntry, path: str) -> NDArray[Any]:
    """One array; everything is decoded with it, so it must be the one that was written."""
    place = f"{layout.SCALES_GROUP}/{path}"
    values, entry = store.read(group, place), group.objects[place]
    differs = difference(entry, values) if DIGEST in entry.attrs else None
    if differs is not None:
        raise _error(store, path, f"{differs}; restore the file from a copy")
    return values


def _record(store: Store, group: SampleEntry) -> CalibrationRecord | None:
    attrs = group.objects[layout.SCALES_GROUP].attrs
    try:
        return from_attributes(CalibrationRecord, attrs) if attrs else None
    except SchemaError as error:
        message = f"{store.file.name}: /{layout.SCALES_GROUP}: {error}"
        raise CorruptArchiveError(message) from error


def _error(store: Store, path: str, what: str) -> CorruptArchiveError:
    return CorruptArchiveError(f"{store.file.name}: /{layout.SCALES_GROUP}/{path}: {what}")


def _listed(items: Sequence[object]) -> str:
    return f"{', '.join(map(str, items[:-1]))} and {items[-1]}"
