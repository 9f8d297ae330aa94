"""Opens files in every way there is, each file in its own process, and reports what came.

A server: one path per line on stdin, one JSON object per line on stdout. It forks for every file,
so a crash, a hang or a full memory ends only that child, and starting Python is paid for once.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import h5traces
from h5traces.cli.app import app
from h5traces.errors import H5TracesError
from h5traces.sources.pickle.stream import BatchStream

MAX_ADDRESS_SPACE = 3 << 30
MAX_CPU_SECONDS = 30
LAYERED = ("hidden_states", "attentions", "attention_mean")
COMMANDS = {
    "inspect": ["inspect", "--num-samples", "all", "{path}"],
    "ls": ["ls", "{path}"],
    "validate-command": ["validate", "--quick", "{path}"],
    "verify": ["verify", "{path}"],
    "repack": ["repack", "{path}", "-o", "{path}.repacked.h5"],
    "export-pkl": ["export", "{path}", "-o", "{path}.pkl", "--numpy"],
    "export-h5": ["export", "{path}", "-o", "{path}.exported.h5"],
    "seal": ["seal", "{copy}"],
}


def flat(value: Any) -> Any:
    """A value as something that equals itself only."""
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return ["array", value.dtype.str, value.shape, digest]
    if isinstance(value, dict):
        return {str(key): flat(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [flat(each) for each in value]
    return repr(value)


def read(path: str) -> str:
    """Everything a trace gives; the first error of ours if there is one."""
    failed: H5TracesError | None = None
    found = []
    with h5traces.open(path) as archive:
        for trace in archive:
            whole: dict[str, Any] = {}
            _ = trace.metadata, repr(trace), len(archive), archive.layers
            for key in trace:
                try:
                    value = trace[key]
                    if key in LAYERED:
                        _ = value.sites, value.layers
                        value = list(value)
                    whole[key] = flat(value)
                except H5TracesError as error:
                    failed = failed or error
            try:
                trace.to_dict(container="numpy")
            except H5TracesError as error:
                failed = failed or error
            found.append(whole)
    if failed:
        raise failed
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def worker(path: str) -> str:
    """What a DataLoader's worker does: an archive arrives pickled, and is read."""
    archive = pickle.loads(pickle.dumps(h5traces.open(path)))
    for index in range(len(archive)):
        trace = archive[index]
        for kind in ("hidden_states", "attentions"):
            if kind in trace:
                _ = trace[kind][0:1]
    return ""


def check(path: str) -> list[dict[str, str]]:
    """What validating the structure finds; reading every value finds that much, and maybe more."""
    found = [each.as_dict() for each in h5traces.validate(path, quick=True).problems]
    more = [each.as_dict() for each in h5traces.validate(path).problems]
    assert all(each in more for each in found)
    return found


def batch(path: str) -> int:
    """The items of a legacy batch."""
    with BatchStream(path) as found:
        return sum(1 for _ in found)


LIBRARY = {"read": read, "worker": worker, "validate": check}
# For pickles.
BATCHES = {"batch": batch}


def command(name: str, path: str) -> dict[str, Any]:
    copy = f"{path}.copy.h5"
    if name == "seal":
        shutil.copyfile(path, copy)
    words = [each.format(path=path, copy=copy) for each in COMMANDS[name]]
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(words)
        except SystemExit as exit_:
            code = exit_.code
    return {"outcome": "exit", "code": code, "message": err.getvalue() + out.getvalue()}


def attempt(route: str, path: str) -> dict[str, Any]:
    try:
        if route in COMMANDS:
            return command(route, path)
        value = {**LIBRARY, **BATCHES}[route](path)
    except H5TracesError as error:
        return {"outcome": "error", "type": type(error).__name__, "message": str(error)}
    except BaseException as error:
        trace = traceback.format_exc(limit=-4)
        return {"outcome": "escaped", "type": type(error).__name__, "message": trace}
    return {"outcome": "ok", "value": value, "message": ""}


def peak_nbytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def measured(route: str, path: str) -> dict[str, Any]:
    # 5: forget the peak so far
    Path("/proc/self/clear_refs").write_text("5")
    before, start, wall = peak_nbytes(), time.process_time(), time.monotonic()
    result = attempt(route, path)
    result["seconds"] = round(time.process_time() - start, 3)
    result["wall"] = round(time.monotonic() - wall, 3)
    result["extra_nbytes"] = peak_nbytes() - before
    result["message"] = result["message"][:4000]
    return result


def child(path: str, routes: list[str], out: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS))
    warnings.simplefilter("ignore")
    # Filter plugins print to stdout, which is the way back here.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for route in routes:
        result = {route: measured(route, path)}
        os.write(out, json.dumps(result).encode() + b"\n")


def probe(path: str, routes: list[str]) -> dict[str, Any]:
    """What came of a file by every route; a route that ended the process is 'died'."""
    inlet, outlet = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(inlet)
        try:
            child(path, routes, outlet)
        finally:
            os._exit(0)
    os.close(outlet)
    with os.fdopen(inlet) as lines:
        results: dict[str, Any] = {}
        for line in lines:
            results |= json.loads(line)
    _, status = os.waitpid(pid, 0)
    for route in routes:
        if route not in results:
            died = {"outcome": "died", "message": f"wait status {status}", "seconds": 0.0}
            results[route] = {**died, "extra_nbytes": 0}
            break
    return results


def main() -> None:
    warm = sys.argv[1]
    warnings.simplefilter("ignore")
    # Whatever is imported late, or warms caches, shall not count.
    child_routes = [*LIBRARY, *COMMANDS]
    for route in child_routes:
        attempt(route, warm)
    # Children share what is here, instead of copying it when they collect garbage.
    gc.freeze()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        result = probe(request["path"], request.get("routes") or child_routes)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
