"""Seconds of each target of the coverage-guided fuzzer; ``tools/fuzz.py`` runs for longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fuzz_targets
import pytest
from fuzz_targets import SEEDS, TARGETS, FindingError

from h5traces.storage.codecs import CODECS, GZIP

SECONDS = 2
OF_CHILDREN = "RuntimeError: Unable to convert call argument"
TOOL = Path(__file__).parents[2] / "tools" / "fuzz.py"


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found_in_what_fuzzing_starts_from(name: str) -> None:
    seeds = [each for each in SEEDS[name]() if len(each) <= fuzz_targets.LARGEST_SEED]
    assert len(seeds) > 10
    for each in seeds:
        TARGETS[name](each)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found_in_seconds(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    command = [sys.executable, str(TOOL), name, "--seconds", str(SECONDS), "--seed", "7"]
    # Through a shell: a child counts the memory of the process that forked it as its own peak.
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@"; exit $?', "sh", *command, "--findings", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = list(tmp_path.iterdir())
    if OF_CHILDREN in done.stderr:
        # pyarrow's exception of C++ ends the child that tries a file, but for frames of the fuzzer
        # on its stack, which catch it. Without them, reading has to reject the file.
        assert found
        for each in found:
            TARGETS[name](each.read_bytes())
        return
    assert done.returncode == 0, done.stderr[-3000:]
    assert found == []


def test_a_decoder_that_errs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(type(GZIP)):
        def decode(self, _stored: memoryview, out: memoryview, _itemsize: int) -> None:
            out[:] = b"\1" * len(out)

    monkeypatch.setitem(CODECS, "gzip", Wrong("gzip", shuffle=True))
    with pytest.raises(FindingError, match="other bytes than the stock library"):
        TARGETS["chunks"](next(SEEDS["chunks"]()))


def test_an_import_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(*_: object, **__: object) -> list[object]:
        sys.modules["forbidden"] = sys
        return []

    monkeypatch.setattr(fuzz_targets, "read_batch", importing)
    with pytest.raises(FindingError, match="had \\['forbidden'\\] imported"):
        TARGETS["unpickler"](b"")
    del sys.modules["forbidden"]
