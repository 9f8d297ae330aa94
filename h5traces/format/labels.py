"""Labels beside an archive: the sidecar that a later scoring run leaves."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from h5traces.format.archive import Count, Int64
from h5traces.format.document import Document

LABELS_FORMAT = "h5traces-labels"


class LabelSidecar(Document):
    """Labels and scores of samples of one archive: a JSON file beside it."""

    format: Annotated[
        Literal["h5traces-labels"], Field(description="Tells a sidecar from other JSON files.")
    ] = "h5traces-labels"
    format_version: Annotated[
        str, Field(pattern=r"^[0-9]+\.[0-9]+$", description="MAJOR.MINOR of the format.")
    ]
    generator: Annotated[str, Field(description="Program and version that wrote the sidecar.")]
    created: Annotated[
        str,
        Field(
            pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?Z$",
            description="UTC time of writing, ISO 8601.",
        ),
    ]
    archive_id: Annotated[
        str,
        Field(
            pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$",
            description="The archive's own; the sidecar belongs to no other.",
        ),
    ]
    num_samples: Annotated[Count, Field(description="Samples in the archive, labelled or not.")]
    source: Annotated[
        str | None, Field(description="Name of the table that the scores came from.")
    ] = None
    label_score: Annotated[
        str | None, Field(description="The score that labels were made of, by name.")
    ] = None
    threshold: Annotated[
        float | None, Field(description="A label is 1 where that score is below this, else 0.")
    ] = None
    ordinals: Annotated[
        tuple[Count, ...],
        Field(description="Which samples are labelled, strictly ascending; others are not."),
    ]
    sample_ids: Annotated[
        tuple[str, ...], Field(description="The ``sample_id`` of each, which must fit.")
    ]
    labels: Annotated[tuple[Int64, ...] | None, Field(description="The label of each.")] = None
    scores: Annotated[
        dict[str, tuple[float, ...]], Field(description="By name, the score of each.")
    ]

    @model_validator(mode="after")
    def _columns_fit(self) -> LabelSidecar:
        lengths = {"sample_ids": len(self.sample_ids)}
        if self.labels is not None:
            lengths["labels"] = len(self.labels)
        lengths |= {f"scores.{name}": len(column) for name, column in self.scores.items()}
        for name, length in lengths.items():
            if length != len(self.ordinals):
                message = f"{name} has {length} entries, ordinals has {len(self.ordinals)}"
                raise ValueError(message)
        if any(left >= right for left, right in itertools.pairwise(self.ordinals)):
            message = "ordinals must be strictly ascending"
            raise ValueError(message)
        if self.ordinals and self.ordinals[-1] >= self.num_samples:
            message = f"ordinal {self.ordinals[-1]} is not one of {self.num_samples} samples"
            raise ValueError(message)
        if not all(math.isfinite(each) for column in self.scores.values() for each in column):
            message = "scores must be finite numbers"
            raise ValueError(message)
        return self
