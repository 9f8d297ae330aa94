"""What no format can beat: copying memory, and inflating deflate streams."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from isal import igzip_lib, isal_zlib

from h5traces.format.native import NATIVE
from h5traces.storage.kernels import PLAN, PLAN_CODECS, run_plan
from suite.measure import Series, timed
from suite.synthetic import KINDS

if TYPE_CHECKING:
    from pathlib import Path

COPY, INFLATE_LEGACY, INFLATE_CHUNKS = "memory copy", "inflate .pkl.gz", "inflate own chunks"
INFLATE_ALL_CORES = "inflate own chunks, all cores"


class Limits:
    """Measured in every round beside the formats, so that both see the same machine.

    Parameters
    ----------
    copy_nbytes
        Size of the copied buffer.
    legacy
        A gzipped pickle, as the old pipeline wrote it.
    archive
        An h5traces archive of codec gzip with the same samples.
    """

    def __init__(self, copy_nbytes: int, legacy: Path, archive: Path) -> None:
        self._source = np.ones(copy_nbytes // 8)
        self._target = np.empty_like(self._source)
        np.copyto(self._target, self._source)
        self._legacy = legacy.read_bytes()
        self._legacy_nbytes = len(igzip_lib.decompress(self._legacy, igzip_lib.DECOMP_GZIP))
        self._chunks = _stored_chunks(archive)
        self._raw_nbytes = sum(nbytes for _, nbytes in self._chunks)
        # What the kernels do, but for reading, checksums and fresh memory.
        sizes = np.array([(len(stored), nbytes) for stored, nbytes in self._chunks])
        ends = np.cumsum(sizes, axis=0)
        self._plan = np.zeros(len(sizes), PLAN)
        self._plan["nbytes"], self._plan["raw_nbytes"] = sizes.T
        self._plan["count"], self._plan["itemsize"] = sizes[:, 1], 1
        self._plan["offset"], self._plan["target"] = (ends - sizes).T
        self._plan["codec"] = PLAN_CODECS.index("deflate")
        self._stored = b"".join(stored for stored, _ in self._chunks)
        self._out = np.zeros(self._raw_nbytes, np.uint8)

    def measure(self, series: Series) -> None:
        """Megabytes per second of one core, once."""
        copy = timed(lambda: np.copyto(self._target, self._source))
        series.add(COPY, speed=self._source.nbytes / copy.wall / 1e6)
        legacy = timed(lambda: igzip_lib.decompress(self._legacy, igzip_lib.DECOMP_GZIP))
        series.add(INFLATE_LEGACY, speed=self._legacy_nbytes / legacy.wall / 1e6)
        chunks = timed(self._inflate_chunks)
        series.add(INFLATE_CHUNKS, speed=self._raw_nbytes / chunks.wall / 1e6)
        all_cores = timed(self._inflate_on_all_cores)
        series.add(INFLATE_ALL_CORES, speed=self._raw_nbytes / all_cores.wall / 1e6)

    def _inflate_on_all_cores(self) -> None:
        """With the kernels where they are compiled, else with isal."""
        cores = os.cpu_count() or 1
        if NATIVE is not None:
            run_plan(self._plan, self._stored, self._out.data, threads=cores)
            return
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda chunk: isal_zlib.decompress(chunk[0], 15, chunk[1]), self._chunks))

    def _inflate_chunks(self) -> None:
        for stored, nbytes in self._chunks:
            isal_zlib.decompress(stored, 15, nbytes)


def _stored_chunks(archive: Path) -> list[tuple[bytes, int]]:
    """The stored bytes of all arrays, and their sizes before compression."""
    import h5py

    found: list[tuple[bytes, int]] = []

    def visit(_: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and any(kind in item.name for kind in KINDS):
            chunk_nbytes = int(np.prod(item.chunks)) * item.dtype.itemsize
            for number in range(item.id.get_num_chunks()):
                offset = item.id.get_chunk_info(number).chunk_offset
                found.append((item.id.read_direct_chunk(offset)[1], chunk_nbytes))

    with h5py.File(archive, "r") as file:
        file["samples"].visititems(visit)
    return found
