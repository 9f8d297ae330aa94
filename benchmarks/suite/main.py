"""The command line: runs the sections, writes results, report and plots."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from suite import report
from suite.cases import conversion, growth, match, memory, opening, throughput
from suite.folder import made_folder
from suite.formats import all_formats
from suite.machine import describe_machine, load_average, versions
from suite.scales import SCALES
from suite.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from suite.scales import Scale

_HERE: Final = Path(__file__).resolve().parents[1]
SECTIONS: Final = (
    "match",
    "throughput",
    "real",
    "opening",
    "growth",
    "conversion",
    "memory",
)
RESULTS_JSON: Final = "results.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    options = _options(arguments)
    if options.report is not None:
        results = json.loads(options.report.read_text(encoding="utf-8"))
        report.write(results, options.output or options.report.parent)
        return
    missing = [each.name for each in all_formats().values() if not each.installed]
    if missing:
        _log(f"not installed and left out: {', '.join(missing)}; pip install '.[bench]'")
    published = options.scale == "full" and options.only is None
    output = options.output or (_HERE if published else _HERE / "out")
    results = _run(SCALES[options.scale], options.only or SECTIONS, options.work)
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    (output / RESULTS_JSON).write_text(text, encoding="utf-8")
    for path in report.write(results, output):
        print(path)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure h5traces beside other formats.")
    parser.add_argument("--scale", choices=SCALES, default="full", help="how much to measure")
    parser.add_argument(
        "--only", metavar="SECTION", choices=SECTIONS, nargs="+", help=f"of {', '.join(SECTIONS)}"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="folder for results.md, results.json and plots"
    )
    parser.add_argument(
        "--work", type=made_folder, help="folder for archives that are written and deleted (8 GB)"
    )
    parser.add_argument(
        "--report", metavar="RESULTS.JSON", type=Path, help="only write the report anew"
    )
    return parser.parse_args(arguments)


def _run(scale: Scale, sections: Sequence[str], work: Path | None) -> dict[str, Any]:
    started, load_before = time.perf_counter(), load_average()
    folder = Path(tempfile.mkdtemp(prefix="h5traces-benchmark-", dir=work))
    try:
        results: dict[str, Any] = {
            "scale": scale.name,
            "machine": describe_machine(folder),
            "versions": versions(),
            "shape": {
                "num_layers": scale.shape.num_layers,
                "hidden_size": scale.shape.hidden_size,
                "num_heads": scale.shape.num_heads,
            },
            "formats": {name: each.installed for name, each in all_formats().items()},
            "plots": find_spec("matplotlib") is not None,
            "sections": {},
        }
        workspace = Workspace(folder, scale)
        for section in sections:
            _log(f"{section} ({time.perf_counter() - started:.0f} s)")
            results["sections"][section] = _section(section, workspace, _log)
    finally:
        shutil.rmtree(folder)
    results["machine"]["load before and after"] = f"{load_before}; {load_average()}"
    results["seconds"] = round(time.perf_counter() - started)
    return results


def _section(name: str, workspace: Workspace, log: Callable[[str], None]) -> dict[str, Any]:
    scale = workspace.scale
    if name in ("throughput", "real"):
        is_real = name == "real"
        return throughput.run(
            workspace.real_samples[: scale.real_samples] if is_real else workspace.samples,
            workspace.folder / name,
            num_rounds=scale.real_rounds if is_real else scale.rounds,
            num_random=scale.random_reads,
            copy_nbytes=scale.copy_nbytes,
            log=log,
        )
    match name:
        case "match":
            return match.run(workspace)
        case "opening":
            return opening.run(workspace, log)
        case "growth":
            return growth.run(workspace, log)
        case "conversion":
            return conversion.run(workspace, log)
    return memory.run(workspace, log)


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
