"""A folder of files as named arrays, where a sample lies in several: one per layer, or per field.

A file that holds one array is named by its path in the folder without the suffix, such as
``hidden_003``; arrays of other files have that before their own names.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from h5traces.errors import ConversionError
from h5traces.format.text import and_more
from h5traces.sources.array_files import TABLES, open_arrays
from h5traces.sources.arrays import ArrayFile, Loaded
from h5traces.sources.mapping import ARRAY
from h5traces.sources.opening import source_stem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from h5traces.sources.arrays import Group
    from h5traces.sources.mapping import MappingDocument

_MOST_FILES: Final = 50_000
# Pages of all files that may stay in memory until the next sample.
_RELEASE_NBYTES: Final = 32 << 20
_ALL_NBYTES: Final = 1 << 62


class FolderFile(ArrayFile):
    """The arrays of all files below a folder; links are not followed."""

    kind = "folder"

    def __init__(self, path: Path, mapping: MappingDocument) -> None:
        self._path = path
        self._files: dict[Path, tuple[ArrayFile, Group]] = {}
        self._touched = 0
        found = (each for each in path.rglob("*") if each.is_file() and not each.is_symlink())
        self._paths = sorted(
            each for each in found if not mapping.ignores(each.relative_to(path).as_posix())
        )
        if len(self._paths) > _MOST_FILES:
            message = f"{path}: holds {len(self._paths):,} files, at most {_MOST_FILES:,} are read"
            raise ConversionError(message)
        self._nbytes = sum(each.stat().st_size for each in self._paths)

    def groups(self) -> Iterator[Group]:
        """One group."""
        arrays: dict[str, Loaded] = {}
        for path in self._paths:
            place = path.relative_to(self._path)
            stem = place.with_name(source_stem(path.name)).as_posix()
            if _is_npy(path):
                # One array: it is opened when it is needed.
                names = {stem: ARRAY}
            else:
                group = self._opened(path)
                names = {stem if name == ARRAY else f"{stem}/{name}": name for name in group}
            twice = names.keys() & arrays.keys()
            if twice:
                message = f"{self._path}: two files hold {and_more(sorted(twice))}"
                raise ConversionError(message)
            arrays |= {
                name: Loaded(partial(self._load, path, inner)) for name, inner in names.items()
            }
        yield arrays

    def _opened(self, path: Path) -> Group:
        if path not in self._files:
            file = open_arrays(path)
            if file.kind in TABLES:
                file.close()
                message = f"{path}: is a table; of a folder, files of arrays are read. Ignore it"
                raise ConversionError(message)
            self._files[path] = file, next(file.groups(), {})
        return self._files[path][1]

    def _load(self, path: Path, name: str) -> Any:
        return self._opened(path)[name].read()

    @property
    def progress(self) -> tuple[int, int]:
        """The size of all files; samples are counted by the mapping."""
        return 0, self._nbytes

    def release(self, nbytes: int = 0) -> None:
        """Give back pages of all files once enough were read."""
        self._touched += nbytes
        if self._touched >= _RELEASE_NBYTES:
            for file, _ in self._files.values():
                file.release(_ALL_NBYTES)
            self._touched = 0

    def close(self) -> None:
        """Close the files; views stay valid."""
        for file, _ in self._files.values():
            file.close()
        self._files = {}


def _is_npy(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6) == b"\x93NUMPY"
