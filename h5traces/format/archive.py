"""Metadata of an archive, of the kinds of arrays in it, and of the labels beside it."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BeforeValidator, FailFast, Field, model_validator

from h5traces.format.document import Document
from h5traces.format.dtypes import DtypePolicy, FloatType, OverflowPolicy
from h5traces.format.precision import Precision

if TYPE_CHECKING:
    from collections.abc import Iterable


AnswerCut = Literal["none", "sentence", "newline"]
FinishReason = Literal["stop", "length", "given", "none"]

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
PositiveCount = Annotated[int, Field(ge=1, lt=2**63)]
LayerNumbers = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    Field(description="0-based decoder block numbers, strictly ascending."),
]
_Version = Annotated[
    str, Field(pattern=r"^[0-9]+\.[0-9]+$", description="MAJOR.MINOR of the format.")
]
_Time = Annotated[
    str,
    Field(
        pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?Z$",
        description="UTC time of writing, ISO 8601.",
    ),
]
_Uuid = Annotated[str, Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]


def _with_lists(value: Any) -> Any:
    """JSON as Python's own parser gives it; attributes are read with tuples for lists."""
    if isinstance(value, dict):
        return {key: _with_lists(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_lists(each) for each in value]
    return value


_Json = Annotated[dict[str, Any], BeforeValidator(_with_lists)]


# Fields of `ExtractionMetadata` that a run measures, and that say nothing of its options.
MEASURED: Final = {"difference", "batch_difference", "threads"}


class ExtractionMetadata(Document):
    """How the samples of an archive were extracted, for everyone who must do it again."""

    model_class: Annotated[str, Field(description="Class of the model, as transformers names it.")]
    config: Annotated[
        _Json, Field(description="The model's configuration, as transformers writes it.")
    ]
    weights_digest: Annotated[
        Digest | None,
        Field(description="xxh3-128 over names, types, shapes and bytes of all weights."),
    ] = None
    tokenizer_class: Annotated[str | None, Field(description="Class of the tokenizer.")] = None
    tokenizer_digest: Annotated[
        Digest | None,
        Field(description="xxh3-128 over the tokenizer's rules, vocabulary and chat template."),
    ] = None
    transformers_version: Annotated[str, Field(description="Release of transformers.")]
    torch_version: Annotated[str, Field(description="Release of torch.")]
    engine: Annotated[str | None, Field(description="Program that ran the model.")] = None
    attention: Annotated[
        str | None, Field(description="Implementation of attention, such as 'eager'.")
    ] = None
    sites: Annotated[
        _Json | None,
        Field(description="Where kinds were taken in the blocks: by kind, layers by place."),
    ] = None
    difference: Annotated[
        float | None,
        Field(
            ge=0,
            description="Largest difference from the model's own outputs over a few tokens, "
            "relative to the largest value; 0: all bits are equal.",
        ),
    ] = None
    batch_difference: Annotated[
        float | None,
        Field(ge=0, description="The same, of sequences in a padded batch from them alone."),
    ] = None
    model_dtype: Annotated[str, Field(description="Type that the model computed in.")]
    quantization: Annotated[str | None, Field(description="Of the weights, if any.")] = None
    device: Annotated[str, Field(description="Name of the device that computed.")]
    threads: Annotated[
        int | None, Field(ge=1, description="Threads that computed, where the device is a CPU.")
    ] = None
    generation: Annotated[
        _Json, Field(description="Every option that decided how answers were generated.")
    ]
    seed: Annotated[Count, Field(description="Of the run; each sample's own is derived from it.")]
    batch_size: Annotated[int, Field(ge=1, description="Samples per batch, as planned.")]
    prompt_template: Annotated[str | None, Field(description="Text around '{question}'.")] = None
    chat_template: Annotated[
        str | None, Field(description="The tokenizer's chat template, where it was used.")
    ] = None
    tokens: Annotated[
        str | None,
        Field(description="Which tokens are stored, where not all are, such as 'answer'."),
    ] = None
    kept: Annotated[
        _Json | None, Field(description="Options that chose what of the model is stored.")
    ] = None
    answer_cut: Annotated[
        AnswerCut, Field(description="Where the clean answer ends; arrays are never cut.")
    ] = "none"
    dataset_config: Annotated[str | None, Field(description="Configuration of the data set.")] = (
        None
    )
    dataset_split: Annotated[str | None, Field(description="Split of the data set.")] = None
    dataset_revision: Annotated[
        str | None, Field(description="Commit of the data set, or digest of its file.")
    ] = None

    def differences(self, other: ExtractionMetadata | None) -> list[str]:
        """What two runs did differently, one text per field; what they measured does not count."""
        if other is None:
            return ["extraction (was not recorded)"]
        return _changed(
            "",
            self.model_dump(mode="json", exclude=MEASURED),
            other.model_dump(mode="json", exclude=MEASURED),
        )


def _changed(prefix: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    found = []
    for key in {**ours, **theirs}:
        new, old = ours.get(key), theirs.get(key)
        if new != old and not prefix and isinstance(new, dict) and isinstance(old, dict):
            # What is kept has names of options.
            found += _changed("" if key == "kept" else f"{key}.", new, old)
        elif new != old:
            found.append(f"{prefix}{key}={new!r} (was {old!r})")
    return found


class SampleExtraction(Document):
    """How one sample was extracted."""

    finish_reason: Annotated[
        FinishReason,
        Field(
            description="'stop': the model ended its answer; 'length': it was not allowed more; "
            "'given': the answer was not its own; 'none': only the prompt was run."
        ),
    ]
    seed: Annotated[Count, Field(description="Of the random numbers that chose its tokens.")]
    row: Annotated[Count, Field(description="Row of the data set, from 0.")]
    num_together: Annotated[
        int | None, Field(ge=1, description="Samples that were computed in one batch with it.")
    ] = None
    num_padding: Annotated[
        Count | None, Field(description="Masked tokens before it in the forward pass.")
    ] = None


def check_ascending(layers: tuple[int, ...], field: str) -> None:
    """Raise ValueError unless layer numbers ascend strictly."""
    if any(left >= right for left, right in itertools.pairwise(layers)):
        message = f"{field} must be strictly ascending layer numbers, got {list(layers)}"
        raise ValueError(message)


class SourceFile(Document):
    """A file that samples were converted from."""

    name: Annotated[str, Field(description="File name, without its folder.")]
    nbytes: Annotated[int, Field(ge=0, description="Size of the file in bytes.")]
    modified_ns: Annotated[
        Int64 | None, Field(description="When it was last changed: nanoseconds since 1970, UTC.")
    ] = None
    ends_digest: Annotated[
        Digest | None,
        Field(
            description="xxh3-128 over its first and last 65,536 bytes; over all bytes of a file "
            "of at most 131,072."
        ),
    ] = None
    digest: Annotated[Digest | None, Field(description="xxh3-128 over all its bytes.")] = None
    num_samples: Annotated[
        int, Field(ge=0, description="Samples of this archive that came from the file.")
    ] = 0


class KindMetadata(Document):
    """What one kind of layered array is: the attributes of ``/kinds/<name>``."""

    axes: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(min_length=1, description="Axis names of one layer's array, outermost first."),
    ]
    layered: Annotated[bool, Field(description="Whether there is one array per decoder block.")]
    layers: LayerNumbers = ()
    positions: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...] | None,
        Field(
            description="Instead of `layers`, where no decoder block is known: strictly "
            "ascending places in the source's list."
        ),
    ] = None
    definition: Annotated[str, Field(description="What the numbers are, in one sentence.")]
    reduction: Annotated[
        str | None,
        Field(description="How heads were reduced: 'mean', 'max', or 'unknown'."),
    ] = None
    derivation: Annotated[
        str | None,
        Field(description="Encoding and version that made these arrays of others."),
    ] = None

    @model_validator(mode="after")
    def _layers_ascend(self) -> KindMetadata:
        check_ascending(self.layers, "layers")
        check_ascending(self.positions or (), "positions")
        if self.layers and self.positions:
            message = "layers and positions are both listed; expected one of them"
            raise ValueError(message)
        return self


class Cast(Document):
    """What casts from one type to another changed, over all layered arrays of an archive."""

    cast_from: Annotated[FloatType, Field(description="Type of the source.")]
    dtype: Annotated[FloatType, Field(description="Stored type.")]
    num_arrays: Annotated[PositiveCount, Field(description="Arrays that were cast so.")]
    num_changed: Annotated[
        Count | None,
        Field(description="Values that the cast changed, rounding included; absent: not known."),
    ] = None

    def __str__(self) -> str:
        changed = "an unknown number of" if self.num_changed is None else f"{self.num_changed:,}"
        return f"cast {self.cast_from} -> {self.dtype} changed {changed} values"


def add_casts(casts: Iterable[Cast]) -> tuple[Cast, ...]:
    """One entry for every pair of types, in order of their names."""
    found: dict[tuple[FloatType, FloatType], Cast] = {}
    for each in casts:
        before = found.get((each.cast_from, each.dtype))
        if before is not None:
            counts = (before.num_changed, each.num_changed)
            num_changed = None if None in counts else sum(filter(None, counts))
            num_arrays = before.num_arrays + each.num_arrays
            each = each.model_copy(update={"num_arrays": num_arrays, "num_changed": num_changed})
        found[each.cast_from, each.dtype] = each
    return tuple(found[key] for key in sorted(found))


class ArchiveMetadata(Document):
    """What an archive says of itself: the attributes of its root group.

    A fact that is not known is absent. ``complete`` is written last: an archive without it was
    not finished.
    """

    format: Annotated[
        Literal["h5traces"], Field(description="Tells an archive from other HDF5 files.")
    ]
    format_version: _Version
    stability: Annotated[
        Literal["unstable", "stable"],
        Field(description="'unstable' until this format version is released and frozen."),
    ] = "unstable"
    required_features: Annotated[
        tuple[str, ...],
        Field(description="Names a reader must know; one it does not know means: do not read."),
    ] = ()
    generator: Annotated[str, Field(description="Program and version that wrote the archive.")]
    created: _Time
    archive_id: Annotated[_Uuid, Field(description="A UUID.")]
    num_samples: Annotated[Count, Field(description="Groups below /samples.")]
    model_id: Annotated[
        str | None, Field(description="As the user or the batch's file name gives it.")
    ] = None
    model_revision: Annotated[
        str | None, Field(description="Commit or tag of the model's weights.")
    ] = None
    dataset: Annotated[
        str | None, Field(description="The data set that the questions came from.")
    ] = None
    num_layers: Annotated[
        PositiveCount | None, Field(description="Decoder blocks of the model.")
    ] = None
    hidden_size: Annotated[
        PositiveCount | None,
        Field(description="Width of the hidden states where all stored layers share it."),
    ] = None
    num_heads: Annotated[
        PositiveCount | None,
        Field(description="Attention heads where all stored layers share the number."),
    ] = None
    layers: Annotated[
        LayerNumbers | None,
        Field(description="Present only when a subset of the model's layers is stored."),
    ] = None
    fields: Annotated[
        tuple[str, ...] | None,
        Field(description="Keys of the legacy dicts, in order; a sample may name its own."),
    ] = None
    codec: Annotated[str, Field(description="Name of the codec of the layered arrays.")]
    dtype_policy: Annotated[
        DtypePolicy | None, Field(description="How stored types were chosen.")
    ] = None
    on_overflow: Annotated[
        OverflowPolicy | None, Field(description="What was done where the type was too narrow.")
    ] = None
    casts: Annotated[
        tuple[Cast, ...] | None,
        Field(description="What casts changed; absent: not known, empty: nothing was cast."),
    ] = None
    precision: Annotated[
        Precision | None,
        Field(description="How precisely arrays are stored; absent in the tier 'exact'."),
    ] = None
    earlier_precisions: Annotated[
        tuple[Precision, ...] | None,
        Field(description="What the arrays had lost before they were encoded, first loss first."),
    ] = None
    sources: Annotated[
        tuple[SourceFile, ...] | None,
        Field(description="The files that samples were converted from."),
    ] = None
    conversion: Annotated[
        _Json | None,
        Field(
            description="Options that shaped the archive when `sources` were converted, where they "
            "were not the default."
        ),
    ] = None
    extraction: Annotated[
        ExtractionMetadata | None,
        Field(description="How a model was run to make the samples."),
    ] = None
    complete: Annotated[bool, Field(description="Written last; false or absent: not finished.")] = (
        False
    )

    @property
    def losses(self) -> tuple[Precision, ...]:
        """All that was given up, first loss first."""
        earlier = self.earlier_precisions or ()
        if self.precision is None or not self.precision.is_lossy:
            return earlier
        return (*earlier, self.precision)

    @property
    def is_lossless(self) -> bool | None:
        """Whether every stored array holds every bit of its source; None if that is not known.

        Layers and samples that were left out do not count.
        """
        if self.losses or any(each.num_changed for each in self.casts or ()):
            return False
        is_known = self.casts is not None and all(
            each.num_changed is not None for each in self.casts
        )
        return True if is_known else None

    @property
    def changes(self) -> str:
        """How stored arrays differ from their source, for people; empty if they do not."""
        found = [str(each) for each in self.losses]
        found += [str(each) for each in self.casts or () if each.num_changed != 0]
        if self.casts is None:
            found.append("the archive does not say what was cast")
        return ", ".join(found)

    @property
    def kept_layers(self) -> str:
        """Which part of the model's layers is stored, for people; empty if all are."""
        if self.layers is None or len(self.layers) == self.num_layers:
            return ""
        of = "" if self.num_layers is None else f" of {self.num_layers}"
        return f"{len(self.layers)}{of} layers"

    @property
    def missing_layers(self) -> tuple[int, ...]:
        """The model's layers that are not stored, where their number is known."""
        if self.layers is None or self.num_layers is None:
            return ()
        return tuple(each for each in range(self.num_layers) if each not in self.layers)

    @model_validator(mode="after")
    def _layers_fit(self) -> ArchiveMetadata:
        if self.layers is None:
            return self
        check_ascending(self.layers, "layers")
        if self.num_layers is not None and self.layers and self.layers[-1] >= self.num_layers:
            message = f"layers names layer {self.layers[-1]} of a model of {self.num_layers} layers"
            raise ValueError(message)
        return self


LABELS_FORMAT: Final = "h5traces-labels"


class _FailFast(FailFast):
    """pydantic's own cannot stand in a union, for want of a hash."""

    __hash__ = object.__hash__


# A column of millions ends at its first wrong element; errors of all take seconds and gigabytes.
_FIRST_FAULT: Final = _FailFast()


class LabelSidecar(Document):
    """Labels and scores of samples of one archive: a JSON file beside it."""

    format: Annotated[
        Literal["h5traces-labels"], Field(description="Tells a sidecar from other JSON files.")
    ] = LABELS_FORMAT
    format_version: _Version
    generator: Annotated[str, Field(description="Program and version that wrote the sidecar.")]
    created: _Time
    archive_id: Annotated[
        _Uuid, Field(description="The archive's own; the sidecar belongs to no other.")
    ]
    num_samples: Annotated[Count, Field(description="Samples in the archive, labelled or not.")]
    source: Annotated[
        str | None, Field(description="Name of the table that labels and scores came from.")
    ] = None
    label_column: Annotated[
        str | None, Field(description="The column that labels came from, where it held classes.")
    ] = None
    classes: Annotated[
        dict[str, Int64] | None,
        Field(description="Its classes that make labels, and the label of each."),
    ] = None
    label_score: Annotated[
        str | None, Field(description="The score that labels were made of, by name.")
    ] = None
    threshold: Annotated[
        float | None,
        Field(allow_inf_nan=False, description="Scores from this on are high, others low."),
    ] = None
    higher_means: Annotated[
        Literal["correct", "hallucinated"] | None,
        Field(
            description="With 'correct', the label of low scores is 1 and that of high ones 0; "
            "with 'hallucinated', the other way round. Present where 'threshold' is."
        ),
    ] = None
    ordinals: Annotated[
        tuple[Count, ...],
        _FIRST_FAULT,
        Field(description="Which samples are labelled, strictly ascending; others are not."),
    ]
    sample_ids: Annotated[
        tuple[str, ...],
        _FIRST_FAULT,
        Field(description="The ``sample_id`` of each, which must fit."),
    ]
    labels: Annotated[
        Annotated[tuple[Int64, ...], _FIRST_FAULT] | None, Field(description="The label of each.")
    ] = None
    scores: Annotated[
        dict[str, Annotated[tuple[float, ...], _FIRST_FAULT]],
        Field(description="By name, the score of each; finite."),
    ]

    @model_validator(mode="after")
    def _origin_is_whole(self) -> LabelSidecar:
        made = [self.label_score, self.threshold, self.higher_means]
        if made.count(None) not in (0, 3):
            message = "label_score, threshold and higher_means belong together"
            raise ValueError(message)
        return self

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
