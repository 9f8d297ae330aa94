"""xxh3 checksums of stored chunks and digests of content.

Digests are of content, not of storage, so repacking keeps them. They show exchanged chunks,
silent edits and incomplete samples; they prove no authenticity, for anybody can recompute them.
"""

from __future__ import annotations

import struct
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

from h5traces.format import layout
from h5traces.format.document import compact_json
from h5traces.format.entries import digest_type

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from h5traces.format.entries import ObjectEntry, SampleEntry

DIGEST: Final = "digest"
_LENGTH: Final = struct.Struct("<Q").pack
# What depends on the archive that a sample lies in, and on the samples before it: merging and
# splitting keep the digest.
ARCHIVE_RELATIVE = frozenset({DIGEST, "fields", "generation_index", "source"})


def chunk_checksum(stored: bytes | bytearray | memoryview) -> int:
    """xxh3-64 of a chunk's stored bytes."""
    return xxhash.xxh3_64_intdigest(stored)


def digest_header(stored_type: str, shape: tuple[int, ...]) -> bytes:
    """What the digest of a dataset begins with."""
    return f"{stored_type}{list(shape)}\n".encode()


def dataset_digest(stored_type: str, values: NDArray[Any]) -> str:
    """xxh3-128 over stored type, shape and little-endian C-order bytes, as 32 hexadecimal digits.

    Texts, of dtype ``S<n>``, have the type ``text`` whatever their width.
    """
    state = xxhash.xxh3_128(digest_header(stored_type, values.shape))
    if values.dtype.kind == "S":
        # The padding depends on the longest text stored, which is not content.
        texts = values.ravel().tolist()
        state.update(b"".join([part for text in texts for part in (_LENGTH(len(text)), text)]))
        return state.hexdigest()
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    if little.size:
        state.update(little.reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def _without_users(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes in order of name, without those that users may add."""
    return {
        name: value
        for name, value in sorted(attrs.items())
        if not name.startswith(layout.USER_PREFIX)
    }


def sample_digest(metadata: Mapping[str, Any], objects: Mapping[str, Any]) -> str:
    """xxh3-128 over a sample's attributes and, in order of path, those of its objects.

    Digests of datasets are among them; `ARCHIVE_RELATIVE` and the users' own (``x_…``) are not.
    """
    listed = compact_json({path: _without_users(objects[path]) for path in sorted(objects)})
    return digest_of_json(metadata, listed[1:-1])


def digest_of_json(metadata: Mapping[str, Any], objects: str) -> str:
    """The same of objects as JSON has them between the braces."""
    content = {name: value for name, value in metadata.items() if name not in ARCHIVE_RELATIVE}
    known = compact_json(_without_users(content))
    document = f'{{"metadata":{known},"objects":{{{objects}}}}}'
    return xxhash.xxh3_128_hexdigest(document.encode("utf-8", "surrogatepass"))


def attributes_json(attrs: Mapping[str, Any]) -> tuple[str, str]:
    """An object's attributes as JSON, before and after its digest, if that is None."""
    attrs = _without_users(attrs)
    if attrs.get(DIGEST, "") is not None:
        return compact_json(attrs), ""
    before = compact_json({name: each for name, each in attrs.items() if name < DIGEST})[:-1]
    after = compact_json({name: each for name, each in attrs.items() if name > DIGEST})[1:]
    comma = "," if len(before) > 1 else ""
    return f'{before}{comma}"{DIGEST}":"', f'"{"," if len(after) > 1 else ""}{after}'


class ObjectsDigest:
    """Digests of samples whose objects differ in digests alone, as `sample_digest` has them.

    `objects` are attributes by path, as those of one sample; the digests in them do not matter.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._parts: list[tuple[str, str, str]] = []
        for path in sorted(objects):
            attrs = objects[path]
            parts = attributes_json({**attrs, DIGEST: None} if DIGEST in attrs else attrs)
            self._parts.append((path, *parts))

    def of(self, metadata: Mapping[str, Any], digests: Mapping[str, str]) -> str:
        """The digest of a sample with these attributes, and digests of hexadecimal digits."""
        objects = (
            f"{encode_basestring(path)}:{before}{digests[path] if after else ''}{after}"
            for path, before, after in self._parts
        )
        return digest_of_json(metadata, ",".join(objects))


# Fields that tell samples apart whose content is the same.
_IDENTITY: Final = tuple(
    f"{layout.EXTRA_GROUP}/{name}" for name in (layout.QUESTION_ID, layout.LABEL)
)


def content_digest(digests: Mapping[str, Any]) -> str:
    """xxh3-128 over paths and digests of a sample's datasets, but its id and label.

    Two samples with the same content digest hold the same bytes. `digests` are those of all objects
    by path, None of one without.
    """
    lines = [
        f"{path} {digests[path]}\n" for path in sorted(digests) if not path.startswith(_IDENTITY)
    ]
    return xxhash.xxh3_128_hexdigest("".join(lines).encode("utf-8", "replace"))


def difference(entry: ObjectEntry, values: NDArray[Any]) -> str | None:
    """How the values of a dataset differ from those that were written; None if they do not."""
    expected = entry.attrs.get(DIGEST)
    if expected is None:
        return "the digest is missing; the file was edited"
    if dataset_digest(digest_type(entry.dtype), values) == expected:
        return None
    return "the values do not fit their digest; they were edited, or exchanged by damage"


DIFFERENT_SAMPLE: Final = "metadata or datasets do not fit the sample's digest; they were edited"


def sample_difference(sample: SampleEntry, expected: str | None = None) -> str | None:
    """How a sample, with the digests of its datasets, differs from the one that was written.

    `expected` is its digest; the stored one by default.
    """
    objects = {path: entry.attrs for path, entry in sample.objects.items()}
    if sample_digest(sample.attrs, objects) == (expected or sample.attrs.get(DIGEST)):
        return None
    return DIFFERENT_SAMPLE
