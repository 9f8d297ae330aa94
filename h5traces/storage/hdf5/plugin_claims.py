"""What a chunk of a plugin's codec claims, checked before the plugin believes it.

HDF5's plugins allocate what a chunk's header says, read beyond its end where a block's length says
so, and Blosc2 starts a Python that imports a package from the current folder where a chunk names a
codec that is not built in. So everything that steers them is compared here with what the archive
says of the chunk.
"""

from __future__ import annotations

import struct
from typing import Final

_LZ4_HEADER: Final = struct.Struct(">qI")
_BITSHUFFLE_HEADER: Final = struct.Struct(">qI")
_BLOCK_NBYTES: Final = struct.Struct(">I")
# bitshuffle works on blocks of multiples of 8 elements; the rest is stored as it is.
_BITSHUFFLE_ELEMENTS: Final = 8
_BITSHUFFLE_TARGET_NBYTES: Final = 8192
_BITSHUFFLE_MIN_ELEMENTS: Final = 128

# A contiguous frame of Blosc2 (all big-endian): magic, header and frame length, flags, sizes.
_FRAME: Final = struct.Struct(">10sBiBQBBBBBBqBqBiBiBi")
_FRAME_MAGIC: Final = b"\x9e\xa8b2frame\x00"
_FRAME_FILTERS: Final = slice(71, 77)
_FRAME_USER_CODEC: Final = 77
_MOST_HEADER_NBYTES: Final = 4096
# A chunk of Blosc2 (little-endian): versions, flags, typesize, raw, block and stored size, filters,
# codec, its parameter, parameters of filters, more flags.
_CHUNK: Final = struct.Struct("<BBBBiii6sBB6sBB")
_CHUNK_IS_STORED: Final = 0x02
_CHUNK_IS_LAZY: Final = 0x08
_SPECIAL_OFFSET: Final = 1 << 63
_NUM_BUILT_IN_FILTERS: Final = 5
_NUM_BUILT_IN_CODECS: Final = 6


def _require(fits: object, claim: str) -> None:
    if not fits:
        message = f"its header does not fit the chunk: {claim}"
        raise ValueError(message)


def check_lz4(stored: memoryview, raw_nbytes: int) -> None:
    """Refuse a chunk of the LZ4 filter whose sizes are not those of its chunk.

    Raises
    ------
    ValueError
        The header claims another size, or the blocks do not fill the chunk.
    """
    _require(len(stored) >= _LZ4_HEADER.size, f"{len(stored)} bytes")
    claimed, block_nbytes = _LZ4_HEADER.unpack_from(stored)
    _require(claimed == raw_nbytes, f"{claimed} raw bytes, expected {raw_nbytes}")
    _require(block_nbytes > 0, "blocks of 0 bytes")
    num_blocks = -(-raw_nbytes // block_nbytes)
    _check_blocks(stored, _LZ4_HEADER.size, num_blocks, 0)


def check_bitshuffle(stored: memoryview, raw_nbytes: int, itemsize: int) -> None:
    """Refuse a chunk of the bitshuffle filter whose sizes are not those of its chunk.

    Raises
    ------
    ValueError
        The header claims another size, or the blocks do not fill the chunk.
    """
    _require(len(stored) >= _BITSHUFFLE_HEADER.size, f"{len(stored)} bytes")
    claimed, block_nbytes = _BITSHUFFLE_HEADER.unpack_from(stored)
    _require(claimed == raw_nbytes, f"{claimed} raw bytes, expected {raw_nbytes}")
    length, block = raw_nbytes // itemsize, block_nbytes // itemsize
    if not block:
        block = max(_BITSHUFFLE_TARGET_NBYTES // itemsize, _BITSHUFFLE_MIN_ELEMENTS)
    # Rounded as bitshuffle rounds its own default; a block is the size of a buffer.
    _require(block % _BITSHUFFLE_ELEMENTS == 0, f"blocks of {block} elements")
    largest = max(raw_nbytes, _BITSHUFFLE_TARGET_NBYTES, _BITSHUFFLE_MIN_ELEMENTS * itemsize)
    _require(block * itemsize <= largest, f"blocks of {block_nbytes} bytes")
    num_blocks = length // block + (length % block >= _BITSHUFFLE_ELEMENTS)
    rest = length % _BITSHUFFLE_ELEMENTS * itemsize
    _check_blocks(stored, _BITSHUFFLE_HEADER.size, num_blocks, rest)


def _check_blocks(stored: memoryview, position: int, num_blocks: int, rest: int) -> None:
    """Whether so many blocks, each behind its length, and `rest` bytes end where the chunk does."""
    for _ in range(num_blocks):
        _require(position + _BLOCK_NBYTES.size <= len(stored), "more blocks than bytes")
        (nbytes,) = _BLOCK_NBYTES.unpack_from(stored, position)
        position += _BLOCK_NBYTES.size + nbytes
    _require(
        position + rest == len(stored), f"blocks of {position + rest} bytes, found {len(stored)}"
    )


def check_blosc2(stored: memoryview, raw_nbytes: int) -> None:
    """Refuse a frame of the Blosc2 filter that is not one plain chunk of that size.

    Raises
    ------
    ValueError
        The frame is of several chunks or lies elsewhere, claims another size, or asks for a filter
        or codec that is not part of Blosc2 itself.
    """
    _require(len(stored) >= _FRAME.size + _CHUNK.size, f"{len(stored)} bytes")
    found = _FRAME.unpack_from(stored)
    magic, header_nbytes, frame_nbytes = found[0], found[2], found[4]
    frame_type, codec = found[7], found[8]
    raw, compressed, block, chunk = found[11], found[13], found[17], found[19]
    _require(magic == _FRAME_MAGIC and frame_type == 0, "no contiguous frame of Blosc2")
    _require(frame_nbytes == len(stored), f"a frame of {frame_nbytes} bytes, found {len(stored)}")
    _require(raw == chunk == raw_nbytes, f"{raw} and {chunk} raw bytes, expected {raw_nbytes}")
    _require(0 < block <= raw_nbytes, f"blocks of {block} bytes")
    _require(_FRAME_USER_CODEC < header_nbytes <= _MOST_HEADER_NBYTES, "the header's length")
    user_codec = stored[_FRAME_USER_CODEC]
    _require(max(codec & 0x0F, user_codec) < _NUM_BUILT_IN_CODECS, "a codec that is not built in")
    _require_built_in(bytes(stored[_FRAME_FILTERS]))
    offsets_at = header_nbytes + compressed
    _require(0 <= compressed and offsets_at <= len(stored), f"{compressed} stored bytes")
    offset = _only_offset(stored, offsets_at)
    if compressed:
        _require(offset == 0, f"a chunk at {offset}")
        _check_chunk(stored, header_nbytes, raw_nbytes, compressed)
    else:
        # All values are the same, which the offset itself says.
        _require(offset & _SPECIAL_OFFSET, f"a chunk at {offset} of no bytes")


def _only_offset(stored: memoryview, position: int) -> int:
    """Where the only chunk of a frame lies, by the chunk of offsets, which must be a stored one."""
    _check_chunk(stored, position, 8, _CHUNK.size + 8)
    _require(stored[position + 2] & _CHUNK_IS_STORED, "compressed offsets")
    start = position + _CHUNK.size
    return int.from_bytes(stored[start : start + 8], "little")


def _check_chunk(stored: memoryview, position: int, raw_nbytes: int, nbytes: int) -> None:
    _require(position + max(nbytes, _CHUNK.size) <= len(stored), "a chunk beyond its end")
    found = _CHUNK.unpack_from(stored, position)
    flags, raw, block, compressed = found[2], found[4], found[5], found[6]
    filters, codec, more_flags = found[7], found[8], found[12]
    _require(raw == raw_nbytes, f"a chunk of {raw} raw bytes, expected {raw_nbytes}")
    _require(compressed == nbytes, f"a chunk of {compressed} bytes, expected {nbytes}")
    _require(0 < block <= raw_nbytes, f"a chunk with blocks of {block} bytes")
    _require(not more_flags & _CHUNK_IS_LAZY, "a chunk that lies elsewhere")
    _require(
        max(flags >> 5, codec) < _NUM_BUILT_IN_CODECS, "a chunk with a codec that is not built in"
    )
    _require_built_in(filters)


def _require_built_in(filters: bytes) -> None:
    _require(max(filters) < _NUM_BUILT_IN_FILTERS, f"filters {list(filters)} not all built in")
