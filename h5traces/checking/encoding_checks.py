"""Structure checks of encoded layers and of the scales that decode them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, get_args

from h5traces.errors import UnsupportedEncodingError
from h5traces.format import layout
from h5traces.format.dtypes import FloatType
from h5traces.precision.decoding import attribute_problems, is_encoded, is_stated, restored_type
from h5traces.precision.exceptions import EXCEPTION_COLUMNS, num_exceptions
from h5traces.precision.scale_storage import OFFSET, SIGMA, STEP, layers_with_scales

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from h5traces.format.archive import ArchiveMetadata
    from h5traces.format.attributes import Attrs
    from h5traces.format.entries import ObjectEntry

    Finding = tuple[str, str, str]

_FLOAT_TYPES: Final[tuple[FloatType, ...]] = get_args(FloatType)


def float_type(entry: ObjectEntry) -> FloatType | None:
    """The type that a layer is read in, None where it is no float type."""
    try:
        found = restored_type(entry.dtype, entry.attrs)
    except UnsupportedEncodingError:
        return None
    return next((each for each in _FLOAT_TYPES if each == found), None)


def scale_problems(objects: Mapping[str, ObjectEntry]) -> Iterator[Finding]:
    """What is wrong below ``/scales``, as path, message and kind."""
    for path, entry in objects.items():
        parts = path.split("/")[1:]
        if entry.is_group:
            if len(parts) > 2:
                yield path, "no such group belongs among scales", "unknown_object"
            continue
        if len(parts) != 3 or parts[2] not in (STEP, OFFSET, SIGMA):
            yield path, "no such dataset belongs among scales", "unknown_object"
        elif entry.dtype != "float32" or len(entry.shape) != 1:
            yield path, f"is {entry.dtype} {entry.shape}, expected float32 (hidden)", "wrong_type"
        if "digest" not in entry.attrs:
            yield path, "the attribute 'digest' is missing", "missing_attribute"
    for layer in layers_with_scales(objects):
        place = f"{layout.SCALES_GROUP}/{layer}"
        for name in (STEP, OFFSET, SIGMA):
            if f"{place}/{name}" not in objects:
                yield f"{place}/{name}", "is missing, which encoded layers need", "missing_scale"
        widths = _widths(objects, layer)
        if len(set(widths)) > 1:
            message = f"step, offset and sigma have {', '.join(map(str, widths))} channels"
            yield place, message, "scale_width"


def scale_widths(objects: Mapping[str, ObjectEntry]) -> dict[str, int]:
    """Channels that the scale of each layer is for, by path of the layer."""
    return {layer: min(_widths(objects, layer), default=0) for layer in layers_with_scales(objects)}


def _widths(objects: Mapping[str, ObjectEntry], layer: str) -> list[int]:
    paths = (f"{layout.SCALES_GROUP}/{layer}/{name}" for name in (STEP, OFFSET, SIGMA))
    return [math.prod(objects[path].shape) for path in paths if path in objects]


def encoding_problems(
    objects: Mapping[str, ObjectEntry], widths: Mapping[str, int], metadata: ArchiveMetadata | None
) -> Iterator[Finding]:
    """What is wrong with the encoded layers of a sample, as path, message and kind.

    Parameters
    ----------
    objects
        Of the sample, by path.
    widths
        Channels of the scales, by path of their layer.
    metadata
        Of the archive, None where it cannot be read.
    """
    for path, entry in objects.items():
        kind, _, name = path.partition("/")
        if kind not in layout.KINDS or not name:
            continue
        if name == layout.EXCEPTIONS_TABLE:
            layers = (objects[each].attrs for each in objects if each.startswith(f"{kind}/"))
            yield from _table_problems(entry, num_exceptions(layers))
            continue
        try:
            encoded = is_encoded(entry.attrs)
        except UnsupportedEncodingError as error:
            yield path, str(error), "unsupported_encoding"
            continue
        if "encoding" in entry.attrs and metadata is not None:
            yield from _unmarked(path, kind, entry.attrs, metadata, encoded=encoded)
        if not encoded:
            continue
        for message in attribute_problems(entry.dtype, entry.attrs):
            yield path, message, "wrong_encoding"
        link = entry.attrs.get("scales")
        width = widths.get(str(link).removeprefix(f"/{layout.SCALES_GROUP}/"))
        if link is not None and width is None:
            yield path, f"its scale {link} is missing", "missing_scale"
        elif link is not None and entry.shape[1:] != (width,):
            yield path, f"is {entry.shape}, its scale {link} for {width} channels", "scale_width"
        table = f"{kind}/{layout.EXCEPTIONS_TABLE}"
        if entry.attrs.get("num_exceptions") and table not in objects:
            yield path, f"its exceptions are missing; expected {table}", "missing_exceptions"


def _table_problems(entry: ObjectEntry, count: int) -> Iterator[Finding]:
    if entry.dtype != "float64" or entry.shape[1:] != (EXCEPTION_COLUMNS,):
        message = f"is {entry.dtype} {entry.shape}, expected float64 (n, {EXCEPTION_COLUMNS})"
        yield entry.path, message, "wrong_type"
    elif entry.shape[0] != count:
        message = f"has {entry.shape[0]} rows, layers list {count} exceptions"
        yield entry.path, message, "count_mismatch"


def _unmarked(
    path: str, kind: str, attrs: Attrs, metadata: ArchiveMetadata, *, encoded: bool
) -> Iterator[Finding]:
    """What the archive does not say of an encoding that it uses."""
    if metadata.precision is None:
        message = "is encoded, but the root attribute 'precision' is missing"
        yield path, message, "unmarked_loss"
    elif not is_stated(kind, attrs, metadata.precision):
        message = f"is encoded otherwise than 'precision' on the root says: {metadata.precision}"
        yield path, message, "unmarked_loss"
    if encoded and layout.PRECISION_FEATURE not in metadata.required_features:
        message = f"is encoded, but 'required_features' does not name {layout.PRECISION_FEATURE!r}"
        yield path, message, "missing_feature"
