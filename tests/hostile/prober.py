"""All attacks by archives, and the process that opens files for those who want to live."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import footer_attacks
import hdf5_attacks
import plugin_attacks
import probe
import value_attacks

if TYPE_CHECKING:
    from pathlib import Path

ATTACKS_BY_PLACE = {
    "HDF5 structures": hdf5_attacks.ATTACKS,
    "footer": footer_attacks.ATTACKS,
    "values and attributes": value_attacks.ATTACKS,
    "filters of plugins": plugin_attacks.ATTACKS,
}
ATTACKS = [attack for attacks in ATTACKS_BY_PLACE.values() for attack in attacks]


class Prober:
    """The process that opens files and survives what comes of it.

    Parameters
    ----------
    archive
        A valid archive, read once in every way before anything is measured.
    """

    def __init__(self, archive: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(probe.__file__), str(archive)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout
        assert self._process.stdout.readline() == "ready\n"

    def __call__(self, path: Path, routes: list[str]) -> dict[str, dict[str, Any]]:
        """What came of a file by each route; see `probe`."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"path": str(path), "routes": routes}) + "\n")
        self._process.stdin.flush()
        results: dict[str, dict[str, Any]] = json.loads(self._process.stdout.readline())
        return results

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
