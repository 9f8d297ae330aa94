"""One file, an archive or one of another program, as a list of plain dicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from h5traces.archive.opening import open as open_archive
from h5traces.archive.tensors import check_container, materialised
from h5traces.arguments import checked
from h5traces.errors import ConversionError
from h5traces.meaning.options import ReadingOptions
from h5traces.paths import ARCHIVE_SUFFIXES, PathLike, Source, listed_sources
from h5traces.sources.opening import open_source, recognise
from h5traces.storage.remote.paths import RemotePath, is_url

if TYPE_CHECKING:
    from h5traces.archive.tensors import Container


@checked
def load(
    path: Source, *, container: Container = "source", reading: ReadingOptions = ReadingOptions()
) -> list[dict[str, Any]]:
    """All traces of one file as plain dicts: what ``pickle.load`` gave, from any format.

    Parameters
    ----------
    path
        An ``.h5`` archive, also on a server, or a file of another program: a pickle,
        ``torch.save``, safetensors and so on, see ``docs/sources.md``. Nothing in it is executed.
    container
        ``source``, ``numpy`` or ``torch``, as for `h5traces.open`.
    reading
        What a file of another program does not say itself.

    Returns
    -------
    list of dict
        The whole file in memory.

    Raises
    ------
    UnsafePickleError, ConversionError
        A pickle asks for something outside the allow-list, or the file holds no traces.
    OptionError
        There is no such container.
    MissingDependencyError
        There are tensors, or they are asked for, and torch is not installed.
    """
    check_container(container)
    (path,) = listed_sources([path])
    if isinstance(path, RemotePath) or is_url(path) or _is_archive(path, reading):
        with open_archive(path, container=container) as archive:
            return [trace.to_dict() for trace in archive]
    with open_source(path, reading) as source:
        return [materialised(each, container) for each in source]


def _is_archive(path: PathLike, reading: ReadingOptions) -> bool:
    """Whether a file is an archive by its content, or by its name where that says nothing."""
    found = recognise(path)
    if found.kind.id == "folder" and not found.is_readable:
        message = (
            f"{path}: is a folder, and h5traces.load reads one file; h5traces.open reads the "
            "archives in a folder, h5traces.convert makes archives of other files in it"
        )
        raise ConversionError(message)
    # A damaged archive may be seen as these; opening it says what is wrong.
    may_be = found.kind.id in ("unknown", "empty", "hdf5") and reading.mapping is None
    return found.is_ours or (may_be and found.path.name.endswith(ARCHIVE_SUFFIXES))
