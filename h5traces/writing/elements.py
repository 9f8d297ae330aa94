"""What of a record is stored beside its layered arrays: tokens, texts, extra fields, the index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from h5traces.errors import ConversionError
from h5traces.format import layout, text
from h5traces.format.values import EncodedObject, encode_element

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h5traces.format.document import Attrs
    from h5traces.format.record import TraceRecord


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
