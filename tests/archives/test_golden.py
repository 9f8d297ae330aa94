"""Archives written by earlier versions hold what they held when they were written."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import h5traces
from h5traces.checking.seal import seal
from h5traces.checking.validate import validate

if TYPE_CHECKING:
    from types import ModuleType

HERE = Path(__file__).parent
TOOL = HERE.parents[1] / "tools" / "make_golden.py"
FILES = sorted(HERE.glob("*/*.h5"))
MAX_NBYTES = 100_000


def expected_of(path: Path) -> dict[str, Any]:
    document = json.loads((path.parent / "expected.json").read_text(encoding="ascii"))
    expected: dict[str, Any] = document[path.name]
    return expected


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("make_golden", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "make_golden", module)
        spec.loader.exec_module(module)
    return module


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda f: f.name)
def test_folders_are_complete(folder: Path) -> None:
    document = json.loads((folder / "expected.json").read_text(encoding="ascii"))
    assert sorted(document) == sorted(path.name for path in folder.glob("*.h5"))
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "python tools/make_golden.py tests/archives/" in readme
    assert all(name in readme for name in document)


def test_there_are_golden_archives() -> None:
    assert len(FILES) >= 9


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_golden_archive(path: Path, tool: ModuleType) -> None:
    assert path.stat().st_size < MAX_NBYTES
    report = validate(path)
    assert report.ok, report.problems
    assert report.notes == []
    expected = expected_of(path)
    with h5traces.open(path) as archive:
        assert archive._files[0].has_footer
        for name in ("format_version", "num_layers", "hidden_size", "num_heads", "model_id"):
            assert getattr(archive.metadata, name) == expected[name], name
        assert archive.metadata.dataset == expected["dataset"]
        assert list(archive.layers) == expected["layers"]
        assert list(archive.ids) == expected["ids"]
        assert [trace.metadata.coverage for trace in archive] == expected["coverage"]
        assert [trace.metadata.digest for trace in archive] == expected["digests"]
        found = [as_json(tool.describe(trace.to_dict())) for trace in archive]
        assert found == expected["samples"]
    assert [as_json(tool.describe(each)) for each in h5traces.load(path)] == expected["samples"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_golden_archive_has_not_been_edited(path: Path) -> None:
    (report,) = seal(path, dry_run=True)
    assert report.edited == []
    assert report.num_samples == len(expected_of(path)["samples"])


def test_the_sources_are_still_the_same(tool: ModuleType) -> None:
    made = tool.goldens()
    for path in FILES:
        if path.parent.name == "unstable":
            expected = expected_of(path)["samples"]
            sources = tool.source_dicts(made[path.name])
            assert [as_json(tool.describe(each)) for each in sources] == expected, path.name
