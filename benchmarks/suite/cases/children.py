"""Runs one case in a fresh interpreter and reports its memory; the module is also the child."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from suite.measure import rss_nbytes

_FOLDER = Path(__file__).resolve().parents[2]


def call(action: str, **arguments: Any) -> dict[str, float]:
    """Run an action in a child.

    Returns
    -------
    dict
        ``bare``, ``imported`` and ``peak``: resident bytes at start, when everything is imported,
        and at most; ``wall``: seconds of the action itself; ``process``: with start and imports.
    """
    command = [sys.executable, "-m", "suite.cases.children", action, json.dumps(arguments)]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=_FOLDER, capture_output=True, text=True, check=False)
    if done.returncode:
        message = f"{action} {arguments}: {done.stderr.strip()[-2000:]}"
        raise RuntimeError(message)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"process": time.perf_counter() - start}


def _work(action: str, arguments: dict[str, Any]) -> Any:
    """The action as a function, with all its imports done."""
    path = Path(arguments["path"])
    if action in ("convert", "load_pickle"):
        from suite.cases import conversion

        if action == "load_pickle":
            return lambda: conversion.load_pickle(path)
        target, verify = Path(arguments["target"]), arguments["verify"]
        return lambda: conversion.convert(path, target, verify=verify)
    from suite.formats import by_name
    from suite.workspace import stored_samples

    each = by_name(arguments["format"])
    each.prepare()
    match action:
        case "write":
            return lambda: each.write(stored_samples(Path(arguments["samples"])), path)
        case "scan":
            return lambda: each.scan(path)
        case "open":
            return lambda: _open(each, path)
    message = f"there is no action {action}"
    raise ValueError(message)


def _open(each: Any, path: Path) -> None:
    """Count the samples and read the first and the last one's first layer."""
    num_samples = each.count(path)
    with each.reader(path) as read:
        for index in (0, num_samples - 1):
            read(index, 0)


def main() -> None:
    """The child."""
    bare = rss_nbytes()
    work = _work(sys.argv[1], json.loads(sys.argv[2]))
    imported = rss_nbytes("VmHWM")
    start = time.perf_counter()
    work()
    wall = time.perf_counter() - start
    figures = {"bare": bare, "imported": imported, "peak": rss_nbytes("VmHWM"), "wall": wall}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
