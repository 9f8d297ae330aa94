#!/usr/bin/env python3
"""Generate the JSON Schemas and the tables of SPEC.md from the pydantic models.

The models in h5traces/format/ are the single source of the format's metadata. Written from them:
  schema/unstable/archive_metadata.schema.json   attributes of the root group
  schema/unstable/kind_metadata.schema.json      attributes of /kinds/<name>
  schema/unstable/trace_metadata.schema.json     attributes of /samples/<ordinal>
  schema/unstable/label_sidecar.schema.json      the file with labels beside an archive
  schema/unstable/trace_record.schema.json       a record without its numbers
  schema/unstable/mapping.schema.json            a file that says how files of others are read
  schema/SPEC.md                                 every table between two marker comments:
                                                 <!-- generated: NAME --> … <!-- end: NAME -->

The schemas describe what a writer stores: a fact that is not known is absent, never null, and
everything a writer always stores is required.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic.json_schema import GenerateJsonSchema

from h5traces.format import layout
from h5traces.format.archive import (
    ArchiveMetadata,
    Cast,
    ExtractionMetadata,
    KindMetadata,
    LabelSidecar,
    SampleExtraction,
    SourceFile,
)
from h5traces.format.attention import MASKS, AttentionRule
from h5traces.format.document import field_forms
from h5traces.format.kinds import MODEL_KINDS, TOKEN_FIELDS
from h5traces.format.limits import ReadLimits
from h5traces.format.precision import CalibrationRecord, Precision
from h5traces.format.record import (
    COVERAGE_DEFINITIONS,
    SourceForm,
    SourcePosition,
    TraceDescription,
    TraceMetadata,
)
from h5traces.format.value_types import TABLE
from h5traces.format.values import JSON_TAGS
from h5traces.sources.mapping import MappingDocument

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from h5traces.format.document import Document

SCHEMA_FOLDER: Final = Path(__file__).resolve().parent.parent / "schema"
STAGE: Final = "unstable"
SPEC: Final = "SPEC.md"

EPILOG: Final = """\
examples:
  after a change of a model in h5traces/format/, write everything anew and look at the difference:
    python tools/gen_schema.py
    git diff schema/

  what the tests and CI run: exit status 1 and a diff if anything is out of date
    python tools/gen_schema.py --check

exit status: 0 all files are up to date (or were written), 1 --check found stale ones, 2 usage
"""


@dataclass(frozen=True)
class SchemaFile:
    """A model and the JSON Schema that is made of it."""

    name: str
    title: str
    model: type[Document]
    description: str
    # People write some documents, and may leave out what has a default.
    is_stored: bool = True


SCHEMAS: Final = (
    SchemaFile(
        "archive_metadata",
        "ArchiveMetadata",
        ArchiveMetadata,
        "What an archive says of itself: the attributes of its root group, with the JSON that some "
        "of them hold parsed, and 0 and 1 of booleans as false and true.",
    ),
    SchemaFile(
        "kind_metadata",
        "KindMetadata",
        KindMetadata,
        "What one kind of array is: the attributes of /kinds/<name>, with JSON parsed and booleans "
        "as false and true.",
    ),
    SchemaFile(
        "trace_metadata",
        "TraceMetadata",
        TraceMetadata,
        "What is known of one trace: the attributes of its group below /samples, with JSON parsed.",
    ),
    SchemaFile(
        "label_sidecar",
        "LabelSidecar",
        LabelSidecar,
        "Labels and scores of samples of one archive: the file beside it.",
    ),
    SchemaFile(
        "trace_record",
        "TraceRecord",
        TraceDescription,
        "A record without its numbers: metadata, and names, types and shapes of its arrays. JSON "
        "Schema cannot relate lengths of different fields; the writer and 'h5traces validate' do.",
    ),
    SchemaFile(
        "mapping",
        "Mapping",
        MappingDocument,
        "Which name of a file of another program holds which field: the content of a mapping, a "
        "file of TOML, see docs/mappings.md.",
        is_stored=False,
    ),
)

_STORED_AS: Final = {
    "text": "text",
    "bool": "int64, 0 or 1",
    "int": "int64",
    "float": "float64",
    "ints": "int64 array",
    "json": "text, JSON",
}


class _StoredDocuments(GenerateJsonSchema):
    """pydantic's JSON Schema of what is stored: no nulls, no defaults, no titles made of names."""

    def nullable_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def field_is_required(self, field: Any, total: bool) -> bool:  # noqa: FBT001  # pydantic's
        inner = field["schema"]
        return inner["type"] != "default" or inner.get("default", "made") is not None


class _WrittenDocuments(_StoredDocuments):
    """The same of what people write: whatever has a default may be absent."""

    def field_is_required(self, field: Any, total: bool) -> bool:  # noqa: FBT001  # pydantic's
        return field["schema"]["type"] != "default"


def json_schema(file: SchemaFile) -> dict[str, Any]:
    """The JSON Schema of a model, as it is written to disk."""
    generator = _StoredDocuments if file.is_stored else _WrittenDocuments
    generated = file.model.model_json_schema(schema_generator=generator)
    generated.pop("title", None)
    generated.pop("description", None)
    definitions = generated.pop("$defs", None)
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "$id": f"urn:h5traces:schema:{STAGE}:{file.name}",
        "title": file.title,
        "description": file.description,
        "$comment": f"Generated by tools/gen_schema.py. Format {layout.FORMAT_VERSION}, {STAGE}.",
        **generated,
        **({"$defs": definitions} if definitions else {}),
    }


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(header), f"|{'---|' * len(header)}", *(line(row) for row in rows)])


def _markdown(text: str) -> str:
    """One line of Markdown of a docstring's reStructuredText."""
    return " ".join(text.replace("``", "`").split())


def _allowed(schema: dict[str, Any]) -> str:
    """What a field's JSON Schema says of its values, for people."""
    found = []
    if "const" in schema:
        found.append(f"`{schema['const']}`")
    if "enum" in schema:
        found.append(", ".join(f"`{each}`" for each in schema["enum"]))
    if "pattern" in schema:
        found.append(f"`{schema['pattern']}`")
    if "minimum" in schema and "maximum" in schema:
        found.append(f"{schema['minimum']} to {schema['maximum']}")
    elif "minimum" in schema:
        found.append(f"≥ {schema['minimum']}")
    if "minLength" in schema or "minItems" in schema:
        found.append("not empty")
    if "$ref" in schema:
        found.append(f"`{schema['$ref'].rpartition('/')[2]}`")
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        found.append(f"object of {schema['additionalProperties']['type']}s")
    if "items" in schema:
        items = schema["items"]
        inner = _allowed(items)
        if "$ref" in items:
            found.append(f"list of {inner}")
        else:
            found.append(f"list of {items['type']}s" + (f" {inner}" if inner else ""))
    return "; ".join(found)


def model_table(model: type[Document], *, nested: bool = False) -> str:
    """The table of a document's fields: one attribute each, or (nested) one JSON key each."""
    schema = model.model_json_schema(schema_generator=_StoredDocuments)
    required = set(schema.get("required", ()))
    forms = field_forms(model)
    rows = []
    for name, info in model.model_fields.items():
        first = schema["properties"][name]
        stored = str(first.get("type", "object")) if nested else _STORED_AS[forms[name]]
        presence = "always" if name in required else "if known"
        meaning = _markdown(info.description or "")
        rows.append((f"`{name}`", stored, presence, _allowed(first), meaning))
    columns = ("key", "JSON type") if nested else ("attribute", "stored as")
    return _table((*columns, "present", "values", "meaning"), rows)


def kinds_table() -> str:
    """The kinds of arrays that this format version names."""
    return _table(
        ("kind", "axes", "IMAGE attributes", "definition"),
        (
            (f"`{name}`", f"({', '.join(kind.axes)})", "yes" if kind.image else "no", definition)
            for name, kind in layout.KINDS.items()
            for definition in [_markdown(kind.definition)]
        ),
    )


def model_kinds_table() -> str:
    """The kinds that are taken from models."""
    return _table(
        ("kind", "axes", "TransformerLens, below `blocks.N`", "definition"),
        (
            (
                f"`{name}`",
                f"({', '.join(kind.axes)})",
                _lens(kind.lens),
                "section 4" if name in layout.KINDS else _markdown(kind.definition),
            )
            for name, kind in MODEL_KINDS.items()
        ),
    )


def _lens(name: str | None) -> str:
    if name is None:
        return ""
    plain = name.replace("rot_", "")
    return f"`{name}`" + ("" if plain == name else f"; `{plain}` where nothing is rotated")


def token_fields_table() -> str:
    """The extra fields with an entry per token."""
    return _table(
        ("extra field, mostly an entry per token", "meaning"),
        ((f"`{name}`", _markdown(text)) for name, text in TOKEN_FIELDS.items()),
    )


def masks_table() -> str:
    """What queries see."""
    return _table(
        ("mask", "keys that query i sees"),
        [(f"`{name}`", _markdown(meaning)) for name, meaning in MASKS.items()],
    )


def coverage_table() -> str:
    """The values of ``coverage``."""
    return _table(
        ("coverage", "meaning"),
        ((f"`{name}`", _markdown(text)) for name, text in COVERAGE_DEFINITIONS.items()),
    )


def limits_table() -> str:
    """The default limits of the reader in this repository."""
    documented = dict(
        re.findall(r"^ {4}(\w+)\n((?: {8}\S.*\n?)+)", ReadLimits.__doc__ or "", re.MULTILINE)
    )
    return _table(
        ("limit", "default", "bounds"),
        (
            (f"`{each.name}`", f"{each.default:,}", _markdown(documented[each.name]))
            for each in fields(ReadLimits)
        ),
    )


def json_tags_table() -> str:
    """What tagged JSON says of values that JSON lacks."""
    rows = [[f"`{tag}`", each.content, each.value] for tag, each in JSON_TAGS.items()]
    return _table(("tag", "content", "Python value"), rows)


def value_types_table() -> str:
    """The types of extra fields that are a name and a content."""
    rows = [[f"`{each.name}`", each.says] for each in TABLE]
    return _table(("name", "content"), rows)


def tables() -> dict[str, str]:
    """Every generated table of SPEC.md by the name in its markers."""
    return {
        "ArchiveMetadata": model_table(ArchiveMetadata),
        "Cast": model_table(Cast, nested=True),
        "Precision": model_table(Precision, nested=True),
        "CalibrationRecord": model_table(CalibrationRecord),
        "SourceFile": model_table(SourceFile, nested=True),
        "ExtractionMetadata": model_table(ExtractionMetadata, nested=True),
        "KindMetadata": model_table(KindMetadata),
        "Kinds": kinds_table(),
        "ModelKinds": model_kinds_table(),
        "AttentionRule": model_table(AttentionRule),
        "Masks": masks_table(),
        "TokenFields": token_fields_table(),
        "TraceMetadata": model_table(TraceMetadata),
        "SourceForm": model_table(SourceForm),
        "LabelSidecar": model_table(LabelSidecar, nested=True),
        "SourcePosition": model_table(SourcePosition, nested=True),
        "SampleExtraction": model_table(SampleExtraction, nested=True),
        "Coverage": coverage_table(),
        "ReadLimits": limits_table(),
        "JsonTags": json_tags_table(),
        "ValueTypes": value_types_table(),
    }


_MARKED: Final = re.compile(r"<!-- generated: (\w+) -->\n(.*?)<!-- end: \1 -->", re.DOTALL)


def fill_tables(spec: str) -> str:
    """`spec` with the text between its markers replaced by the tables as they are now.

    Raises
    ------
    ValueError
        Its markers are not exactly those of `tables`.
    """
    made = tables()
    found = [match[1] for match in _MARKED.finditer(spec)]
    if sorted(found) != sorted(made):
        message = (
            f"{SPEC} has markers for {', '.join(sorted(found)) or 'nothing'}; expected each of "
            f"{', '.join(sorted(made))} once: <!-- generated: NAME --> and <!-- end: NAME -->"
        )
        raise ValueError(message)

    def filled(match: re.Match[str]) -> str:
        return f"<!-- generated: {match[1]} -->\n{made[match[1]]}\n<!-- end: {match[1]} -->"

    return _MARKED.sub(filled, spec)


def _json_text(document: dict[str, Any]) -> str:
    # Descriptions come from docstrings, which mark code with two backticks.
    return f"{json.dumps(document, indent=2, ensure_ascii=False)}\n".replace("``", "`")


def generated_files(folder: Path) -> dict[Path, str]:
    """Path and wanted text of every generated file below `folder`."""
    files = {
        folder / STAGE / f"{each.name}.schema.json": _json_text(json_schema(each))
        for each in SCHEMAS
    }
    spec = folder / SPEC
    return {**files, spec: fill_tables(spec.read_text(encoding="utf-8"))}


def stale_files(folder: Path) -> dict[Path, str]:
    """Those of `generated_files` whose text on disk is another, with a diff to the wanted one."""
    stale = {}
    for path, wanted in generated_files(folder).items():
        present = path.read_text(encoding="utf-8") if path.exists() else ""
        if present != wanted:
            name = path.relative_to(folder).as_posix()
            lines = difflib.unified_diff(
                present.splitlines(keepends=True),
                wanted.splitlines(keepends=True),
                f"{name} (on disk)",
                f"{name} (from the models)",
            )
            stale[path] = "".join(lines)
    return stale


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; print a diff and exit with 1 if a file is out of date",
    )
    parser.add_argument(
        "--schema-folder",
        type=Path,
        default=SCHEMA_FOLDER,
        metavar="FOLDER",
        help="folder with SPEC.md (default: schema/ of this repository)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the files."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    folder: Path = options.schema_folder
    if not (folder / SPEC).is_file():
        parser.error(f"{folder} holds no {SPEC}; name the folder with --schema-folder")
    try:
        stale = stale_files(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.check:
        for diff in stale.values():
            sys.stdout.write(diff)
        if stale:
            print(
                f"{len(stale)} generated files are out of date; run python tools/gen_schema.py",
                file=sys.stderr,
            )
        return 1 if stale else 0
    wanted = generated_files(folder)
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
