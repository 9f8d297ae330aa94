"""Real servers for the tests, in processes of their own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Server:
    """A running server.

    Attributes
    ----------
    url
        Its address.
    """

    url: str

    def control(self, **settings: Any) -> None:
        """Set what the server does from now on, and forget what it was asked."""
        self._ask(settings)

    def requests(self) -> list[dict[str, str]]:
        """The requests since the last call."""
        return self._ask({})

    def _ask(self, settings: dict[str, Any]) -> Any:
        body = json.dumps(settings).encode()
        with urllib.request.urlopen(f"{self.url}/__control__", body, timeout=60) as answer:
            return json.load(answer)


@contextlib.contextmanager
def running(script: str, *arguments: str) -> Iterator[Server]:
    """One of the servers beside this file, until the block ends."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.kill()
