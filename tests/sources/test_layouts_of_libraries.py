"""Every layout of `library_layouts` is read, and named in the docs with what wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from library_layouts import HERE, IMITATED, LAYOUTS, MAPPINGS, RECORD, RECORDED, Layout

import h5traces
from h5traces.sources.opening import recognise

ROOT = Path(__file__).parents[2]
TABLE = json.loads((RECORDED / "recorded.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    path, expected = layout.make(tmp_path)
    mapping = layout.mapping and MAPPINGS / f"{layout.mapping}.toml"
    reading = h5traces.ReadingOptions(mapping=mapping)
    options = {"merge": True, "reading": reading}
    out = tmp_path.with_name(f"{tmp_path.name}.h5")
    report = h5traces.convert(
        path, out, precision=h5traces.PrecisionOptions(dtype="auto"), **options
    )
    assert report.ok, report.problems
    with h5traces.open(out, container="numpy") as archive:
        assert len(archive) == layout.count
        found = archive[layout.count - 1]["hidden_states"]
        if name == "torch.save of what generate returns":
            found = [steps[0] for steps in found]
        found = np.stack([np.asarray(each, np.float32) for each in found])
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    is_one = path.is_file() or recognise(path, reading).is_readable
    for source in [path] if is_one else sorted(path.iterdir()):
        (verified,) = h5traces.verify(out, against=source, reading=reading)
        assert verified.ok, verified


def test_every_mapping_is_one_of_a_layout() -> None:
    used = [layout.mapping for layout in LAYOUTS.values() if layout.mapping]
    assert sorted(used) == sorted(path.stem for path in MAPPINGS.glob("*.toml"))
    assert len(used) >= 10


def test_recorded_files_are_small_and_known() -> None:
    for library, facts in TABLE.items():
        folder = RECORDED / library
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file()
        }
        assert files == facts["files"], library
        assert sum(files.values()) < 150_000


def written_by(layout: Layout) -> str:
    """What the table says wrote the files."""
    if layout.how == RECORD:
        facts = TABLE[layout.library]
        return f"{facts['package']} {facts['version']}"
    return layout.library if layout.how == HERE else f"{layout.library} ({IMITATED})"


def test_the_docs_have_them_all() -> None:
    rows = [
        f"| {name} | {written_by(layout)} | "
        f"{f'`{layout.mapping}`' if layout.mapping else ''} |".replace("|  |", "| |")
        for name, layout in LAYOUTS.items()
    ]
    text = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    table = "\n".join(["| layout | written by | mapping |", "|---|---|---|", *rows])
    assert table in text, f"put this into docs/sources.md:\n{table}"
    assert len({layout.library for layout in LAYOUTS.values()}) >= 20
    assert sum(layout.how != IMITATED for layout in LAYOUTS.values()) >= 30
