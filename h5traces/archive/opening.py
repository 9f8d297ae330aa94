"""From what a user names (files, globs, folders) to an archive or a list of dicts."""

from __future__ import annotations

import glob
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.request import url2pathname

from h5traces.archive.archive import Archive
from h5traces.archive.tensors import materialised
from h5traces.errors import LossyArchiveError, RemoteError
from h5traces.format import layout
from h5traces.format.limits import DEFAULT_LIMITS, ReadLimits
from h5traces.sources.pickle.layouts import as_dict
from h5traces.sources.pickle.stream import open_batch
from h5traces.storage.files import open_regular
from h5traces.storage.remote.connecting import list_remote
from h5traces.storage.remote.options import DEFAULT_REMOTE, RemoteOptions
from h5traces.storage.remote.paths import RemotePath, is_url

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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


def open_archive(
    path: Source | Iterable[Source],
    *,
    limits: ReadLimits = DEFAULT_LIMITS,
    cache: PathLike | None = None,
    storage_options: Mapping[str, Any] | None = None,
    remote: RemoteOptions = DEFAULT_REMOTE,
    labels: PathLike | Literal[False] | None = None,
    exact: bool = False,
    lossy_dtype: Literal["float16", "float32"] = "float16",
) -> Archive:
    """Open one archive, or several as one sequence.

    Reads a few kilobytes of each file; nothing is decompressed until a trace is asked for.

    Parameters
    ----------
    path
        A file, a glob, a folder (all ``.h5`` files below it), or a list of these; on disk, or on a
        server (``s3://…``, ``hf://…``, ``https://…``), where reading goes by ranges.
    limits
        What a file may ask of its reader before it is refused.
    cache
        Folder that keeps what is fetched from servers; an object that changed is fetched anew.
    storage_options
        For fsspec's file system of the server: ``key``, ``secret``, ``anon``, ``endpoint_url``,
        ``headers`` and so on.
    remote
        More about reading from servers: attempts, timeout, size of requests.
    labels
        Folder with the labels that ``h5traces label`` wrote; beside each archive by default, where
        archives on servers are not looked for any. False reads none.
    exact
        Refuse archives that hold less than their source did.
    lossy_dtype
        Type in which layers stored in steps come back. ``float32`` spares them the rounding to
        float16; the bound on the error holds in both.

    Raises
    ------
    FileNotFoundError
        Nothing matches.
    NotAnArchiveError, CorruptArchiveError, UnsupportedVersionError
        A file is no archive, is damaged, or is newer than this release.
    ArchiveError
        The files are of different models, or not equally precise.
    LossyArchiveError
        `exact` is set, and an archive is not.
    ValueError
        `lossy_dtype` is another type.
    SchemaError
        The labels beside an archive are of another one.
    RemoteError
        A server cannot be reached, or refuses.
    MissingDependencyError
        ``h5traces[remote]`` is not installed.
    """
    options = replace(
        remote,
        cache=remote.cache if cache is None else Path(cache),
        storage_options=remote.storage_options if storage_options is None else storage_options,
    )
    folder = labels if labels is None or labels is False else Path(labels)
    if lossy_dtype not in ("float16", "float32"):
        message = f"lossy_dtype is {lossy_dtype!r}, expected 'float16' or 'float32'"
        raise ValueError(message)
    unrounded = lossy_dtype == "float32"
    archive = Archive(
        expand_sources(path, remote=options), limits, options, folder, unrounded=unrounded
    )
    if exact:
        _check_exact(archive)
    return archive


def _check_exact(archive: Archive) -> None:
    for file in archive.files:
        if not file.metadata.is_exact:
            archive.close()
            message = (
                f"{file.path}: is not exact: {', '.join(map(str, file.metadata.losses))}; "
                "take the archive that it was made from, or open it without exact=True"
            )
            raise LossyArchiveError(message)


def load(path: Source) -> list[dict[str, Any]]:
    """All traces of one file as plain dicts: what ``pickle.load`` gave, from any format.

    Parameters
    ----------
    path
        An ``.h5`` archive, also on a server, or a legacy ``.pkl`` or ``.pkl.gz`` batch. Pickles
        are read by an interpreter of our own that executes nothing.

    Returns
    -------
    list of dict
        The whole file in memory.

    Raises
    ------
    UnsafePickleError, ConversionError
        The pickle asks for something outside the allow-list, or is no batch.
    """
    if isinstance(path, RemotePath) or is_url(path) or is_archive(Path(path)):
        with open_archive(path) as archive:
            return [trace.to_dict() for trace in archive]
    with open_batch(Path(path)) as batch:
        return [materialised(as_dict(item)) for item in batch]


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
