"""Files of numpy.save and numpy.savez: arrays as views of the file, objects rejected by name."""

from __future__ import annotations

import ast
import math
import re
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

import numpy as np

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.meaning.options import ReadingOptions
from h5traces.sources.mapped import aligned
from h5traces.sources.named_arrays import NamedArraysSource
from h5traces.sources.unpacked import mapped_file
from h5traces.sources.zip_entries import ZipDirectory, entry_content

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

_MAGIC: Final = b"\x93NUMPY"
_SUFFIX: Final = ".npy"
# As numpy itself; the header is a literal of Python.
_MAX_HEADER_NBYTES: Final = 10_000
_MAX_AXES: Final = 32
_MAX_ELEMENTS: Final = 1 << 60
_PLAIN: Final = re.compile(r"[<>|=][biufcSU]\d{1,9}\Z")


class NpzSource(NamedArraysSource):
    """The samples of a file of numpy.savez, mostly one."""

    kind = "npz"

    def __init__(
        self, path: str | os.PathLike[str], *, options: ReadingOptions = ReadingOptions()
    ) -> None:
        super().__init__(path, options=options)
        self._mapped = mapped_file(self.path)
        self._directory = ZipDirectory(self._mapped.read_at, self._mapped.nbytes, str(path))
        names = {name.removesuffix(_SUFFIX): partial(self._load, name) for name in self._directory}
        self.take(names, {}, self._mapped)

    def _load(self, name: str) -> NDArray[Any]:
        entry = self._directory.entry(name)
        content = entry_content(self._mapped, entry, str(self.path))
        return _array_in(content, f"{self.path}: array {name.removesuffix(_SUFFIX)[:80]!r}")


class NpySource(NamedArraysSource):
    """A file of numpy.save: one array, the hidden states of one sample."""

    kind = "npy"

    def __init__(
        self, path: str | os.PathLike[str], *, options: ReadingOptions = ReadingOptions()
    ) -> None:
        super().__init__(path, options=options)
        file = mapped_file(self.path)
        self.understood.append("the array holds hidden states")
        self.take(
            {layout.HIDDEN_STATES: lambda: _array_in(file.view(0, file.nbytes), f"{path}:")},
            {},
            file,
        )


def _array_in(content: NDArray[np.uint8], where: str) -> NDArray[Any]:
    """The array in the bytes of a file of numpy.save: a view of them."""

    def fail(message: str) -> NoReturn:
        message = f"{where} {message}"
        raise ConversionError(message)

    head = content[:12].tobytes()
    if not head.startswith(_MAGIC) or len(head) < 12:
        fail("is none of numpy.save")
    major = head[6]
    if major not in (1, 2, 3):
        fail(f"has version {major} of numpy's format, expected 1 to 3")
    size = 2 if major == 1 else 4
    nbytes = int.from_bytes(head[8 : 8 + size], "little")
    start = 8 + size + nbytes
    if nbytes > _MAX_HEADER_NBYTES or start > len(content):
        fail(f"has a header of {nbytes:,} bytes, at most {_MAX_HEADER_NBYTES:,} are read")
    text = (
        content[8 + size : start].tobytes().decode("utf-8" if major == 3 else "latin-1", "replace")
    )
    try:
        header = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        fail("has a header that is not a literal of Python")
    if type(header) is not dict or set(header) != {"descr", "fortran_order", "shape"}:
        fail("has a header without descr, fortran_order and shape")
    dtype, shape = _dtype(header["descr"], fail), header["shape"]
    if (
        type(shape) is not tuple
        or len(shape) > _MAX_AXES
        or any(type(each) is not int or each < 0 for each in shape)
        or math.prod(max(each, 1) for each in shape) >= _MAX_ELEMENTS
    ):
        fail(f"has the shape {str(shape)[:80]}, expected sizes")
    needed = math.prod(shape) * dtype.itemsize
    if start + needed != len(content):
        fail(
            f"of shape {shape} and dtype {dtype} needs {needed:,} bytes, found "
            f"{len(content) - start:,}; it is not complete, or holds several arrays"
        )
    order: Literal["C", "F"] = "F" if header["fortran_order"] is True else "C"
    data = content[start:] if needed else np.empty(0, np.uint8)
    array: NDArray[Any] = np.ndarray(shape, dtype, buffer=data, order=order)
    if dtype.kind == "U" and array.size:
        _check_text(data, dtype, fail)
    return aligned(array)


def _dtype(code: Any, fail: Any) -> np.dtype[Any]:
    if type(code) is list:
        fail("holds structures, expected plain numbers or text; save each field as an array")
    if type(code) is not str:
        fail("has no dtype")
    if "O" in code:
        fail(
            "holds objects, which only running a pickle could read; save them as an array of "
            "numbers or text"
        )
    if code.lstrip("<>|=")[:1] == "V":
        fail(
            "holds raw bytes, as numpy.save writes types that it does not know, such as bfloat16; "
            "save it as float32, or its bits as uint16"
        )
    if not _PLAIN.match(code):
        fail(f"has the dtype {code[:40]!r}, expected plain numbers or text")
    try:
        dtype: np.dtype[Any] = np.dtype(code)
    except (TypeError, ValueError):
        fail(f"has the dtype {code[:40]!r}, which numpy does not know")
    if not dtype.itemsize:
        fail(f"has elements of 0 bytes ({code[:40]!r})")
    return dtype


def _check_text(data: NDArray[np.uint8], dtype: np.dtype[Any], fail: Any) -> None:
    """Check that words are characters: numpy makes text of them unchecked."""
    words = data.view(np.dtype("u4").newbyteorder(dtype.byteorder))
    if words.max() > 0x10FFFF:
        fail("holds a word that is not a Unicode character")
