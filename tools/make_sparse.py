#!/usr/bin/env python3
"""Make a sparse archive of any size from one that has a single sample.

    python tools/make_sparse.py one.h5 -o large.h5 --nbytes 100_000_000_000

The index lists the sample again and again, each time at another place, until the file has the
size. Only the first place holds data; the others are holes, so the file takes no more of the disk
than its index. It shows what readers of the index do with very large files;
HDF5 does not open it.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from h5traces.archive.footer_store import FooterStore
from h5traces.format.forms import StoredObject
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import FooterBuilder, hdf5_end

if TYPE_CHECKING:
    from h5traces.format.entries import ObjectEntry


def make_sparse(
    source: Path, target: Path, nbytes: int = 0, *, num_samples: int | None = None
) -> int:
    """Write the archive, of a size or a number of samples; how many samples it claims."""
    shutil.copyfile(source, target)
    store = FooterStore(LocalFile(source), DEFAULT_LIMITS)
    sample, end = store.sample(0), hdf5_end(LocalFile(source))
    first = min(min(each.chunks.offsets) for each in sample.objects.values() if each.chunks)
    count = (nbytes - first) // (end - first) if num_samples is None else num_samples
    with target.open("r+b") as out:
        # The superblock says where the HDF5 part ends.
        out.seek(28)
        out.write((first + count * (end - first)).to_bytes(8, "little"))
        out.truncate(first + count * (end - first))
    builder = FooterBuilder()
    for number in range(count):
        attrs = {**sample.attrs, "sample_id": f"{sample.attrs['sample_id']}_{number}"}
        moved = (_moved(each, number * (end - first)) for each in sample.objects.values())
        builder.add_sample(attrs, [StoredObject.of(each) for each in moved])
    with target.open("ab") as out:
        root = {**store.root_attrs, "num_samples": count}
        for block in builder.finish(LocalFile(target), root, store.kinds):
            out.write(block)
    return count


def _moved(entry: ObjectEntry, shift: int) -> ObjectEntry:
    if entry.chunks is None:
        return entry
    offsets = tuple(each + shift for each in entry.chunks.offsets)
    return replace(entry, chunks=replace(entry.chunks, offsets=offsets))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="an archive of one sample")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--nbytes", type=int, default=100_000_000_000)
    options = parser.parse_args()
    count = make_sparse(options.source, options.output, options.nbytes)
    print(f"{options.output}: {count:,} samples, {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
