"""Files of safetensors: named tensors behind a header of JSON, read as views of the file.

The layout is that of https://huggingface.co/docs/safetensors: the length of the header in 8 bytes,
the header, and the numbers without gaps. What the names mean, `named_arrays` says; serving engines
write one file per request, with `hidden_states` and `token_ids`.
"""

from __future__ import annotations

import json
import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import numpy as np

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.format.values import TorchValue
from h5traces.meaning.options import ReadingOptions
from h5traces.sources.mapped import aligned
from h5traces.sources.named_arrays import NamedArraysSource
from h5traces.sources.unpacked import mapped_file

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

_METADATA: Final = "__metadata__"
_MAX_HEADER_NBYTES: Final = 32 << 20
# Signs of JSON in the header, some 11 per tensor, so that parsing it takes less than a second.
_MAX_SIGNS: Final = 700_000
_MAX_AXES: Final = 32
# As numpy, counting axes of length 0 as 1.
_MAX_ELEMENTS: Final = 1 << 60
_DTYPES: Final = {
    "F64": ("float64", "<f8"),
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
    "F8_E4M3": ("float8_e4m3fn", "u1"),
    "F8_E5M2": ("float8_e5m2", "u1"),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", "u1"),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", "u1"),
    "C64": ("complex64", "<c8"),
    "BOOL": ("bool", "?"),
    **{
        f"{kind}{bits}": (f"{name}{bits}", f"<{code}{bits // 8}")
        for kind, name, code in (("I", "int", "i"), ("U", "uint", "u"))
        for bits in (8, 16, 32, 64)
    },
}
_ITEMSIZES: Final = {name: np.dtype(code).itemsize for name, (_, code) in _DTYPES.items()}
_KEYS: Final = {"dtype", "shape", "data_offsets"}
# Of texts that are lists, or that UTF-8 does not hold.
_JSON_ENDING: Final = ".json"
# The scale of each token, beside states in float8.
_SCALES: Final = f"{layout.HIDDEN_STATES}_scales"


class _Tensor(NamedTuple):
    """An entry of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsSource(NamedArraysSource):
    """The samples of a file of safetensors, mostly one; also inside a compressor."""

    kind = "safetensors"

    def __init__(
        self, path: str | os.PathLike[str], *, options: ReadingOptions = ReadingOptions()
    ) -> None:
        super().__init__(path, options=options)
        self._file = mapped_file(self.path)
        header, facts = self._read_header()
        self._check_places(header, self._start)
        loaders: dict[str, Any] = {name: partial(self._load, name, header[name]) for name in header}
        texts, facts = _texts_of(facts)
        loaders |= {name: partial(_same, value) for name, value in texts.items()}
        self.take(loaders, facts, self._file)

    def prepared(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """The arrays; states in float8 times the scale of their token."""
        if _SCALES in arrays and layout.HIDDEN_STATES in arrays:
            arrays[layout.HIDDEN_STATES] = self._scaled(arrays)
        return arrays

    def _fail(self, message: str) -> NoReturn:
        message = f"{self.path}: {message}"
        raise ConversionError(message)

    # --- the header ------------------------------------------------------------------------------

    def _header_nbytes(self, head: bytes | bytearray) -> int:
        nbytes = int.from_bytes(head, "little")
        if nbytes > _MAX_HEADER_NBYTES:
            self._fail(
                f"the header takes {nbytes:,} bytes, at most {_MAX_HEADER_NBYTES:,} are read; save "
                "the tensors in several files"
            )
        return nbytes

    def _read_header(self) -> tuple[dict[str, _Tensor], Mapping[str, str]]:
        nbytes = self._header_nbytes(self._file.read_at(0, 8))
        data = self._file.read_at(8, nbytes)
        if len(data) < nbytes:
            self._fail("the header is cut off, so the file is not complete; copy it again")
        if sum(map(data.count, (b",", b":", b"[", b"{"))) > _MAX_SIGNS:
            self._fail(
                "the header names too many tensors, at most some 60,000 are read; save them in "
                "several files"
            )
        try:
            found = json.loads(data, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            self._fail(f"the header is not JSON: {error}")
        if type(found) is not dict:
            self._fail("the header is not an object of JSON")
        facts = self._metadata(found.pop(_METADATA, None))
        self._start = 8 + nbytes
        return {name: self._entry(name, entry) for name, entry in found.items()}, facts

    def _metadata(self, found: Any) -> Mapping[str, str]:
        if found is None:
            return {}
        if type(found) is not dict or not all(type(each) is str for each in found.values()):
            self._fail(f"{_METADATA} of the header is not an object of text")
        return found

    def _entry(self, name: str, entry: Any) -> _Tensor:
        if type(entry) is not dict or entry.keys() != _KEYS:
            self._fail(f"the header says of {name[:80]!r} no {', '.join(sorted(_KEYS))}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
            self._fail(f"tensor {name[:80]!r}: shape and data_offsets are not lists of sizes")
        if type(dtype) is not str:
            self._fail(f"tensor {name[:80]!r}: dtype is not text")
        elements = math.prod(shape)
        if elements >= _MAX_ELEMENTS or (
            not elements and math.prod(map(_or_one, shape)) >= _MAX_ELEMENTS
        ):
            self._fail(f"tensor {name[:80]!r}: shape {tuple(shape)} has too many elements")
        begin, end = offsets
        itemsize = _ITEMSIZES.get(dtype)
        if itemsize is not None and end - begin != elements * itemsize:
            self._fail(
                f"tensor {name[:80]!r}: shape {tuple(shape)} of {dtype} needs "
                f"{elements * itemsize:,} bytes, the header gives it {end - begin:,}"
            )
        return _Tensor(dtype, tuple(shape), begin, end)

    def _check_places(self, header: dict[str, _Tensor], start: int) -> None:
        """Check that the tensors follow each other without gaps, to the end of the file."""
        end = 0
        for name, tensor in sorted(header.items(), key=lambda item: (item[1].begin, item[1].end)):
            if tensor.begin != end or tensor.end < end:
                self._fail(
                    f"tensor {name[:80]!r} begins at byte {tensor.begin:,} of the numbers, "
                    f"expected {end:,}: tensors overlap, or leave gaps"
                )
            end = tensor.end
        found = self._file.nbytes - start
        if found < end:
            self._fail(
                f"the tensors take {end:,} bytes, and {found:,} follow the header; the file is not "
                "complete: copy it again, or wait for its writer"
            )
        if found > end:
            self._fail(f"{found - end:,} bytes follow the last tensor")

    # --- tensors ---------------------------------------------------------------------------------

    def _load(self, name: str, tensor: _Tensor) -> TorchValue:
        if tensor.dtype not in _DTYPES:
            self._fail(
                f"tensor {name[:80]!r} has the dtype {tensor.dtype}, expected one of "
                f"{', '.join(_DTYPES)}"
            )
        dtype, code = _DTYPES[tensor.dtype]
        array = self._file.array(self._start + tensor.begin, code, tensor.shape)
        return TorchValue(aligned(array), dtype)

    def _scaled(self, arrays: dict[str, Any]) -> Any:
        """States in float8 times the scale of their token: float32."""
        states, scales = arrays.get(layout.HIDDEN_STATES), arrays[_SCALES]
        if states is None or not states.dtype.startswith("float8_e4m3fn"):
            return states
        shape, given = states.data.shape, scales.data.shape
        # Older ones are (tokens, 1), newer ones have every axis of the states.
        if len(given) == 2 and len(shape) == 3 and given == (shape[0], 1):
            given = (*given, 1)
        fits = len(given) == len(shape) and all(
            one in (1, other) for one, other in zip(given, shape, strict=True)
        )
        if scales.dtype != "float32" or not fits:
            self._fail(
                f"{_SCALES} are {scales.dtype} of shape {scales.data.shape}, expected float32 "
                f"that fit hidden_states of shape {shape}"
            )
        self.understood.append(f"hidden_states are float8 times {_SCALES}, taken as float32")
        numbers = _float8_e4m3fn()[states.data]
        numbers *= scales.data.reshape(given)
        return TorchValue(numbers, "float32")


def _texts_of(facts: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Texts in the header that are fields of a sample, as ``export`` writes them; the others."""
    others = dict(facts)
    names = (layout.QUESTION_ID, *layout.TEXT_FIELDS)
    texts: dict[str, Any] = {name: others.pop(name) for name in names if name in others}
    for name in (*names, layout.TOKENS_DECODED):
        value = _decoded(others.get(name + _JSON_ENDING, ""))
        is_text = type(value) is str and name != layout.TOKENS_DECODED
        is_list = type(value) is list and all(type(each) is str for each in value)
        if name not in texts and (is_text or (is_list and name == layout.TOKENS_DECODED)):
            texts[name] = value
            del others[name + _JSON_ENDING]
    return texts, others


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _same(value: Any) -> Any:
    return value


def _are_sizes(values: Any) -> bool:
    return (
        type(values) is list
        and len(values) <= _MAX_AXES
        and all(type(each) is int for each in values)
        and (not values or min(values) >= 0)
    )


def _or_one(size: int) -> int:
    return max(size, 1)


def _float8_e4m3fn() -> Any:
    """The number of each of the 256 codes ``(256,)`` of float8 e4m3fn, in float32.

    1 bit sign, 4 bits exponent with bias 7, 3 bits mantissa, no infinities: Micikevicius et al.
    2022, FP8 Formats for Deep Learning, table 1.
    """
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    numbers = np.where(exponent > 0, normal, np.ldexp(mantissa / 8, -6))
    numbers[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -numbers, numbers).astype(np.float32)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        message = "a name comes twice"
        raise ValueError(message)
    return found
