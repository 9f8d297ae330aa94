"""How the values of a legacy dict are stored without ever being pickled.

Every element names its encoding and the encoding's version. A reader dispatches on the pair and
rejects what it does not know. ``schema/SPEC.md``, section Extra fields, is normative.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np

from h5traces.errors import ConversionError, CorruptArchiveError, UnsupportedEncodingError
from h5traces.format import layout, text
from h5traces.format.document import compact_json
from h5traces.format.entries import stored_type_of
from h5traces.format.value_types import BY_NAME, plain_content

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from h5traces.format.document import Attrs
    from h5traces.format.value_types import ValueType

ENCODING: Final = "encoding"
ENCODING_VERSION: Final = "encoding_version"
VERSION: Final = "1"
MAX_DEPTH: Final = 64
MAX_ITEMS: Final = 5_000_000
MAX_AXES: Final = 32
# Types of the package ml_dtypes by their width in bytes: as many as their bits travel in.
ML_DTYPES: Final = {
    "bfloat16": 2,
    **dict.fromkeys(
        (
            *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
            *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
            *("float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"),
            *("int2", "int4", "uint2", "uint4"),
        ),
        1,
    ),
}


@dataclass(frozen=True, slots=True)
class EncodedObject:
    """A dataset with its values, or a group, to be stored at `path` below the sample's group."""

    path: str
    attrs: Attrs = field(default_factory=dict)
    # Stored type; empty for a group.
    dtype: str = ""
    values: NDArray[Any] | None = None


class ElementReader(Protocol):
    """What decoding needs of an archive."""

    def attrs(self, path: str) -> Attrs:
        """Attributes of the object at `path`."""

    def values(self, path: str) -> NDArray[Any]:
        """Values of the dataset at `path`, in their carrier dtype."""

    def children(self, path: str) -> list[str]:
        """Names directly below the group at `path`, sorted."""


@dataclass(frozen=True, slots=True)
class TorchValue:
    """A torch tensor outside torch: the array, and torch's name for its dtype, such as ``int64``.

    bfloat16 comes as the raw bits in uint16, float8 as those in uint8. So do arrays of the package
    ml_dtypes, which JAX uses, with that package as the `container`.
    """

    data: NDArray[Any]
    dtype: str
    container: Literal["torch", "ml_dtypes"] = "torch"


def encode_element(path: str, value: Any) -> Iterator[EncodedObject]:
    """The objects that hold `value` below `path`; parents come before children.

    ConversionError where it, or a value inside, has no encoding or is nested too deeply.
    """
    yield from _Encoder().encode(path, value, depth=0)


def tagged_json(value: Any) -> Any:
    """`value` as the JSON that ``json`` elements hold; ConversionError where arrays are inside."""
    return _Encoder()._to_json(value, 0)


class _Encoder:
    """Counts as it goes: a small pickle can stand for exponentially many shared items."""

    def __init__(self) -> None:
        self._num_items = 0

    def encode(self, path: str, value: Any, *, depth: int) -> Iterator[EncodedObject]:
        self._count(depth)
        typed = _content_of(value)
        if typed is not None and self._holds_array(typed[1], depth + 1):
            yield EncodedObject(path, {**_encoding("typed"), "type": typed[0].name})
            child = f"{path}/{layout.sample_name(0)}"
            yield from self.encode(child, typed[1], depth=depth + 1)
        elif typed is not None:
            yield self._encode_plain(path, value, depth)
        elif isinstance(value, (np.ndarray, TorchValue)):
            yield _encode_array(path, value)
        elif isinstance(value, np.generic):
            yield _encode_array(path, np.asarray(value), encoding="numpy-scalar")
        elif isinstance(value, (dict, list, tuple)) and self._holds_array(value, depth):
            yield from self._encode_container(path, value, depth)
        else:
            yield self._encode_plain(path, value, depth)

    def _count(self, depth: int) -> None:
        self._num_items += 1
        if self._num_items > MAX_ITEMS:
            message = f"the value holds more than {MAX_ITEMS} items; such a field cannot be kept"
            raise ConversionError(message)
        if depth > MAX_DEPTH:
            message = f"the value is nested more than {MAX_DEPTH} levels deep, or holds itself"
            raise ConversionError(message)

    def _holds_array(self, value: Any, depth: int) -> bool:
        self._count(depth)
        if (typed := _content_of(value)) is not None:
            return self._holds_array(typed[1], depth + 1)
        if isinstance(value, (np.ndarray, np.generic, TorchValue)):
            return True
        if not isinstance(value, (dict, list, tuple)):
            return False
        children = value.values() if isinstance(value, dict) else value
        return any(self._holds_array(each, depth + 1) for each in children)

    def _encode_container(
        self, path: str, value: dict[Any, Any] | list[Any] | tuple[Any, ...], depth: int
    ) -> Iterator[EncodedObject]:
        if isinstance(value, dict):
            keys = compact_json([self._to_json(key, depth) for key in value])
            yield EncodedObject(path, {**_encoding("dict"), "keys": keys})
            children = list(value.values())
        else:
            yield EncodedObject(path, _encoding("list" if isinstance(value, list) else "tuple"))
            children = list(value)
        for index, child in enumerate(children):
            yield from self.encode(f"{path}/{layout.sample_name(index)}", child, depth=depth + 1)

    def _encode_plain(self, path: str, value: Any, depth: int) -> EncodedObject:
        if value is None:
            return _dataset(path, "null", np.zeros(1, dtype=np.uint8))
        if isinstance(value, bool):
            return _dataset(path, "bool", np.array([value], dtype=np.uint8))
        if isinstance(value, int) and -(2**63) <= value < 2**63:
            return _dataset(path, "int", np.array([value], dtype=np.int64))
        if isinstance(value, float):
            return _dataset(path, "float", np.array([value], dtype=np.float64))
        if isinstance(value, str):
            return _dataset(path, "string", text.encode_all([value]))
        if isinstance(value, bytes):
            return _dataset(path, "bytes", np.frombuffer(value, dtype=np.uint8))
        document = compact_json(self._to_json(value, depth))
        return _dataset(path, "json", text.encode_all([document]))

    def _to_json(self, value: Any, depth: int) -> Any:
        """Plain JSON where JSON has the type, else an object with one ``$…`` key."""
        self._count(depth)
        if (typed := _content_of(value)) is not None:
            return {f"${typed[0].name}": self._to_json(typed[1], depth + 1)}
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            # Hexadecimal, since Python bounds the length of decimal conversions.
            return value if abs(value) < 2**53 else {"$int": hex(value)}
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, (bytes, bytearray)):
            name = "$bytes" if isinstance(value, bytes) else "$bytearray"
            return {name: base64.b64encode(value).decode()}
        if isinstance(value, list):
            return [self._to_json(each, depth + 1) for each in value]
        if isinstance(value, tuple):
            return {"$tuple": [self._to_json(each, depth + 1) for each in value]}
        if isinstance(value, dict):
            return self._dict_to_json(value, depth)
        message = (
            f"a value of type {type(value).__module__}.{type(value).__qualname__} has no encoding; "
            "expected plain Python values, numpy arrays or torch tensors. Store a dict of its "
            "fields, or its text"
        )
        raise ConversionError(message)

    def _dict_to_json(self, value: dict[Any, Any], depth: int) -> Any:
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: self._to_json(each, depth + 1) for key, each in value.items()}
        return {
            "$dict": [
                [self._to_json(key, depth + 1), self._to_json(each, depth + 1)]
                for key, each in value.items()
            ]
        }


def _content_of(value: Any) -> tuple[ValueType, Any] | None:
    try:
        return plain_content(value)
    except ValueError as error:
        raise ConversionError(str(error)) from None


def _encoding(name: str) -> Attrs:
    return {ENCODING: name, ENCODING_VERSION: VERSION}


def _dataset(path: str, encoding: str, values: NDArray[Any]) -> EncodedObject:
    return EncodedObject(path, _encoding(encoding), stored_type_of(values), values)


def _encode_array(
    path: str, value: NDArray[Any] | TorchValue, encoding: str = "array"
) -> EncodedObject:
    """An array of any byte order; what HDF5 has no plain type for is stored as bytes.

    The attributes ``dtype`` and ``ndim`` state the original's where the stored ones differ.
    """
    attrs = _encoding(encoding)
    if isinstance(value, TorchValue):
        attrs |= {"container": value.container, "torch_dtype": value.dtype}
    array = value.data if isinstance(value, TorchValue) else value
    attrs["dtype"] = array.dtype.str
    if array.ndim == 0:
        attrs["ndim"] = 0
    # Python's own 1-D form: HDF5's filters take no scalars.
    array = np.atleast_1d(array)
    kind, itemsize = array.dtype.kind, array.dtype.itemsize
    if kind in "iu" or (kind == "f" and itemsize <= 8):
        values = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        dtype = array.dtype.name
    elif kind in "mM":
        values = array.astype(array.dtype.newbyteorder("<")).view("<i8")
        dtype = "int64"
    elif kind == "U":
        values = text.encode_all(array.ravel().tolist()).reshape(array.shape)
        dtype = stored_type_of(values)
    elif kind in "bScf" and itemsize:
        contiguous = np.ascontiguousarray(array)
        values = contiguous.reshape(-1).view(np.uint8).reshape(*array.shape, itemsize)
        dtype = "uint8"
    else:
        message = f"an array of dtype {array.dtype} has no encoding; expected numbers or text"
        raise ConversionError(message)
    if values.ndim > MAX_AXES:
        message = f"an array of {array.ndim} axes has no encoding; HDF5 has at most {MAX_AXES}"
        raise ConversionError(message)
    return EncodedObject(path, attrs, dtype, values)


def decode_element(reader: ElementReader, path: str) -> Any:
    """The value that `encode_element` stored at `path`; torch tensors as `TorchValue`.

    UnsupportedEncodingError for an unknown encoding or version; CorruptArchiveError where stored
    values contradict their encoding.
    """
    attrs = reader.attrs(path)
    name, version = attrs.get(ENCODING), attrs.get(ENCODING_VERSION)
    if version != VERSION or name not in _DECODERS:
        message = f"{path}: encoding {name!r} version {version!r} is unknown; upgrade h5traces"
        raise UnsupportedEncodingError(message)
    try:
        return _DECODERS[name](reader, path, attrs)
    except (
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ) as error:
        message = f"{path}: stored value does not fit its encoding {name!r}: {error!r}"
        raise CorruptArchiveError(message) from error


def _decode_array(reader: ElementReader, path: str, attrs: Attrs) -> Any:
    stored, dtype = reader.values(path), np.dtype(str(attrs["dtype"]))
    if dtype.kind == "U":
        # The file has the texts, but not the width they are to be padded to.
        if dtype.itemsize * stored.size > text.MAX_TEXT_NBYTES:
            message = f"{path}: {stored.size} texts of type {dtype} take too many bytes"
            raise CorruptArchiveError(message)
        array = np.array(text.decode_all(stored), dtype=dtype).reshape(stored.shape)
    elif dtype.kind in "bSc" or (dtype.kind == "f" and dtype.itemsize > 8):
        array = np.ascontiguousarray(stored).reshape(-1).view(dtype).reshape(stored.shape[:-1])
    elif dtype.kind in "mM":
        array = stored.astype("<i8").view(dtype.newbyteorder("<")).astype(dtype)
    elif dtype.kind in "iuf":
        array = stored.astype(dtype)
    else:
        message = f"dtype {dtype} cannot be stored in an archive"
        raise CorruptArchiveError(message)
    if attrs.get("ndim") == 0:
        array = array.reshape(())
    if attrs.get(ENCODING) == "numpy-scalar":
        return array[()]
    container = attrs.get("container")
    if container == "torch":
        return TorchValue(array, str(attrs["torch_dtype"]))
    if container == "ml_dtypes":
        name = str(attrs["torch_dtype"])
        if array.dtype != f"u{ML_DTYPES[name]}":
            message = f"{path}: values of {name} are stored as {array.dtype}"
            raise CorruptArchiveError(message)
        return TorchValue(array, name, "ml_dtypes")
    return array


def _decode_sequence(reader: ElementReader, path: str, attrs: Attrs) -> Any:
    items = [decode_element(reader, f"{path}/{name}") for name in reader.children(path)]
    return items if attrs[ENCODING] == "list" else tuple(items)


def _decode_dict(reader: ElementReader, path: str, attrs: Attrs) -> Any:
    keys = [from_json(key) for key in json.loads(str(attrs["keys"]))]
    names = reader.children(path)
    return {
        key: decode_element(reader, f"{path}/{name}") for key, name in zip(keys, names, strict=True)
    }


def _decode_typed(reader: ElementReader, path: str, attrs: Attrs) -> Any:
    content = decode_element(reader, f"{path}/{layout.sample_name(0)}")
    return BY_NAME[str(attrs["type"])].make(content)


def _one(reader: ElementReader, path: str) -> Any:
    (value,) = reader.values(path).tolist()
    return value


def _text(reader: ElementReader, path: str) -> str:
    (value,) = text.decode_all(reader.values(path))
    return value


_DECODERS: Final[dict[Any, Any]] = {
    "null": lambda _reader, _path, _attrs: None,
    "bool": lambda reader, path, _attrs: bool(_one(reader, path)),
    "int": lambda reader, path, _attrs: int(_one(reader, path)),
    "float": lambda reader, path, _attrs: float(_one(reader, path)),
    "string": lambda reader, path, _attrs: _text(reader, path),
    "bytes": lambda reader, path, _attrs: reader.values(path).tobytes(),
    "json": lambda reader, path, _attrs: from_json(json.loads(_text(reader, path))),
    "array": _decode_array,
    "numpy-scalar": _decode_array,
    "list": _decode_sequence,
    "tuple": _decode_sequence,
    "dict": _decode_dict,
    "typed": _decode_typed,
}


def from_json(value: Any) -> Any:
    """The Python value that the tagged JSON of the encoding ``json`` stands for."""
    if isinstance(value, list):
        return [from_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, content),) = value.items()
        if tag.startswith("$"):
            if tag in JSON_TAGS:
                return JSON_TAGS[tag].make(content)
            return BY_NAME[tag[1:]].make(from_json(content))
    return {key: from_json(each) for key, each in value.items()}


@dataclass(frozen=True, slots=True)
class JsonTag:
    """A value that JSON lacks: what its content is and stands for (for SPEC.md), and its making."""

    content: str
    value: str
    make: Callable[[Any], Any]


JSON_TAGS: Final = {
    "$int": JsonTag(
        'hexadecimal string, such as `"-0x20000000000000"`',
        "`int` of magnitude 2^53 or more",
        lambda content: int(content, 16),
    ),
    "$float": JsonTag(
        '`"nan"`, `"inf"` or `"-inf"`',
        "`float` that is not finite; sign and payload of NaN are not kept",
        float,
    ),
    "$bytes": JsonTag("base64 string", "`bytes`", base64.b64decode),
    "$bytearray": JsonTag(
        "base64 string", "`bytearray`", lambda content: bytearray(base64.b64decode(content))
    ),
    "$tuple": JsonTag(
        "array", "`tuple`", lambda content: tuple(from_json(each) for each in content)
    ),
    "$dict": JsonTag(
        "array of [key, value] pairs, both tagged JSON",
        "`dict` with other keys",
        lambda content: {from_json(key): from_json(each) for key, each in content},
    ),
}
