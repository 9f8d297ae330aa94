"""From what a user names (files, globs, folders) to an archive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from h5traces.archive.archive import Archive
from h5traces.archive.labels import labels_folder
from h5traces.archive.tensors import check_container
from h5traces.arguments import checked
from h5traces.errors import ArchiveError, LossyArchiveError
from h5traces.format.limits import DEFAULT_LIMITS, ReadLimits
from h5traces.lazy import needing
from h5traces.paths import PathLike, Source, expand_sources, listed_sources
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemoteOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from h5traces.archive.tensors import Container


@checked
def open(
    path: Source | Iterable[Source],
    *,
    limits: ReadLimits = DEFAULT_LIMITS,
    cache: PathLike | None = None,
    storage_options: Mapping[str, Any] | None = None,
    remote: RemoteOptions = DEFAULT_REMOTE,
    labels: PathLike | Literal[False] | None = None,
    lossless: bool = False,
    lossy_dtype: Literal["float16", "float32"] = "float16",
    container: Container = "source",
) -> Archive:
    """Open one archive, or several as one sequence.

    Reads a few kilobytes of each file; nothing is decompressed until a trace is asked for. Of a
    catalogue, only the catalogue is read.

    Parameters
    ----------
    path
        A file, a glob, a folder (all ``.h5`` files below it), or a list of these; on disk, or on a
        server (``s3://…``, ``hf://…``, ``https://…``), where reading goes by ranges. Or a catalogue
        of shards, which ``h5traces.index`` wrote and whose name ends in ``.parquet``.
    limits
        What a file may ask of its reader; others are rejected.
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
    lossless
        Reject archives with stored values that are not those of their source, or that do not say:
        those of a lossy tier, and those whose cast to the stored type changed values. Layers and
        samples that were left out do not count.
    lossy_dtype
        Type in which layers stored in steps come back. ``float32`` spares them the rounding to
        float16; the bound on the error holds in both.
    container
        What traces give: ``source``, torch tensors where the source held tensors and numpy arrays
        where it held arrays; ``numpy``, arrays everywhere, bfloat16 as float32; ``torch``, tensors
        everywhere. torch is imported for tensors only.

    Raises
    ------
    FileNotFoundError
        Nothing matches.
    NotAnArchiveError, CorruptArchiveError, UnsupportedVersionError
        A file is not an archive, is damaged, or is newer than this release.
    ArchiveError
        The files are of different models, or not equally precise.
    LossyArchiveError
        `lossless` is set, and an archive is not.
    OptionError
        `lossy_dtype` or `container` is none of these.
    SchemaError
        The labels beside an archive are of another one.
    RemoteError
        A server cannot be reached, or rejects the request.
    MissingDependencyError
        ``h5traces[remote]`` is not installed, or torch for ``container="torch"``.
    """
    given = {"cache": None if cache is None else Path(cache), "storage_options": storage_options}
    changes: dict[str, Any] = {name: each for name, each in given.items() if each is not None}
    options = replace(remote, **changes) if changes else remote
    folder = labels_folder(labels)
    check_container(container)
    unrounded = lossy_dtype == "float32"
    settings: dict[str, Any] = {"unrounded": unrounded, "container": container}
    sources = listed_sources(path)
    if len(sources) == 1 and str(sources[0]).endswith(".parquet"):
        with needing("a catalogue", "pyarrow", extra="parquet"):
            from h5traces.archive.catalogue import CataloguedArchive
        place, *others = expand_sources(sources, (".parquet",), remote=options)
        if others:
            message = f"{path}: names several catalogues; open them one by one"
            raise ArchiveError(message)
        archive: Archive = CataloguedArchive(place, limits, options, folder, **settings)
    else:
        archive = Archive(
            expand_sources(sources, remote=options), limits, options, folder, **settings
        )
    if lossless:
        _check_lossless(archive)
    return archive


def _check_lossless(archive: Archive) -> None:
    for file in archive._suspects:
        found = file.metadata.is_lossless
        if not found:
            archive.close()
            message = (
                f"{file.path}: {'may not be' if found is None else 'is not'} lossless: "
                f"{file.metadata.changes}; convert or extract again with dtype='auto' in the tier "
                "'exact', or open it without lossless=True"
            )
            raise LossyArchiveError(message)
