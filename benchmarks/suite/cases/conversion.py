"""``h5traces convert`` against merely inflating its source, and one layer against a whole batch."""

from __future__ import annotations

import gzip
import pickle
from typing import TYPE_CHECKING, Any

import h5traces
from h5traces.writing.options import TargetOptions
from suite.measure import Series, rounds, timed
from suite.workspace import payload_nbytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from suite.workspace import Workspace

INFLATE, READ_PKL = "igzip inflates the .pkl.gz", "read the .pkl"
LOAD_GZ, LOAD_PKL = "gzip + pickle.load", "pickle.load"
SAFE_LOAD = "h5traces.load of the .pkl.gz"
CONVERT_GZ, CONVERT_GZ_VERIFY = "convert .pkl.gz --no-verify", "convert .pkl.gz --verify"
CONVERT_PKL, CONVERT_PKL_VERIFY = "convert .pkl --no-verify", "convert .pkl --verify"
ONE_LAYER = "one layer of every sample from the archive"
ALL_FROM_ARCHIVE = "h5traces.load of the archive"
CASES = (
    INFLATE,
    READ_PKL,
    LOAD_GZ,
    LOAD_PKL,
    SAFE_LOAD,
    CONVERT_GZ,
    CONVERT_GZ_VERIFY,
    CONVERT_PKL,
    CONVERT_PKL_VERIFY,
    ONE_LAYER,
    ALL_FROM_ARCHIVE,
)
_BLOCK = 1 << 20


def run(workspace: Workspace, log: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of every case, and the sizes of sources and archive."""
    scale, target = workspace.scale, workspace.folder / "converted.h5"
    kept = workspace.folder / "kept.h5"
    convert(workspace.batch_gz, kept, verify=True)
    layer = scale.shape.num_layers // 2
    works: dict[str, Callable[[], object]] = {
        INFLATE: lambda: inflate(workspace.batch_gz),
        READ_PKL: lambda: read_through(workspace.batch_pkl),
        LOAD_GZ: lambda: load_pickle(workspace.batch_gz),
        LOAD_PKL: lambda: load_pickle(workspace.batch_pkl),
        SAFE_LOAD: lambda: h5traces.load(workspace.batch_gz),
        CONVERT_GZ: lambda: convert(workspace.batch_gz, target, verify=False),
        CONVERT_GZ_VERIFY: lambda: convert(workspace.batch_gz, target, verify=True),
        CONVERT_PKL: lambda: convert(workspace.batch_pkl, target, verify=False),
        CONVERT_PKL_VERIFY: lambda: convert(workspace.batch_pkl, target, verify=True),
        ONE_LAYER: lambda: one_layer(kept, layer),
        ALL_FROM_ARCHIVE: lambda: h5traces.load(kept),
    }
    series, last = Series(), None
    for number, name in rounds(scale.convert_rounds, CASES):
        if number != last:
            log(f"  round {number + 1} of {scale.convert_rounds}")
            last = number
        series.add_timing(name, "run", timed(works[name]))
        target.unlink(missing_ok=True)
    return {
        "num_samples": len(workspace.samples),
        "payload_nbytes": payload_nbytes(workspace.samples),
        "largest_sample_nbytes": max(payload_nbytes([each]) for each in workspace.samples),
        "gz_nbytes": workspace.batch_gz.stat().st_size,
        "pkl_nbytes": workspace.batch_pkl.stat().st_size,
        "archive_nbytes": kept.stat().st_size,
        "series": series.values,
    }


def convert(source: Path, target: Path, *, verify: bool) -> None:
    """What the command does."""
    report = h5traces.convert(source, target, target=TargetOptions(verify=verify))
    if not report.ok:
        message = f"the conversion failed: {report.files[0].error}"
        raise RuntimeError(message)


def inflate(path: Path) -> None:
    """Inflate a gzip file and forget the bytes."""
    from isal import igzip

    opened: Any = igzip.open(path, "rb")  # type: ignore[no-untyped-call]
    buffer = bytearray(_BLOCK)
    with opened as file:
        while file.readinto(buffer):
            pass


def read_through(path: Path) -> None:
    """Read a file and forget the bytes."""
    buffer = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def load_pickle(path: Path) -> object:
    """What people do today, for any part of a batch."""
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    with opened as file:
        return pickle.load(file)


def one_layer(path: Path, layer: int) -> object:
    """Hidden states of one layer of all samples."""
    with h5traces.open(path) as archive:
        return archive.read(range(len(archive)), layers=[layer], kinds=["hidden_states"])
