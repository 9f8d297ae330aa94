"""What `h5traces` exports, and nothing else."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import h5traces

if TYPE_CHECKING:
    from collections.abc import Iterator

PUBLIC = [
    "Archive",
    "CheckOptions",
    "H5TracesError",
    "LabelOptions",
    "Precision",
    "PrecisionOptions",
    "ReadingOptions",
    "TargetOptions",
    "Trace",
    "TraceSource",
    "__version__",
    "calibrate",
    "collect",
    "convert",
    "create",
    "errors",
    "estimate",
    "export",
    "extract",
    "features",
    "fidelity",
    "finish",
    "graph",
    "index",
    "inspect",
    "label",
    "load",
    "merge",
    "open",
    "plotting",
    "repack",
    "salvage",
    "seal",
    "split",
    "status",
    "torch_data",
    "validate",
    "verify",
    "view",
]

VERBS = [name for name in PUBLIC if name in {
    "calibrate", "collect", "convert", "create", "estimate", "export", "finish", "inspect",
    "label", "load", "merge", "open", "repack", "salvage", "seal", "split", "status", "validate",
    "verify",
}]  # fmt: skip
PACKAGE = Path(h5traces.__file__).parent

# Packages for one kind of work each.
PUBLIC_EDGES = {
    "h5traces.fidelity": [
        "FidelityReport",
        "KindFidelity",
        "StateFidelity",
        "Unmatched",
        "WeightFidelity",
        "compare",
    ],
    "h5traces.graph": ["TraceGraphDataset", "attention_edges"],
    "h5traces.ray": ["ArchiveSink", "convert", "extract"],
    "h5traces.torch_data": [
        "DeviceLoader",
        "IterableTraceDataset",
        "Labels",
        "PackCollate",
        "PadCollate",
        "ShardSampler",
        "Tokens",
        "TraceDataset",
        "pack_collate",
        "pad_collate",
        "to_device",
    ],
}


def test_exports_are_listed() -> None:
    assert sorted(h5traces.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC_EDGES)
def test_exports_of_edges_are_listed_and_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == PUBLIC_EDGES[name]
    for each in PUBLIC_EDGES[name]:
        assert inspect.getdoc(getattr(module, each)), each


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("h5traces.torch_data", "torch", "torch"),
        ("h5traces.graph", "torch_geometric", "graph"),
        ("h5traces.ray", "ray", "ray"),
    ],
)
def test_a_missing_library_is_named(module: str, missing: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from h5traces.errors import MissingDependencyError\n"
        f"import {module} as package\n"
        f"try:\n    getattr(package, package.__all__[0])\n"
        f"except MissingDependencyError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"install 'h5traces[{extra}]'" in done.stdout


def test_exports_exist_and_are_documented() -> None:
    for name in h5traces.__all__:
        each = getattr(h5traces, name)
        assert name == "__version__" or inspect.getdoc(each), name


def test_a_name_is_what_it_says_whatever_was_imported_before() -> None:
    """No module shares its name with a public function: importing one would replace the other."""
    modules = ["archive.opening", "checking.validate", "rewriting.convert", "extract.estimate"]
    imported = "; ".join(f"import h5traces.{each}" for each in modules)
    types = f"(type(getattr(h5traces, each)).__name__ for each in {VERBS})"
    code = f"import h5traces; {imported}; print(*{types})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"function"}
    top = {path.stem for path in PACKAGE.glob("*") if path.stem[0] != "_"}
    assert not top & set(VERBS)


def test_importing_loads_next_to_nothing() -> None:
    code = "import sys, h5traces; print(*sorted(set(sys.modules) & {'numpy', 'h5py', 'pydantic'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_package_shows_its_public_names_only() -> None:
    assert dir(h5traces) == PUBLIC


def test_every_name_can_be_had_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['torch_geometric'] = None\n"
        "from h5traces import *\nimport h5traces, pydoc\npydoc.render_doc(h5traces)\n"
        "print(graph.__name__, torch_data.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["h5traces.graph", "h5traces.torch_data"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: h5traces.PrecisionOptions(dtype="int8"),
            "dtype is 'int8', expected one of",
        ),
        (lambda: h5traces.PrecisionOptions(on_overflow="wrap"), "on_overflow is 'wrap', expected"),
        (
            lambda: h5traces.TargetOptions(workers=0),
            "workers is 0, expected at least 1",
        ),
    ],
)
def test_options_check_their_values(make: Any, message: str) -> None:
    with pytest.raises(h5traces.errors.OptionError, match=message):
        make()


def test_unknown_names_are_named() -> None:
    with pytest.raises(AttributeError, match="module 'h5traces' has no attribute 'opne'"):
        _ = h5traces.opne


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "h5traces", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert h5traces.__version__ in done.stdout


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "cli":
            continue  # one parameter per option: typer reads them
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(PACKAGE)}:{node.name}", node


def test_no_function_has_more_than_twelve_parameters() -> None:
    # Not counted: which share of the work to do, which every command that has shares takes alike.
    ranks = {"rank", "world_size"}
    long = {
        name: count
        for name, node in functions()
        if (
            count := sum(
                each.arg not in ranks
                for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            )
        )
        > 12
    }
    assert long == {}


def test_the_version_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z.]+\d+)?", h5traces.__version__)


def test_options_are_named() -> None:
    for function in (h5traces.convert, h5traces.open, h5traces.validate):
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            if isinstance(parameter.default, bool):
                assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, (function, parameter.name)
