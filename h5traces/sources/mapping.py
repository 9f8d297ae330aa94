"""Mappings: a small file of TOML that says which name of a file holds which field.

Names are templates: ``{layer}`` stands for digits, ``{id}`` for any text. Nothing else in them is
special, so that matching takes time in proportion to the name.
"""

from __future__ import annotations

import os
import re
import tomllib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from h5traces.errors import ConversionError, OptionError
from h5traces.format import layout
from h5traces.format.document import Document, problems_of, with_tuples
from h5traces.format.text import and_more
from h5traces.meaning.axes import BATCH, LAYER, Axes
from h5traces.meaning.options import FirstState
from h5traces.storage.files import open_regular

if TYPE_CHECKING:
    from h5traces.meaning.options import ReadingOptions

ARRAY: Final = "array"
ID: Final = "id"
_SAMPLE_AXES: Final = frozenset({"sample", "samples", "example", "examples"})
_MAX_NBYTES: Final = 256 << 10
_MAX_NAME: Final = 1000
_MAX_TEMPLATE: Final = 300
_MAX_STARS: Final = 8
_PLACEHOLDER: Final = re.compile(r"\{([^{}]*)\}")
_PATTERNS: Final = {LAYER: r"(?P<layer>[0-9]{1,6})", ID: r"(?P<id>.+?)"}

RawType = Literal[
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "bool",
]
# Types that numpy lacks travel as integers of their width.
CARRIERS: Final = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


class Template:
    """A name with places for a layer's number and a sample's id.

    Attributes
    ----------
    text
        As written: ``activations/layer_{layer}``.
    places
        Which of ``layer`` and ``id`` it has.
    """

    def __init__(self, text: str) -> None:
        """ValueError where it has other places, one twice, or two without text between."""
        self.text = text
        found = [match[1] for match in _PLACEHOLDER.finditer(text)]
        wrong = next((each for each in found if each not in _PATTERNS), None)
        if wrong is not None:
            message = f"{text!r} has {{{wrong}}}, expected {{layer}} or {{id}}"
            raise ValueError(message)
        if len(set(found)) < len(found):
            message = f"{text!r} has a place twice"
            raise ValueError(message)
        if "}{" in text:
            message = f"{text!r} has two places side by side; expected text between them"
            raise ValueError(message)
        self.places = frozenset(found)
        parts = _PLACEHOLDER.split(text)
        parts[::2] = map(re.escape, parts[::2])
        parts[1::2] = map(_PATTERNS.__getitem__, parts[1::2])
        self._pattern = re.compile("".join(parts), re.DOTALL)

    def match(self, name: str) -> tuple[str | None, int | None] | None:
        """Id and layer in a name, each None without a place for it; None if it does not fit."""
        found = self._pattern.fullmatch(name) if len(name) <= _MAX_NAME else None
        if found is None:
            return None
        groups = found.groupdict()
        layer = groups.get(LAYER)
        return groups.get(ID), None if layer is None else int(layer)


def _checked_template(value: Any) -> Any:
    if isinstance(value, str):
        Template(value)
    return value


def _checked_axes(value: Any) -> Any:
    if isinstance(value, str):
        try:
            parsed_axes(value)
        except OptionError as error:
            raise ValueError(str(error)) from error
    return value


def parsed_axes(text: str) -> Axes:
    """Axes of words; ``sample`` and ``example`` are ``batch``, too."""
    words = text.replace(",", " ").split()
    return Axes.parse(" ".join(BATCH if word.lower() in _SAMPLE_AXES else word for word in words))


Name = Annotated[
    str, Field(min_length=1, max_length=_MAX_TEMPLATE), BeforeValidator(_checked_template)
]


class FieldMapping(Document):
    """Where one field of the samples is."""

    name: Name = Field(
        description="Name of the array, column or attribute, as h5traces inspect prints it. "
        "`{layer}` stands for a layer's number: one array per layer; `{id}` for a sample's id."
    )
    axes: Annotated[str, BeforeValidator(_checked_axes)] | None = Field(
        None,
        description="Axes in their order, such as `token hidden` or `batch layer head query key`. "
        "Every element along `batch` (or `sample`) is a sample.",
    )
    embedding: Name | None = Field(
        None, description="Name of the array that holds the embedding, beside those of layers."
    )
    layers: tuple[Annotated[int, Field(ge=0, lt=10_000)], ...] | None = Field(
        None,
        min_length=1,
        description="Numbers of the layers, in the order of the axis or of the names.",
    )
    dtype: RawType | None = Field(
        None,
        description="What the bits are, where the file holds them as integers of that width: "
        "`bfloat16` in uint16.",
    )
    optional: bool = Field(default=False, description="Samples may lack it.")

    @cached_property
    def template(self) -> Template:
        """Its name, taken apart."""
        return Template(self.name)

    @cached_property
    def parsed(self) -> Axes | None:
        """Its axes; None if none are named."""
        return None if self.axes is None else parsed_axes(self.axes)

    @property
    def is_layered(self) -> bool:
        """Whether it holds layers: by its name, or along an axis."""
        has_axis = self.parsed is not None and LAYER in self.parsed.names
        return has_axis or LAYER in self.template.places

    @model_validator(mode="after")
    def _check(self) -> Self:
        has_axis = self.parsed is not None and LAYER in self.parsed.names
        if has_axis and LAYER in self.template.places:
            message = "the name has {layer}, and the axes name layer; expected one of them"
            raise ValueError(message)
        if not self.is_layered and (len(self.layers or ()) > 1 or self.embedding):
            message = "layers and embedding need {layer} in the name, or a layer axis"
            raise ValueError(message)
        if self.embedding and LAYER in Template(self.embedding).places:
            message = "the embedding's name has {layer}; it is one array"
            raise ValueError(message)
        if self.layers and len(set(self.layers)) < len(self.layers):
            message = "layers names a number twice"
            raise ValueError(message)
        return self


class ArrayMapping(Document):
    """What the bytes of a file of raw numbers are."""

    dtype: RawType = Field(description="Type of the numbers.")
    shape: tuple[Annotated[int, Field(ge=-1, lt=2**48)], ...] = Field(
        min_length=1, max_length=16, description="Length of each axis; one may be -1: the rest."
    )
    offset: Annotated[int, Field(ge=0, lt=2**62)] = Field(
        0, description="Bytes before the first number."
    )
    byte_order: Literal["little", "big"] = Field("little", description="Order of bytes.")
    order: Literal["C", "F"] = Field("C", description="C: the last axis varies fastest.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shape.count(-1) > 1:
            message = "shape has -1 twice; expected one unknown length at most"
            raise ValueError(message)
        return self


def _as_field(value: Any) -> Any:
    """A field written as a text is its name."""
    return {"name": value} if isinstance(value, str) else value


FieldName = Annotated[str, Field(min_length=1, max_length=200)]


class MappingDocument(Document):
    """Which name of a file holds which field of its samples."""

    version: Literal[1] = Field(1, description="Version of this format.")
    kind: str | None = Field(
        None,
        description="Kind of files that it is for: `hdf5`, `npz`, `npy`, `safetensors`, `torch`, "
        "`pickle`, `parquet`, `arrow`, `jsonl`, `datasets-folder`, `raw`.",
    )
    file: Name | None = Field(
        None,
        description="What file names are: `{id}.npz`, `{id}/states.npy`; `{id}` becomes the "
        "sample's id.",
    )
    folder: bool = Field(
        default=False,
        description="A folder is one source, whose samples lie in several files: one per layer or "
        "field. Names are paths in it without suffixes.",
    )
    first_state: FirstState | None = Field(
        None, description="What the first hidden state is: the embedding, or the output of block 0."
    )
    fields: dict[FieldName, Annotated[FieldMapping, BeforeValidator(_as_field)]] = Field(
        description="By field: `hidden_states`, `attentions`, `tokens`, `question_id`, "
        "`generated_answer`, `label` and so on; any other name is an extra field.",
    )
    ignore: tuple[Annotated[str, Field(max_length=_MAX_TEMPLATE)], ...] = Field(
        (), description="Names that are not read, with `*` for any text."
    )
    array: ArrayMapping | None = Field(
        None, description="For raw numbers, which become one array of the name `array`."
    )

    @cached_property
    def file_template(self) -> Template | None:
        """The pattern of file names."""
        return None if self.file is None else Template(self.file)

    def ignores(self, name: str) -> bool:
        """Whether a name is not to be read."""
        return any(_fits(pattern.split("*"), name) for pattern in self.ignore)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any(kind in self.fields for kind in layout.KINDS):
            message = "fields names neither hidden_states nor attentions"
            raise ValueError(message)
        if self.file_template is not None and LAYER in self.file_template.places:
            message = (
                "file has {layer}; expected {id} at most: one file holds all layers. Where each "
                "layer has a file, say folder = true, and name the files in fields"
            )
            raise ValueError(message)
        if self.folder and (self.file or self.array):
            message = "folder = true names files in fields; leave out file and array"
            raise ValueError(message)
        if any(pattern.count("*") > _MAX_STARS for pattern in self.ignore):
            message = f"ignore has a pattern with more than {_MAX_STARS} stars"
            raise ValueError(message)
        return self


def _fits(parts: list[str], name: str) -> bool:
    """Whether a name is these parts with any text between them."""
    first, *rest = parts
    if not rest:
        return name == first
    if not name.startswith(first):
        return False
    at = len(first)
    for part in rest[:-1]:
        # The earliest place leaves the most for what follows.
        found = name.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return len(name) - len(rest[-1]) >= at and name.endswith(rest[-1])


def read_mapping(path: str | os.PathLike[str]) -> MappingDocument:
    """Read a mapping.

    Parameters
    ----------
    path
        A file of TOML.

    Raises
    ------
    FileNotFoundError
        There is none.
    ConversionError
        It is not TOML, or says what a mapping has no place for; the message names the key.
    """
    path = Path(path)
    with os.fdopen(open_regular(path, ConversionError, "a mapping"), "rb") as file:
        content = file.read(_MAX_NBYTES + 1)
    if len(content) > _MAX_NBYTES:
        message = f"{path}: has more than {_MAX_NBYTES:,} bytes, which no mapping needs"
        raise ConversionError(message)
    try:
        found = with_tuples(tomllib.loads(content.decode("utf-8")))
    except (ValueError, RecursionError) as error:
        message = f"{path}: is not TOML, which mappings are written in: {error}"
        raise ConversionError(message) from error
    try:
        return MappingDocument.model_validate(found)
    except ValidationError as error:
        problems = (f"{each.loc}: {each.message}" for each in problems_of(error))
        message = f"{path}: {and_more(problems, 5, separator='; ')}"
        raise ConversionError(message) from error


def mapping_of(options: ReadingOptions) -> MappingDocument | None:
    """The mapping that the user names; None without one."""
    return None if options.mapping is None else read_mapping(options.mapping)
