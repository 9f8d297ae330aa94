"""What a coverage-guided fuzzer calls: the unpickler, the chunk decoders, and `open`.

Each target takes any bytes, and raises only where something is wrong with h5traces: an exception
that is not of ours, other values than a stock library gives, an import that the data asked for.
`SEEDS` gives the inputs that a run starts from.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import struct
import sys
import tempfile
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import probe
import specimen
import test_pickles
import zstandard
from legacy_batches import LAYOUTS, dumps, make_batch

from h5traces.errors import ConversionError, H5TracesError
from h5traces.sources.pickle.source import PickleLimits
from h5traces.sources.pickle.stream import BatchStream
from h5traces.storage.codecs import CODECS
from h5traces.storage.footer import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LARGEST_SEED = 8192
_LENGTH = struct.Struct("<I")
_CHUNK_HEAD = struct.Struct("<BBH")
_ITEMSIZES = (1, 2, 4, 8)
_NAMES = tuple(CODECS)
# A fuzzer's inputs are short; what is made of them should be, too.
_LIMITS = PickleLimits(max_created_nbytes=1 << 20, max_item_opcodes=20_000)


class FindingError(Exception):
    """A target did what it must not."""


@cache
def _folder() -> Path:
    # In memory where that is possible; a file for every input.
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return Path(tempfile.mkdtemp(dir=where))


# --- the unpickler ---------------------------------------------------------------------------


def unpickle(data: bytes) -> None:
    """Read a batch; nothing may be imported for it."""
    path = _folder() / "batch.pkl"
    path.write_bytes(data)
    # Protocol 0 is written in this encoding, which Python imports when it is first used.
    codecs.lookup("raw_unicode_escape")
    before = set(sys.modules)
    with contextlib.suppress(ConversionError):
        read_batch(path)
    if more := set(sys.modules) - before:
        message = f"the pickle had {sorted(more)} imported"
        raise FindingError(message)


def read_batch(path: Path) -> None:
    """Every item of a batch."""
    with BatchStream(path, limits=_LIMITS) as batch:
        for _ in batch:
            pass


def pickles() -> Iterator[bytes]:
    """Honest batches of all layouts and protocols, and the attacks that are short."""
    for layout in LAYOUTS:
        batch = make_batch(layout, num_samples=1)
        for protocol in range(6):
            yield dumps(batch, protocol)
        yield dumps(batch, numpy1=True)
    for build, _ in test_pickles.ATTACKS.values():
        yield build()


# --- chunks ----------------------------------------------------------------------------------


def decode_chunk(data: bytes) -> None:
    """Undo a codec: first its number, the size and number of elements, then the stored bytes."""
    if len(data) < _CHUNK_HEAD.size:
        return
    number, width, count = _CHUNK_HEAD.unpack_from(data)
    codec, itemsize = CODECS[_NAMES[number % len(_NAMES)]], _ITEMSIZES[width % len(_ITEMSIZES)]
    stored, out = data[_CHUNK_HEAD.size :], bytearray(count * itemsize)
    if not out:
        return
    try:
        codec.decode(memoryview(stored), memoryview(out), itemsize)
    except ValueError:
        return
    expected = _stock(codec.name, stored, itemsize)
    if expected is not None and expected != out:
        message = f"{codec.name} gives other bytes than the stock library"
        raise FindingError(message)


def _stock(codec: str, stored: bytes, itemsize: int) -> bytes | None:
    """What others make of a chunk that h5traces took for intact; None where nobody is asked."""
    if codec in ("gzip", "deflate"):
        raw = zlib.decompress(stored)
    elif codec == "zstd":
        raw = zstandard.ZstdDecompressor().decompress(stored)
    else:
        return None
    width = 1 if codec == "deflate" else itemsize
    return np.frombuffer(raw, np.uint8).reshape(width, -1).T.tobytes()


def chunks() -> Iterator[bytes]:
    """Chunks of every codec: noise, numbers that compress, zeros."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(_NAMES):
        for width, itemsize in enumerate(_ITEMSIZES):
            for values in (
                rng.integers(0, 256, 40 * itemsize),
                rng.integers(0, 3, 500 * itemsize),
                np.zeros(900 * itemsize),
            ):
                raw = values.astype(np.uint8).tobytes()
                stored = CODECS[name].encode(memoryview(raw), itemsize)
                yield _CHUNK_HEAD.pack(number, width, len(raw) // itemsize) + stored


# --- open ------------------------------------------------------------------------------------


@cache
def _archive() -> tuple[Path, dict[str, Any], dict[str, bytes]]:
    path = _folder() / "archive.h5"
    specimen.write(path)
    return path, *specimen.footer_of(path)


def read_archive(data: bytes) -> None:
    """Read an archive whose footer is what the data say, with right checksums."""
    path, _, _ = _archive()
    directory, *columns = _split(data, 1 + len(COLUMNS))
    try:
        document = json.loads(directory)
    except (ValueError, RecursionError):
        document = None
    tables = dict(zip(COLUMNS, columns, strict=True))
    if isinstance(document, dict):
        specimen.seal(path, document, tables)
    else:
        specimen.seal(path, {}, tables, directory=directory or b" ")
    with warnings.catch_warnings(), contextlib.suppress(H5TracesError):
        warnings.simplefilter("ignore")
        probe.read(str(path))


def _split(data: bytes, count: int) -> list[bytes]:
    """So many parts, each behind its length; what is missing is empty."""
    parts, position = [], 0
    for _ in range(count):
        (length,) = _LENGTH.unpack(data[position : position + 4].ljust(4, b"\0"))
        parts.append(data[position + 4 : position + 4 + length])
        position = min(position + 4 + length, len(data))
    return parts


def footers() -> Iterator[bytes]:
    """The footer of a real archive, and it again with single columns emptied."""
    _, document, columns = _archive()
    directory = json.dumps(document).encode()
    parts = [directory, *(columns[name] for name in COLUMNS)]
    for missing in (None, *range(len(parts))):
        kept = [b"" if number == missing else part for number, part in enumerate(parts)]
        yield b"".join(_LENGTH.pack(len(part)) + part for part in kept)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "unpickler": unpickle,
    "chunks": decode_chunk,
    "open": read_archive,
}
SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "unpickler": pickles,
    "chunks": chunks,
    "open": footers,
}
