"""One file or folder, of archives or of other programs, as a list of plain dicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from h5traces.archive.opening import open as open_archive
from h5traces.archive.tensors import check_container, materialised
from h5traces.arguments import checked
from h5traces.errors import ConversionError
from h5traces.meaning.options import ReadingOptions
from h5traces.paths import ARCHIVE_SUFFIXES, PathLike, Source, listed_sources, local_path
from h5traces.sources.collecting import archives_and_sources
from h5traces.sources.opening import open_source, recognise
from h5traces.storage.remote.paths import RemotePath, is_url

if TYPE_CHECKING:
    from h5traces.archive.tensors import Container


@checked
def load(
    path: Source, *, container: Container = "source", reading: ReadingOptions = ReadingOptions()
) -> list[dict[str, Any]]:
    """All traces of one file or folder as plain dicts: what ``pickle.load`` gave, from any format.

    Parameters
    ----------
    path
        An ``.h5`` archive, also on a server, or a file of another program: a pickle,
        ``torch.save``, safetensors and so on, see ``docs/sources.md``. Nothing in it is executed.
        Of a folder, such as one of requests with a sample each, all files in the order of their
        names; a warning names what is not read.
    container
        ``source``, ``numpy`` or ``torch``, as for `h5traces.open`.
    reading
        What a file of another program does not say itself.

    Returns
    -------
    list of dict
        All samples, in memory.

    Raises
    ------
    UnsafePickleError, ConversionError
        A pickle asks for something outside the allow-list, a file holds no traces, or a folder
        holds archives beside files of other programs.
    FileNotFoundError
        Nothing is there, or a folder holds neither.
    OptionError
        There is no such container.
    MissingDependencyError
        There are tensors, or they are asked for, and torch is not installed.
    """
    check_container(container)
    (path,) = listed_sources([path])
    if isinstance(path, RemotePath) or is_url(path):
        return _from_archive(path, container)
    if Path(path).is_dir() and not recognise(path, reading).is_readable:
        return _from_folder(Path(path), container, reading)
    if _is_archive(path, reading):
        return _from_archive(path, container)
    return _from_source(path, container, reading)


def _from_archive(path: PathLike | RemotePath, container: Container) -> list[dict[str, Any]]:
    with open_archive(path, container=container) as archive:
        return [trace.to_dict() for trace in archive]


def _from_source(
    path: PathLike, container: Container, reading: ReadingOptions
) -> list[dict[str, Any]]:
    with open_source(path, reading) as source:
        return [materialised(each, container) for each in iter(source.next_sample, None)]


def _from_folder(
    folder: Path, container: Container, reading: ReadingOptions
) -> list[dict[str, Any]]:
    """The samples of all files of a folder, in the order of their names."""
    paths = [local_path(each) for each in archives_and_sources(folder, reading)]
    archives = [path for path in paths if _is_archive(path, reading)]
    if not archives:
        return [each for path in paths for each in _from_source(path, container, reading)]
    others = [path for path in paths if path not in archives]
    if others:
        message = (
            f"{folder}: holds archives ({archives[0].name}) and files of other programs "
            f"({others[0].name}), which may be the same samples twice; load each file by itself, "
            "or move them apart"
        )
        raise ConversionError(message)
    return _from_archive(folder, container)


def _is_archive(path: PathLike, reading: ReadingOptions) -> bool:
    """Whether a file is an archive by its content, or by its name where that says nothing."""
    found = recognise(path)
    # A damaged archive may be seen as these; opening it says what is wrong.
    may_be = found.kind.id in ("unknown", "empty", "hdf5") and reading.mapping is None
    return found.is_ours or (may_be and found.path.name.endswith(ARCHIVE_SUFFIXES))
