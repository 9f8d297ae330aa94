"""From what a user names (files, globs, folders) to an archive or a list of dicts."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import url2pathname

from h5traces.errors import RemoteError
from h5traces.format import layout
from h5traces.storage.files import open_regular
from h5traces.storage.remote.file import list_remote
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemoteOptions, RemotePath, is_url

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


ARCHIVE_SUFFIXES = (".h5", ".hdf5")


_LOCAL_URL = "file://"


PathLike = str | os.PathLike[str]


Source = PathLike | RemotePath


def expand_paths(
    sources: PathLike | Iterable[PathLike], suffixes: tuple[str, ...] = ARCHIVE_SUFFIXES
) -> list[Path]:
    """The files behind paths, globs and folders, in the order given, sorted within each.

    Raises
    ------
    FileNotFoundError
        A path does not exist, a glob matches nothing, or a folder holds no such file.
    RemoteError
        An address on a server is among them.
    """
    found: list[Path] = []
    for each in expand_sources(sources, suffixes):
        if isinstance(each, RemotePath):
            message = (
                f"{each}: this takes a file on disk; download it. 'open', 'inspect', 'ls', "
                "'label', 'features', 'repack' and 'merge' read archives on servers"
            )
            raise RemoteError(message)
        found.append(each)
    return found


def expand_sources(
    sources: Source | Iterable[Source],
    suffixes: tuple[str, ...] = ARCHIVE_SUFFIXES,
    remote: RemoteOptions = DEFAULT_REMOTE,
) -> list[Path | RemotePath]:
    """The files, and objects on servers, behind what is named; as `expand_paths`.

    Addresses that end in a suffix of an archive are taken as they are; the server is asked for
    what a glob or a folder holds.

    Raises
    ------
    FileNotFoundError
        A path does not exist, a glob matches nothing, or a folder holds no such file.
    RemoteError, MissingDependencyError
        The server cannot be asked.
    """
    named: list[Source] = (
        [sources] if isinstance(sources, (str, os.PathLike, RemotePath)) else list(sources)
    )
    found: list[Path | RemotePath] = []
    for source in named:
        found += _expand(source, suffixes, remote)
    return list(dict.fromkeys(found))


def _expand(
    source: Source, suffixes: tuple[str, ...], remote: RemoteOptions
) -> Sequence[Path | RemotePath]:
    if isinstance(source, str) and source.startswith(_LOCAL_URL):
        return _expand_local(url2pathname(source.removeprefix(_LOCAL_URL)), suffixes)
    path = RemotePath(source) if isinstance(source, str) and is_url(source) else source
    if isinstance(path, RemotePath):
        return _expand_remote(path, suffixes, remote)
    return _expand_local(path, suffixes)


def _expand_remote(
    path: RemotePath, suffixes: tuple[str, ...], remote: RemoteOptions
) -> list[RemotePath]:
    # A web server is asked for a folder only where it looks like one: addresses of files there
    # need not end in a suffix.
    if not path.is_pattern and (
        path.name.endswith(suffixes) or (path.is_web and not path.url.endswith("/"))
    ):
        return [path]
    found = list_remote(path, suffixes, remote)
    if not found:
        message = f"{path}: no such object, and nothing that matches; expected an object, a glob "
        message += f"or a folder with {' or '.join(suffixes)} objects"
        raise FileNotFoundError(message)
    return found


def _expand_local(source: PathLike, suffixes: tuple[str, ...]) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        matches = sorted(each for each in path.rglob("*") if each.name.endswith(suffixes))
    elif path.exists():
        matches = [path]
    else:
        matches = sorted(Path(each) for each in glob.glob(str(source), recursive=True))  # noqa: PTH207  # Path.glob takes no absolute pattern
    if not matches:
        message = f"{source}: no such file, and nothing that matches; expected a file, a glob "
        message += f"or a folder with {' or '.join(suffixes)} files"
        raise FileNotFoundError(message)
    return matches


def is_archive(path: Path) -> bool:
    """Whether a file is to be read as an archive: by its name, or as HDF5 by its first bytes.

    Raises
    ------
    OSError
        It cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        is_hdf5 = file.read(len(layout.HDF5_SIGNATURE)) == layout.HDF5_SIGNATURE
    return is_hdf5 or path.name.endswith(ARCHIVE_SUFFIXES)
