"""Opening an archive of many samples and counting them."""

from __future__ import annotations

import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

from suite.formats import GZIP_PICKLE, STOCK, by_name
from suite.formats.base import stored_nbytes
from suite.formats.h5traces_archive import archive_name
from suite.measure import Series, rounds, timed
from suite.synthetic import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from suite.formats import Format
    from suite.workspace import Workspace

# The other HDF5 formats have the same structure as the stock one.
_FORMATS = (
    archive_name("gzip", threaded=False),
    STOCK,
    "safetensors",
    "torch.save",
    "numpy.savez_compressed",
    "zarr 3",
    "pickle",
    GZIP_PICKLE,
)


def run(workspace: Workspace, log: Callable[[str], None]) -> dict[str, Any]:
    """Seconds to open and count, by format."""
    scale, folder = workspace.scale, workspace.folder / "opening"
    folder.mkdir()
    samples = workspace.tiny_samples(scale.open_samples, scale.open_layers)
    names = [name for name in _FORMATS if by_name(name).installed]
    stored, making = {}, {}
    for name in names:
        each = by_name(name)
        each.prepare()
        path = each.path(folder)
        log(f"  making {name}")
        write = _many_zarr_groups if name == "zarr 3" else each.write
        making[name] = timed(partial(write, samples, path)).wall
        stored[name] = dict(zip(("nbytes", "num_files"), stored_nbytes(path), strict=True))
    series = Series()
    for _, name in rounds(scale.open_rounds, names):
        each = by_name(name)
        series.add_timing(
            name,
            "open",
            timed(partial(_check_count, each, path=each.path(folder), num_samples=len(samples))),
        )
    shutil.rmtree(folder)
    return {
        "num_samples": len(samples),
        "num_datasets": len(KINDS) * scale.open_layers,
        "stored": stored,
        "making": making,
        "series": series.values,
    }


def _check_count(each: Format, path: Path, num_samples: int) -> None:
    counted = each.count(path)
    if counted != num_samples:
        message = f"{each.name}: counted {counted} samples of {num_samples}"
        raise RuntimeError(message)


def _many_zarr_groups(samples: list[dict[str, Any]], path: Path) -> None:
    """Only the first group has its arrays: counting does not look, and all take minutes to make."""
    by_name("zarr 3").write(samples[:1], path)
    for index in range(1, len(samples)):
        group = path / f"{index:08d}"
        group.mkdir()
        shutil.copy(path / f"{0:08d}" / "zarr.json", group)
