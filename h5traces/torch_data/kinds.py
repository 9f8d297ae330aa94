"""What the shards of a dataset store: their kinds, axes and layers, checked before training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from h5traces.errors import DatasetError, LayerIndexError
from h5traces.format import layout

if TYPE_CHECKING:
    from h5traces.archive.archive import Archive
    from h5traces.archive.file import ArchiveFile


def axes_of(archive: Archive, kind: str) -> tuple[str, ...]:
    """Names of the axes of one layer's array of a kind."""
    if kind in layout.KINDS:
        return layout.KINDS[kind].axes
    axes = json.loads(str(_declared(archive.files[0], kind)["axes"]))
    return tuple(str(axis) for axis in axes)


def check_layers(archive: Archive, kinds: tuple[str, ...], layers: tuple[int, ...]) -> None:
    """Refuse shards that do not store the kinds and layers asked for.

    Raises
    ------
    DatasetError
        No kind or no layer was asked for, or a shard does not store a kind.
    LayerIndexError
        A shard does not store a layer.
    """
    if not kinds:
        message = "kinds is empty, expected for instance ('hidden_states',)"
        raise DatasetError(message)
    for file in archive.files:
        if not file.num_samples:
            continue
        for kind in kinds:
            _check_stored(file, kind, layers)
    if not layers and len(archive):
        message = f"{archive.paths[0]}: layers is empty, or the archive stores no layers"
        raise DatasetError(message)


def _check_stored(file: ArchiveFile, kind: str, layers: tuple[int, ...]) -> None:
    stored = _declared(file, kind).get("layers", ())
    missing = [each for each in layers if not isinstance(stored, tuple) or each not in stored]
    if missing:
        message = (
            f"{file.path}: layers {missing} of {kind} are not stored; stored: "
            f"{list(stored) if isinstance(stored, tuple) else stored}; choose other layers="
        )
        raise LayerIndexError(message)


def _declared(file: ArchiveFile, kind: str) -> dict[str, object]:
    kinds = file.store.kinds
    if kind not in kinds:
        message = (
            f"{file.path}: stores no {kind}; stored: {', '.join(kinds) or 'no kinds'}; choose "
            "other kinds=, or name the shards that have them"
        )
        raise DatasetError(message)
    return dict(kinds[kind])
