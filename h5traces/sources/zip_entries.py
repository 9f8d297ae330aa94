"""The entries of a zip file, as torch.save and numpy.savez write them, within limits.

Nothing is unpacked: names are keys only and never become paths, and the bytes of stored entries are
read where they lie.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

import numpy as np

from h5traces.errors import ConversionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from h5traces.sources.mapped import MappedFile

_crc32: Callable[..., int] = zlib.crc32
_inflater: Callable[[int], Any] = zlib.decompressobj
_INFLATE_ERRORS: tuple[type[Exception], ...] = (zlib.error,)
try:
    # Several times as fast as zlib; has wheels for x86-64 and arm64 only.
    from isal import isal_zlib
except ImportError:  # pragma: no cover - depends on the machine
    pass
else:
    _crc32, _inflater = isal_zlib.crc32, isal_zlib.decompressobj
    _INFLATE_ERRORS = (zlib.error, cast("type[Exception]", isal_zlib.error))

STORED: Final = 0
DEFLATED: Final = 8
MAGIC: Final = b"PK\x03\x04"

_MAX_DIRECTORY_NBYTES: Final = 64 << 20
_MAX_ENTRIES: Final = 1_000_000
# Of content at a time.
_CRC_NBYTES: Final = 4 << 20
_MAX_COMMENT_NBYTES: Final = 1 << 16
# End of the directory, its 64-bit form and that one's locator, an entry, a local header; APPNOTE
# 6.3.10, sections 4.3.6 to 4.3.16.
_END: Final = struct.Struct("<4s4H2IH")
_END64: Final = struct.Struct("<4sQ2H2I4Q")
_LOCATOR: Final = struct.Struct("<4sIQI")
_ENTRY: Final = struct.Struct("<4s6H3I5H2I")
_LOCAL: Final = struct.Struct("<4s5H3I2H")
_ENCRYPTED: Final = 1
_UTF8: Final = 1 << 11
_IN_EXTRA: Final = 0xFFFFFFFF
_ZIP64_EXTRA: Final = 1


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One entry.

    Attributes
    ----------
    name
        As it stands in the directory.
    method
        `STORED` or `DEFLATED`; other numbers are passed on.
    nbytes, stored_nbytes
        Size of the content, and of its bytes in the file.
    crc
        CRC-32 of the content.
    start
        Where its bytes begin in the file.
    """

    name: str
    method: int
    nbytes: int
    stored_nbytes: int
    crc: int
    start: int


class ZipDirectory:
    """The directory of a zip file: names, and where each entry lies.

    It keeps the directory as bytes and parses entries when they are asked for: a file of
    torch.save has one entry per tensor.

    Parameters
    ----------
    read_at
        Gives bytes of the file: takes offset and number.
    nbytes
        Size of the file.
    name
        Of the file, for messages.

    Raises
    ------
    ConversionError
        The file is not a zip file, is cut off, or asks for more than a reader should give.
    """

    def __init__(self, read_at: Callable[[int, int], bytes], nbytes: int, name: str) -> None:
        self._read_at = read_at
        self._file = name
        self.nbytes = nbytes
        self._start, data, count = self._read()
        self._data = data
        self._places = self._parse(count)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def entry(self, name: str) -> ZipEntry:
        """The entry with that name; KeyError if there is none."""
        place = self._places[name]
        (_, _, _, flags, method, _, _, crc, stored, size, name_nbytes, extra_nbytes, *_, offset) = (
            _ENTRY.unpack_from(self._data, place)
        )
        extra_at = place + _ENTRY.size + name_nbytes
        extra = self._data[extra_at : extra_at + extra_nbytes]
        size, stored, offset = self._wide(name, (size, stored, offset), extra)
        if flags & _ENCRYPTED:
            self._fail(f"entry {name[:80]!r} is encrypted; save it again without a password")
        start = self._content(name, offset)
        if start + stored > self._start or (method == STORED and stored != size):
            self._fail(f"entry {name[:80]!r} does not lie within the file")
        return ZipEntry(name, method, size, stored, crc, start)

    def _fail(self, message: str) -> NoReturn:
        message = f"{self._file}: {message}"
        raise ConversionError(message)

    def _at(self, offset: int, nbytes: int) -> bytes:
        data = self._read_at(offset, nbytes) if 0 <= offset < self.nbytes else b""
        if len(data) != nbytes:
            self._fail("the directory of the zip file points outside of the file")
        return data

    def _read(self) -> tuple[int, bytes, int]:
        """Where the directory begins, its bytes, and its number of entries."""
        tail_nbytes = min(self.nbytes, _END.size + _LOCATOR.size + _MAX_COMMENT_NBYTES)
        tail = self._read_at(self.nbytes - tail_nbytes, tail_nbytes)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) - at < _END.size:
            self._fail(
                "begins as a zip file (torch.save and numpy.savez write such) and has no directory "
                "at its end, so it is not complete; copy it again or wait for its writer"
            )
        _, disk, first_disk, _, count, nbytes, start, _ = _END.unpack_from(tail, at)
        locator_at = at - _LOCATOR.size
        if locator_at >= 0 and tail[locator_at : locator_at + 4] == b"PK\x06\x07":
            _, _, end64_at, _ = _LOCATOR.unpack_from(tail, locator_at)
            end64 = _END64.unpack(self._at(end64_at, _END64.size))
            if end64[0] != b"PK\x06\x06":
                self._fail("the directory of the zip file has no valid end")
            disk, first_disk, count, nbytes, start = end64[4], end64[5], *end64[7:]
        if disk or first_disk:
            self._fail("is one part of a zip file in several parts; put them together first")
        if nbytes > _MAX_DIRECTORY_NBYTES or count > _MAX_ENTRIES:
            self._fail(
                f"the zip file has {count:,} entries in a directory of {nbytes:,} bytes, at most "
                f"{_MAX_ENTRIES:,} in {_MAX_DIRECTORY_NBYTES:,} are read; save it in several files"
            )
        return start, self._at(start, nbytes) if nbytes else b"", count

    def _parse(self, count: int) -> dict[str, int]:
        places: dict[str, int] = {}
        data, place = self._data, 0
        for _ in range(count):
            if data[place : place + 4] != b"PK\x01\x02" or len(data) - place < _ENTRY.size:
                self._fail(f"the directory of the zip file ends after {len(places):,} entries")
            fields = _ENTRY.unpack_from(data, place)
            flags, (name_nbytes, extra_nbytes, comment_nbytes) = fields[3], fields[10:13]
            raw = data[place + _ENTRY.size : place + _ENTRY.size + name_nbytes]
            name = raw.decode("utf-8" if flags & _UTF8 else "cp437", "replace")
            if name in places:
                self._fail(f"the zip file has two entries {name[:80]!r}")
            places[name] = place
            place += _ENTRY.size + name_nbytes + extra_nbytes + comment_nbytes
        return places

    def _wide(self, name: str, values: tuple[int, int, int], extra: bytes) -> list[int]:
        """Size, stored size and offset, those of 64 bits out of the extra field."""
        if _IN_EXTRA not in values:
            return list(values)
        at = 0
        while at + 4 <= len(extra):
            kind, nbytes = struct.unpack_from("<2H", extra, at)
            body = extra[at + 4 : at + 4 + nbytes]
            if kind == _ZIP64_EXTRA:
                wide = iter(struct.unpack_from(f"<{len(body) // 8}Q", body))
                return [next(wide, each) if each == _IN_EXTRA else each for each in values]
            at += 4 + nbytes
        self._fail(f"entry {name[:80]!r} does not say how large it is")

    def _content(self, name: str, offset: int) -> int:
        """Where the bytes of an entry begin: after its local header."""
        header = _LOCAL.unpack(self._at(offset, _LOCAL.size))
        if header[0] != MAGIC:
            self._fail(f"entry {name[:80]!r} is not where the directory says")
        return int(offset + _LOCAL.size + header[9] + header[10])


def entry_content(
    file: MappedFile,
    entry: ZipEntry,
    name: str,
    *,
    max_expansion: int = 300,
    grace_nbytes: int = 64 << 20,
    check: bool = True,
) -> NDArray[np.uint8]:
    """The content of an entry: a view of the file where it is stored as it is.

    Parameters
    ----------
    file
        The zip file.
    entry
        One of its entries.
    name
        Of the file, for messages.
    max_expansion, grace_nbytes
        How many times a deflated entry may expand, or to how many bytes.
    check
        Compare the content with its checksum.

    Raises
    ------
    ConversionError
        The content does not fit its entry, or expands more.
    """
    where = f"{name}: entry {entry.name[:80]!r}"
    if entry.method not in (STORED, DEFLATED):
        message = f"{where} is compressed by method {entry.method}, expected none or deflate; "
        message += "save the file again"
        raise ConversionError(message)
    if entry.method == DEFLATED:
        if entry.nbytes > max(grace_nbytes, max_expansion * entry.stored_nbytes):
            message = (
                f"{where} expands from {entry.stored_nbytes:,} to {entry.nbytes:,} bytes, more "
                f"than {max_expansion} times; save the file again without compression"
            )
            raise ConversionError(message)
        content = _inflated(file.view(entry.start, entry.stored_nbytes), entry, where)
        crc = _crc32(content.data)
    else:
        # Writers may leave the checksum out: torch.serialization.set_crc32_options(False).
        crc = _crc_in_file(file, entry) if check and entry.crc else entry.crc
        content = file.view(entry.start, entry.nbytes)
    if crc != entry.crc:
        message = (
            f"{where} does not fit its checksum; copy the file again from where it was written"
        )
        raise ConversionError(message)
    return content


def _inflated(stored: NDArray[np.uint8], entry: ZipEntry, where: str) -> NDArray[np.uint8]:
    try:
        content = _inflater(-zlib.MAX_WBITS).decompress(stored.data, entry.nbytes + 1)
    except _INFLATE_ERRORS as error:
        message = f"{where} cannot be inflated: {error}"
        raise ConversionError(message) from error
    if len(content) != entry.nbytes:
        message = f"{where} does not hold the {entry.nbytes:,} bytes that the directory says"
        raise ConversionError(message)
    return np.frombuffer(content, np.uint8)


def _crc_in_file(file: MappedFile, entry: ZipEntry) -> int:
    crc = 0
    for start in range(0, entry.nbytes, _CRC_NBYTES):
        nbytes = min(_CRC_NBYTES, entry.nbytes - start)
        crc = _crc32(file.view(entry.start + start, nbytes).data, crc)
        file.release()
    return crc
