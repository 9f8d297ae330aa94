"""The base of every stored document."""

from __future__ import annotations

import json
import types
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from h5traces.errors import Problem, SchemaError
from h5traces.format import layout

if TYPE_CHECKING:
    from collections.abc import Mapping


class Document(BaseModel):
    """A validated, immutable document; an unknown field or a value of another type is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, ser_json_inf_nan="constants"
    )


AttrValue = str | int | float | tuple[int, ...]
Attrs = dict[str, AttrValue]
FieldForm = Literal["text", "bool", "int", "float", "ints", "json"]
AnyDocument = TypeVar("AnyDocument", bound=Document)

# What pydantic writes before the message of a validator.
_OWN_ERROR: Final = "Value error, "
_SCALAR_FORMS: dict[Any, FieldForm] = {str: "text", bool: "bool", int: "int", float: "float"}


def _form(annotation: Any) -> FieldForm:
    """How a field of this type is written."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        inner = [each for each in args if each is not type(None)]
        return _form(inner[0]) if len(inner) == 1 else "json"
    if hasattr(annotation, "__metadata__"):
        return _form(annotation.__origin__)
    if origin is Literal:
        return "text"
    if origin is tuple and _form(args[0]) == "int":
        return "ints"
    return _SCALAR_FORMS.get(annotation, "json")


@cache
def field_forms(document: type[Document]) -> dict[str, FieldForm]:
    """The form of every field of a document class, in the order of its definition."""
    return {name: _form(info.annotation) for name, info in document.model_fields.items()}


def compact_json(value: Any) -> str:
    """One line of JSON: several lines would push other attributes off HDFView's screen."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def to_attributes(document: Document) -> Attrs:
    """The attributes of a document; fields that are None are absent."""
    plain = document.model_dump(mode="json", exclude_none=True)
    attrs: Attrs = {}
    for name, form in field_forms(type(document)).items():
        if name not in plain:
            continue
        value = plain[name]
        if form == "json":
            attrs[name] = compact_json(value)
        elif form == "bool":
            attrs[name] = int(value)
        elif form == "ints":
            attrs[name] = tuple(value)
        else:
            attrs[name] = value
    return attrs


def from_attributes(document: type[AnyDocument], attrs: Mapping[str, AttrValue]) -> AnyDocument:
    """The document that `attrs` hold; other attributes are ignored.

    SchemaError where a field is missing or has a value that the schema does not allow.
    """
    plain: dict[str, Any] = {}
    forms = field_forms(document)
    for name, value in attrs.items():
        form = forms.get(name)
        if form is None:
            continue
        if form == "json" and isinstance(value, str):
            try:
                plain[name] = with_tuples(json.loads(value))
            except (ValueError, RecursionError) as error:
                problem = Problem(name, f"is not JSON: {error}", "bad_json")
                msg = f"{name} {problem.message}"
                raise SchemaError(msg, [problem]) from error
        elif form == "bool" and value in (0, 1):
            plain[name] = bool(value)
        elif form == "ints" and isinstance(value, int):
            plain[name] = (value,)
        else:
            plain[name] = value
    try:
        # Not from JSON: pydantic's parser rejects the lone surrogates that Python strings may hold.
        return document.model_validate(plain)
    except ValidationError as error:
        problems = problems_of(error)
        raise SchemaError("; ".join(map(str, problems)), problems) from error


def with_tuples(value: Any) -> Any:
    """Lists as tuples: strict validation takes nothing else for a tuple, and no field is a list."""
    if isinstance(value, list):
        return tuple(with_tuples(each) for each in value)
    if isinstance(value, dict):
        return {key: with_tuples(each) for key, each in value.items()}
    return value


def unknown_attributes(document: type[Document], attrs: Mapping[str, AttrValue]) -> list[str]:
    """Names in `attrs` that are neither fields of the document nor the user's own (``x_…``)."""
    known = document.model_fields
    return [name for name in attrs if name not in known and not name.startswith(layout.USER_PREFIX)]


def problems_of(error: ValidationError) -> list[Problem]:
    """pydantic's findings as problems."""
    return [
        Problem(
            loc=".".join(str(part) for part in each["loc"]) or "document",
            message=each["msg"].removeprefix(_OWN_ERROR),
            kind=each["type"],
        )
        for each in error.errors(include_url=False, include_input=False)
    ]
