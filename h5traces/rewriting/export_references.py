"""Exports where an archive's chunks lie, as kerchunk's JSON: zarr reads the archive itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.format.entries import carrier_dtype
from h5traces.storage.codecs import FILTER_SHUFFLE, FILTER_ZSTD, get_codec
from h5traces.storage.remote.paths import RemotePath

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h5traces.archive.archive import Archive
    from h5traces.archive.file import ArchiveFile
    from h5traces.format.document import Attrs
    from h5traces.format.entries import ObjectEntry
    from h5traces.storage.publish import PartFile

_VERSION: Final = 1
_ZARR_FORMAT: Final = 2
_LEVEL: Final = 6
_ZSTD_LEVEL: Final = 3
_AXES: Final = "_ARRAY_DIMENSIONS"


def write_references(archive: Archive, part: PartFile) -> None:
    """Write the references of all arrays of all samples: ``samples/00000000/hidden_states/…``.

    Chunks of an archive are what zarr's own codecs read: numcodecs' shuffle, then zlib or zstd.
    bfloat16, which zarr lacks, comes as its bits in uint16, with the attribute ``h5traces_type``.
    """
    part.file.write(f'{{"version": {_VERSION}, "refs": {{'.encode())
    separator = ""
    for key, value in _references(archive):
        text = f"{separator}\n{json.dumps(key)}: {json.dumps(value)}"
        part.file.write(text.encode())
        part.file.raise_error()
        separator = ","
    part.append(b"\n}}\n")


def _references(archive: Archive) -> Iterator[tuple[str, Any]]:
    group = _document({"zarr_format": _ZARR_FORMAT})
    yield ".zgroup", group
    yield ".zattrs", _attributes({"format": layout.FORMAT_NAME, "num_samples": len(archive)})
    yield f"{layout.SAMPLES_GROUP.strip('/')}/.zgroup", group
    numbers = itertools.count()
    for file in archive._files:
        address = _address(file)
        for index in range(file.num_samples):
            sample = file.sample(index)
            place = layout.sample_path(next(numbers)).strip("/")
            yield f"{place}/.zgroup", group
            yield f"{place}/.zattrs", _attributes(sample.attrs)
            for path in sample.objects:
                entry = file.entry(sample, path)
                yield f"{place}/{path}/.zattrs", _attributes(entry.attrs, entry)
                if entry.is_group:
                    yield f"{place}/{path}/.zgroup", group
                else:
                    yield f"{place}/{path}/.zarray", _document(_array(entry, file))
                    yield from _chunks(f"{place}/{path}", entry, address)


def _address(file: ArchiveFile) -> str:
    if isinstance(file.path, RemotePath):
        return str(file.path)
    return str(Path(file.path).resolve())


def _document(content: dict[str, Any]) -> str:
    return json.dumps(content)


def _attributes(attrs: Attrs, entry: ObjectEntry | None = None) -> str:
    found: dict[str, Any] = dict(attrs)
    if entry is not None and not entry.is_group:
        found[_AXES] = list(_axes(entry))
        found |= {"h5traces_type": entry.dtype} if entry.dtype == "bfloat16" else {}
    return _document(found)


def _axes(entry: ObjectEntry) -> tuple[str, ...]:
    kind, _, name = entry.path.partition("/")
    axes = layout.KINDS[kind].axes if kind in layout.KINDS else ()
    if len(axes) == len(entry.shape) and layout.parse_layer_name(name) is not None:
        return axes
    # Separate names, so that xarray takes no two lengths for one.
    return tuple(f"{entry.path.replace('/', '_')}_{axis}" for axis in range(len(entry.shape)))


def _array(entry: ObjectEntry, file: ArchiveFile) -> dict[str, Any]:
    if entry.codec is None or entry.chunks is None:
        message = (
            f"{file.path}: {entry.path}: where its chunks lie is not known; run 'h5traces seal' on "
            "the archive first"
        )
        raise ConversionError(message)
    dtype = carrier_dtype(entry.dtype)
    steps = get_codec(entry.codec).pipeline(dtype.itemsize)
    return {
        "zarr_format": _ZARR_FORMAT,
        "shape": list(entry.shape),
        "chunks": list(entry.chunk),
        "dtype": dtype.str,
        "order": "C",
        "fill_value": None,
        # All as filters: VirtualiZarr takes them so, and zarr either way.
        "filters": [_codec(each.filter_id, dtype.itemsize) for each in steps],
        "compressor": None,
    }


def _codec(filter_id: int, itemsize: int) -> dict[str, Any]:
    """The codec of numcodecs that undoes a filter of HDF5."""
    if filter_id == FILTER_SHUFFLE:
        return {"id": "shuffle", "elementsize": itemsize}
    if filter_id == FILTER_ZSTD:
        return {"id": "zstd", "level": _ZSTD_LEVEL}
    return {"id": "zlib", "level": _LEVEL}


def _chunks(place: str, entry: ObjectEntry, address: str) -> Iterator[tuple[str, Any]]:
    grid = [
        range(-(-length // size)) for length, size in zip(entry.shape, entry.chunk, strict=True)
    ]
    assert entry.chunks is not None
    for numbers, (offset, size) in zip(itertools.product(*grid), entry.chunks.ranges, strict=True):
        yield f"{place}/{'.'.join(map(str, numbers))}", [address, offset, size]
