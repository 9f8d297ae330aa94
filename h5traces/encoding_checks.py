"""Structure checks of encoded layers and of the scales that decode them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, get_args

from h5traces import layout
from h5traces.dtypes import FloatType
from h5traces.errors import UnsupportedEncodingError
from h5traces.precision import is_encoded, restored_type
from h5traces.precision.scale_storage import OFFSET, SIGMA, STEP

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from h5traces.storage.objects import ObjectEntry

    Finding = tuple[str, str, str]

_FLOAT_TYPES: Final[tuple[FloatType, ...]] = get_args(FloatType)
_EXCEPTION_COLUMNS: Final = 3


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


def encoding_problems(
    objects: Mapping[str, ObjectEntry], scaled: Collection[str], *, is_exact: bool
) -> Iterator[Finding]:
    """What is wrong with the encoded layers of a sample, as path, message and kind.

    Parameters
    ----------
    objects
        Of the sample, by path.
    scaled
        Paths of the layers that have a scale.
    is_exact
        Whether the archive says that nothing was given up.
    """
    for path, entry in objects.items():
        kind, _, name = path.partition("/")
        if kind not in layout.KINDS or not name:
            continue
        if name == layout.EXCEPTIONS_TABLE:
            if entry.dtype != "float64" or entry.shape[1:] != (_EXCEPTION_COLUMNS,):
                message = f"is {entry.dtype} {entry.shape}, expected float64 (n, 3)"
                yield path, message, "wrong_type"
            continue
        try:
            encoded = is_encoded(entry.attrs)
        except UnsupportedEncodingError as error:
            yield path, str(error), "unsupported_encoding"
            continue
        if "encoding" in entry.attrs and is_exact:
            message = "is encoded, but the root attribute 'precision' is missing"
            yield path, message, "unmarked_loss"
        if not encoded:
            continue
        link = entry.attrs.get("scales")
        if link is not None and str(link).removeprefix(f"/{layout.SCALES_GROUP}/") not in scaled:
            yield path, f"its scale {link} is missing", "missing_scale"
        table = f"{kind}/{layout.EXCEPTIONS_TABLE}"
        if entry.attrs.get("num_exceptions") and table not in objects:
            yield path, f"its exceptions are missing; expected {table}", "missing_exceptions"
