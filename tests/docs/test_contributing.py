"""The picture of the house in CONTRIBUTING.md is the house as it stands."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import pytest
from test_readme import ROOT, blocks

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LIBRARIES = re.findall(r"^\| ([a-z0-9_, ]+) \| (`.*`) \|$", TEXT, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def architecture() -> Any:
    spec = spec_from_file_location("architecture", ROOT / "tests/unit/test_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_rooms_are_those_of_the_code(architecture: Any) -> None:
    (picture,) = blocks("text", "CONTRIBUTING.md")
    lines = [line.split(maxsplit=1) for line in picture.splitlines()]
    assert [name.removesuffix("/").removesuffix(".py") for name, _ in lines] == list(
        architecture.ROOMS
    )
    package = ROOT / "h5traces"
    for name, purpose in lines:
        assert (package / name).is_dir() if name.endswith("/") else (package / name).is_file()
        assert purpose
    found = {path.name + "/" for path in package.iterdir() if (path / "__init__.py").exists()}
    found |= {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert {name for name, _ in lines} == found


@pytest.mark.parametrize(
    ("library", "places"),
    [(library, places) for names, places in LIBRARIES for library in names.split(", ")],
)
def test_libraries_are_imported_where_it_says(architecture: Any, library: str, places: str) -> None:
    found = {name.replace(".", "/") for name in architecture.importers(library)}
    named = re.findall(r"`([\w/]+)`", places)
    outside = {name for name in found if not any(f"{name}/".startswith(f"{p}/") for p in named)}
    assert outside == set()
    for place in named:
        assert any(f"{name}/".startswith(f"{place}/") for name in found), place


def test_it_is_short() -> None:
    assert len(LIBRARIES) >= 8
    assert len(TEXT.splitlines()) <= 60
