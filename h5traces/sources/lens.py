"""Responses of vLLM-Lens: a server's answer with ``activations`` in it, numbers as text.

``activations.residual_stream`` is ``{data, dtype, shape, compression}``, where `data` is base64 of
zstd of the numbers, layers outermost. Other forms are pickled, and never read.
"""

from __future__ import annotations

import base64
import binascii
import math
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np
import zstandard

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.format.values import TorchValue
from h5traces.sources.responses import fields_of

if TYPE_CHECKING:
    from pathlib import Path

_ACTIVATIONS: Final = "activations"
_STREAM: Final = "residual_stream"
_CODES: Final = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float64": "<f8"}
_MAX_NBYTES: Final = 1 << 32


def is_of_lens(row: dict[str, Any]) -> bool:
    """Whether a row is such a response."""
    found = row.get(_ACTIVATIONS)
    return isinstance(found, dict) and _STREAM in found and layout.HIDDEN_STATES not in row


def of_lens(row: dict[str, Any], path: Path) -> dict[str, Any]:
    """Such a row as fields: ``hidden_states``, one ``(tokens, hidden)`` per layer, and the answer.

    Raises
    ------
    ConversionError
        The numbers are pickled, or not what type and shape say.
    """
    fields = fields_of(row)
    if isinstance(row.get("id"), str):
        fields.setdefault(layout.QUESTION_ID, row["id"])
    return {layout.HIDDEN_STATES: _states(row[_ACTIVATIONS][_STREAM], path), **fields}


def _states(found: Any, path: Path) -> list[TorchValue]:
    where = f"{path}: {_ACTIVATIONS}.{_STREAM}"
    parts = found if isinstance(found, dict) else {}
    data, dtype, shape = parts.get("data"), parts.get("dtype"), _plain(parts.get("shape"))
    if parts.get("compression") != "zstd" or dtype not in _CODES or not isinstance(data, str):
        _fail(
            f"{where} has dtype {dtype!r:.40} and compression {parts.get('compression')!r:.40}, "
            f"expected {', '.join(_CODES)} in zstd; pickled activations are never read: ask the "
            "server for arrays"
        )
    if len(shape) != 3 or not all(type(each) is int and each > 0 for each in shape):
        _fail(f"{where} has the shape {shape!r:.60}, expected (layers, tokens, hidden)")
    code = np.dtype(_CODES[dtype])
    nbytes = math.prod(shape) * code.itemsize
    if nbytes > _MAX_NBYTES:
        _fail(f"{where} takes {nbytes:,} bytes, at most {_MAX_NBYTES:,} are read")
    try:
        reader = zstandard.ZstdDecompressor().stream_reader(base64.b64decode(data, validate=True))
        raw = reader.read(nbytes + 1)
    except (binascii.Error, ValueError, zstandard.ZstdError) as error:
        _fail(f"{where} is not zstd in base64: {error}")
    if len(raw) != nbytes:
        _fail(f"{where} has {len(raw):,} bytes, but {dtype} of shape {shape} takes {nbytes:,}")
    return [TorchValue(each, dtype) for each in np.frombuffer(raw, code).reshape(shape)]


def _plain(shape: Any) -> tuple[Any, ...]:
    """A shape that came as a list, or as an array of a table."""
    return tuple(np.asarray(shape).tolist()) if isinstance(shape, (list, np.ndarray)) else ()


def _fail(message: str) -> NoReturn:
    raise ConversionError(message)
