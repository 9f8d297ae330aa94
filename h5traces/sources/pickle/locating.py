"""Errors in a pickle as the caller sees them: where it is wrong, and what to do about it."""

from __future__ import annotations

import struct
from pickletools import opcodes
from typing import TYPE_CHECKING, Final

from h5traces.errors import ConversionError, UnsafePickleError
from h5traces.sources.pickle.source import MalformedError, RejectedError

if TYPE_CHECKING:
    from h5traces.sources.pickle.stack import Stack

_OPCODE_NAMES: Final = {ord(opcode.code): opcode.name for opcode in opcodes}
# What handlers raise on bytes that no pickler writes; `locate` translates it.
INVALID = (
    RejectedError,
    MalformedError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    struct.error,
)
_REMEDIES: Final = (
    (
        ("dill", "cloudpickle"),
        "It was written by dill or cloudpickle with functions or classes inside: load it with "
        "that, and save what is plain of it with pickle",
    ),
    (
        ("pandas", "pyarrow"),
        "Save a table as Parquet, or df.to_dict('records') with pickle",
    ),
    (
        ("torch", "transformers", "numpy", "jax", "jaxlib"),
        "Convert only files that you trust; save objects of libraries as arrays, dicts or text: "
        "dict(output), str(dtype)",
    ),
)
_REMEDY: Final = (
    "Convert only files that you trust; load the file where its classes are, and save such "
    "objects as plain values: dataclasses.asdict(), _asdict(), vars(), or the value of an enum"
)


def remedy(module: str) -> str:
    """What to do about a name of that module in a pickle."""
    package = module.partition(".")[0]
    return next((text for packages, text in _REMEDIES if package in packages), _REMEDY)


def locate(
    error: Exception, machine: Stack, where: str, item: int | None = None
) -> ConversionError:
    """The error for the caller, with file, byte, opcode and item."""
    place = f"{where}: byte {machine.source.inflated_bytes:,}"
    place += f" ({name})" if (name := _OPCODE_NAMES.get(machine.opcode)) else ""
    place += f", item {item}" if item is not None else ""
    if isinstance(error, RejectedError):
        return UnsafePickleError(f"{place}: {error}")
    if isinstance(error, MalformedError):
        return ConversionError(f"{place}: {error}")
    if isinstance(error, IndexError):
        return UnsafePickleError(f"{place}: it needs a value and the stack is empty")
    return ConversionError(f"{place}: no valid pickle: {error}")
