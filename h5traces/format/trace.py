"""Metadata of one trace, and the table of those of all traces."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from h5traces.format.archive import Count, Int64, SampleExtraction
from h5traces.format.document import Document
from h5traces.format.text import encode_all

Coverage = Literal["full", "partial", "last_position", "steps", "empty"]

COVERAGE_DEFINITIONS: dict[Coverage, str] = {
    "full": "Every layer's array covers exactly the stored tokens.",
    "partial": "Arrays cover a sequence whose length is not the number of stored tokens.",
    "last_position": "Arrays hold one position only (the '350 MB bug' of old extractors).",
    "steps": "Arrays are generation steps, as an old extractor kept them, often with beams.",
    "empty": "No layered array is stored, or none with a value in it.",
}


class SourcePosition(Document):
    """Where a sample was converted from."""

    file: Annotated[int, Field(ge=0, description="Index into the archive's ``sources``.")]
    position: Annotated[int, Field(ge=0, description="Index in that file's list.")]


class TraceMetadata(Document):
    """What is known of one trace: the attributes of its sample group."""

    sample_id: Annotated[
        str | None,
        Field(description="The legacy ``question_id``. May be absent, and may repeat."),
    ] = None
    generation_index: Annotated[
        Count | None,
        Field(description="Tells samples of one sample_id apart, in order of writing, from 0."),
    ] = None
    seq_len: Annotated[
        Count, Field(description="Number of stored tokens, or of stored positions without tokens.")
    ]
    prompt_len: Annotated[Count | None, Field(description="Tokens of the prompt.")] = None
    coverage: Annotated[Coverage, Field(description="What the token axis of the arrays covers.")]
    label: Annotated[
        Int64 | None, Field(description="Class label, for instance 1=hallucination.")
    ] = None
    scores: Annotated[
        dict[str, float] | None, Field(description="Scores by name, for instance bleurt.")
    ] = None
    fields: Annotated[
        tuple[str, ...] | None,
        Field(description="Keys of the legacy dict in order, where not the archive's ``fields``."),
    ] = None
    source: Annotated[
        SourcePosition | None, Field(description="Where the sample was converted from.")
    ] = None
    extraction: Annotated[
        SampleExtraction | None, Field(description="How the sample was extracted from the model.")
    ] = None
    exact_digest: Annotated[
        str | None,
        Field(
            pattern=r"^[0-9a-f]{32}$",
            description="Digest of the sample that this one was made of by giving up precision.",
        ),
    ] = None
    digest: Annotated[
        str | None,
        Field(pattern=r"^[0-9a-f]{32}$", description="xxh3-128 of the content; written last."),
    ] = None

    @model_validator(mode="after")
    def _prompt_fits(self) -> TraceMetadata:
        # Only where the arrays cover the tokens: old batches stored answer tokens alone.
        if (
            self.coverage == "full"
            and self.prompt_len is not None
            and self.prompt_len > self.seq_len
        ):
            message = f"prompt_len {self.prompt_len} exceeds seq_len {self.seq_len}"
            raise ValueError(message)
        return self


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
