"""What no format can beat: copying memory, and inflating deflate streams on one core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from isal import igzip_lib, isal_zlib

from suite.measure import Series, timed
from suite.synthetic import KINDS

if TYPE_CHECKING:
    from pathlib import Path

COPY, INFLATE_LEGACY, INFLATE_CHUNKS = "memory copy", "inflate .pkl.gz", "inflate own chunks"


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

    def measure(self, series: Series) -> None:
        """Megabytes per second of one core, once."""
        copy = timed(lambda: np.copyto(self._target, self._source))
        series.add(COPY, speed=self._source.nbytes / copy.wall / 1e6)
        legacy = timed(lambda: igzip_lib.decompress(self._legacy, igzip_lib.DECOMP_GZIP))
        series.add(INFLATE_LEGACY, speed=self._legacy_nbytes / legacy.wall / 1e6)
        chunks = timed(self._inflate_chunks)
        series.add(INFLATE_CHUNKS, speed=self._raw_nbytes / chunks.wall / 1e6)

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
