"""What `append` takes, as records: records, traces, dicts, and what models return."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.archive.trace import Trace
from h5traces.errors import ConversionError, OptionError, SchemaError
from h5traces.format import layout
from h5traces.format.record import SourcePosition, TraceRecord
from h5traces.format.text import counted
from h5traces.format.values import MAX_DEPTH, TorchValue
from h5traces.meaning.containers import is_absent, shape_of
from h5traces.meaning.model_outputs import (
    TAKEN_OF_OUTPUTS,
    is_of_hooks,
    items_of_hooks,
    items_of_output,
)
from h5traces.meaning.records import to_record as dict_to_record
from h5traces.writing.stored_samples import to_record

if TYPE_CHECKING:
    from h5traces.meaning.numbering import Established
    from h5traces.meaning.options import ReadingOptions

    SampleIds = str | Sequence[str] | None

_NOWHERE: Final = SourcePosition(file=0, position=0)
# The embedding's output, which the first hook of the residual stream begins with.
_BATCHED_AXES: Final = 3


def records_of(
    sample: Any,
    sample_id: SampleIds,
    inputs: Any,
    reading: ReadingOptions,
    established: Established,
) -> list[TraceRecord]:
    """The records of what was appended, each with its id; see `TraceWriter.append`."""
    if _is_output(sample) or _is_cache(sample):
        records = _of_model(sample, inputs, reading, established)
    elif inputs is not None:
        message = (
            "inputs are for what a model returned; put 'tokens' and 'attention_mask' into the dict"
        )
        raise OptionError(message)
    else:
        records = [_of_one(sample, reading, established)]
    ids = [sample_id] if sample_id is None or isinstance(sample_id, str) else list(sample_id)
    if len(ids) != len(records):
        given = counted(0 if sample_id is None else len(ids), "sample id")
        message = f"{given} for a batch of {len(records)}; pass sample_id=[…], one per sequence"
        raise SchemaError(message)
    return [_with_id(each, found) for each, found in zip(records, ids, strict=True)]


def _of_one(sample: Any, reading: ReadingOptions, established: Established) -> TraceRecord:
    if isinstance(sample, TraceRecord):
        return sample
    if isinstance(sample, Trace):
        return to_record(sample).model_copy(update={"source": None})
    if isinstance(sample, Mapping):
        plain = _plain_fields(sample)
        found = dict_to_record(plain, source=_NOWHERE, options=reading, established=established)
        return found.model_copy(update={"source": None})
    message = (
        f"found {type(sample).__name__}, expected a TraceRecord, the dict of a trace, or what a "
        "model of transformers or TransformerLens returned"
    )
    raise ConversionError(message)


def _with_id(record: TraceRecord, sample_id: str | None) -> TraceRecord:
    if sample_id is None or record.sample_id == sample_id:
        return record
    if record.sample_id is not None:
        message = f"sample_id is {sample_id!r}, but the sample itself says {record.sample_id!r}"
        raise SchemaError(message)
    return record.model_copy(update={"sample_id": sample_id})


# --- what models return ---------------------------------------------------------------------------


def _is_output(sample: Any) -> bool:
    """Whether it is a ``ModelOutput``; never the first to import transformers."""
    generic = sys.modules.get("transformers.utils.generic")
    return generic is not None and isinstance(sample, generic.ModelOutput)


def _is_cache(sample: Any) -> bool:
    """Whether it is an ``ActivationCache``, or a dict by the names of its hooks."""
    if isinstance(sample, (TraceRecord, Trace)):
        return False
    if isinstance(sample, Mapping):
        return layout.HIDDEN_STATES not in sample and is_of_hooks(sample)
    return is_of_hooks(getattr(sample, "cache_dict", ()))


def _of_model(
    sample: Any, inputs: Any, reading: ReadingOptions, established: Established
) -> list[TraceRecord]:
    given = _inputs(inputs)
    if _is_output(sample):
        found = _plain_fields({key: sample[key] for key in TAKEN_OF_OUTPUTS if key in sample})
        items, has_sites = items_of_output(found, given), True
        if all(is_absent(each.get(layout.ATTENTIONS)) for each in items):
            # transformers' hidden states begin with the embedding.
            reading = replace(reading, first_state=reading.first_state or "embedding")
    else:
        values = getattr(sample, "cache_dict", sample)
        found = _plain_fields(values)
        items, first = items_of_hooks(found, given, has_batch=_has_batch(sample, found))
        # Hooks take the last block before the final norm.
        has_sites = False
        if all(is_absent(each.get(layout.ATTENTIONS)) for each in items):
            reading = replace(reading, first_state=reading.first_state or first)
    return [
        dict_to_record(
            each,
            source=_NOWHERE,
            sites_known=has_sites,
            options=reading,
            established=established,
        ).model_copy(update={"source": None})
        for each in items
    ]


def _inputs(inputs: Any) -> dict[str, Any]:
    """What the model was given, by name: a ``BatchEncoding``, a dict, or the ids of tokens."""
    if inputs is None:
        return {}
    if isinstance(inputs, Mapping):
        return {key: _as_array(_without_torch(value)) for key, value in inputs.items()}
    return {"input_ids": _as_array(_without_torch(inputs))}


def _as_array(value: Any) -> Any:
    """Lists of numbers, which tokenizers give without ``return_tensors``, as an array."""
    if not isinstance(value, list):
        return value
    try:
        return np.asarray(value)
    except ValueError:
        message = "inputs are lists of several lengths; pad them, or append one sequence at a time"
        raise ConversionError(message) from None


def _has_batch(sample: Any, values: dict[str, Any]) -> bool:
    stated = getattr(sample, "has_batch_dim", None)
    if stated is not None:
        return bool(stated)
    streams = (value for name, value in values.items() if ".hook_resid_" in name)
    return any(len(shape_of(each)) == _BATCHED_AXES for each in streams)


def _plain_fields(fields: Mapping[Any, Any]) -> dict[Any, Any]:
    """Fields with every torch tensor inside as a `TorchValue`."""
    found = {}
    for name, value in fields.items():
        try:
            found[name] = _without_torch(value)
        except ConversionError as error:
            message = f"field {name!r}: {error}"
            raise ConversionError(message) from error
    return found


def _without_torch(value: Any, depth: int = 0) -> Any:
    """`value` with every torch tensor inside as a `TorchValue`; never the first to import torch.

    ConversionError for what has no plain values, such as masked arrays.
    """
    torch = sys.modules.get("torch")
    if isinstance(value, np.ma.MaskedArray):
        message = "a masked array cannot be kept; pass array.filled(value), and the mask as a field"
        raise ConversionError(message)
    if torch is not None and isinstance(value, torch.Tensor):
        from h5traces.archive.torch_values import from_tensor

        return TorchValue(*from_tensor(value))
    if depth > MAX_DEPTH:
        message = f"the value is nested more than {MAX_DEPTH} levels deep, or holds itself"
        raise ConversionError(message)
    if type(value) is dict:
        return {key: _without_torch(each, depth + 1) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_torch(each, depth + 1) for each in value)
    return value
