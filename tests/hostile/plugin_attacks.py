"""Attacks through chunks of codecs that only HDF5's plugins can undo.

The plugins believe what a chunk's header says: they allocate it, read beyond the chunk's end, and
Blosc2 starts a Python for a codec that it does not have.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from attack import Attack, register
from specimen import SAMPLE, edit

from h5traces.rewriting.repack import repack
from h5traces.writing.options import PrecisionOptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import h5py

    Change = Callable[[bytearray], bytearray | None]

ATTACKS: list[Attack] = []
LAYER = f"{SAMPLE}/hidden_states/layer_000"
# Where things lie in a frame of Blosc2 with one chunk: the chunk, and in both the claims.
CHUNK = 97
FRAME_RAW, FRAME_CHUNK, FRAME_STORED, FRAME_TYPE, FRAME_FILTERS = 30, 58, 39, 26, 71
RAW, BLOCK, FLAGS, FILTERS, CODEC, MORE_FLAGS = 4, 8, 2, 16, 22, 31
USER_CODEC, EXTENDED_HEADER = 6 << 5, 5
# blosc2_grok: not part of Blosc2, but known to it by that number
GROK = 37
GiB = 1 << 30


def forged(codec: str, name: str, error: str, change: Change) -> None:
    """An attack by a chunk of that codec, changed."""

    def build(path: Path) -> None:
        forge(path, codec, change)

    register(ATTACKS, error, problem=None, name=f"{codec}-{name}")(build)


def forge(path: Path, codec: str, change: Change) -> None:
    """Rewrite an archive with a codec and change a stored chunk of it."""
    other = path.with_suffix(".repacked")
    repack(path, other, precision=PrecisionOptions(codec=codec))
    other.replace(path)

    def put(file: h5py.File) -> None:
        dataset = file[LAYER].id
        _, stored = dataset.read_direct_chunk((0, 0))
        found = bytearray(stored)
        dataset.write_direct_chunk((0, 0), bytes(change(found) or found))

    edit(path, put)


def number(form: str, *places: int, value: int) -> Change:
    def change(stored: bytearray) -> None:
        for place in places:
            struct.pack_into(form, stored, place, value)

    return change


def together(*changes: Change) -> Change:
    def change(stored: bytearray) -> None:
        for each in changes:
            each(stored)

    return change


def byte(place: int, value: int) -> Change:
    return number("<B", place, value=value)


def user_codec(stored: bytearray) -> None:
    """A codec that Blosc2 would look for with ``python -c 'import blosc2_grok'``."""
    # No longer stored as it is, but compressed: where its block begins, and how long its stream is.
    stored[CHUNK + FLAGS] = USER_CODEC | EXTENDED_HEADER
    stored[CHUNK + CODEC] = GROK
    struct.pack_into("<ii", stored, CHUNK + 32, 36, 20)


for each in ("lz4", "bitshuffle-lz4", "bitshuffle-zstd"):
    forged(each, "claims-a-gib", "raw bytes, expected 96", number(">q", 0, value=GiB))
    forged(each, "claims-negative-size", "raw bytes, expected 96", number(">q", 0, value=-1))
    forged(each, "block-beyond-end", "blocks of", number(">I", 12, value=1 << 20))
    forged(each, "cut-off", "more blocks than bytes|blocks of", lambda stored: stored[:20])
    forged(each, "header-cut-off", "cannot hold|its header", lambda stored: stored[:7])
forged("lz4", "blocks-of-nothing", "blocks of 0 bytes", number(">I", 8, value=0))
forged("bitshuffle-lz4", "blocks-of-a-gib", "blocks of", number(">I", 8, value=GiB))
forged("bitshuffle-zstd", "odd-blocks", "blocks of", number(">I", 8, value=6))
forged(
    "blosc2",
    "claims-two-gib",
    "raw bytes, expected 96",
    together(
        number(">q", FRAME_RAW, value=2 * GiB - 64),
        number(">i", FRAME_CHUNK, value=2 * GiB - 64),
        number("<i", CHUNK + RAW, CHUNK + BLOCK, value=2 * GiB - 64),
    ),
)
forged("blosc2", "chunk-claims-two-gib", "raw bytes", number("<i", CHUNK + RAW, value=2 * GiB - 64))
forged("blosc2", "block-of-half-a-gib", "blocks of", number("<i", CHUNK + BLOCK, value=GiB // 2))
forged("blosc2", "many-chunks", "raw bytes, expected 96", number(">i", FRAME_CHUNK, value=1))
forged("blosc2", "frame-on-disk", "no contiguous frame", byte(FRAME_TYPE, 1))
forged("blosc2", "codec-of-a-package", "codec that is not built in", user_codec)
forged(
    "blosc2",
    "filter-of-a-package",
    "not all built in",
    byte(CHUNK + FILTERS + 5, 160),
)
forged(
    "blosc2",
    "frame-filter-of-a-package",
    "not all built in",
    byte(FRAME_FILTERS, 160),
)
forged(
    "blosc2",
    "lazy-chunk",
    "a chunk that lies elsewhere",
    byte(CHUNK + MORE_FLAGS, 8),
)
forged("blosc2", "no-bytes", "of no bytes|stored bytes|chunk", number(">q", FRAME_STORED, value=0))
forged("blosc2", "negative-bytes", "stored bytes", number(">q", FRAME_STORED, value=-5))
forged("blosc2", "no-frame", "no contiguous frame", lambda stored: bytearray(bytes(len(stored))))
forged("blosc2", "cut-off", "a frame of|bytes", lambda stored: stored[:-30])
