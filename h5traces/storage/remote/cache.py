"""A folder that keeps what was fetched of remote archives.

Every version of every object has a folder of its own, named by a digest of its address, size,
version and last bytes, so that an object that was replaced is never mixed with its successor. In
it, ``data`` is a sparse file with the fetched ranges in their places, and ``ranges`` a log of them:
offset, length and checksum, a line each. A range is logged after it was written; one whose checksum
does not fit, because a process was killed or the disk was damaged, is fetched again.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import xxhash

from h5traces.storage.remote.ranges import ByteRange

if TYPE_CHECKING:
    from pathlib import Path

    from h5traces.storage.remote.paths import RemotePath
    from h5traces.storage.remote.transport import Reply

_DATA = "data"
_LOG = "ranges"


class RangeCache:
    """The kept ranges of one version of one object. Safe for threads and processes.

    Parameters
    ----------
    folder
        The folder for all objects; made where it is missing.
    path
        Address of the object.
    tail
        Its last bytes, and what the server said of it.

    Raises
    ------
    OSError
        The folder cannot be made or written.
    """

    def __init__(self, folder: Path, path: RemotePath, tail: Reply) -> None:
        self._folder = folder / _key(path, tail)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._ranges: dict[ByteRange, str] = {}
        with contextlib.suppress(FileNotFoundError):
            self._read_log()

    def _read_log(self) -> None:
        for line in (self._folder / _LOG).read_text(encoding="ascii", errors="replace").split("\n"):
            parts = line.split(" ")
            # The last line may be torn.
            if len(parts) == 3 and parts[0].isdecimal() and parts[1].isdecimal():
                self._ranges[ByteRange(int(parts[0]), int(parts[1]))] = parts[2]

    def find(self, wanted: ByteRange) -> bytes | None:
        """The bytes of a range that was kept as a whole, else None."""
        checksum = self._ranges.get(wanted)
        if checksum is None:
            return None
        with contextlib.suppress(OSError):
            descriptor = os.open(self._folder / _DATA, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.pread(descriptor, wanted.nbytes, wanted.offset)
            finally:
                os.close(descriptor)
            if xxhash.xxh3_64_hexdigest(data) == checksum:
                return data
        return None

    def keep(self, pieces: dict[ByteRange, bytes]) -> None:
        """Keep ranges; a full disk raises OSError."""
        flags = os.O_CREAT | os.O_CLOEXEC
        data_file = os.open(self._folder / _DATA, os.O_WRONLY | flags, 0o666)
        try:
            for wanted, data in pieces.items():
                written = 0
                while written < len(data):
                    written += os.pwrite(data_file, data[written:], wanted.offset + written)
        finally:
            os.close(data_file)
        added = {wanted: xxhash.xxh3_64_hexdigest(data) for wanted, data in pieces.items()}
        lines = "".join(f"{each.offset} {each.nbytes} {added[each]}\n" for each in added)
        log = os.open(self._folder / _LOG, os.O_WRONLY | os.O_APPEND | flags, 0o666)
        try:
            # A newline in front, in case that the line before is torn.
            os.write(log, f"\n{lines}".encode("ascii"))
        finally:
            os.close(log)
        self._ranges.update(added)


def _key(path: RemotePath, tail: Reply) -> str:
    facts = "\0".join((path.url.partition("?")[0], str(tail.total_nbytes), tail.version or ""))
    digest = xxhash.xxh3_128(facts.encode("utf-8", "surrogatepass"))
    digest.update(tail.data)
    return digest.hexdigest()
