"""Whatever a caller has of a sample, as a record."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from h5traces.archive.trace import Trace
from h5traces.errors import ConversionError, SchemaError
from h5traces.format.record import TraceRecord
from h5traces.format.trace import SourcePosition
from h5traces.format.values import TorchValue
from h5traces.sources.pickle import layouts
from h5traces.writing import transcription

_NOWHERE = SourcePosition(file=0, position=0)


def as_record(sample: TraceRecord | Mapping[str, Any], sample_id: str | None) -> TraceRecord:
    """A record, a legacy dict (with arrays or torch tensors) or a stored trace as a record.

    Raises
    ------
    ConversionError
        It is none of these, or a field of the dict has a type that no layout has.
    SchemaError
        It has another sample id already.
    """
    if isinstance(sample, TraceRecord):
        record = sample
    elif isinstance(sample, Trace):
        record = transcription.to_record(sample).model_copy(update={"source": None})
    elif isinstance(sample, Mapping):
        plain = {key: _without_torch(value) for key, value in sample.items()}
        record = layouts.to_record(plain, source=_NOWHERE).model_copy(update={"source": None})
    else:
        message = f"found a {type(sample).__name__}, expected a TraceRecord or the dict of a trace"
        raise ConversionError(message)
    if sample_id is None or record.sample_id == sample_id:
        return record
    if record.sample_id is not None:
        message = f"sample_id is {sample_id!r}, but the sample itself says {record.sample_id!r}"
        raise SchemaError(message)
    return record.model_copy(update={"sample_id": sample_id})


def _without_torch(value: Any) -> Any:
    """`value` with every torch tensor inside it as a `TorchValue`; torch is not imported for it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return value
    if isinstance(value, torch.Tensor):
        return _from_tensor(value, torch)
    if type(value) is dict:
        return {key: _without_torch(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_torch(each) for each in value)
    return value


def _from_tensor(tensor: Any, torch: Any) -> TorchValue:
    found = tensor.detach().cpu().contiguous()
    dtype = str(found.dtype).removeprefix("torch.")
    if found.dtype == torch.bfloat16:
        return TorchValue(found.view(torch.int16).numpy().view(np.uint16), dtype)
    return TorchValue(found.numpy(), dtype)
