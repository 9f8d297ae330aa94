"""Exports archives as files of ``torch.save``: a list of dicts, written one sample at a time."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from h5traces.archive.trace import Trace
    from h5traces.storage.publish import PartFile

_ROOT: Final = "archive"
# Types that torch.save takes; torch.load with weights_only reads no others.
_PROTOCOL: Final = 2
_HEADER_NBYTES: Final = 2
# torch pads entries to this, so that a mapped file gives aligned tensors.
_ALIGNMENT: Final = 64
_LOCAL_HEADER_NBYTES: Final = 30
_ZIP64_NBYTES: Final = 20
_PADDING: Final = struct.Struct("<2sH")


def write_torch(traces: Iterable[Trace], part: PartFile) -> None:
    """Write traces as ``torch.save(list_of_dicts, file)`` would; all arrays are tensors.

    The storages of a sample go to the file before the next sample is read; the pickle that refers
    to them comes last.
    """
    document = io.BytesIO()
    document.write(pickle.PROTO + bytes([_PROTOCOL]) + pickle.EMPTY_LIST)
    with zipfile.ZipFile(part.file, "w", zipfile.ZIP_STORED) as archive:
        writer = _Storages(archive, part)
        for trace in traces:
            fragment = io.BytesIO()
            pickler = _Pickler(fragment, protocol=_PROTOCOL)
            pickler.keep = writer.add
            pickler.dump(_plain(trace.to_dict(container="torch")))
            # Without its own header and STOP: the dict, then "append it to the list".
            document.write(fragment.getbuffer()[_HEADER_NBYTES : -len(pickle.STOP)])
            document.write(pickle.APPEND)
        document.write(pickle.STOP)
        writer.write("byteorder", b"little")
        writer.write("data.pkl", document.getbuffer())
        writer.write("version", b"3\n")
    part.file.raise_error()


def _plain(value: Any) -> Any:
    """Numbers of numpy as those of Python, which ``weights_only`` takes."""
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return value.item()
    if type(value) is dict:
        return {key: _plain(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(each) for each in value)
    return value


class _Storages:
    """Writes the entries of the zip file."""

    def __init__(self, archive: zipfile.ZipFile, part: PartFile) -> None:
        self._archive, self._part = archive, part
        self._number = 0

    def add(self, storage: torch.UntypedStorage) -> str:
        """Write a storage; its key."""
        key = str(self._number)
        self._number += 1
        values = torch.empty(0, dtype=torch.uint8).set_(storage)
        self.write(f"data/{key}", values.numpy().data)
        return key

    def write(self, name: str, content: bytes | memoryview) -> None:
        entry = zipfile.ZipInfo(f"{_ROOT}/{name}")
        place = self._part.file.tell() + _LOCAL_HEADER_NBYTES + len(entry.filename) + _ZIP64_NBYTES
        padding = -(place + _PADDING.size) % _ALIGNMENT
        entry.extra = _PADDING.pack(b"FB", padding) + bytes(padding)
        with self._archive.open(entry, "w", force_zip64=True) as member:
            member.write(content)
        self._part.file.raise_error()


class _Pickler(pickle.Pickler):
    """Refers to storages by the keys of their entries, as torch.save does."""

    keep: Any

    def persistent_id(self, obj: Any) -> Any:
        """What torch.load takes for a storage; None for other objects."""
        if isinstance(obj, torch.storage.TypedStorage):
            typed: Any = obj
            kind = getattr(torch, typed._pickle_storage_type())
            return "storage", kind, self.keep(typed._untyped_storage), "cpu", typed._size()
        if isinstance(obj, torch.UntypedStorage):
            return "storage", torch.UntypedStorage, self.keep(obj), "cpu", obj.nbytes()
        return None
