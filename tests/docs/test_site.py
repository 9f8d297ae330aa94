"""The documents as a site, for readers and for programs that read llms.txt; how to cite it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    for needed in ("material", "mkdocstrings", "mike"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(folder)]
    # Material says on every run how long it is maintained.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_document_is_a_page(site: Path) -> None:
    for document in (ROOT / "docs").glob("*.md"):
        assert (site / document.stem / "index.html").is_file(), document
    assert 'class="md-search' in (site / "index.html").read_text(encoding="utf-8")
    assert "h5traces.open" in (site / "api" / "index.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_from_other_servers(site: Path) -> None:
    text = (site / "reading" / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', text)
    assert loaded == []


@pytest.mark.parametrize("page", [".", "compatibility", "viewing"])
def test_pictures_are_on_the_pages(site: Path, page: str) -> None:
    text = (site / page / "index.html").read_text(encoding="utf-8")
    found = re.findall(r'<img[^>]*src="([^"]*images/[^"]*)"', text)
    assert len(found) == (4 if page == "viewing" else 1)
    assert all((site / page / each).is_file() for each in found)


def test_llms_txt_lists_every_page_with_a_sentence(site: Path) -> None:
    lines = (site / "llms.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# h5traces"
    assert lines[2].startswith("> An archive for LLM traces")
    pages = [re.fullmatch(r"- \[([^]]+)\]\(([^)]+)\): (.+)", line) for line in lines[3:]]
    found = {page[2]: page[3] for page in pages if page}
    assert {f"{each.stem}/" for each in (ROOT / "docs").glob("*.md")} < set(found)
    for address, sentence in found.items():
        assert (site / address / "index.html").is_file()
        assert len(sentence.split()) > 2, address


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited["version"] == project["version"]
    assert cited["license"] == project["license"]
    assert cited["keywords"] == project["keywords"]
    assert [each["name"] for each in cited["authors"]] == [
        each["name"] for each in project["authors"]
    ]
