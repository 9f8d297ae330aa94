"""The API reference covers what is public, and its site has every page."""

from __future__ import annotations

import re

import pytest
from test_readme import ROOT

PUBLIC_PACKAGES = ("extract", "features", "fidelity", "graph", "torch_data")


@pytest.mark.parametrize("name", ["h5traces", *(f"h5traces.{each}" for each in PUBLIC_PACKAGES)])
def test_the_reference_covers_the_package(name: str) -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert re.search(rf"^::: {re.escape(name)}$", text, flags=re.MULTILINE)


def test_every_document_is_a_page() -> None:
    pages = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    documents = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert documents <= pages
    assert {f"schema/{path.name}" for path in (ROOT / "schema").glob("*.md")} <= pages
