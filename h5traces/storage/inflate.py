"""Inflates zlib streams whose size is known, in small steps into memory that was used before.

The libraries return new bytes for every call. For a whole chunk that is fresh memory from the
system each time; steps of some 50 kB come from memory just freed and are still in the cache when
they are copied. Stored blocks, such as those of a noise plane, are copied without any library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from h5traces.storage.engines import Engines
    from h5traces.storage.planes import Bytes

_HEADER_NBYTES: Final = 2
_CHECKSUM_NBYTES: Final = 4
_STORED_HEADER_NBYTES: Final = 5
# Stored bytes that are handed to the library at a time.
_STEP: Final = 32 << 10


def inflate(stored: Bytes, out: Bytes, engines: Engines) -> None:
    """Fill `out` with what the stream holds, no more and no less.

    No more than ``len(out) + 1`` bytes are ever inflated.

    Parameters
    ----------
    stored
        A zlib stream (RFC 1950) and nothing behind it.
    out
        Writable bytes; after an error they hold something undefined.
    engines
        The libraries to use.

    Raises
    ------
    ValueError
        The stream is damaged, cut off, followed by other bytes, or not of the size of `out`.
    """
    if stored.size < _HEADER_NBYTES or not _is_header(*stored[:_HEADER_NBYTES].tolist()):
        msg = "the stored bytes are no intact zlib stream: they begin with no header of one"
        raise ValueError(msg)
    position, filled = _copy_stored_blocks(stored, out)
    try:
        end = _inflate_blocks(stored, position, out, filled, engines)
    except _DamagedError as error:
        # Other writers' later blocks may refer back into the stored ones.
        if not filled:
            raise ValueError(str(error)) from error
        try:
            end = _inflate_blocks(stored, _HEADER_NBYTES, out, 0, engines)
        except _DamagedError as error_of_whole:
            raise ValueError(str(error_of_whole)) from error
    _check_end(stored, end, out, engines)


class _DamagedError(Exception):
    """Blocks are damaged, or refer back to what came before them."""


def _is_header(method: int, flags: int) -> bool:
    """RFC 1950, 2.2: deflate with a window of up to 32 KiB, a check sum, and no dictionary."""
    is_deflate = method & 0x0F == 8 and method >> 4 <= 7
    return is_deflate and (256 * method + flags) % 31 == 0 and not flags & 0x20


def _copy_stored_blocks(stored: Bytes, out: Bytes) -> tuple[int, int]:
    """Copy the stored blocks that the stream begins with, except a final one.

    Returns
    -------
    tuple
        Bytes read of the stream and bytes written.
    """
    position, filled = _HEADER_NBYTES, 0
    while True:
        header = stored[position : position + _STORED_HEADER_NBYTES].tolist()
        # RFC 1951, 3.2.4: three bits for "not final, stored", the length and its complement.
        if len(header) < _STORED_HEADER_NBYTES or header[0] & 7:
            return position, filled
        length = header[1] | header[2] << 8
        start = position + _STORED_HEADER_NBYTES
        is_whole = length ^ 0xFFFF == header[3] | header[4] << 8 and start + length <= stored.size
        if not is_whole or filled + length > out.size:
            return position, filled
        out[filled : filled + length] = stored[start : start + length]
        position, filled = start + length, filled + length


def _inflate_blocks(stored: Bytes, position: int, out: Bytes, filled: int, engines: Engines) -> int:
    """Inflate from `position` on to behind `filled`; where the last block ends."""
    inflater = engines.inflater((stored.size - position) / max(out.size - filled, 1))
    while not inflater.eof:
        if position >= stored.size:
            msg = f"the zlib stream is cut off after {filled} of {out.size} bytes"
            raise _DamagedError(msg)
        step = stored[position : position + _STEP]
        try:
            data = inflater.decompress(step, out.size - filled + 1)
        except engines.errors as error:
            msg = f"the stored bytes are no intact zlib stream: {error}"
            raise _DamagedError(msg) from error
        if filled + len(data) > out.size:
            msg = f"the zlib stream holds more than the expected {out.size} bytes"
            raise _DamagedError(msg)
        out[filled : filled + len(data)] = np.frombuffer(data, np.uint8)
        position, filled = position + step.size, filled + len(data)
    if filled < out.size:
        msg = f"the zlib stream holds {filled} bytes, expected {out.size}"
        raise _DamagedError(msg)
    return position - len(inflater.unused_data)


def _check_end(stored: Bytes, end: int, out: Bytes, engines: Engines) -> None:
    checksum = stored[end : end + _CHECKSUM_NBYTES].tobytes()
    if len(checksum) < _CHECKSUM_NBYTES:
        msg = f"the zlib stream is cut off after {out.size} of {out.size} bytes"
        raise ValueError(msg)
    if int.from_bytes(checksum, "big") != engines.adler32(out):
        msg = "the stored bytes are no intact zlib stream: its checksum does not fit"
        raise ValueError(msg)
    stray = stored.size - end - _CHECKSUM_NBYTES
    if stray:
        msg = f"{stray} stray bytes follow the zlib stream"
        raise ValueError(msg)
