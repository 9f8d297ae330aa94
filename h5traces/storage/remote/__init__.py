"""Archives in object stores and on web servers, read by ranges through fsspec."""

from h5traces.storage.remote.connecting import list_remote
from h5traces.storage.remote.file import RemoteFile
from h5traces.storage.remote.options import DEFAULT_REMOTE, RemoteOptions
from h5traces.storage.remote.paths import RemotePath, is_url

__all__ = ["DEFAULT_REMOTE", "RemoteFile", "RemoteOptions", "RemotePath", "is_url", "list_remote"]
