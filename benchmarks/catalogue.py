"""What a catalogue of 100,000 shards costs: opening it, its memory, and a look-up.

    python benchmarks/catalogue.py [--shards N] [--samples N]

A few shards are real; the others are rows of a catalogue, since opening touches none.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

import h5traces
from h5traces.archive.catalogue import id_hash
from h5traces.rewriting.cataloguing import _Before, _Reader, _Written
from h5traces.storage.publish import PartFile
from h5traces.storage.remote.paths import DEFAULT_REMOTE

_REAL = 10


def make(folder: Path, num_shards: int, num_samples: int) -> None:
    """Real shards, and a catalogue that lists many more."""
    states = [np.zeros((8, 16), np.float16)] * 4
    for number in range(_REAL):
        with h5traces.create(folder / f"{number:06d}.h5", model_id="model", spool=False) as run:
            for each in range(num_samples):
                run.append({"hidden_states": states, "question_id": f"real_{number}_{each}"})
    before = _Before((), texts=False)
    reader = _Reader(folder, before, DEFAULT_REMOTE, texts=False, check=False)
    real = [reader.read(folder / f"{number:06d}.h5") for number in range(_REAL)]
    started = time.perf_counter()
    with PartFile(folder / "catalogue.parquet") as part:
        written = _Written(part, texts=False)
        for number in range(num_shards):
            # The real ones are spread over the catalogue.
            kind, rest = divmod(number, num_shards // _REAL)
            shard = real[min(kind, _REAL - 1)]
            if rest:
                names = [f"question_{number}_{each}" for each in range(num_samples)]
                table = shard.table.set_column(
                    shard.table.column_names.index("sample_id"),
                    "sample_id",
                    pa.array(names, pa.large_string()),
                )
                hashes = pa.array([id_hash(each) for each in names], pa.uint64())
                place = table.column_names.index("id_hash")
                row = {
                    **shard.row,
                    "path": f"rank/{number:06d}.h5",
                    "archive_id": str(uuid.uuid4()),
                }
                shard = replace(shard, row=row, table=table.set_column(place, "id_hash", hashes))
            written.add(shard)
        written.finish(None)
        part.publish()
    size = (folder / "catalogue.parquet").stat().st_size / 1e6
    print(f"written in {time.perf_counter() - started:.1f} s, {size:.1f} MB")


def peak_kbytes() -> int:
    """Most memory that this process had."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def look(catalogue: str) -> None:
    """Print what opening and finding take in this process."""
    import h5traces.archive.catalogue

    loaded = peak_kbytes()
    started = time.perf_counter()
    archive = h5traces.open(catalogue)
    opened = time.perf_counter()
    print(f"{len(archive):,} samples in {len(archive._files):,} shards")
    print(f"open: {opened - started:.3f} s")
    first = archive.by_id("real_7_0")
    found = time.perf_counter()
    print(f"first look-up by id, and its trace: {found - opened:.3f} s")
    for number in range(1000):
        archive.by_id(f"real_{number % _REAL}_{number % 3}")
    print(f"further look-ups: {time.perf_counter() - found:.3f} ms each")
    assert len(first["hidden_states"]) == 4
    print(f"memory: {(peak_kbytes() - loaded) >> 10} MB beyond the {loaded >> 10} MB of imports")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--look", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.look:
        look(chosen.look)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            make(Path(scratch), chosen.shards, chosen.samples)
            command = [sys.executable, __file__, "--look", f"{scratch}/catalogue.parquet"]
            subprocess.run(command, check=True)
