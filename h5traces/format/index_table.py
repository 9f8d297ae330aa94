"""What of a record is stored beside its layered arrays: tokens, texts, extra fields, the index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from h5traces.format.text import encode_all

if TYPE_CHECKING:
    from h5traces.format.trace import TraceMetadata


# In the table's column of labels, where 0, 1 and -1 are labels that people use.
NO_LABEL = -(2**63)


def index_columns(index: list[TraceMetadata]) -> dict[str, np.ndarray]:
    """The table ``/index/samples``; -1 stands for an absent count, `NO_LABEL` for no label."""

    def numbers(name: str, absent: int = -1) -> np.ndarray:
        values = [getattr(each, name) for each in index]
        return np.array([absent if value is None else value for value in values], dtype="<i8")

    columns = {
        "ordinal": np.arange(len(index), dtype="<i8"),
        "sample_id": encode_all([each.sample_id or "" for each in index]),
        "generation_index": numbers("generation_index"),
        "seq_len": numbers("seq_len"),
        "prompt_len": numbers("prompt_len"),
        "coverage": encode_all([each.coverage for each in index]),
    }
    if any(each.label is not None for each in index):
        columns["label"] = numbers("label", NO_LABEL)
    return columns
