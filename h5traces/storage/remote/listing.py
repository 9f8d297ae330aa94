"""Listings of servers: what a pattern matches, what lies below a folder, and where they end."""

from __future__ import annotations

import fnmatch
import re
import time
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

from fsspec.utils import glob_translate

from h5traces.errors import RemoteError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from h5traces.storage.remote.paths import RemoteOptions, RemotePath


# A request takes as long as reading this many entries, and its answer may be empty.
_ENTRIES_PER_REQUEST: Final = 10
_MAGIC: Final = re.compile(r"[*?\[]")
_ANY_DEPTH: Final = "**"


class Listing:
    """Counts what servers list, so that a listing without end comes to one.

    Attributes
    ----------
    path
        What is listed, for messages.
    """

    def __init__(self, path: RemotePath, options: RemoteOptions) -> None:
        self.path, self._options = path, options
        self._num_listed, self._started = 0, time.monotonic()

    def count_request(self) -> None:
        """Count a request for a part of the listing."""
        self.count(_ENTRIES_PER_REQUEST)

    def count(self, num_entries: int) -> None:
        """Count entries."""
        self._num_listed += num_entries
        if self._num_listed > self._options.max_listed:
            self._reject(f"of more than {self._options.max_listed} objects")
        if time.monotonic() - self._started > self._options.total_timeout:
            self._reject(f"for more than {self._options.total_timeout:g} s")

    def reject_length(self) -> NoReturn:
        """Raise that one answer of a listing is too long."""
        self._reject(f"of more than {self._options.max_listing_nbytes} bytes")

    def _reject(self, what: str) -> NoReturn:
        message = (
            f"{self.path}: the server sends a listing {what}; name a smaller folder, or raise "
            "max_listed, max_listing_nbytes or total_timeout of RemoteOptions"
        )
        raise RemoteError(message)


class Folders(Protocol):
    """Folders on a server, by addresses that end in a slash."""

    def children(self, folder: str) -> Iterable[str]:
        """Addresses of what lies directly in a folder; those of folders end in a slash."""

    def below(self, folder: str) -> Iterable[str]:
        """Addresses of all objects below a folder."""


def matching(folders: Folders, pattern: str) -> Iterator[str]:
    """Addresses of the objects that a glob matches; ``**`` stands for folders of any depth."""
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if _MAGIC.search(part))
    return _matching(folders, "".join(f"{part}/" for part in parts[:first]), parts[first:])


def _matching(folders: Folders, folder: str, parts: list[str]) -> Iterator[str]:
    first, rest = parts[0], parts[1:]
    if first == _ANY_DEPTH:
        fits = re.compile(glob_translate("/".join(parts))).match
        yield from (each for each in folders.below(folder) if fits(each.removeprefix(folder)))
        return
    matches = re.compile(fnmatch.translate(first)).match
    for name in folders.children(folder):
        is_folder = name.endswith("/")
        if is_folder == bool(rest) and matches(name.removeprefix(folder).rstrip("/")):
            if is_folder:
                yield from _matching(folders, name, rest)
            else:
                yield name
