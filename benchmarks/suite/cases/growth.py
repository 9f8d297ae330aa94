"""What stays flat as archives grow, and what does not."""

from __future__ import annotations

import random
import shutil
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from suite.cases.children import call
from suite.formats import GZIP_PICKLE, STOCK, by_name
from suite.formats.base import stored_nbytes
from suite.formats.h5traces_archive import archive_name
from suite.measure import Series, rounds, timed

if TYPE_CHECKING:
    from collections.abc import Callable

    from suite.workspace import Workspace

_LAYERS = 2
FORMATS = (archive_name("gzip", threaded=False), STOCK, GZIP_PICKLE)


def run(workspace: Workspace, log: Callable[[str], None]) -> dict[str, Any]:
    """Opening, random access and memory for every number of samples, by format."""
    scale, folder = workspace.scale, workspace.folder / "growth"
    result: dict[str, Any] = {"num_layers": _LAYERS, "sizes": {}}
    for num_samples in scale.growth:
        log(f"  {num_samples} samples")
        folder.mkdir()
        samples = workspace.tiny_samples(num_samples, _LAYERS)
        stored, memory, writing = {}, {}, {}
        for name in FORMATS:
            each = by_name(name)
            each.prepare()
            path = each.path(folder)
            writing[name] = timed(partial(each.write, samples, path)).wall
            stored[name] = stored_nbytes(path)[0]
            memory[name] = call("open", format=name, path=str(path))
        series = Series()
        chooser = random.Random(0)
        for _, name in rounds(scale.open_rounds, FORMATS):
            each = by_name(name)
            path = each.path(folder)
            series.add_timing(name, "open", timed(partial(each.count, path)))
            num_reads = 1 if "pickle" in name else scale.random_reads
            with each.reader(path) as read:
                read(num_samples - 1, 0)
                start = time.perf_counter()
                for _ in range(num_reads):
                    read(chooser.randrange(num_samples), chooser.randrange(_LAYERS))
                series.add(name, random=(time.perf_counter() - start) / num_reads)
        result["sizes"][str(num_samples)] = {
            "stored": stored,
            "writing": writing,
            "memory": memory,
            "series": series.values,
        }
        shutil.rmtree(folder)
    return result
