"""The scales that an archive, or a file of scales, holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from h5traces import layout
from h5traces.errors import CorruptArchiveError, SchemaError
from h5traces.precision import (
    Calibration,
    ChannelScale,
    ScaleSet,
    layers_with_scales,
    read_scale,
    read_statistics,
)
from h5traces.schema import CalibrationRecord
from h5traces.schema.attributes import from_attributes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h5traces.archive.store import Store
    from h5traces.storage.objects import SampleEntry


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
    group = store.scales()
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
    group = store.scales()
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
    group = store.scales()
    if group is None:
        return None
    try:
        layers = {
            path: read_statistics(path, group.objects, lambda each: store.read(group, each))
            for path in layers_with_scales(group.objects)
        }
    except CorruptArchiveError as error:
        raise _placed(store, error) from error
    return Calibration(layers, _record(store, group))


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
        return read_scale(path, group.objects, lambda each: store.read(group, each))
    except CorruptArchiveError as error:
        raise _placed(store, error) from error


def _placed(store: Store, error: CorruptArchiveError) -> CorruptArchiveError:
    message = str(error)
    return (
        error
        if message.startswith(store.file.name)
        else type(error)(f"{store.file.name}: {message}")
    )
