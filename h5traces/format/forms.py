"""What objects have in common that differ in path, digest and chunks alone: of most samples, all.

It is worked out once for all of them: attributes as JSON here, headers of HDF5 and numbers of the
index where these are written.
"""

from __future__ import annotations

import re
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from h5traces.format.digests import DIGEST, attributes_json, content_digest, digest_of_json
from h5traces.format.entries import NO_CHUNKS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from h5traces.format.document import Attrs
    from h5traces.format.entries import ChunkTable, ObjectEntry

_DIGEST: Final = re.compile("[0-9a-f]{32}")
_MOST_FORMS: Final = 1024


class ObjectForm:
    """A group or dataset but for its path, digest and chunks; `form_of` makes one for all alike.

    Attributes
    ----------
    dtype, shape, chunk, codec
        As those of an `ObjectEntry`.
    attrs
        Attributes in their order, with None in place of the digest, where there is a valid one.
    json
        What the digest of a sample is made of, before and after the object's digest.
    """

    __slots__ = ("attrs", "chunk", "codec", "dtype", "json", "shape")

    def __init__(
        self,
        dtype: str,
        shape: tuple[int, ...],
        chunk: tuple[int, ...],
        codec: str | None,
        attrs: dict[str, Any],
    ) -> None:
        self.dtype, self.shape, self.chunk, self.codec = dtype, shape, chunk, codec
        self.attrs = attrs
        self.json = attributes_json(attrs)


_FORMS: Final[dict[Any, ObjectForm]] = {}


def form_of(
    dtype: str,
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    codec: str | None,
    attrs: Mapping[str, Any],
) -> tuple[ObjectForm, str | None]:
    """The form of an object, and its digest if it has a valid one."""
    own, digest = dict(attrs), attrs.get(DIGEST)
    if isinstance(digest, str) and _DIGEST.fullmatch(digest):
        own[DIGEST] = None
    else:
        digest = None
    # Numbers that are equal may be of different types, and zeros of different signs.
    told = (repr(each) if isinstance(each, (float, tuple)) else type(each) for each in own.values())
    key = (dtype, shape, chunk, codec, *own.items(), *told)
    form = _FORMS.get(key)
    if form is None:
        if len(_FORMS) >= _MOST_FORMS:
            _FORMS.clear()
        form = _FORMS[key] = ObjectForm(dtype, shape, chunk, codec, own)
    return form, digest


class StoredObject(NamedTuple):
    """A group or dataset of a sample; `digest` is None if it has no valid one."""

    path: str
    form: ObjectForm
    digest: str | None
    chunks: ChunkTable

    @classmethod
    def of(cls, entry: ObjectEntry) -> StoredObject:
        """What an entry says."""
        form, digest = form_of(entry.dtype, entry.shape, entry.chunk, entry.codec, entry.attrs)
        return cls(entry.path, form, digest, entry.chunks or NO_CHUNKS)


def digests_of(metadata: Attrs, objects: Sequence[StoredObject]) -> tuple[str, str]:
    """The digest of a sample with these objects, in order of path, and that of its content."""
    listed = ",".join(
        [
            f"{encode_basestring(path)}:{form.json[0]}{digest or ''}{form.json[1]}"
            for path, form, digest, _ in objects
        ]
    )
    known = {path: digest or form.attrs.get(DIGEST) for path, form, digest, _ in objects}
    return digest_of_json(metadata, listed), content_digest(known)
