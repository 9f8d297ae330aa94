"""Addresses of archives in object stores and on web servers."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

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

    ``str()`` leaves out what may be a secret (passwords, signatures behind ``?``), so that
    messages can be shown; ``url`` has all of it.

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
        """Whether a web server is asked."""
        return self.protocol in _WEB

    @property
    def name(self) -> str:
        """The last part of the address, without what stands behind ``?``."""
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
