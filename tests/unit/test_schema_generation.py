"""The JSON Schemas and the tables of SPEC.md are what the models say now."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "gen_schema.py"
SCHEMA = ROOT / "schema"


def _load_tool():
    spec = importlib.util.spec_from_file_location("gen_schema", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gen_schema = _load_tool()


@pytest.fixture
def folder(tmp_path):
    """A copy of schema/ that a test may change."""
    return shutil.copytree(SCHEMA, tmp_path / "schema")


def test_everything_generated_is_up_to_date():
    result = subprocess.run(
        [sys.executable, str(TOOL), "--check"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_check_shows_a_stale_table_and_writes_nothing(folder, capsys):
    spec = folder / "SPEC.md"
    stale = spec.read_text(encoding="utf-8").replace("Tokens of the prompt.", "Old words.")
    spec.write_text(stale, encoding="utf-8")
    assert gen_schema.main(["--check", "--schema-folder", str(folder)]) == 1
    printed = capsys.readouterr()
    assert "Old words." in printed.out
    assert "+++ SPEC.md (from the models)" in printed.out
    assert "run python tools/gen_schema.py" in printed.err
    assert spec.read_text(encoding="utf-8") == stale


def test_check_shows_a_missing_schema(folder, capsys):
    (folder / "unstable" / "kind_metadata.schema.json").unlink()
    assert gen_schema.main(["--check", "--schema-folder", str(folder)]) == 1
    assert "kind_metadata.schema.json" in capsys.readouterr().out


def test_writing_mends_what_check_found(folder, capsys):
    (folder / "unstable" / "kind_metadata.schema.json").write_text("{}", encoding="utf-8")
    assert gen_schema.main(["--schema-folder", str(folder)]) == 0
    assert "kind_metadata.schema.json" in capsys.readouterr().out
    assert gen_schema.main(["--check", "--schema-folder", str(folder)]) == 0


def test_missing_marker_is_named(folder, capsys):
    spec = folder / "SPEC.md"
    text = spec.read_text(encoding="utf-8").replace("<!-- generated: Coverage -->", "")
    spec.write_text(text, encoding="utf-8")
    assert gen_schema.main(["--check", "--schema-folder", str(folder)]) == 1
    assert (
        "expected each of ArchiveMetadata, AttentionRule, CalibrationRecord, Cast, Coverage"
        in capsys.readouterr().err
    )


def test_folder_without_spec_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gen_schema.main(["--schema-folder", str(tmp_path)])
    assert stopped.value.code == 2
    assert "holds no SPEC.md" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        gen_schema.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "python tools/gen_schema.py --check" in printed
    assert "exit status" in printed


@pytest.mark.parametrize("file", gen_schema.SCHEMAS, ids=lambda file: file.name)
def test_schemas_are_json_schema_2020_12(file):
    path = SCHEMA / "unstable" / f"{file.name}.schema.json"
    schema = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == f"urn:h5traces:schema:unstable:{file.name}"
    assert schema["title"]
    assert schema["description"]
    assert "null" not in json.dumps(schema), "what is not known is absent, never null"
