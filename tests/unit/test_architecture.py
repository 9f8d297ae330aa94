"""Imports go downwards only, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import h5traces

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(h5traces.__file__).parent

# The rooms of the house from the ground up. A module imports from its own room and from those
# above its name in this list; no two rooms share a floor.
ROOMS = (
    "errors",
    "arguments",
    "lazy",
    "format",
    "storage",
    "paths",
    "ranks",
    "precision",
    "meaning",
    "sources",
    "archive",
    "loading",
    "writing",
    "rewriting",
    "checking",
    "torch_data",
    "graph",
    "features",
    "fidelity",
    "extract",
    "vllm",
    "ray",
    "plotting",
    "view",
    "cli",
)
# Doors for users, which open onto every room.
DOORS = {"", "__main__"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imports(path: Path, *, with_types: bool) -> Iterator[str]:
    """Full names that a module imports, those in functions included."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                if with_types:
                    yield from walk(child)
                continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name: str) -> str | None:
    """The module of ours behind an imported name; None for those of others."""
    if name.partition(".")[0] != "h5traces":
        return None
    inner = name.partition(".")[2]
    while inner and inner not in MODULES:
        inner = inner.rpartition(".")[0]
    return inner


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_its_place() -> None:
    assert {room(name) for name in MODULES} - DOORS == set(ROOMS)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in DOORS])
def test_imports_go_down(name: str) -> None:
    rank = ROOMS.index(room(name))
    for imported in imports(MODULES[name], with_types=True):
        target = own(imported)
        if target is None:
            continue
        assert target not in DOORS, f"{name} imports {imported}"
        assert ROOMS.index(room(target)) <= rank, f"{name} imports {imported}"


@pytest.mark.parametrize("with_types", [False, True], ids=["run", "types"])
def test_there_are_no_circles(with_types: bool) -> None:
    """Neither between rooms nor inside one; imports for annotations count as well."""
    graph = {
        name: {
            target
            for imported in imports(path, with_types=with_types)
            if (target := own(imported)) is not None and target != name
        }
        for name, path in MODULES.items()
    }
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) == set(MODULES)


def importers(library: str) -> set[str]:
    return {
        name
        for name, path in MODULES.items()
        for imported in imports(path, with_types=True)
        if imported.partition(".")[0] == library
    }


def test_h5py_is_imported_in_one_place() -> None:
    found = importers("h5py") | importers("hdf5plugin")
    assert found
    assert all(name.startswith("storage.hdf5") for name in found), found


def test_servers_are_talked_to_in_one_place() -> None:
    libraries = ("fsspec", "s3fs", "aiohttp", "huggingface_hub", "botocore", "aiobotocore", "yarl")
    found = set().union(*(importers(each) for each in libraries))
    # Loaded only when an address is read; file and paths of that package are loaded always.
    assert found == {f"storage.remote.{each}" for each in ("filesystems", "listing", "s3", "web")}


def test_tables_are_written_and_read_in_one_place_each() -> None:
    expected = {"archive.tables", "features.parquet", "rewriting.export_tables", "sources.arrow"}
    expected |= {"archive.catalogue", "rewriting.cataloguing"}
    # The archive names the type of what it returns.
    assert importers("pyarrow") == expected | {"archive.archive"}


def test_torch_is_imported_in_one_place_of_the_reader() -> None:
    heavy = ("extract", "torch_data", "vllm", "graph")
    found = {name for name in importers("torch") if name.partition(".")[0] not in heavy}
    assert found == {"archive.torch_values", "rewriting.export_torch"}


def test_pickle_is_never_loaded() -> None:
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr not in ("load", "loads", "Unpickler", "_Unpickler"), name


@pytest.mark.parametrize("module", ["h5traces", "h5traces.cli"])
def test_importing_is_light(module: str) -> None:
    heavy = {"torch", "transformers", "pandas", "torch_geometric", "fsspec", "pyarrow", "sklearn"}
    code = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_reading_an_archive_of_arrays_needs_no_torch(tmp_path: Path) -> None:
    from legacy_batches import make_archive, make_batch

    target = make_archive(tmp_path, make_batch("full_pkl"))
    code = (
        "import sys; sys.modules['torch'] = None; import h5traces; "
        f"print(len(h5traces.load({str(target)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "6"
