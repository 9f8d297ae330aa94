"""Every example under schema/ is judged as its place says, by the models and by JSON Schema."""

import json
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError

from h5traces.format.archive import ArchiveMetadata, KindMetadata, LabelSidecar
from h5traces.format.document import from_attributes, problems_of, to_attributes
from h5traces.format.record import TraceDescription, TraceMetadata

UNSTABLE = Path(__file__).resolve().parents[2] / "schema" / "unstable"
MODELS = {
    "archive_metadata": ArchiveMetadata,
    "kind_metadata": KindMetadata,
    "label_sidecar": LabelSidecar,
    "trace_metadata": TraceMetadata,
    "trace_record": TraceDescription,
}
VALID = sorted((UNSTABLE / "examples" / "valid").iterdir())
INVALID = sorted((UNSTABLE / "examples" / "invalid").iterdir())
# What JSON Schema cannot express: an order, a relation of two fields, 8.0 being no integer.
ONLY_MODEL = {
    "archive_metadata.layer_beyond_model",
    "archive_metadata.layers_not_ascending",
    "archive_metadata.num_samples_with_fraction_part",
    "kind_metadata.repeated_layer",
    "label_sidecar.columns_of_other_length",
    "label_sidecar.ordinal_beyond_archive",
    "label_sidecar.ordinals_not_ascending",
    "label_sidecar.threshold_without_direction",
    "trace_metadata.prompt_longer_than_sequence",
}
# What spans the arrays of a record: `TraceDescription.problems()`.
ONLY_PROBLEMS = {
    "trace_record.attentions_of_another_sequence",
    "trace_record.attentions_without_heads",
    "trace_record.decoded_tokens_of_other_length",
    "trace_record.layers_of_other_lengths",
}


def _name(path):
    return path.name.removesuffix(".json")


def _model(path):
    return MODELS[path.name.partition(".")[0]]


def _validator(path):
    schema = UNSTABLE / f"{path.name.partition('.')[0]}.schema.json"
    return jsonschema.Draft202012Validator(json.loads(schema.read_text(encoding="utf-8")))


def _read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def _findings(path, document):
    """(loc, kind) of everything that the models find, and who found it."""
    try:
        parsed = _model(path).model_validate_json(json.dumps(document))
    except ValidationError as error:
        return {(each.loc, each.kind) for each in problems_of(error)}, "model"
    if isinstance(parsed, TraceDescription):
        return {(each.loc, each.kind) for each in parsed.problems()}, "problems"
    return set(), None


@pytest.mark.parametrize("examples", [VALID, INVALID], ids=["valid", "invalid"])
def test_every_model_has_several_examples(examples):
    for name in MODELS:
        assert sum(path.name.startswith(f"{name}.") for path in examples) >= 2


@pytest.mark.parametrize("path", VALID, ids=_name)
def test_valid_example_passes_model_and_json_schema(path):
    document = _read(path)
    assert list(_validator(path).iter_errors(document)) == []
    assert _findings(path, document)[0] == set()


@pytest.mark.parametrize("path", VALID, ids=_name)
def test_valid_example_is_what_the_model_writes(path):
    document = _read(path)
    parsed = _model(path).model_validate_json(json.dumps(document))
    assert parsed.model_dump(mode="json", exclude_none=True) == document


@pytest.mark.parametrize("path", [path for path in VALID if "record" not in path.name], ids=_name)
def test_valid_example_survives_as_attributes(path):
    parsed = _model(path).model_validate_json(json.dumps(_read(path)))
    assert from_attributes(_model(path), to_attributes(parsed)) == parsed


@pytest.mark.parametrize("path", INVALID, ids=_name)
def test_invalid_example_is_found_out_as_it_says(path):
    example = _read(path)
    assert set(example) == {"why", "caught_by", "expected", "document"}
    found, by = _findings(path, example["document"])
    assert found == {(each["loc"], each["kind"]) for each in example["expected"]}
    assert by in example["caught_by"]
    fails_schema = not _validator(path).is_valid(example["document"])
    assert fails_schema == ("json_schema" in example["caught_by"])


def test_what_json_schema_cannot_express_is_known():
    caught_by = {_name(path): _read(path)["caught_by"] for path in INVALID}
    assert {name for name, by in caught_by.items() if by == ["model"]} == ONLY_MODEL
    assert {name for name, by in caught_by.items() if by == ["problems"]} == ONLY_PROBLEMS
    rest = set(caught_by) - ONLY_MODEL - ONLY_PROBLEMS
    assert all(caught_by[name] == ["json_schema", "model"] for name in rest)


@pytest.mark.parametrize("name", ["format", "format_version", "num_samples", "complete", "codec"])
def test_json_schema_wants_what_is_always_stored(name):
    path = UNSTABLE / "examples" / "valid" / "archive_metadata.minimal.json"
    document = _read(path)
    del document[name]
    (error,) = _validator(path).iter_errors(document)
    assert error.message == f"'{name}' is a required property"
