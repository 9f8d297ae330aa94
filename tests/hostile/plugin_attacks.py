"""Attacks through filters that only HDF5's plugins can run, and through frames of Zstandard.

Plugins believe what a chunk's header says: they allocate it, read beyond the chunk's end, and
Blosc2 starts a Python for a codec that it does not have. So no archive may name them.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import h5py
import hdf5plugin
import zstandard
from attack import Attack, register
from h5py import h5p, h5t
from hdf5_attacks import LAYER, low_level
from specimen import edit

from h5traces.rewriting.repack import repack
from h5traces.writing.options import PrecisionOptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Change = Callable[[bytearray], bytearray | bytes | None]

ATTACKS: list[Attack] = []
BLOSC2 = 32026
# Filters and their client data, as hdf5plugin sets them.
FILTERS = {
    "lz4": (32004, (0,)),
    "blosc2": (BLOSC2, (0, 0, 0, 0, 3, 1, 5)),
    "bitshuffle-lz4": (32008, (0, 2)),
    "bitshuffle-zstd": (32008, (0, 3, 3)),
}
# Where a frame of Blosc2 has its chunk, and a chunk its flags and its codec.
CHUNK, FLAGS, CODEC = 97, 2, 22
USER_CODEC, EXTENDED_HEADER = 6 << 5, 5
# blosc2_grok: not part of Blosc2, but known to it by that number
GROK = 37
RAW_NBYTES = 96


def put_chunk(path: Path, codec: str, change: Change | None = None) -> None:
    """Store a layer behind a plugin's filter, its chunk changed."""
    number, parameters = FILTERS[codec]
    assert hdf5plugin.get_filters(number)
    options = h5p.create(h5p.DATASET_CREATE)
    options.set_filter(number, 0, parameters)

    def put(file: h5py.File) -> None:
        values = file[LAYER][:]
        with h5py.File(io.BytesIO(), "w") as scratch:
            flat = options.copy()
            flat.set_chunk((values.size,))
            made = low_level(scratch, "flat", h5t.IEEE_F16LE, (values.size,), flat)
            made.write(h5py.h5s.ALL, h5py.h5s.ALL, values.ravel())
            made.flush()
            _, stored = made.read_direct_chunk((0,))
        options.set_chunk(values.shape)
        found = bytearray(stored)
        made = low_level(file, LAYER, h5t.IEEE_F16LE, values.shape, options)
        made.write_direct_chunk((0, 0), bytes((change and change(found)) or found))

    edit(path, put)


def user_codec(stored: bytearray) -> None:
    """A codec that Blosc2 would look for with ``python -c 'import blosc2_grok'``."""
    # No longer stored as it is, but compressed: where its block begins, and how long its stream is.
    stored[CHUNK + FLAGS] = USER_CODEC | EXTENDED_HEADER
    stored[CHUNK + CODEC] = GROK
    struct.pack_into("<ii", stored, CHUNK + 32, 36, 20)


def foreign(name: str, codec: str, change: Change | None = None) -> None:
    def build(path: Path) -> None:
        put_chunk(path, codec, change)

    number, _ = FILTERS[codec]
    error = rf"the filters \[{number}\] are none that archives use"
    register(ATTACKS, error, name=name)(build)


for each in FILTERS:
    foreign(f"{each}-filter", each)
foreign("blosc2-codec-of-a-package", "blosc2", user_codec)


def frame(name: str, error: str, change: Change) -> None:
    """An attack by a frame of Zstandard in place of a layer's."""

    def build(path: Path) -> None:
        other = path.with_suffix(".repacked.h5")
        repack(path, other, precision=PrecisionOptions(codec="zstd"))
        other.replace(path)

        def put(file: h5py.File) -> None:
            dataset = file[LAYER].id
            _, stored = dataset.read_direct_chunk((0, 0))
            dataset.write_direct_chunk((0, 0), bytes(change(bytearray(stored)) or b""))

        edit(path, put)

    register(ATTACKS, error, problem=None, name=f"zstd-{name}")(build)


def of_size(nbytes: int) -> bytes:
    return zstandard.ZstdCompressor().compress(bytes(nbytes))


def without_size(_: bytearray) -> bytes:
    stream = zstandard.ZstdCompressor(write_content_size=False)
    return stream.compress(bytes(RAW_NBYTES))


frame("claims-a-mib", "claims 1048576 bytes, expected 96", lambda _: of_size(1 << 20))
frame("claims-less", "claims 95 bytes, expected 96", lambda _: of_size(RAW_NBYTES - 1))
frame("claims-nothing", "expected 96", without_size)
frame("cut-off", "not an intact Zstandard frame|claims", lambda stored: stored[:-9])
frame("followed-by-more", "not an intact Zstandard frame", lambda stored: stored + bytes(9))
frame("no-frame", "not an intact Zstandard frame|expected 96", lambda stored: bytes(len(stored)))
