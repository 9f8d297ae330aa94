"""What `h5traces` exports, and nothing else."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import h5traces

PUBLIC = [
    "Archive",
    "Precision",
    "Trace",
    "__version__",
    "calibrate",
    "convert",
    "create",
    "load",
    "open",
    "validate",
    "verify",
]

# Heavy edges are explicit imports.
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
    "h5traces.torch_data": [
        "DeviceLoader",
        "IterableTraceDataset",
        "PackCollate",
        "PadCollate",
        "ShardSampler",
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
    ],
)
def test_a_missing_library_is_named(module: str, missing: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from h5traces.errors import MissingDependencyError\n"
        f"try:\n    import {module}\n"
        f"except MissingDependencyError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"install h5traces[{extra}]" in done.stdout


def test_exports_exist_and_are_documented() -> None:
    for name in h5traces.__all__:
        each = getattr(h5traces, name)
        assert name == "__version__" or inspect.getdoc(each), name


def test_no_module_shares_the_name_of_a_function() -> None:
    modules = {
        path.stem for path in Path(h5traces.__file__).parent.glob("*") if path.stem[0] != "_"
    }
    assert not modules & set(h5traces.__all__)


def test_the_version_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z.]+\d+)?", h5traces.__version__)


def test_options_are_named() -> None:
    for function in (h5traces.convert, h5traces.open, h5traces.validate):
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            if isinstance(parameter.default, bool):
                assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, (function, parameter.name)
