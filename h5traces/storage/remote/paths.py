"""Addresses of archives in object stores and on web servers."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


# At least two letters: a single one is a drive of Windows.
_URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.ASCII | re.IGNORECASE)
_WEB = ("http", "https")
_WEB_MAGIC = re.compile(r"[*\[]")
_MAGIC = re.compile(r"[*?\[]")
# Parts of a web address that may hold a password or a signature.
_SECRETS = re.compile(r"(?<=://)[^/@]*@|(?<=\?)[^#]+")


def is_url(source: object) -> bool:
    """Whether `source` is an address such as ``s3://bucket/run.h5``, and no path on disk."""
    if isinstance(source, RemotePath):
        return True
    return isinstance(source, str) and _URL.match(source) is not None


@dataclass(frozen=True, order=True, slots=True)
class RemotePath:
    """The address of an object, or of several: what a `Path` is to files.

    ``str()`` leaves out what may be secret (passwords, all after ``?``), so that messages can be
    shown; ``url`` is complete.

    Attributes
    ----------
    url
        ``s3://…``, ``hf://…``, ``https://…``, or of any other protocol that fsspec knows.
    """

    url: str

    @property
    def protocol(self) -> str:
        """``s3``, ``hf``, ``https`` and so on."""
        found = _URL.match(self.url)
        return found[1].lower() if found else ""

    @property
    def is_web(self) -> bool:
        """Whether it is on a web server."""
        return self.protocol in _WEB

    @property
    def name(self) -> str:
        """The last part of the address, up to ``?``."""
        if self.is_web:
            return posixpath.basename(unquote(urlsplit(self.url).path))
        return posixpath.basename(self.url.partition("://")[2])

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot on."""
        return posixpath.splitext(self.name)[1]

    @property
    def is_pattern(self) -> bool:
        """Whether it is a glob; ``?`` in a web address begins a query."""
        if self.is_web:
            return _WEB_MAGIC.search(self.url.partition("?")[0]) is not None
        return _MAGIC.search(self.url) is not None

    def __str__(self) -> str:
        return _SECRETS.sub("…", self.url) if self.is_web else self.url


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """Options for remote archives.

    Attributes
    ----------
    storage_options
        Handed to fsspec's file system of the protocol: ``key``, ``secret``, ``token``, ``anon``,
        ``endpoint_url`` for S3; ``headers``, ``client_kwargs`` for web servers; ``token`` for hf.
    cache
        Folder that keeps what was fetched; None for none.
    attempts
        How often a request is tried when it fails for a temporary reason.
    timeout
        Seconds to wait for a connection, and for each piece of an answer.
    tail_nbytes
        Bytes of the first request, from the end of the object: the index of most archives.
    max_gap_nbytes
        Ranges with no more than this between them are fetched in one request.
    max_request_nbytes
        Ranges are not joined beyond this: parallel requests are faster then.
    max_parallel
        Requests at a time for one read.
    """

    storage_options: Mapping[str, Any] = field(default_factory=dict)
    cache: Path | None = None
    attempts: int = 5
    timeout: float = 30.0
    tail_nbytes: int = 128 << 10
    max_gap_nbytes: int = 256 << 10
    max_request_nbytes: int = 16 << 20
    max_parallel: int = 8


DEFAULT_REMOTE = RemoteOptions()
