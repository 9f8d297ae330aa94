"""What of a record is stored beside its layered arrays: tokens, texts, extra fields, the index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from h5traces.errors import ConversionError
from h5traces.format import layout, text
from h5traces.format.values import EncodedObject, encode_element
from h5traces.storage.hdf5.writing import text_column

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h5traces.format.attributes import Attrs
    from h5traces.format.record import TraceRecord
    from h5traces.format.trace import TraceMetadata


# In the table's column of labels, where 0, 1 and -1 are labels that people use.
NO_LABEL = -(2**63)


def record_elements(record: TraceRecord) -> Iterator[EncodedObject]:
    """Tokens, texts and extra fields."""
    if record.tokens is not None:
        attrs: Attrs = {}
        tokens = record.tokens
        if tokens.dtype != np.int64:
            attrs["source_dtype"] = tokens.dtype.newbyteorder("=").name
        if record.tokens_container is not None:
            attrs["container"] = record.tokens_container
        yield EncodedObject(layout.TOKENS, attrs, "int64", tokens.astype("<i8"))
    if record.tokens_decoded is not None:
        yield text_element(layout.TOKENS_DECODED, record.tokens_decoded)
    for name, value in record.texts.items():
        yield text_element(name, (value,))
    if record.extra:
        yield EncodedObject(layout.EXTRA_GROUP)
    for key, value in record.extra.items():
        path = f"{layout.EXTRA_GROUP}/{text.escape(layout.escape_key(key))}"
        try:
            yield from encode_element(path, value)
        except ConversionError as error:
            message = f"field {key!r}: {error}"
            raise ConversionError(message) from error


def text_element(path: str, texts: tuple[str, ...]) -> EncodedObject:
    values = text.encode_all(texts)
    return EncodedObject(path, {}, f"text:{values.dtype.itemsize}", values)


def index_columns(index: list[TraceMetadata]) -> dict[str, np.ndarray]:
    """The table ``/index/samples``; -1 stands for an absent count, `NO_LABEL` for no label."""

    def numbers(name: str, absent: int = -1) -> np.ndarray:
        values = [getattr(each, name) for each in index]
        return np.array([absent if value is None else value for value in values], dtype="<i8")

    columns = {
        "ordinal": np.arange(len(index), dtype="<i8"),
        "sample_id": text_column([each.sample_id or "" for each in index]),
        "generation_index": numbers("generation_index"),
        "seq_len": numbers("seq_len"),
        "prompt_len": numbers("prompt_len"),
        "coverage": text_column([each.coverage for each in index]),
    }
    if any(each.label is not None for each in index):
        columns["label"] = numbers("label", NO_LABEL)
    return columns
