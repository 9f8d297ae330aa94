"""What a user names: sources to read (files, globs, folders, addresses) and outputs to write."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self
from urllib.request import url2pathname

from h5traces.errors import RemoteError, TargetError
from h5traces.format import layout
from h5traces.storage.files import open_regular
from h5traces.storage.remote.file import list_remote
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemoteOptions, RemotePath, is_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ARCHIVE_SUFFIXES: Final = (".h5", ".hdf5")
# Of an archive in a folder that the user named.
DEFAULT_NAME: Final = "traces"
_BATCH_NAME: Final = re.compile(r"\.(pkl|pickle)(\.gz)?\Z")
_LOCAL_URL: Final = "file://"

PathLike = str | os.PathLike[str]
Source = PathLike | RemotePath
_NAMES: Final = (str, os.PathLike, RemotePath)


def expand_paths(
    sources: PathLike | Iterable[PathLike], suffixes: tuple[str, ...] = ARCHIVE_SUFFIXES
) -> list[Path]:
    """List the files that paths, globs and folders name, in the order given, sorted within each."""
    found: list[Path] = []
    for each in expand_sources(sources, suffixes):
        if isinstance(each, RemotePath):
            message = (
                f"{each}: expected a file on disk; download it. 'open', 'inspect', 'ls', "
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
    """List the files and the objects on servers that are named; as `expand_paths`.

    An address that ends in a suffix is used as it is; for a glob or a folder, the server is asked.
    """
    found: list[Path | RemotePath] = []
    for source in listed_sources(sources):
        place = _place(source)
        if isinstance(place, RemotePath):
            found += _expand_remote(place, suffixes, remote)
        else:
            found += _expand_local(place, suffixes)
    return list(dict.fromkeys(found))


def listed_sources(sources: Source | Iterable[Source]) -> list[Source]:
    """What a user named, one by one.

    Raises
    ------
    TypeError
        It is neither a name nor a list of names.
    FileNotFoundError
        A name is empty.
    """
    if isinstance(sources, (bytes, Mapping)) or not isinstance(sources, (*_NAMES, Iterable)):
        raise _not_a_name(sources)
    named = [sources] if isinstance(sources, _NAMES) else list(sources)
    for each in named:
        if not isinstance(each, _NAMES):
            raise _not_a_name(each)
        if isinstance(each, str) and not each:
            message = "the name of a source is empty; expected a file, a glob or a folder, '.' here"
            raise FileNotFoundError(message)
    return named


def _not_a_name(value: object) -> TypeError:
    message = "expected the name of a file, a glob or a folder, or a list of these, not "
    message += f"{type(value).__name__}"
    if isinstance(value, Mapping):
        message += "; h5traces.create writes samples that lie in memory"
    return TypeError(message)


def _place(named: Source) -> PathLike | RemotePath:
    """A path on disk, also for ``file://``, or the address of an object."""
    if not isinstance(named, str) or not is_url(named):
        return named
    if named[: len(_LOCAL_URL)].lower() == _LOCAL_URL:
        return url2pathname(named[len(_LOCAL_URL) :])
    return RemotePath(named)


def _expand_remote(
    path: RemotePath, suffixes: tuple[str, ...], remote: RemoteOptions
) -> list[RemotePath]:
    # Files on a web server need not end in a suffix, so only an address with a final slash is a
    # folder there.
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
    if not matches and path.is_dir():
        message = f"{source}: holds no {' or '.join(suffixes)} file"
        batches = sum(_BATCH_NAME.search(each.name) is not None for each in path.rglob("*"))
        if batches:
            message += (
                f", but {batches} pickled batch{'es' * (batches != 1)}; h5traces.convert makes "
            )
            message += "archives of them"
        raise FileNotFoundError(message)
    if not matches:
        message = f"{source}: no such file, and nothing that matches; expected a file, a glob "
        message += f"or a folder with {' or '.join(suffixes)} files"
        raise FileNotFoundError(message)
    return matches


def is_archive(path: Path) -> bool:
    """Whether a file is read as an archive: its name ends so, or its first bytes are HDF5's."""
    with os.fdopen(open_regular(path), "rb") as file:
        is_hdf5 = file.read(len(layout.HDF5_SIGNATURE)) == layout.HDF5_SIGNATURE
    return is_hdf5 or path.name.endswith(ARCHIVE_SUFFIXES)


@dataclass(frozen=True, slots=True)
class Target:
    """What an output names: a file, or a folder of files.

    One rule for everything that writes: a name that ends in a slash, or a folder that exists, is a
    folder; a name that ends in a suffix of the command (``.h5``) is a file; anything else is an
    error, so that a forgotten suffix never makes a folder.

    Files in a folder: ``convert`` writes one per source, with the source's name. Commands that
    write one archive (``repack``, ``merge``, ``split``, ``export``, ...) give it the name of the
    source if there is one, else ``traces``: they count samples and measure scales over all sources,
    so several never become several archives. ``create`` and ``extract`` write ``traces``. With
    `shard_samples`, the largest number of samples in a file, a number follows the name:
    ``traces-00000.h5``.
    """

    path: Path
    suffix: str
    _: KW_ONLY
    is_folder: bool
    shard_samples: int | None = None

    @classmethod
    def of(
        cls,
        dest: PathLike,
        *,
        suffixes: tuple[str, ...] = ARCHIVE_SUFFIXES[:1],
        shard_samples: int | None = None,
    ) -> Self:
        """The target that a user names; files in a folder get the first of `suffixes`.

        A `Path` cannot keep a final slash, so it names a folder only if that exists.
        """
        if shard_samples is not None and shard_samples < 1:
            message = f"shard_samples is {shard_samples}, expected at least 1"
            raise TargetError(message)
        place = _place(dest)
        if isinstance(place, RemotePath):
            message = f"{place} is an address on a server; name an output on disk, and copy it"
            raise TargetError(message)
        text, path = os.fspath(place), Path(place)
        is_folder = bool(text) and (text.endswith("/") or path.is_dir())
        if is_folder and os.path.lexists(path) and not path.is_dir():
            message = f"{text} ends in a slash, but {path} is a file; name a folder"
            raise TargetError(message)
        endings = (each for each in suffixes if path.name.endswith(each) and path.name != each)
        suffix = suffixes[0] if is_folder else next(endings, None)
        if suffix is None:
            new = f"write {text}/" if text and isinstance(dest, str) else "create it first"
            message = (
                f"{text or 'an empty name'} is neither a folder that exists nor a name ending in "
                f"{' or '.join(suffixes)}; for a new folder {new}"
            )
            if isinstance(dest, Path):
                message += ", or pass text that ends in a slash, which a Path cannot keep"
            raise TargetError(message)
        return cls(path, suffix, is_folder=is_folder, shard_samples=shard_samples)

    def named(self, name: str) -> Target:
        """The target of the file `name`, without suffix, in the folder; a file keeps its name."""
        if not self.is_folder:
            return self
        return replace(self, path=self.path / f"{name}{self.suffix}", is_folder=False)

    def for_sources(self, sources: Sequence[Source]) -> Target:
        """The target of the one file that is made of `sources`: named after it if it is one."""
        if len(sources) != 1:
            return self.named(DEFAULT_NAME)
        (source,) = sources
        name = source.name if isinstance(source, RemotePath) else Path(source).name
        suffix = next((each for each in ARCHIVE_SUFFIXES if name.endswith(each)), "")
        return self.named(name.removesuffix(suffix))

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return self.path if self.is_folder else self.path.parent

    def shard(self, number: int) -> Path:
        """The name of one file of a set of shards, or of the only file."""
        path = self.path / f"{DEFAULT_NAME}{self.suffix}" if self.is_folder else self.path
        if self.shard_samples is None:
            return path
        return path.with_name(f"{path.name.removesuffix(self.suffix)}-{number:05d}{self.suffix}")

    def shard_of(self, sample: int) -> int:
        """The number of the shard that a sample goes to."""
        return 0 if self.shard_samples is None else sample // self.shard_samples

    def first_sample(self, shard: int) -> int:
        """The number of the first sample of a shard."""
        return shard * (self.shard_samples or 0)

    def existing(self) -> list[Path]:
        """The files that exist, in order, up to the first that does not."""
        found: list[Path] = []
        while (path := self.shard(len(found))).exists():
            found.append(path)
            if self.shard_samples is None:
                break
        return found

    def taken(self) -> list[Path]:
        """Every file that has a name of this target, in any number and with gaps."""
        if self.shard_samples is None:
            path = self.shard(0)
            return [path] if os.path.lexists(path) else []
        before, _, after = self.shard(0).name.rpartition("00000")
        pattern = re.compile(rf"{re.escape(before)}[0-9]{{5,}}{re.escape(after)}")
        files = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in files if pattern.fullmatch(path.name))


def check_not_a_source(
    targets: Target | PathLike | Iterable[Target | PathLike], sources: Source | Iterable[Source]
) -> None:
    """Reject an output that is one of the files read, whether or not existing files are replaced.

    `sources` are all files that are read, sidecars and scales included.
    """
    read: dict[object, Source] = {}
    for source in [sources] if isinstance(sources, (str, os.PathLike, RemotePath)) else sources:
        place = _place(source)
        if not isinstance(place, RemotePath):
            read |= dict.fromkeys(_identities(place), source)
    for target in [targets] if isinstance(targets, (str, os.PathLike, Target)) else targets:
        for path in target.taken() if isinstance(target, Target) else [target]:
            for source in (read[each] for each in _identities(path) if each in read):
                same = "" if os.fspath(path) == str(source) else f", the same file as {source},"
                message = f"{path}{same} is one of the sources; name another output"
                raise TargetError(message)


def _identities(path: PathLike) -> Iterator[object]:
    """What two names of one file have in common: the path without links, device and inode."""
    yield os.path.realpath(path)
    try:
        status = Path(path).stat()
    except OSError:
        return
    yield status.st_dev, status.st_ino
