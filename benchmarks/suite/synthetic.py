"""``tools/make_synthetic.py``, which is a script and no installed module, for import."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parents[2]


def _load_tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    from make_synthetic import (
        KINDS,
        LLAMA_2_7B,
        Generator,
        Shape,
        byte_statistics,
        compare,
        plane_entropies,
        write_batch,
    )
else:
    _tool = _load_tool("make_synthetic")
    KINDS, LLAMA_2_7B = _tool.KINDS, _tool.LLAMA_2_7B
    Generator, Shape, write_batch = _tool.Generator, _tool.Shape, _tool.write_batch
    byte_statistics, compare = _tool.byte_statistics, _tool.compare
    plane_entropies = _tool.plane_entropies

__all__ = [
    "KINDS",
    "LLAMA_2_7B",
    "REPOSITORY",
    "Generator",
    "Shape",
    "byte_statistics",
    "compare",
    "plane_entropies",
    "write_batch",
]
