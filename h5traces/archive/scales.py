"""The scales that an archive, or a file of scales, holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from h5traces.errors import CorruptArchiveError, HostileFileError, SchemaError
from h5traces.format import layout
from h5traces.format.digests import DIGEST, difference
from h5traces.format.document import from_attributes
from h5traces.format.precision import CalibrationRecord
from h5traces.precision.scales import (
    Calibration,
    ChannelScale,
    ScaleSet,
    layers_with_scales,
    read_scale,
    read_statistics,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from h5traces.archive.stores import Store
    from h5traces.format.entries import SampleEntry

# All scales of a file together; those of the largest models take a tenth of it.
MAX_SCALES_NBYTES: Final = 256 << 20


def stored_scale(store: Store, path: str) -> ChannelScale:
    """The scale of one layer.

    Parameters
    ----------
    store
        The file.
    path
        Such as ``hidden_states/layer_005``.

    Raises
    ------
    CorruptArchiveError
        It is missing, or is not what a scale is made of.
    """
    group = _group(store)
    if group is None:
        message = (
            f"/{layout.SCALES_GROUP} is missing, which encoded layers need; restore the file from "
            "a copy"
        )
        raise CorruptArchiveError(message)
    return _scale(store, group, path)


def stored_scales(store: Store) -> ScaleSet | None:
    """All scales of a file, None where it holds none.

    Raises
    ------
    CorruptArchiveError
        One is not whole.
    """
    group = _group(store)
    if group is None:
        return None
    with store.file.prefetched(_ranges(group)):
        layers = {path: _scale(store, group, path) for path in layers_with_scales(group.objects)}
    return ScaleSet(layers, _record(store, group))


def stored_statistics(store: Store) -> Calibration | None:
    """What the scales of a file, or a file of scales, can be made from; None without any.

    Raises
    ------
    CorruptArchiveError
        An array is missing, or holds what cannot be.
    """
    group = _group(store)
    if group is None:
        return None
    try:
        layers = {
            path: read_statistics(path, group.objects, lambda each: _values(store, group, each))
            for path in layers_with_scales(group.objects)
        }
    except CorruptArchiveError as error:
        raise _placed(store, error) from error
    return Calibration(layers, _record(store, group))


def _group(store: Store) -> SampleEntry | None:
    """The scales, if they are few enough to be held in memory all together."""
    group = store.scales()
    nbytes = 0 if group is None else sum(each.raw_nbytes for each in group.objects.values())
    if nbytes > MAX_SCALES_NBYTES:
        message = (
            f"{store.file.name}: /{layout.SCALES_GROUP}: scales take {nbytes} bytes; the limit is "
            f"{MAX_SCALES_NBYTES}"
        )
        raise HostileFileError(message)
    return group


def _values(store: Store, group: SampleEntry, path: str) -> NDArray[Any]:
    """One array; everything is decoded with it, so it must be the one that was written."""
    values, entry = store.read(group, path), group.objects[path]
    differs = difference(entry, values) if DIGEST in entry.attrs else None
    if differs is not None:
        message = f"/{path}: {differs}; restore the file from a copy"
        raise CorruptArchiveError(message)
    return values


def _ranges(group: SampleEntry) -> Iterator[tuple[int, int]]:
    for entry in group.objects.values():
        yield from entry.chunks.ranges if entry.chunks is not None else ()


def _record(store: Store, group: SampleEntry) -> CalibrationRecord | None:
    attrs = group.objects[layout.SCALES_GROUP].attrs
    try:
        return from_attributes(CalibrationRecord, attrs) if attrs else None
    except SchemaError as error:
        message = f"{store.file.name}: /{layout.SCALES_GROUP}: {error}"
        raise CorruptArchiveError(message) from error


def _scale(store: Store, group: SampleEntry, path: str) -> ChannelScale:
    try:
        return read_scale(path, group.objects, lambda each: _values(store, group, each))
    except CorruptArchiveError as error:
        raise _placed(store, error) from error


def _placed(store: Store, error: CorruptArchiveError) -> CorruptArchiveError:
    message = str(error)
    return (
        error
        if message.startswith(store.file.name)
        else type(error)(f"{store.file.name}: {message}")
    )
