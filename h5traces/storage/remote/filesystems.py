"""Objects on servers, through the public interface of fsspec."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Final

import fsspec

from h5traces.errors import RemoteError
from h5traces.storage.remote.answers import RangeRequest, translate
from h5traces.storage.remote.listing import Listing, matching
from h5traces.storage.remote.paths import ByteRange, RemotePath, Reply, TemporaryError, persistently

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from h5traces.storage.remote.listing import Folders
    from h5traces.storage.remote.paths import RemoteOptions, Transport
    from h5traces.storage.remote.web import WebClient


# By process, protocol, options and environment: no process can use connections of another, and
# renewed credentials are read anew.
_filesystems: dict[tuple[int, str, str, str], Any] = {}
_ENVIRONMENT: Final = ("AWS_", "HF_")


def filesystem(protocol: str, options: RemoteOptions) -> Any:
    """The file system for a protocol in this process.

    fsspec itself keeps one for each thread; connections of all threads are shared here.
    """
    environment = sorted(each for each in os.environ.items() if each[0].startswith(_ENVIRONMENT))
    # The size of first requests is of a file, not of a connection.
    names = [each.name for each in fields(options) if each.name != "tail_nbytes"]
    named = [(name, getattr(options, name)) for name in names]
    named.append(("storage_options", sorted(options.storage_options.items())))
    key = (os.getpid(), protocol, repr(named), repr(environment))
    found = _filesystems.get(key)
    if found is None:
        arguments = {**options.storage_options, **_settings(protocol, options)}
        try:
            found = fsspec.filesystem(protocol, skip_instance_cache=True, **arguments)
        except ValueError as error:
            message = f"{protocol}:// cannot be opened: {error}"
            raise RemoteError(message) from error
        if protocol == "s3":
            # Requests are repeated here; repeating them there as well would multiply.
            found.retries = 1
        _filesystems[key] = found
    return found


def forget(files: Any) -> None:
    """Make a new file system for the next request: this one may hold old credentials."""
    for key in [key for key, known in _filesystems.items() if known is files]:
        _filesystems.pop(key, None)


def _settings(protocol: str, options: RemoteOptions) -> dict[str, Any]:
    """Arguments for a file system from the options; those that a user sets win."""
    given = options.storage_options
    if protocol in ("s3", "s3a"):
        from h5traces.storage.remote.s3 import bounded_sessions

        config = {
            "http_session_cls": bounded_sessions(options),
            "retries": {"max_attempts": 0},
            "connect_timeout": options.timeout,
            "read_timeout": options.timeout,
            "max_pool_connections": 4 * options.max_parallel,
        }
        return {
            "use_listings_cache": given.get("use_listings_cache", False),
            "config_kwargs": {**config, **given.get("config_kwargs", {})},
        }
    if protocol in ("http", "https"):
        import aiohttp

        from h5traces.storage.remote.web import new_session

        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=options.timeout, sock_read=options.timeout
        )
        client = {"timeout": timeout, **given.get("client_kwargs", {})}
        return {"get_client": new_session, "client_kwargs": client}
    return {}


def transport_for(path: RemotePath, options: RemoteOptions) -> Transport:
    """The transport for an address; see `h5traces.storage.remote.paths`."""
    if path.is_web:
        client = _web_client(filesystem(path.protocol, options), options)
        return _WebTransport(path, client, path.url)
    if path.protocol in ("s3", "s3a"):
        return _S3Transport(path, filesystem("s3", options), options)
    if path.protocol == "hf":
        return _hub_transport(path, options)
    return _PlainTransport(path, filesystem(path.protocol, options))


def list_objects(
    path: RemotePath, suffixes: tuple[str, ...], options: RemoteOptions
) -> list[RemotePath]:
    """What a pattern matches, or what lies below a folder, by address."""
    files = filesystem(path.protocol, options)

    def found() -> list[str]:
        listing = Listing(path, options)
        try:
            return list(_listed(path, files, listing, suffixes, options))
        except FileNotFoundError:
            return []
        except (RemoteError, TemporaryError):
            raise
        except Exception as error:  # every library has its own
            translate(path, error)

    try:
        names = persistently(path, options.attempts, found)
    except RemoteError:
        forget(files)
        raise
    return sorted({RemotePath(files.unstrip_protocol(each)) for each in names})


def _listed(
    path: RemotePath,
    files: Any,
    listing: Listing,
    suffixes: tuple[str, ...],
    options: RemoteOptions,
) -> Iterator[str]:
    folders: Folders
    if path.is_web:
        from h5traces.storage.remote.web import WebFolders

        folders, place = WebFolders(_web_client(files, options), listing), path.url
    elif path.protocol in ("s3", "s3a"):
        from h5traces.storage.remote.s3 import S3Folders

        folders, place = S3Folders(files, listing), path.url.partition("://")[2]
    else:
        files.invalidate_cache()
        names = files.glob(path.url) if path.is_pattern else files.find(path.url)
        listing.count(len(names))
        yield from (each for each in names if path.is_pattern or each.endswith(suffixes))
        return
    if path.is_pattern:
        yield from matching(folders, place)
    else:
        place = f"{place.rstrip('/')}/"
        yield from (each for each in folders.below(place) if each.endswith(suffixes))


class _FsspecTransport:
    """An object that one of fsspec's file systems reaches; a `Transport`."""

    def __init__(self, path: RemotePath, files: Any) -> None:
        self._path, self._files = path, files

    def tail(self, nbytes: int) -> Reply:
        return self._asked(RangeRequest(self._path, None, nbytes))

    def get(self, wanted: ByteRange) -> Reply:
        return self._asked(RangeRequest(self._path, wanted.offset, wanted.nbytes))

    def _asked(self, request: RangeRequest) -> Reply:
        try:
            try:
                return request.reply(self._data(request))
            except (RemoteError, TemporaryError):
                raise
            except Exception as error:
                translate(self._path, error)
        except RemoteError:
            forget(self._files)
            raise

    def _data(self, request: RangeRequest) -> bytes:
        """The bytes of the range; size and version of the object go into the request."""
        raise NotImplementedError


class _PlainTransport(_FsspecTransport):
    """An object whose size and version take a separate request (``info``)."""

    def _data(self, request: RangeRequest) -> bytes:
        self._files.invalidate_cache()
        facts = self._files.info(self._path.url)
        marks = (facts.get(name) for name in ("ETag", "etag", "mtime", "created", "modified"))
        request.version = next((str(mark) for mark in marks if mark is not None), None)
        request.total_nbytes = total = int(facts["size"])
        first = request.offset
        if first is None:
            first = max(0, total - request.nbytes)
        stop = first + request.nbytes
        data: bytes = self._files.cat_file(self._path.url, start=first, end=stop)
        return data


class _S3Transport(_FsspecTransport):
    """An object in an S3 bucket, or in a store that speaks S3."""

    def __init__(self, path: RemotePath, files: Any, options: RemoteOptions) -> None:
        super().__init__(path, files)
        self._options = options

    def _data(self, request: RangeRequest) -> bytes:
        from h5traces.storage.remote.s3 import read_range

        return read_range(self._files, request, self._options)


class _WebTransport(_FsspecTransport):
    """An object on a web server; `path` is its address for messages, `url` that of requests."""

    def __init__(self, path: RemotePath, client: WebClient, url: str) -> None:
        super().__init__(path, client.files)
        self._client, self._url = client, url

    def _data(self, request: RangeRequest) -> bytes:
        return self._client.read(request, self._url)


def _web_client(
    files: Any, options: RemoteOptions, headers: Mapping[str, str] | None = None
) -> WebClient:
    from h5traces.storage.remote.web import WebClient

    client = options.storage_options.get("client_kwargs", {})
    # Proxies are of this machine, not of a host.
    kept = {name: client[name] for name in ("trust_env",) if name in client}
    bare = filesystem("https", replace(options, storage_options={"client_kwargs": kept}))
    return WebClient(files, bare, options, headers)


def _hub_transport(path: RemotePath, options: RemoteOptions) -> Transport:
    """A file of a repository on the Hugging Face hub, by its web address."""
    from huggingface_hub import get_token, hf_hub_url

    files = filesystem("hf", options)
    try:
        found = files.resolve_path(path.url)
        url = hf_hub_url(
            found.repo_id,
            found.path_in_repo,
            repo_type=found.repo_type,
            revision=found.revision,
            endpoint=files.endpoint,
        )
    except Exception as error:
        translate(path, error)
    token = files.token if isinstance(files.token, str) else get_token()
    headers = {"Authorization": f"Bearer {token}"} if token and files.token is not False else {}
    web = filesystem("https", replace(options, storage_options={}))
    return _WebTransport(path, _web_client(web, options, headers), url)
