"""An archive on a server, read by ranges."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from typing import TYPE_CHECKING, Any, Final

import xxhash

from h5traces.errors import (
    CorruptArchiveError,
    MissingDependencyError,
    RemoteError,
    StoredStateWarning,
    warn,
)
from h5traces.storage.files import read_document
from h5traces.storage.remote.paths import Blocks, ByteRange, coalesce, persistently
from h5traces.storage.threads import ThreadPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from h5traces.storage.remote.paths import RemoteOptions, RemotePath, Reply, Transport


_DATA = "data"
_LOG = "ranges"
# Of a larger group, rows are read one by one.
_MOST_HELD_NBYTES: Final = 32 << 20


class RemoteFile:
    """The bytes of an object; a `ByteFile`.

    Opening takes one request, for the end of the object. Every later answer must have the same
    version and size. Safe for threads, and for processes that get it by fork or pickling: each
    makes its own connections.
    """

    def __init__(self, path: RemotePath, options: RemoteOptions) -> None:
        self.path, self._options = path, options
        tail = self._ask(lambda transport: transport.tail(options.tail_nbytes))
        self._total_nbytes, self._version = tail.total_nbytes, tail.version
        self._cache = RangeCache(options.cache, path, tail) if options.cache else None
        self._tail: tuple[int, bytes] | None = (tail.total_nbytes - len(tail.data), tail.data)
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        # Bytes that `prefetched` blocks hold, by range.
        self._fetched: tuple[dict[ByteRange, bytes], ...] = ()
        # Offset and bytes of what `hold` keeps, beside the tail.
        self._held: tuple[tuple[int, bytes], ...] = ()

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def nbytes(self) -> int:
        """Size of the object when it was opened."""
        return self._total_nbytes

    def read_at(self, offset: int, nbytes: int) -> bytes:
        wanted = ByteRange(offset, nbytes)
        if not nbytes:
            return b""
        found = self._find(wanted)
        return self._fetch([wanted])[wanted] if found is None else found

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self.read_at(offset, len(out))

    def at_hand(self, offset: int, nbytes: int) -> bool:
        return self._find(ByteRange(offset, nbytes)) is not None

    def hold(self, offset: int, nbytes: int) -> None:
        """Keep bytes in memory, some groups of rows at a time; what is missing is one request."""
        wanted = ByteRange(offset, nbytes)
        if nbytes > _MOST_HELD_NBYTES or self._find(wanted) is not None:
            return
        start, tail = self._tail or (wanted.stop, b"")
        if offset < start <= wanted.stop <= start + len(tail):
            missing = ByteRange(offset, start - offset)
            self._tail = (offset, self._fetch([missing], whole=True)[missing] + tail)
            return
        held = (offset, self._fetch([wanted], whole=True)[wanted])
        is_full = nbytes + sum(len(data) for _, data in self._held) > _MOST_HELD_NBYTES
        self._held = (held,) if is_full else (*self._held, held)

    @contextlib.contextmanager
    def prefetched(self, ranges: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Inside the block, reading these ranges takes no request: all are fetched here.

        Ranges that lie near each other are fetched in one request, and requests run in parallel.
        """
        wanted = {ByteRange(*each) for each in ranges}
        missing = [each for each in wanted if each.nbytes and self._find(each) is None]
        if not missing:
            yield
            return
        fetched = self._fetch(missing)
        with self._lock:
            self._fetched += (fetched,)
        try:
            yield
        finally:
            with self._lock:
                self._fetched = tuple(each for each in self._fetched if each is not fetched)

    def _find(self, wanted: ByteRange) -> bytes | None:
        tail: tuple[tuple[int, bytes], ...] = () if self._tail is None else (self._tail,)
        for start, data in (*tail, *self._held):
            first = wanted.offset - start
            if 0 <= first <= first + wanted.nbytes <= len(data):
                return data[first : first + wanted.nbytes]
        return next((each[wanted] for each in self._fetched if wanted in each), None)

    def _fetch(self, ranges: list[ByteRange], *, whole: bool = False) -> dict[ByteRange, bytes]:
        """The bytes of every range, from the cache or the server."""
        for each in ranges:
            if each.offset < 0 or each.stop > self._total_nbytes:
                message = (
                    f"{self.name}: the object ends at {self._total_nbytes}, expected "
                    f"{each.nbytes} bytes at {each.offset}; it was truncated"
                )
                raise CorruptArchiveError(message)
        found: dict[ByteRange, bytes] = {}
        if self._cache is not None:
            kept = ((each, self._cache.find(each)) for each in ranges)
            found = {each: data for each, data in kept if data is not None}
        missing = [each for each in ranges if each not in found]
        if not missing:
            return found
        fetched = self._request(missing, whole=whole)
        if self._cache is not None:
            self._keep(self._cache, fetched)
        return found | fetched

    def _keep(self, cache: RangeCache, fetched: dict[ByteRange, bytes]) -> None:
        try:
            cache.keep(fetched)
        except OSError as error:
            # Reading goes on when the disk is full.
            self._cache = None
            message = f"{self.name}: the cache cannot be written and is not used: {error}"
            warn(message, StoredStateWarning)

    def _request(self, ranges: list[ByteRange], *, whole: bool) -> dict[ByteRange, bytes]:
        options = self._options
        joined = coalesce(
            ranges,
            max_gap_nbytes=options.max_gap_nbytes,
            max_nbytes=self._total_nbytes if whole else options.max_request_nbytes,
        )
        if len(joined) == 1:
            data = [self._get(joined[0])]
        else:
            with ThreadPool(min(options.max_parallel, len(joined))) as pool:
                data = list(pool.map(self._get, joined))
        blocks = Blocks([(each.offset, part) for each, part in zip(joined, data, strict=True)])
        pieces = {each: blocks.find(each) for each in ranges}
        return {each: piece for each, piece in pieces.items() if piece is not None}

    def _get(self, wanted: ByteRange) -> bytes:
        try:
            reply = self._ask(lambda transport: transport.get(wanted))
        except FileNotFoundError as error:
            message = f"{self.name}: the object was deleted since it was opened"
            raise RemoteError(message) from error
        if (reply.total_nbytes, reply.version) != (self._total_nbytes, self._version):
            message = (
                f"{self.name}: the object was replaced since it was opened (size "
                f"{reply.total_nbytes}, version {reply.version}; expected {self._total_nbytes}, "
                f"{self._version}); open it again"
            )
            raise CorruptArchiveError(message)
        return reply.data

    def _ask(self, request: Callable[[Transport], Reply]) -> Reply:
        def ask() -> Reply:
            with _library(self.path):
                from h5traces.storage.remote.filesystems import transport_for

                # New for every request: it belongs to the process.
                transport = transport_for(self.path, self._options)
            return request(transport)

        return persistently(self.path, self._options.attempts, ask)

    def close(self) -> None:
        with self._lock:
            self._fetched, self._held, self._tail = (), (), None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_fetched": (), "_held": (), "_tail": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


class RangeCache:
    """The kept ranges of one version of one object. Safe for threads and processes.

    `folder` is that of all objects; `tail` has the object's last bytes, size and version.
    """

    def __init__(self, folder: Path, path: RemotePath, tail: Reply) -> None:
        self._folder = folder / _key(path, tail)
        if self._folder.is_symlink():
            message = f"{self._folder}: is a link, expected a folder of a cache; remove it"
            raise RemoteError(message)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._ranges: dict[ByteRange, str] = {}
        with contextlib.suppress(FileNotFoundError):
            self._read_log()

    def _read_log(self) -> None:
        log = read_document(self._folder / _LOG, RemoteError, "ranges that a cache holds")
        for line in log.decode("ascii", "replace").split("\n"):
            parts = line.split(" ")
            # The last line may be torn.
            if len(parts) == 3 and len(line) < 80 and all(map(str.isdecimal, parts[:2])):
                self._ranges[ByteRange(int(parts[0]), int(parts[1]))] = parts[2]

    def find(self, wanted: ByteRange) -> bytes | None:
        """The bytes of a range that was kept as a whole, else None."""
        checksum = self._ranges.get(wanted)
        if checksum is None:
            return None
        with contextlib.suppress(OSError):
            descriptor = _opened(self._folder / _DATA, os.O_RDONLY)
            try:
                data = os.pread(descriptor, wanted.nbytes, wanted.offset)
            finally:
                os.close(descriptor)
            if xxhash.xxh3_64_hexdigest(data) == checksum:
                return data
        return None

    def keep(self, pieces: dict[ByteRange, bytes]) -> None:
        """Keep ranges; a full disk raises OSError."""
        data_file = _opened(self._folder / _DATA, os.O_WRONLY | os.O_CREAT)
        try:
            for wanted, data in pieces.items():
                written = 0
                while written < len(data):
                    written += os.pwrite(data_file, data[written:], wanted.offset + written)
        finally:
            os.close(data_file)
        added = {wanted: xxhash.xxh3_64_hexdigest(data) for wanted, data in pieces.items()}
        lines = "".join(f"{each.offset} {each.nbytes} {added[each]}\n" for each in added)
        log = _opened(self._folder / _LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            # The newline comes first, in case the last line is torn.
            os.write(log, f"\n{lines}".encode("ascii"))
        finally:
            os.close(log)
        self._ranges.update(added)


def _opened(path: Path, flags: int) -> int:
    """A file of the cache; OSError for a link or pipe, which others may have put there."""
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "is not a file of a cache", str(path))


def _key(path: RemotePath, tail: Reply) -> str:
    facts = "\0".join((path.url.partition("?")[0], str(tail.total_nbytes), tail.version or ""))
    digest = xxhash.xxh3_128(facts.encode("utf-8", "surrogatepass"))
    digest.update(tail.data)
    return digest.hexdigest()


def list_remote(
    path: RemotePath, suffixes: tuple[str, ...], options: RemoteOptions
) -> list[RemotePath]:
    """The objects that a pattern matches, or that lie below a folder, sorted."""
    with _library(path):
        from h5traces.storage.remote.filesystems import list_objects

        return list_objects(path, suffixes, options)


@contextlib.contextmanager
def _library(path: RemotePath) -> Iterator[None]:
    """Say what to install where a library is missing."""
    try:
        yield
    except ImportError as error:
        message = (
            f"{path}: reading {path.protocol}:// needs a library that is not installed ({error}); "
            "install h5traces[remote]"
        )
        raise MissingDependencyError(message) from error
