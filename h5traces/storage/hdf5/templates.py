"""Headers of datasets of one form, which differ in a few fields."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from h5traces.format import layout
from h5traces.format.digests import DIGEST
from h5traces.storage.hdf5.messages import (
    ATTRIBUTE_INFO,
    attribute_message,
    dataset_messages,
    datatype_message,
    object_header,
    single_chunk_layout,
)
from h5traces.storage.hdf5.types import hdf5_type

if TYPE_CHECKING:
    from h5traces.format.forms import ObjectForm
    from h5traces.storage.hdf5.types import StoredValue

# Stored size, filter mask and address of the only chunk; the end of a range.
_PLACE: Final = struct.Struct("<QIQ")
_WHITE: Final = struct.Struct("<d")
_NO_DIGEST: Final = "0" * 32


def shown_attributes(
    form: ObjectForm, digest: str, white: float | None, *, is_picture: bool
) -> dict[str, StoredValue]:
    """The attributes of a dataset in HDF5: those of a picture first."""
    shown: dict[str, StoredValue] = {**layout.IMAGE_ATTRS} if is_picture else {}
    if white is not None:
        shown[layout.IMAGE_RANGE] = (0.0, white)
    own = {name: digest if value is None else value for name, value in form.attrs.items()}
    return {**shown, **own}


class HeaderTemplate(NamedTuple):
    """A header without its checksum, and where in it the fields begin; 0 for one that it lacks."""

    header: bytes
    place: int
    digest: int
    white: int

    def filled(self, address: int, nbytes: int, digest: str | None, white: float | None) -> bytes:
        """The header of a dataset whose only chunk lies there."""
        header = bytearray(self.header)
        _PLACE.pack_into(header, self.place, nbytes, 0, address)
        if digest is not None:
            header[self.digest : self.digest + len(digest)] = digest.encode()
        if white is not None:
            _WHITE.pack_into(header, self.white, white)
        return bytes(header)


@lru_cache(maxsize=1024)
def template_of(form: ObjectForm, *, is_picture: bool, has_white: bool) -> HeaderTemplate | None:
    """The header of datasets of a form; None for several chunks, and for large attributes."""
    if form.shape != form.chunk or form.codec is None:
        return None
    itemsize = hdf5_type(form.dtype).get_size()
    described = dataset_messages(datatype_message(form.dtype), itemsize, form.shape, form.codec)
    parts = [described, single_chunk_layout(itemsize, form.chunk, 0, 0)]
    place = len(b"".join(parts)) - _PLACE.size
    fields = {}
    attrs = shown_attributes(form, _NO_DIGEST, 1.0 if has_white else None, is_picture=is_picture)
    if attrs:
        parts.append(ATTRIBUTE_INFO)
    for name, value in attrs.items():
        message = attribute_message(name, value)
        if message is None:
            return None
        parts.append(message)
        fields[name] = len(b"".join(parts))
    header = object_header(parts)
    before = len(header) - len(b"".join(parts))
    digest, white = fields.get(DIGEST, 0), fields.get(layout.IMAGE_RANGE, 0)
    return HeaderTemplate(
        header,
        before + place,
        before + digest - len(_NO_DIGEST),
        before + white - _WHITE.size,
    )
