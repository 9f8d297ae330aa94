"""A trace in memory on its way into an archive, its attributes, and checks that span its fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, SkipValidation, ValidationError, model_validator

from h5traces.errors import Problem, SchemaError
from h5traces.format import layout
from h5traces.format.archive import Count, Digest, Int64, SampleExtraction
from h5traces.format.attention import AttentionRule  # noqa: TC001 - pydantic resolves it
from h5traces.format.document import Document, problems_of
from h5traces.format.dtypes import CastCounts, FloatType, TypedArray
from h5traces.format.text import encode_all, excerpt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


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
        Digest | None,
        Field(description="Digest of the sample that this one was made of by giving up precision."),
    ] = None
    digest: Annotated[
        Digest | None, Field(description="xxh3-128 of the content; written last.")
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
# Columns of the table that are beginnings of texts.
EXCERPTS = ("question", "answer")


class IndexRow(NamedTuple):
    """What the table ``/index/samples`` has of a sample, in less memory than its metadata."""

    sample_id: str | None
    seq_len: int
    label: int | None
    question: str
    answer: str
    generation_index: int | None
    prompt_len: int | None
    coverage: str

    @classmethod
    def of(cls, metadata: TraceMetadata, texts: Mapping[str, str]) -> IndexRow:
        """The row of a sample; `texts` are its question and answers by field."""
        answers = (texts.get(name) for name in reversed(layout.ANSWER_FIELDS))
        return cls(
            metadata.sample_id,
            metadata.seq_len,
            metadata.label,
            excerpt(texts.get("question", "")),
            excerpt(next(filter(None, answers), "")),
            metadata.generation_index,
            metadata.prompt_len,
            metadata.coverage,
        )


def index_columns(index: Sequence[IndexRow]) -> dict[str, np.ndarray]:
    """The table ``/index/samples``; -1 stands for an absent count, `NO_LABEL` for no label."""

    def numbers(name: str, absent: int = -1) -> np.ndarray:
        values = [getattr(each, name) for each in index]
        return np.array([absent if value is None else value for value in values], dtype="<i8")

    def texts(name: str) -> np.ndarray:
        return encode_all([getattr(each, name) or "" for each in index])

    columns = {
        "ordinal": np.arange(len(index), dtype="<i8"),
        "sample_id": texts("sample_id"),
        "seq_len": numbers("seq_len"),
    }
    if any(each.label is not None for each in index):
        columns["label"] = numbers("label", NO_LABEL)
    columns |= {name: texts(name) for name in EXCERPTS if any(getattr(r, name) for r in index)}
    columns |= {name: numbers(name) for name in ("generation_index", "prompt_len")}
    return {**columns, "coverage": texts("coverage")}


Container = Literal["torch", "ml_dtypes"]
TokensContainer = Literal["torch", "list"]


class ArraySource(Protocol):
    """Anything that knows its shape and type and can produce the array when it is written."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""

    @property
    def dtype(self) -> FloatType:
        """Type of the array."""

    def load(self) -> TypedArray:
        """The array; called once, when the writer gets to it."""


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One layer's arrays of generation steps, as old extractors kept them.

    All are of one type: hidden states ``(beams, tokens, hidden)`` or attentions ``(beams, heads,
    query, key)``. `sequence` says what held them in the legacy dict.
    """

    steps: tuple[TypedArray, ...]
    sequence: Literal["list", "tuple"] = "list"


@dataclass(frozen=True, slots=True)
class EarlierCast:
    """A cast that was made before an array got into a record, on the device that computed it."""

    cast_from: FloatType
    # Without values that are not finite: they are counted when the array is written.
    counts: CastCounts
    # Rounding included; None if that is not known.
    num_changed: int | None = None


@dataclass(frozen=True, slots=True)
class LayerArray:
    """One array of a layered kind, or its generation steps."""

    # Of the dataset: ``layer_000`` (the model's own 0-based block number) or ``embedding``.
    name: str
    array: ArraySource | StepArrays
    # Where in the model the numbers were taken; see ``schema/SPEC.md``.
    site: str | None = None
    # None for numpy.
    container: Container | None = None
    earlier: EarlierCast | None = None
    # Of queries: how they and the keys make attention weights.
    rule: AttentionRule | None = None


class SourceForm(Document):
    """What held the arrays of a kind in the legacy dict: attributes of the kind's group."""

    sequence: Annotated[
        Literal["tuple", "dict", "array"] | None,
        Field(description="Container of the layers; `array`: one array or tensor; absent: a list."),
    ] = None
    source_axes: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...] | None,
        Field(
            description="Axes of that array, or of each item, where they are not those of the kind."
        ),
    ] = None
    keys: Annotated[
        tuple[tuple[str | int, str], ...] | None,
        Field(description="Of a dict, in its order: each key, and the name of its dataset."),
    ] = None
    lists_embedding: Annotated[
        bool | None, Field(description="Whether the embedding was the first item.")
    ] = None
    absent: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...] | None,
        Field(description="Names of items that were None, such as `layer_001`; none is stored."),
    ] = None

    @model_validator(mode="after")
    def _fits_its_sequence(self) -> SourceForm:
        if (self.sequence == "dict") != (self.keys is not None):
            message = "keys are listed of a dict, and of nothing else"
            raise ValueError(message)
        if self.absent is not None and self.sequence == "array":
            message = "absent items are listed of an array, which has none"
            raise ValueError(message)
        return self


_PLAIN_LIST = SourceForm()


@dataclass(frozen=True, slots=True)
class LayeredArrays:
    """All arrays of one kind of one sample: the embedding, if any, then in order of layer.

    `form` says what held them in the legacy dict.
    """

    arrays: tuple[LayerArray, ...]
    form: SourceForm = _PLAIN_LIST
    # How heads were reduced in arrays without a head axis, if known.
    reduction: str | None = None
    # Of one layer's array, for kinds that `layout.KINDS` does not name.
    axes: tuple[str, ...] | None = None
    # What the numbers are, where whoever made them knows: of a kind of `kinds.MODEL_KINDS`.
    definition: str | None = None

    @property
    def in_steps(self) -> bool:
        """Whether the arrays are lists of generation steps."""
        return any(isinstance(entry.array, StepArrays) for entry in self.arrays)


class ArrayDescription(Document):
    """Name, type and shape of one stored array."""

    kind: Annotated[str, Field(min_length=1, description="For instance ``hidden_states``.")]
    name: Annotated[
        str,
        Field(
            pattern=r"^((layer|position)_[0-9]{3,}|embedding)$",
            description="Dataset name: ``layer_000`` and so on, ``embedding``, or ``position_000`` "
            "and so on where no decoder block is known.",
        ),
    ]
    dtype: Annotated[FloatType, Field(description="Stored type.")]
    shape: Annotated[tuple[Count, ...], Field(description="Shape of the array.")]
    site: Annotated[str | None, Field(description="Where in the model the numbers were taken.")] = (
        None
    )


class TraceDescription(Document):
    """A trace without its numbers: what is stored, under which names, in which shapes."""

    metadata: Annotated[TraceMetadata, Field(description="The attributes of the sample group.")]
    num_tokens: Annotated[Count | None, Field(description="Stored token ids.")] = None
    num_tokens_decoded: Annotated[Count | None, Field(description="Stored token texts.")] = None
    arrays: Annotated[tuple[ArrayDescription, ...], Field(description="Every layered array.")] = ()
    axes: Annotated[
        dict[str, tuple[str, ...]] | None,
        Field(description="Axes of one layer's array, of kinds that the format does not name."),
    ] = None

    def problems(self) -> list[Problem]:
        """Every contradiction between the fields; JSON Schema cannot relate their lengths."""
        found: list[Problem] = []
        if (
            self.num_tokens is not None
            and self.num_tokens_decoded is not None
            and self.num_tokens != self.num_tokens_decoded
        ):
            message = (
                f"{self.num_tokens_decoded} decoded tokens for {self.num_tokens} token ids; "
                "expected one text per id"
            )
            found.append(Problem(layout.TOKENS_DECODED, message, "length_mismatch"))
        # Kinds that are not in steps still have their axes.
        covers_tokens = self.metadata.coverage not in ("steps", "empty")
        known = {kind: definition.axes for kind, definition in layout.KINDS.items()}
        for kind, axes in {**(self.axes or {}), **known}.items():
            entries = self._of(kind)
            of_kind = _axes_problems(entries, axes)
            if covers_tokens and not of_kind:
                of_kind = _length_problems(entries, axes)
            found += of_kind
        return found + (self._cross_kind_problems() if covers_tokens else [])

    def _of(self, kind: str) -> list[ArrayDescription]:
        return [entry for entry in self.arrays if entry.kind == kind]

    def _cross_kind_problems(self) -> list[Problem]:
        hidden, found = self._of(layout.HIDDEN_STATES), []
        for kind in (layout.ATTENTIONS, layout.ATTENTION_MEAN):
            weights = self._of(kind)
            if not hidden or not weights or len(hidden[0].shape) < 1 or len(weights[0].shape) < 2:
                continue
            if hidden[0].shape[0] != weights[0].shape[-2]:
                message = (
                    f"{weights[0].shape[-2]} query positions, but hidden states have "
                    f"{hidden[0].shape[0]} tokens; expected the same sequence in both"
                )
                found.append(Problem(f"{kind}/{weights[0].name}", message, "unequal_lengths"))
        return found


def _axes_problems(entries: list[ArrayDescription], axes: tuple[str, ...]) -> list[Problem]:
    found = []
    for entry in entries:
        if len(entry.shape) != len(axes):
            message = (
                f"shape {entry.shape} has {len(entry.shape)} axes, expected {len(axes)}: "
                f"({', '.join(axes)})"
            )
            found.append(Problem(f"{entry.kind}/{entry.name}", message, "wrong_axes"))
    return found


def _length_problems(entries: list[ArrayDescription], axes: tuple[str, ...]) -> list[Problem]:
    """Of entries that have these axes."""
    found = []
    for axis, axis_name in enumerate(axes if entries else ()):
        if axis_name not in ("token", "query", "key"):
            continue
        expected = entries[0].shape[axis]
        odd = next((each for each in entries if each.shape[axis] != expected), None)
        if odd is not None:
            message = (
                f"shape {odd.shape} has {odd.shape[axis]} on the {axis_name} axis, but "
                f"{entries[0].name} has {expected}; expected the same sequence in every layer"
            )
            found.append(Problem(f"{odd.kind}/{odd.name}", message, "unequal_lengths"))
    return found


class TraceRecord(BaseModel):
    """A trace that is not written yet.

    The converter and the extractor both produce it, and the writer knows nothing else.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True)

    sample_id: str | None = None
    generation_index: Annotated[int | None, Field(ge=0)] = None
    prompt_len: Annotated[int | None, Field(ge=0)] = None
    label: Int64 | None = None
    scores: dict[str, float] | None = None
    source: SourcePosition | None = None
    extraction: SampleExtraction | None = None
    exact_digest: Digest | None = None
    fields: tuple[str, ...] = ()
    tokens: NDArray[np.int64] | None = None
    tokens_container: TokensContainer | None = None
    tokens_decoded: tuple[str, ...] | None = None
    # By position: 1, or 0 where nothing may be read into the numbers.
    attention_mask: NDArray[np.uint8] | None = None
    texts: dict[str, str] = {}
    layered: SkipValidation[dict[str, LayeredArrays]] = {}
    extra: SkipValidation[dict[str, Any]] = {}
    # Findings of `h5traces.meaning.checks`, for reports; not stored.
    findings: SkipValidation[tuple[Any, ...]] = ()

    def coverage(self) -> Coverage:
        """What the token axis of the arrays covers; see `COVERAGE_DEFINITIONS`."""
        kinds = {name: kind for name, kind in self.layered.items() if kind.arrays}
        if any(kind.in_steps for kind in kinds.values()):
            has_steps = any(
                isinstance(entry.array, StepArrays) and entry.array.steps
                for kind in kinds.values()
                for entry in kind.arrays
            )
            return "steps" if has_steps else "empty"
        if not kinds:
            return "empty"
        return coverage_of(
            {name: _shape_of(kind.arrays[0]) for name, kind in kinds.items()},
            None if self.tokens is None else len(self.tokens),
        )

    def describe(self) -> TraceDescription:
        """The record without its numbers; SchemaError, with `problems`, where fields contradict."""
        try:
            description = self._description()
        except ValidationError as error:
            found = problems_of(error)
            raise SchemaError("; ".join(map(str, found)), found) from error
        problems = description.problems()
        if problems:
            raise SchemaError("; ".join(map(str, problems)), problems)
        return description

    def _description(self) -> TraceDescription:
        coverage = self.coverage()
        # Not `ArrayDescription`s: pydantic makes all of them in one call.
        arrays: Any = tuple(
            {
                "kind": kind,
                "name": entry.name,
                "dtype": entry.array.dtype,
                "shape": entry.array.shape,
                "site": entry.site,
            }
            for kind, layers in self.layered.items()
            for entry in layers.arrays
            if not isinstance(entry.array, StepArrays)
        )
        return TraceDescription(
            metadata=TraceMetadata(
                sample_id=self.sample_id,
                generation_index=self.generation_index,
                seq_len=self._seq_len(),
                prompt_len=self.prompt_len,
                coverage=coverage,
                label=self.label,
                scores=self.scores,
                fields=self.fields or None,
                source=self.source,
                extraction=self.extraction,
                exact_digest=self.exact_digest,
            ),
            num_tokens=None if self.tokens is None else len(self.tokens),
            num_tokens_decoded=None if self.tokens_decoded is None else len(self.tokens_decoded),
            arrays=arrays,
            axes={kind: each.axes for kind, each in self.layered.items() if each.axes} or None,
        )

    def _seq_len(self) -> int:
        if self.tokens is not None:
            return len(self.tokens)
        for kind, layers in self.layered.items():
            axes = layout.axes_of_kind(kind, layers.axes) or ()
            for shape in map(_shape_of, layers.arrays):
                if len(axes) == len(shape):
                    for axis_name, length in zip(axes, shape, strict=True):
                        if axis_name in ("token", "query"):
                            return length
        return 0


def _shape_of(entry: LayerArray) -> tuple[int, ...]:
    return () if isinstance(entry.array, StepArrays) else entry.array.shape


def coverage_of(shapes: dict[str, tuple[int, ...]], num_tokens: int | None) -> Coverage:
    """What arrays cover, by one layer's shape of each stored kind; without tokens, None of them."""
    hidden = shapes.get(layout.HIDDEN_STATES)
    weights = shapes.get(layout.ATTENTIONS) or shapes.get(layout.ATTENTION_MEAN)
    length = hidden[0] if hidden else weights[-2] if weights and len(weights) >= 2 else 0
    keys = weights[-1] if weights else length
    # Of one position alone, nobody stores the only token of a text.
    is_alone = num_tokens is None and not weights
    if length == 1 and (keys > 1 or is_alone or num_tokens not in (None, 1)):
        return "last_position"
    if keys == length and num_tokens in (None, length):
        return "full"
    return "partial"
