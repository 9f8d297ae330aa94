"""A short run of the fuzzer of kernels; ``tools/fuzz_kernels.py`` runs it for longer."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = spec_from_file_location("fuzz_kernels", ROOT / "tools/fuzz_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    tool: Any = module_from_spec(spec)
    spec.loader.exec_module(tool)
    if shutil.which(tool.compiler()) is None:
        pytest.skip("there is no C compiler")
    try:
        return tool.build(tmp_path_factory.mktemp("fuzzer"))
    except subprocess.CalledProcessError as error:
        if "sanitize" in error.stderr or "asan" in error.stderr:
            pytest.skip("the compiler has no sanitizers")
        pytest.fail(error.stderr)


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_differs_from_the_oracles(fuzzer: Path, seed: int, tmp_path: Path) -> None:
    command = [fuzzer, str(seed), "10000000", "25"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    executions = int(done.stdout.split()[0])
    assert executions >= 1000
