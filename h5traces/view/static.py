"""The page as static files, for any web server that sends byte ranges."""

from __future__ import annotations

import json
import os
import shutil
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from h5traces.arguments import checked
from h5traces.errors import TargetError
from h5traces.paths import expand_sources
from h5traces.storage.publish import new_folder
from h5traces.storage.remote.paths import RemotePath

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from h5traces.paths import PathLike, Source

PAGE_FILES: Final = {
    "index.html": "text/html; charset=utf-8",
    "viewer.js": "text/javascript; charset=utf-8",
    "viewer.css": "text/css; charset=utf-8",
    "LICENSES.txt": "text/plain; charset=utf-8",
}
LIST_FILE: Final = "archives.json"


def page_file(name: str) -> bytes:
    """A file of the page, as it is built from ``viewer/``."""
    return files("h5traces.view").joinpath("page", name).read_bytes()


def list_document(archives: Sequence[tuple[str, str]]) -> bytes:
    """The document in which the page finds its archives: address and name of each."""
    listed = [{"url": url, "name": name} for url, name in archives]
    return json.dumps({"archives": listed}, ensure_ascii=False, indent=2).encode()


@checked
def export_page(
    sources: Source | Iterable[Source], dest: PathLike, *, copy: bool = True
) -> list[Path]:
    """Write the page and the archives into a new folder, which any web server can publish.

    The folder gets its name when all files are in it, and durable.

    Parameters
    ----------
    sources
        Archives, globs, folders or addresses. Those on ``https://`` servers stay where they are;
        their servers must allow cross-origin requests with ranges.
    dest
        A folder that does not exist, or is empty.
    copy
        Whether archives on disk are copied; else they are linked (hard links where the file system
        allows, so that they take no room).

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    TargetError
        The folder is not empty, or an archive lies on a server that browsers cannot read from.
    FileNotFoundError
        There is no such archive.
    """
    folder = Path(dest)
    paths = expand_sources(sources)
    _check(folder, paths)
    listed = []
    with new_folder(folder) as part:
        for number, path in enumerate(paths):
            if isinstance(path, RemotePath):
                listed.append((str(path), path.name))
                continue
            name = f"{number:05d}.h5"
            _take(path, part / name, copy=copy)
            listed.append((name, path.name))
        for name in PAGE_FILES:
            (part / name).write_bytes(page_file(name))
        (part / LIST_FILE).write_bytes(list_document(listed))
        names = [each.name for each in part.iterdir()]
        for name in names:
            with (part / name).open("rb") as file:
                os.fsync(file.fileno())
    return [folder / name for name in sorted(names)]


def _check(folder: Path, paths: Sequence[Any]) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        message = f"{folder} exists and is no empty folder; name a new one"
        raise TargetError(message)
    for path in paths:
        if isinstance(path, RemotePath) and path.protocol not in ("http", "https"):
            message = (
                f"{path}: browsers read from http:// and https:// only; name the archive by such "
                "an address, or show it with 'h5traces view'"
            )
            raise TargetError(message)


def _take(path: Path, target: Path, *, copy: bool) -> None:
    if not copy:
        try:
            target.hardlink_to(path)
        except OSError:
            pass
        else:
            return
    shutil.copyfile(path, target)
