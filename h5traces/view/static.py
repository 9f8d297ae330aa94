"""The page as static files, for any web server that sends byte ranges."""

from __future__ import annotations

import json
import os
import shutil
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from h5traces.arguments import checked
from h5traces.errors import TargetError
from h5traces.paths import expand_sources
from h5traces.storage.publish import new_folder
from h5traces.storage.remote.paths import RemotePath
from h5traces.view.beside import checks_document, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from h5traces.paths import PathLike, Source

PAGE_FILES: Final = {
    "index.html": "text/html; charset=utf-8",
    "viewer.js": "text/javascript; charset=utf-8",
    "worker.js": "text/javascript; charset=utf-8",
    "viewer.css": "text/css; charset=utf-8",
    "LICENSES.txt": "text/plain; charset=utf-8",
}
LIST_FILE: Final = "archives.json"


def page_file(name: str) -> bytes:
    """A file of the page that is built from ``viewer/``."""
    return files("h5traces.view").joinpath("page", name).read_bytes()


def list_document(archives: Sequence[dict[str, Any]]) -> bytes:
    """The document in which the page finds its archives.

    Each has ``url`` and ``name``; addresses of ``labels`` and ``checks``, where there are any; and
    `h5traces.view.beside.Scores.entry`, with an address.
    """
    return json.dumps({"archives": archives}, ensure_ascii=True, indent=2).encode()


@checked
def export_page(
    sources: Source | Iterable[Source],
    dest: PathLike,
    *,
    copy: bool = True,
    labels: PathLike | Literal[False] | None = None,
    scores: PathLike | None = None,
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
    labels, scores
        As for `serve`; what the checks find is written, too.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    TargetError
        The folder is not empty, or an archive lies on a server that browsers cannot read from.
    OptionError
        `scores` is not a features file of these archives.
    FileNotFoundError
        There is no such archive.
    """
    folder = Path(dest)
    paths = expand_sources(sources)
    _check(folder, paths)
    listed = []
    with new_folder(folder) as part:
        for number, each in enumerate(shown(paths, part, labels=labels, scores=scores)):
            path, stem = each.path, f"{number:05d}"
            entry: dict[str, Any] = {"url": f"{stem}.h5", "name": path.name}
            if isinstance(path, RemotePath):
                entry["url"] = str(path)
            else:
                _take(path, part / f"{stem}.h5", copy=copy)
            beside = {"labels": each.labels(), "checks": checks_document(each)}
            for kind, content in beside.items():
                if content is not None:
                    entry[kind] = f"{stem}.{kind}.json"
                    (part / entry[kind]).write_bytes(content)
            entry["scores"] = [{**one.entry, "url": one.path.name} for one in each.scores]
            listed.append(entry)
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
        message = f"{folder} exists and is not an empty folder; name a new one"
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
