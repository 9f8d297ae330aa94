"""Another package adds a reader by an entry point: the one of docs/sources.md, installed by pip."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import h5traces
from h5traces.errors import ConversionError
from h5traces.sources import opening

ROOT = Path(__file__).parents[2]
ENTRY_POINTS = "[h5traces.sources]\nprobe = probe_reader:ProbeSource\n"


def module() -> str:
    """The reader of the document."""
    text = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return code


def install(folder: Path, code: str, entry_points: str = ENTRY_POINTS) -> Path:
    """A wheel with one module, installed into a folder without a network."""
    wheel = folder / "probe_reader-1.0-py3-none-any.whl"
    info = "probe_reader-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("probe_reader.py", code)
        file.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: probe_reader\nVersion: 1.0\n"
        )
        file.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        file.writestr(f"{info}/entry_points.txt", entry_points)
        file.writestr(f"{info}/RECORD", "")
    site = folder / "site"
    command = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site, wheel)
    subprocess.run([sys.executable, *command], check=True)
    return site


def run(site: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "h5traces", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    states = np.arange(24, dtype="<f4").reshape(2, 3, 4)
    path = tmp_path / "q7.probe"
    path.write_bytes(b"PROBE" + np.array(states.shape, "<u4").tobytes() + states.tobytes())
    return path


def test_files_of_an_added_reader_are_read(tmp_path: Path, probe: Path) -> None:
    site = install(tmp_path, module())
    archive = tmp_path / "q7.h5"
    done = run(site, "convert", probe, "-o", archive)
    assert done.returncode == 0, done.stderr
    shown = run(site, "inspect", probe, "--json")
    assert '"sample_id": "q7"' in shown.stdout
    verified = run(site, "verify", archive, "--against", probe)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    listed = run(site, "ls", archive, "--json")
    assert '"sample_id": "q7"' in listed.stdout


def test_without_the_package_the_file_is_unknown(tmp_path: Path, probe: Path) -> None:
    done = run(tmp_path, "convert", probe, "-o", tmp_path / "a.h5")
    assert done.returncode == 1
    assert "is of an unknown kind" in " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import no_such_module_at_all", "cannot be imported: ModuleNotFoundError"),
        ("ProbeSource = 3", "is not a class of h5traces.TraceSource"),
    ],
)
def test_a_reader_that_cannot_be_used_is_named(tmp_path: Path, code: str, problem: str) -> None:
    site = install(tmp_path, code)
    batch = ROOT / "examples" / "legacy"
    done = run(site, "inspect", next(batch.rglob("*.pkl.gz")))
    assert done.returncode == 0, done.stderr
    message = " ".join(done.stderr.split())
    assert "the reader 'probe' (probe_reader:ProbeSource" in message
    assert problem in message


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("recognises(*_)", "raise KeyError('wrong')"),
        ("__init__(self, path, *, options)", "raise ValueError('wrong')"),
        ("__init__(self, path, *, options)", "self.path = path"),
        ("__next__(self)", "return [].pop()"),
        ("__next__(self)", "return ['wrong']"),
        ("__next__(self)", "return None"),
        ("close(self)", "raise RuntimeError('wrong')"),
    ],
)
@pytest.mark.parametrize("load", [h5traces.load, h5traces.inspect])
def test_what_a_reader_raises_is_an_error_of_ours(
    probe: Path, monkeypatch: pytest.MonkeyPatch, method: str, body: str, load: Any
) -> None:
    names: dict[str, Any] = {"__name__": "probe_reader"}
    exec(module(), names)
    code = f"def {method}:\n    {body}"
    exec(code, names)
    monkeypatch.setattr(names["ProbeSource"], method.partition("(")[0], names.popitem()[1])
    monkeypatch.setattr(opening, "added_readers", lambda: (names["ProbeSource"],))
    with pytest.raises(ConversionError, match=r"q7.probe: the reader probe_reader.ProbeSource "):
        load(probe)


def test_a_reader_that_does_not_call_its_base_is_told_so(
    probe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {"__name__": "probe_reader"}
    exec(module(), names)
    monkeypatch.setattr(names["ProbeSource"], "__init__", lambda *_, **__: None)
    monkeypatch.setattr(opening, "added_readers", lambda: (names["ProbeSource"],))
    with pytest.raises(ConversionError, match=r"does not call super\(\).__init__\(path, options="):
        h5traces.load(probe)
