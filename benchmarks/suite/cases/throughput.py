"""Writing, reading and random access of whole batches, format by format."""

from __future__ import annotations

import gc
import random
import shutil
import time
from typing import TYPE_CHECKING, Any

import h5traces
from suite.cases.limits import Limits
from suite.formats import GZIP_PICKLE, all_formats
from suite.formats.base import stored_nbytes
from suite.formats.h5traces_archive import archive_name
from suite.measure import Series, rounds, timed
from suite.synthetic import KINDS, byte_statistics
from suite.workspace import payload_nbytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from suite.formats import Format


def run(
    samples: list[dict[str, Any]],
    folder: Path,
    *,
    num_rounds: int,
    num_random: int,
    copy_nbytes: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """All installed formats, round by round; each must first give back what it was given."""
    folder.mkdir(parents=True)
    formats = {name: each for name, each in all_formats().items() if each.installed}
    pairs = _random_pairs(samples, num_random)
    series = Series()
    for each in formats.values():
        each.prepare()
        # Untimed: makes the files, warms up, and proves that the format keeps every bit.
        if not each.written_by:
            each.write(samples, each.path(folder))
        wrong = each.wrong_layers(samples, each.path(folder))
        if wrong:
            message = f"{each.name}: {wrong} arrays did not come back as they were written"
            raise RuntimeError(message)
    # What imports have made need not be looked through before every measurement.
    gc.collect()
    gc.freeze()
    limits = Limits(
        copy_nbytes,
        formats[GZIP_PICKLE].path(folder),
        formats[archive_name("gzip", threaded=False)].path(folder),
    )
    last = None
    for number, name in rounds(num_rounds, list(formats)):
        if number != last:
            log(f"  round {number + 1} of {num_rounds}")
            limits.measure(series)
            last = number
        _measure(formats[name], samples, folder, pairs, series)
    result = _sizes(samples)
    result["stored"] = {
        name: dict(zip(("nbytes", "num_files"), stored_nbytes(each.path(folder)), strict=True))
        for name, each in formats.items()
        if not each.written_by
    }
    result["kinds"] = _stored_by_kind(
        {each.name: each.path(folder) for each in formats.values() if "h5traces" in each.modules}
    )
    result["series"] = series.values
    shutil.rmtree(folder)
    return result


def _measure(
    each: Format,
    samples: list[dict[str, Any]],
    folder: Path,
    pairs: list[tuple[int, int]],
    series: Series,
) -> None:
    path = each.path(folder)
    if not each.written_by:
        _delete(path)
        series.add_timing(each.name, "write", timed(lambda: each.write(samples, path)))
    series.add_timing(each.name, "scan", timed(lambda: each.scan(path)))
    # Where a single layer means loading everything, one such access takes long enough.
    chosen = pairs[:1] if "pickle" in each.name else pairs
    with each.reader(path) as read:
        read(*pairs[-1])
        start = time.perf_counter()
        for index, layer in chosen:
            read(index, layer)
        series.add(each.name, random=(time.perf_counter() - start) / len(chosen))


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _random_pairs(samples: list[dict[str, Any]], number: int) -> list[tuple[int, int]]:
    chooser = random.Random(0)
    layers = len(samples[0][KINDS[0]])
    return [(chooser.randrange(len(samples)), chooser.randrange(layers)) for _ in range(number)]


def _sizes(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Sizes before compression, and entropies."""
    found: dict[str, Any] = {
        "num_samples": len(samples),
        "payload_nbytes": payload_nbytes(samples),
        "num_values": payload_nbytes(samples) // 2,
        "mean_tokens": sum(len(sample["tokens"]) for sample in samples) / len(samples),
        "floor": {},
        "kind_values": {},
    }
    for kind in KINDS:
        arrays = [array for sample in samples for array in sample[kind]]
        found["floor"][kind] = byte_statistics(arrays, with_gzip=False).floor
        found["kind_values"][kind] = sum(array.size for array in arrays)
    return found


def _stored_by_kind(paths: dict[str, Path]) -> dict[str, dict[str, int]]:
    """Stored bytes of hidden states and of attentions in h5traces archives."""
    found = {}
    for name, path in paths.items():
        with h5traces.open(path) as archive:
            sizes = archive._files[0].sizes()
            found[name] = {kind: sizes[kind].stored_nbytes for kind in KINDS}
    return found
