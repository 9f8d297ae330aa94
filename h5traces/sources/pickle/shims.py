"""What a pickle may call: an exact list of names, each bound to a function of this module.

A pickle never gets a real object of numpy or torch. ``numpy.dtype.__setstate__`` crashes Python on
a forged state, and ``torch.storage._load_from_bytes`` is ``torch.load``; the shims check dtype,
shape and byte count and build the array themselves. They read names of numpy 1 and 2 under either.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.format.value_types import object_array
from h5traces.format.values import ML_DTYPES, TorchValue
from h5traces.sources.pickle.calls import (
    Pending,
    Shim,
    Unsupported,
    brief,
    check_args,
    is_small_int,
    type_name,
)
from h5traces.sources.pickle.plain import PLAIN_NAMES
from h5traces.sources.pickle.source import MalformedError, contradict, reject

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.sources.pickle.calls import Meter
    from h5traces.sources.pickle.source import MemorySource


MAX_NDIM = 32
_MAX_DIM = 1 << 62

_NUMERIC_CODES = frozenset("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 f12 f16 c8 c16 c24 c32".split())
_FORBIDDEN_KINDS = {
    "V": "structures or raw records",
}
# NPY_NEEDS_INIT, which U dtypes have; all other flags are of objects or user types.
_HARMLESS_DTYPE_FLAGS = (0, 8)
_OBJECT_DTYPE_FLAGS = (63,)
_DTYPE_STATE_LENGTH = 8
_TIME_CODES = frozenset({"M8", "m8"})
_TIME_UNITS = frozenset("Y M W D h m s ms us ns ps fs as".split())
_MAX_TIME_STEP = 1 << 31

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001

# numpy's dtype for each of torch's; types that numpy lacks are stored as raw words.
_STORED_AS = {
    **{
        name: np.dtype(name).newbyteorder("<")
        for name in (
            *("float16", "float32", "float64", "complex64", "complex128", "bool"),
            *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        )
    },
    "bfloat16": np.dtype("<u2"),
    **dict.fromkeys(
        ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"), np.dtype("u1")
    ),
}
_STORAGE_TYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
    # Of quantised tensors, which are `Unsupported`.
    **{f"Q{kind}Storage": "uint8" for kind in ("Int8", "UInt8", "UInt4x2", "UInt2x4")},
    "QInt32Storage": "int32",
}


def check_shape(shape: Any) -> tuple[int, ...]:
    """The shape; RejectedError unless it is a tuple of plausible ints."""
    if type(shape) is not tuple or len(shape) > MAX_NDIM:
        reject(f"a shape is {type_name(shape)}, expected a tuple of at most {MAX_NDIM} ints")
    for dim in shape:
        if type(dim) is not int or not 0 <= dim < _MAX_DIM:
            reject(f"a shape holds {brief(dim)}, expected sizes")
    return shape


def build_array(
    meter: Meter, data: Any, dtype: Any, shape: Any, *, order: str = "C"
) -> np.ndarray[Any, Any]:
    """An array over the payload's own memory, once dtype, shape and byte count are checked."""
    if not isinstance(dtype, np.dtype):
        reject(f"an array has {type_name(dtype)} for its dtype, expected a numpy.dtype")
    if dtype.kind == "O":
        return _object_array(meter, data, shape, order)
    if type(data) not in (bytes, bytearray):
        reject(f"an array has {type_name(data)} for its data, expected bytes")
    check_shape(shape)
    if not dtype.itemsize:
        reject(f"an array has elements of 0 bytes (dtype {dtype.str}), which numpy never writes")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != len(data):
        contradict(
            f"an array of shape {shape} and dtype {dtype.str} needs {nbytes:,} bytes, "
            f"found {len(data):,}"
        )
    array: np.ndarray[Any, Any] = np.ndarray(
        shape, dtype, buffer=data, order="F" if order == "F" else "C"
    )
    if dtype.kind == "U" and array.size:
        _check_characters(meter, data, dtype)
    return array


def _object_array(meter: Meter, data: Any, shape: Any, order: str) -> np.ndarray[Any, Any]:
    """An array of values that the pickle holds as a list; their bytes are never pointers."""
    check_shape(shape)
    if type(data) is not list:
        reject(f"an array of objects has {type_name(data)} for its data, expected a list")
    if math.prod(shape) != len(data):
        contradict(f"an array of objects of shape {shape} has {len(data):,} values")
    meter.charge(8 * len(data))
    return object_array(shape, data, order)


def _check_characters(meter: Meter, data: bytes | bytearray, dtype: np.dtype[Any]) -> None:
    # numpy makes str objects of these words unchecked, even where Python has no such character.
    meter.charge(len(data))
    words = np.frombuffer(data, np.dtype("u4").newbyteorder(dtype.byteorder))
    if words.max() > sys.maxunicode:
        contradict(f"an array of dtype {dtype.str} holds a word that is not a Unicode character")


# --- numpy -------------------------------------------------------------------------------------

NDARRAY = Shim("numpy.ndarray")


@dataclass(frozen=True, eq=False)
class MlDtype:
    """A dtype of the package ml_dtypes: its name, and the dtype that its bits travel in."""

    name: str

    @property
    def carrier(self) -> np.dtype[Any]:
        """Unsigned integers of the same width."""
        return np.dtype(f"<u{ML_DTYPES[self.name]}")


def _dtype(_meter: Meter, args: tuple[Any, ...]) -> Pending:
    check_args("numpy.dtype", args, 3)
    code, _align, _copy = args
    if type(code) is Shim and code.dtype in ML_DTYPES and code.name.startswith("ml_dtypes."):
        made = MlDtype(code.dtype)
        return Pending("dtype", lambda _meter, state: _finish_ml_dtype(made, state))
    if type(code) is not str:
        reject(f"numpy.dtype is called with {type_name(code)}, expected a type code")
    if code in ("O8", "O4"):
        return Pending("dtype", lambda _meter, state: _finish_dtype(np.dtype("O"), state))
    if code in _TIME_CODES:
        return Pending("dtype", lambda _meter, state: _finish_time_dtype(code, state))
    known = code in _NUMERIC_CODES or (code[:1] in ("S", "U") and code[1:].isdecimal())
    if not known or not code.isascii() or len(code) > 12:
        holds = _FORBIDDEN_KINDS.get(code[:1], "values of an unknown type")
        reject(
            f"numpy.dtype({brief(code)}) would make an array of {holds}; expected booleans, "
            f"integers, floats, complex numbers, dates, objects or fixed-length strings"
        )
    try:
        dtype = np.dtype(code)
    except (TypeError, ValueError):
        message = f"this machine's numpy has no dtype {code!r}; convert the batch on another"
        raise MalformedError(message) from None
    if dtype.itemsize >= 1 << 30:
        reject(f"numpy.dtype({code!r}) has elements of {dtype.itemsize} bytes")
    return Pending("dtype", lambda _meter, state: _finish_dtype(dtype, state))


def _finish_dtype(dtype: np.dtype[Any], state: Any) -> np.dtype[Any]:
    flags = _OBJECT_DTYPE_FLAGS if dtype.kind == "O" else _HARMLESS_DTYPE_FLAGS
    order = _checked_state(dtype.str, dtype.itemsize, state, flags)
    # Not newbyteorder: its result says "<" where numpy says "=".
    return dtype if order in "|=" or dtype.kind == "O" else np.dtype(order + dtype.str[1:])


def _finish_ml_dtype(dtype: MlDtype, state: Any) -> MlDtype:
    order = _checked_state(dtype.name, ML_DTYPES[dtype.name], state, (0, 64))
    if order == ">":
        contradict(f"an array of {dtype.name} is big-endian, which ml_dtypes never writes")
    return dtype


def _finish_time_dtype(code: str, state: Any) -> np.dtype[Any]:
    """A dtype of dates, whose state ends with a unit and its multiple."""
    if type(state) is not tuple or len(state) != _DTYPE_STATE_LENGTH + 1 or state[0] != 4:
        reject(f"the state of dtype {code} is {type_name(state)}, expected a tuple of 9")
    order = _checked_state(code, 8, (3, *state[1:-1]), (0,))
    found = state[-1]
    parts = found[1] if type(found) is tuple and len(found) == 2 else None
    if type(parts) is not tuple or len(parts) != 4 or not all(map(is_small_int, parts[1:])):
        reject(f"the state of dtype {code} has {type_name(found)} for its unit")
    unit = str(parts[0], "ascii", "replace") if type(parts[0]) is bytes else parts[0]
    if type(unit) is not str or unit not in _TIME_UNITS or parts[2] != 1:
        if unit == "generic":
            return np.dtype(order.replace("|", "=") + code)
        reject(f"the state of dtype {code} has the unit {brief(unit)}")
    if not 0 < parts[1] < _MAX_TIME_STEP:
        reject(f"the state of dtype {code} has the multiple {parts[1]}")
    return np.dtype(f"{order.replace('|', '=')}{code}[{parts[1]}{unit}]")


def _checked_state(name: str, itemsize: int, state: Any, flags: tuple[int, ...]) -> str:
    """The byte order in the state of a dtype that is a plain type, which is checked."""
    if type(state) is not tuple or len(state) != _DTYPE_STATE_LENGTH:
        reject(f"the state of a dtype is {type_name(state)}, expected a tuple of 8")
    version, order, subarray, names, fields, size, alignment, found_flags = state
    checks = {
        "version": type(version) is int and version == 3,
        "byte order": type(order) is str and order in ("<", ">", "|", "="),
        "subarray": subarray is None,
        "names": names is None,
        "fields": fields is None,
        "element size": type(size) is int and size in (-1, itemsize),
        "alignment": type(alignment) is int and alignment in (-1, 1, 2, 4, 8, 16),
        "flags": type(found_flags) is int and found_flags in flags,
    }
    wrong = [what for what, fits in checks.items() if not fits]
    if wrong:
        reject(
            f"the state of dtype {name} has unexpected {', '.join(wrong)}; numpy writes "
            f"that for structures only, if at all"
        )
    return str(order)


def _reconstruct(_meter: Meter, args: tuple[Any, ...]) -> Pending:
    check_args("_reconstruct", args, 3)
    if args[0] is not NDARRAY:
        reject(f"_reconstruct is called with {type_name(args[0])}, expected numpy.ndarray")
    return Pending("array", finish_array)


def finish_array(meter: Meter, state: Any) -> Any:
    """The array that a state of `numpy.ndarray` describes; of ml_dtypes, a `TorchValue`."""
    if type(state) is not tuple or len(state) not in (4, 5):
        reject(f"the state of an array is {type_name(state)}, expected a tuple of 4 or 5")
    if len(state) == 5 and (type(state[0]) is not int or state[0] not in (0, 1)):
        reject(f"the state of an array has version {brief(state[0])}, expected 1")
    shape, dtype, fortran, data = state[-4:]
    if type(fortran) is not bool:
        reject(f"the state of an array has the order {type_name(fortran)}, expected a bool")
    return any_array(meter, data, dtype, shape, order="F" if fortran else "C")


def any_array(meter: Meter, data: Any, dtype: Any, shape: Any, *, order: str) -> Any:
    """As `build_array`, also of types that numpy lacks: as a `TorchValue`."""
    if type(dtype) is not MlDtype:
        return build_array(meter, data, dtype, shape, order=order)
    array = build_array(meter, data, dtype.carrier, shape, order=order)
    return TorchValue(array, dtype.name, "ml_dtypes")


def _frombuffer(meter: Meter, args: tuple[Any, ...]) -> Any:
    check_args("_frombuffer", args, 4)
    data, dtype, shape, order = args
    if type(order) is not str or order not in ("C", "F"):
        reject(f"_frombuffer is called with the order {brief(order)}, expected 'C' or 'F'")
    return any_array(meter, data, dtype, shape, order=order)


def _scalar(meter: Meter, args: tuple[Any, ...]) -> Any:
    check_args("scalar", args, 2)
    dtype, data = args
    if type(dtype) is MlDtype:
        reject(f"a single number is a {dtype.name} of ml_dtypes; save float(...) of it instead")
    if isinstance(dtype, np.dtype) and dtype.kind == "O":
        reject("a single number has the dtype of objects, which numpy never writes")
    if isinstance(dtype, np.dtype) and not dtype.itemsize and type(data) is bytes and not data:
        return dtype.type()  # the empty string, which no array can hold
    return build_array(meter, data, dtype, ())[()]


# --- builtins, _codecs ------------------------------------------------------------


def _encode(meter: Meter, args: tuple[Any, ...]) -> bytes:
    check_args("_codecs.encode", args, 2)
    text, encoding = args
    if type(text) is not str or type(encoding) is not str or encoding != "latin1":
        reject(f"_codecs.encode is called with {type_name(text)} and {brief(encoding)}")
    return _to_bytes(meter, text)


def _to_bytes(meter: Meter, text: str) -> bytes:
    meter.charge(len(text))
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        message = "a string that stands for bytes holds a character above U+00FF"
        raise MalformedError(message) from None


def _bytes(_meter: Meter, args: tuple[Any, ...]) -> bytes:
    check_args("bytes", args, 0)  # bytes(n) would allocate whatever n says
    return b""


def _bytearray(meter: Meter, args: tuple[Any, ...]) -> bytearray:
    check_args("bytearray", args, 0, 1, 2)
    if not args:
        return bytearray()
    if len(args) == 2:
        if (type(args[0]), type(args[1])) != (str, str) or args[1] != "latin-1":
            reject(f"bytearray is called with {type_name(args[0])} and {brief(args[1])}")
        return bytearray(_to_bytes(meter, args[0]))
    if type(args[0]) is not bytes:
        reject(f"bytearray is called with {type_name(args[0])}, expected bytes")
    meter.charge(len(args[0]))
    return bytearray(args[0])


# --- torch ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Storage:
    """The numbers of one or more tensors.

    Attributes
    ----------
    data
        The bytes that hold them: those of an embedded stream, or of a mapped file. None if only
        shapes are asked for.
    start
        Where in `data` they begin.
    num_elements, dtype
        How many there are, and torch's name for their type.
    is_mapped
        Whether `data` lies in a file, so that views of it keep nothing in memory.
    is_big_endian
        The order of their bytes.
    """

    data: Any
    start: int
    num_elements: int
    dtype: str
    is_mapped: bool = False
    is_big_endian: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return self.num_elements * _STORED_AS[self.dtype].itemsize


@dataclass(frozen=True, eq=False)
class StorageHeader:
    """A storage as the persistent id of its embedded stream describes it."""

    key: str
    dtype: str
    num_elements: int


def storage_nbytes(header: StorageHeader) -> int:
    """Bytes of a storage's numbers."""
    return header.num_elements * _STORED_AS[header.dtype].itemsize


def parse_persistent_id(value: Any) -> StorageHeader:
    """The storage that an embedded stream's persistent id describes."""
    if type(value) is not tuple or len(value) != 6 or brief(value[0]) != "'storage'":
        reject(f"a persistent id is {type_name(value)}, expected a description of a storage")
    _, kind, key, location, num_elements, view = value
    dtype = kind.dtype if type(kind) is Shim else None
    if dtype is None or type(key) is not str or type(location) is not str:
        reject(f"a persistent id names {type_name(kind)}, expected a torch storage type")
    if view is not None:
        contradict("a storage is a view of another one, which only torch before 0.4 wrote")
    if type(num_elements) is not int or not 0 <= num_elements < 1 << 62:
        reject(f"a storage has {brief(num_elements)} elements")
    return StorageHeader(key, dtype, num_elements)


def read_storage(load: Callable[[], Any], source: MemorySource) -> Storage:
    """The storage in an embedded stream; ``load`` reads one pickle from ``source``."""
    if load() != MAGIC or load() != PROTOCOL:
        contradict("the bytes of a torch storage are not a legacy torch.save stream")
    system = load()
    if type(system) is not dict or system.get("little_endian") is not True:
        contradict("a torch storage was written on a big-endian machine; save it again on another")
    header = load()
    keys = load()
    if type(header) is not StorageHeader or type(keys) is not list or keys != [header.key]:
        contradict("the bytes of a torch storage hold something else than one storage")
    declared = int.from_bytes(source.read(8), "little")
    storage = Storage(source.data, source.inflated_bytes, header.num_elements, header.dtype)
    found = len(source.data) - storage.start
    if declared != header.num_elements or storage.nbytes != found:
        contradict(
            f"a torch storage of {header.num_elements:,} {header.dtype} elements needs "
            f"{storage.nbytes:,} bytes, found {found:,} for {declared:,} elements"
        )
    return storage


def _load_from_bytes(meter: Meter, args: tuple[Any, ...]) -> Storage:
    check_args("_load_from_bytes", args, 1)
    if type(args[0]) is not bytes:
        reject(f"_load_from_bytes is called with {type_name(args[0])}, expected bytes")
    storage = meter.load_storage(args[0])
    if type(storage) is not Storage:
        contradict(f"the bytes of a torch storage hold {type_name(storage)}")
    return storage


def _rebuild_v2(meter: Meter, args: tuple[Any, ...]) -> TorchValue | Unsupported:
    check_args("_rebuild_tensor_v2", args, 6, 7)
    _check_extras(args[4], args[5], args[6] if len(args) == 7 else None)
    return _tensor(meter, args, None)


def _rebuild_v3(meter: Meter, args: tuple[Any, ...]) -> TorchValue | Unsupported:
    check_args("_rebuild_tensor_v3", args, 7, 8)
    _check_extras(args[4], args[5], args[7] if len(args) == 8 else None)
    if type(args[6]) is not Shim or args[6].dtype is None:
        reject(f"a tensor has {type_name(args[6])} for its dtype, expected a torch dtype")
    return _tensor(meter, args, args[6].dtype)


def _rebuild_parameter(_meter: Meter, args: tuple[Any, ...]) -> TorchValue | Unsupported:
    check_args("_rebuild_parameter", args, 3)
    _check_extras(args[1], args[2], None)
    if type(args[0]) not in (TorchValue, Unsupported):
        reject(f"a parameter holds {type_name(args[0])}, expected a tensor")
    found: TorchValue | Unsupported = args[0]
    return found


def _check_extras(requires_grad: Any, hooks: Any, metadata: Any) -> None:
    empty = all(
        value is None or (isinstance(value, dict) and not value) for value in (hooks, metadata)
    )
    if type(requires_grad) is not bool or not empty:
        reject(
            "a tensor carries hooks, or a conjugate or negative bit; save it again after "
            "detach().resolve_conj().resolve_neg()"
        )


def _tensor(
    meter: Meter, args: tuple[Any, ...], dtype_name: str | None
) -> TorchValue | Unsupported:
    storage, offset, size, strides = args[:4]
    if type(storage) is not Storage:
        reject(f"a tensor has {type_name(storage)} for its storage")
    dtype_name = dtype_name or storage.dtype
    if dtype_name not in _STORED_AS:
        return Unsupported(f"a tensor of torch.{dtype_name}", "save it again as float32")
    dtype = _STORED_AS[dtype_name]
    shape = check_shape(size)
    if len(check_shape(strides)) != len(shape) or type(offset) is not int or offset < 0:
        reject(f"a tensor of shape {shape} has the strides {strides} and offset {brief(offset)}")
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return TorchValue(np.empty(shape, dtype), dtype_name)
    last = offset + sum((dim - 1) * step for dim, step in zip(shape, strides, strict=True))
    if (last + 1) * dtype.itemsize > storage.nbytes:
        reject(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} reaches element "
            f"{last:,} of a storage of {storage.nbytes // dtype.itemsize:,}"
        )
    start = storage.start + offset * dtype.itemsize
    array: np.ndarray[Any, Any]
    byte_strides = tuple(step * dtype.itemsize for step in strides)
    if storage.data is None:
        return TorchValue(np.broadcast_to(np.zeros((), dtype), shape), dtype_name)
    if storage.is_mapped:
        array = np.ndarray(
            shape,
            dtype.newbyteorder(">") if storage.is_big_endian else dtype,
            buffer=storage.data,
            offset=start,
            strides=byte_strides,
        )
        if not array.flags.aligned or (storage.is_big_endian and dtype.itemsize > 1):
            meter.charge(nbytes)
            array = array.astype(dtype, order="C")
        return TorchValue(array, dtype_name)
    whole = nbytes == storage.nbytes
    if not whole:
        meter.charge(nbytes)
    array = np.ndarray(shape, dtype, buffer=storage.data, offset=start, strides=byte_strides)
    # Numbers may be unaligned in the stream, which is slow to read; a view of a part would keep
    # the whole alive.
    if not whole or not array.flags.c_contiguous or not array.flags.aligned:
        meter.charge(nbytes if whole else 0)
        array = array.copy(order="C")
    return TorchValue(array, dtype_name)


# --- names -------------------------------------------------------------------------------------


def _allow(function: Callable[[Meter, tuple[Any, ...]], Any], name: str, *modules: str) -> None:
    shim = Shim(f"{modules[0]}.{name}", function)
    for module in modules:
        NAMES[module, name] = shim


# Exact (module, name) pairs, compared as strings and never resolved.
NAMES: dict[tuple[str, str], Shim] = {("numpy", "ndarray"): NDARRAY}
NAMES |= PLAIN_NAMES
NAMES |= {("torch", dtype): Shim(f"torch.{dtype}", dtype=dtype) for dtype in _STORED_AS}
NAMES |= {("ml_dtypes", name): Shim(f"ml_dtypes.{name}", dtype=name) for name in ML_DTYPES}
_allow(_dtype, "dtype", "numpy")
_allow(_reconstruct, "_reconstruct", "numpy._core.multiarray", "numpy.core.multiarray")
_allow(_scalar, "scalar", "numpy._core.multiarray", "numpy.core.multiarray")
_allow(_frombuffer, "_frombuffer", "numpy._core.numeric", "numpy.core.numeric")
_allow(_encode, "encode", "_codecs")
_allow(_bytes, "bytes", "builtins", "__builtin__")  # protocols 0 to 2 write the latter
_allow(_bytearray, "bytearray", "builtins", "__builtin__")
_allow(_load_from_bytes, "_load_from_bytes", "torch.storage")
_allow(_rebuild_v2, "_rebuild_tensor_v2", "torch._utils")
_allow(_rebuild_v3, "_rebuild_tensor_v3", "torch._utils")
_allow(_rebuild_parameter, "_rebuild_parameter", "torch._utils")

# All that the embedded streams of storages may name. Torch before 1.10 wrote torch.cuda for
# tensors on a GPU.
STORAGE_NAMES = {
    (module, kind): Shim(f"{module}.{kind}", dtype=dtype)
    for kind, dtype in _STORAGE_TYPES.items()
    for module in ("torch", "torch.cuda", "torch.storage")
}
