"""The notebook in examples/ runs, and shows what it shows there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

EXAMPLES = Path(__file__).parents[2] / "examples"


def outputs(book: nbformat.NotebookNode) -> list[list[tuple[list[str], object]]]:
    """Of each cell: types of what it shows, and the text of what is not a picture."""
    return [
        [
            (sorted(each.data), None if "image/png" in each.data else each.data["text/plain"])
            for each in cell.get("outputs", ())
        ]
        for cell in book.cells
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_shows_what_it_shows(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / "legacy", tmp_path / "legacy")
    stored = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    book = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    for cell in book.cells:
        cell.pop("outputs", None)
    client = nbclient.NotebookClient(
        book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    found = outputs(book)
    assert found == outputs(stored)
    assert sum(len(cell) for cell in found) == 8
    assert found[-1] == [(["image/png", "text/plain"], None)]
