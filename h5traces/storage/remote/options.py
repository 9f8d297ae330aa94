"""How archives in object stores and on web servers are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """Options for remote archives; local ones do not look at them.

    Attributes
    ----------
    storage_options
        Handed to fsspec's file system of the protocol: ``key``, ``secret``, ``token``, ``anon``,
        ``endpoint_url`` for S3; ``headers``, ``client_kwargs`` for web servers; ``token`` for hf.
    cache
        Folder that keeps what was fetched; None for none.
    attempts
        How often a request is tried that fails for a reason that may pass.
    timeout
        Seconds to wait for a connection, and for each piece of an answer.
    tail_nbytes
        Bytes of the first request, from the end of the object: the footer of most archives.
    max_gap_nbytes
        Ranges with no more than this between them are fetched in one request.
    max_request_nbytes
        Ranges are not joined beyond this; several requests at a time are faster then.
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
