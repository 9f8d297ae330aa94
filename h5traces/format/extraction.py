"""How a model was run to make samples."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from h5traces.format.document import Document

AnswerCut = Literal["none", "sentence", "newline"]
FinishReason = Literal["stop", "length"]

_Digest = Field(pattern=r"^[0-9a-f]{32}$")
_Count = Annotated[int, Field(ge=0, lt=2**63)]


def _with_lists(value: Any) -> Any:
    """JSON as Python's own parser gives it; attributes are read with tuples for lists."""
    if isinstance(value, dict):
        return {key: _with_lists(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_lists(each) for each in value]
    return value


_Json = Annotated[dict[str, Any], BeforeValidator(_with_lists)]


class ExtractionMetadata(Document):
    """How the samples of an archive were extracted, for everyone who must do it again."""

    model_class: Annotated[str, Field(description="Class of the model, as transformers names it.")]
    config: Annotated[
        _Json, Field(description="The model's configuration, as transformers writes it.")
    ]
    weights_digest: Annotated[
        Annotated[str, _Digest] | None,
        Field(description="xxh3-128 over names, types, shapes and bytes of all weights."),
    ] = None
    tokenizer_class: Annotated[str | None, Field(description="Class of the tokenizer.")] = None
    tokenizer_digest: Annotated[
        Annotated[str, _Digest] | None,
        Field(description="xxh3-128 over the tokenizer's rules, vocabulary and chat template."),
    ] = None
    transformers_version: Annotated[str, Field(description="Release of transformers.")]
    torch_version: Annotated[str, Field(description="Release of torch.")]
    model_dtype: Annotated[str, Field(description="Type that the model computed in.")]
    quantization: Annotated[str | None, Field(description="Of the weights, if any.")] = None
    device: Annotated[str, Field(description="Name of the device that computed.")]
    generation: Annotated[
        _Json, Field(description="Every option that decided how answers were generated.")
    ]
    seed: Annotated[_Count, Field(description="Of the run; each sample's own is derived from it.")]
    batch_size: Annotated[int, Field(ge=1, description="Samples per batch, as planned.")]
    prompt_template: Annotated[str | None, Field(description="Text around '{question}'.")] = None
    chat_template: Annotated[
        str | None, Field(description="The tokenizer's chat template, where it was used.")
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
        """What two runs did differently, one text per field."""
        if other is None:
            return ["extraction (was not recorded)"]
        ours, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        found = []
        for name, value in ours.items():
            if value != theirs[name] and isinstance(value, dict) and isinstance(theirs[name], dict):
                found += _nested(name, value, theirs[name])
            elif value != theirs[name]:
                found.append(f"{name}={value!r} (was {theirs[name]!r})")
        return found


def _nested(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return [f"{name}.{key}={ours.get(key)!r} (was {theirs.get(key)!r})" for key in keys]


class SampleExtraction(Document):
    """How one sample was extracted."""

    finish_reason: Annotated[
        FinishReason,
        Field(description="'stop': the model ended its answer; 'length': it was not allowed more."),
    ]
    seed: Annotated[_Count, Field(description="Of the random numbers that chose its tokens.")]
    row: Annotated[_Count, Field(description="Row of the data set, from 0.")]
