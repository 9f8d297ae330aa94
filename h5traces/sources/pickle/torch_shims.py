"""Torch tensors inside a pickle, read without torch.

``pickle.dump`` of a tensor writes a call of ``torch._utils._rebuild_tensor_v2`` whose storage is
a complete legacy ``torch.save`` stream in a bytes object: five small pickles, then the numbers in
little-endian order. CUDA tensors differ in the name of the device only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.sources.pickle.shims import (
    Meter,
    Shim,
    Tensor,
    brief,
    check_args,
    check_shape,
    is_int,
    type_name,
)
from h5traces.sources.pickle.source import MalformedError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from h5traces.sources.pickle.source import MemorySource

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

# What holds each torch dtype in numpy; types that numpy lacks stay raw words.
_STORED_AS = {
    "float32": "<f4",
    "float64": "<f8",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "|i1",
    "uint8": "|u1",
    "uint16": "<u2",
    "uint32": "<u4",
    "uint64": "<u8",
    "bool": "|b1",
    "complex64": "<c8",
    "complex128": "<c16",
    "float8_e4m3fn": "|u1",
    "float8_e4m3fnuz": "|u1",
    "float8_e5m2": "|u1",
    "float8_e5m2fnuz": "|u1",
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
}


@dataclass(frozen=True, eq=False)
class TypeName(Shim):
    """The name of a storage type or of a torch dtype; nothing that can be called."""

    dtype: str


@dataclass(frozen=True, eq=False)
class Storage:
    """The numbers of one or more tensors: a part of the embedded stream's bytes."""

    data: bytes | bytearray
    start: int
    num_elements: int
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return self.num_elements * np.dtype(_STORED_AS[self.dtype]).itemsize


@dataclass(frozen=True, eq=False)
class StorageHeader:
    """What the persistent id of an embedded stream says about its storage."""

    key: str
    dtype: str
    num_elements: int


def _never(_meter: Meter, _args: tuple[Any, ...]) -> Any:
    message = "a torch type is called; pickles of tensors only pass it on"
    raise RefusedError(message)


def parse_persistent_id(value: Any) -> StorageHeader:
    """The storage that an embedded stream's persistent id describes."""
    if type(value) is not tuple or len(value) != 6 or brief(value[0]) != "'storage'":
        message = f"a persistent id is {type_name(value)}, expected a description of a storage"
        raise RefusedError(message)
    _, kind, key, location, num_elements, view = value
    if type(kind) is not TypeName or type(key) is not str or type(location) is not str:
        message = f"a persistent id names {type_name(kind)}, expected a torch storage type"
        raise RefusedError(message)
    if view is not None:
        message = "a storage is a view of another one, which only torch before 0.4 wrote"
        raise MalformedError(message)
    if not is_int(num_elements) or not 0 <= num_elements < 1 << 62:
        message = f"a storage has {brief(num_elements)} elements"
        raise RefusedError(message)
    return StorageHeader(key, kind.dtype, num_elements)


def read_storage(load: Callable[[], Any], source: MemorySource) -> Storage:
    """The storage in an embedded stream; ``load`` reads one pickle from ``source``."""
    if load() != _MAGIC or load() != _PROTOCOL:
        message = "the bytes of a torch storage are no legacy torch.save stream"
        raise MalformedError(message)
    system = load()
    if type(system) is not dict or system.get("little_endian") is not True:
        message = "a torch storage was written on a big-endian machine; save it again on another"
        raise MalformedError(message)
    header = load()
    keys = load()
    if type(header) is not StorageHeader or type(keys) is not list or keys != [header.key]:
        message = "the bytes of a torch storage hold something else than one storage"
        raise MalformedError(message)
    declared = int.from_bytes(source.read(8), "little")
    storage = Storage(source.data, source.inflated_bytes, header.num_elements, header.dtype)
    found = len(source.data) - storage.start
    if declared != header.num_elements or storage.nbytes != found:
        message = (
            f"a torch storage of {header.num_elements:,} {header.dtype} elements needs "
            f"{storage.nbytes:,} bytes, found {found:,} for {declared:,} elements"
        )
        raise MalformedError(message)
    return storage


def _load_from_bytes(meter: Meter, args: tuple[Any, ...]) -> Storage:
    check_args("_load_from_bytes", args, 1)
    if type(args[0]) is not bytes:
        message = f"_load_from_bytes is called with {type_name(args[0])}, expected bytes"
        raise RefusedError(message)
    storage = meter.load_storage(args[0])
    if type(storage) is not Storage:
        message = f"the bytes of a torch storage hold {type_name(storage)}"
        raise MalformedError(message)
    return storage


def _rebuild_v2(meter: Meter, args: tuple[Any, ...]) -> Tensor:
    check_args("_rebuild_tensor_v2", args, 6, 7)
    _check_extras(args[4], args[5], args[6] if len(args) == 7 else None)
    return _tensor(meter, args, None)


def _rebuild_v3(meter: Meter, args: tuple[Any, ...]) -> Tensor:
    check_args("_rebuild_tensor_v3", args, 7, 8)
    _check_extras(args[4], args[5], args[7] if len(args) == 8 else None)
    if type(args[6]) is not TypeName:
        message = f"a tensor has {type_name(args[6])} for its dtype, expected a torch dtype"
        raise RefusedError(message)
    return _tensor(meter, args, args[6].dtype)


def _rebuild_parameter(_meter: Meter, args: tuple[Any, ...]) -> Tensor:
    check_args("_rebuild_parameter", args, 3)
    _check_extras(args[1], args[2], None)
    if type(args[0]) is not Tensor:
        message = f"a parameter holds {type_name(args[0])}, expected a tensor"
        raise RefusedError(message)
    return args[0]


def _check_extras(requires_grad: Any, hooks: Any, metadata: Any) -> None:
    empty = all(value is None or (type(value) is dict and not value) for value in (hooks, metadata))
    if type(requires_grad) is not bool or not empty:
        message = (
            "a tensor carries hooks, or a conjugate or negative bit; save it again after "
            "detach().resolve_conj().resolve_neg()"
        )
        raise RefusedError(message)


def _tensor(meter: Meter, args: tuple[Any, ...], dtype_name: str | None) -> Tensor:
    storage, offset, size, strides = args[:4]
    if type(storage) is not Storage:
        message = f"a tensor has {type_name(storage)} for its storage"
        raise RefusedError(message)
    dtype_name = dtype_name or storage.dtype
    dtype = np.dtype(_STORED_AS[dtype_name])
    shape = check_shape(size)
    if len(check_shape(strides)) != len(shape) or not is_int(offset) or offset < 0:
        message = f"a tensor of shape {shape} has the strides {strides} and offset {brief(offset)}"
        raise RefusedError(message)
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return Tensor(np.empty(shape, dtype), dtype_name)
    last = offset + sum((dim - 1) * step for dim, step in zip(shape, strides, strict=True))
    if (last + 1) * dtype.itemsize > storage.nbytes:
        message = (
            f"a tensor of shape {shape}, strides {strides} and offset {offset} reaches element "
            f"{last:,} of a storage of {storage.nbytes // dtype.itemsize:,}"
        )
        raise RefusedError(message)
    start = storage.start + offset * dtype.itemsize
    byte_strides = tuple(step * dtype.itemsize for step in strides)
    whole = nbytes == storage.nbytes
    if not whole:
        meter.charge(nbytes)
    array: np.ndarray[Any, Any] = np.ndarray(
        shape, dtype, buffer=storage.data, offset=start, strides=byte_strides
    )
    # Where the numbers lie in the stream is chance, and readers of unaligned memory are slow; a
    # view of a part would keep the rest alive.
    if not whole or not array.flags.c_contiguous or not array.flags.aligned:
        meter.charge(nbytes if whole else 0)
        array = array.copy(order="C")
    return Tensor(array, dtype_name)


def _names() -> tuple[dict[tuple[str, str], Shim], dict[tuple[str, str], Shim]]:
    outer = {
        ("torch.storage", "_load_from_bytes"): _load_from_bytes,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
        ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    }
    names = {pair: Shim(".".join(pair), function) for pair, function in outer.items()}
    for dtype in _STORED_AS:
        names["torch", dtype] = TypeName(f"torch.{dtype}", _never, dtype)
    storages: dict[tuple[str, str], Shim] = {}
    for kind, dtype in _STORAGE_TYPES.items():
        # torch before 1.10 wrote torch.cuda for tensors on a GPU.
        for module in ("torch", "torch.cuda", "torch.storage"):
            storages[module, kind] = TypeName(f"{module}.{kind}", _never, dtype)
    return names, storages


# What a batch may name, and what the embedded streams may name: storage types, nothing else.
TORCH_NAMES: Mapping[tuple[str, str], Shim]
STORAGE_NAMES: Mapping[tuple[str, str], Shim]
TORCH_NAMES, STORAGE_NAMES = _names()
