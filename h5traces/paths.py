"""What a user names: sources to read (files, globs, folders, addresses) and outputs to write."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self
from urllib.request import url2pathname

from h5traces.errors import H5TracesError, RemoteError, TargetError, warn
from h5traces.format import layout
from h5traces.format.text import and_more
from h5traces.storage.files import open_regular
from h5traces.storage.remote.file import list_remote
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemoteOptions, RemotePath, is_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ARCHIVE_SUFFIXES: Final = (".h5", ".hdf5")
# Of an archive in a folder that the user named.
DEFAULT_NAME: Final = "traces"
_BATCH_NAME: Final = re.compile(r"\.(pkl|pickle)(\.gz)?\Z")
_LOCAL_URL: Final = "file://"
# In an HDF5 superblock of version 2 or 3, where the header of the root is; that holds attributes.
_ROOT_ADDRESS: Final = struct.Struct("<36xQ")
_ROOT_NBYTES: Final = 64 << 10
# Name, type, extent and value of the attribute 'format'.
_OTHER_FORMAT: Final = re.compile(
    rb"format\0.{12}(?:%s)" % b"|".join(each.encode() for each in layout.OTHER_FORMATS), re.DOTALL
)

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
            raise _not_on_disk(each)
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


def local_path(source: Source) -> Path:
    """The path of a source that has to lie on disk; RemoteError for one on a server."""
    place = _place(source)
    if isinstance(place, RemotePath):
        raise _not_on_disk(place)
    return Path(place)


def _not_on_disk(path: RemotePath) -> RemoteError:
    message = (
        f"{path}: expected a file on disk; download it. 'open', 'inspect', 'ls', "
        "'label', 'features', 'repack' and 'merge' read archives on servers"
    )
    return RemoteError(message)


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


@dataclass(frozen=True, slots=True)
class Other:
    """Something in a folder that is not a plain file, or was not entered.

    Attributes
    ----------
    path
        Where it is.
    what
        What it is, after "is".
    remedy
        What to do where it should be read.
    is_hidden
        Whether its name begins with a dot.
    may_hold_files
        Whether files lie in it that nothing else in the folder leads to.
    """

    path: Path
    what: str
    remedy: str
    _: KW_ONLY
    is_hidden: bool = False
    may_hold_files: bool = False


@dataclass(slots=True)
class Walked:
    """What lies in a folder and in those below it.

    Attributes
    ----------
    files
        Plain files and links to them, sorted; and folders that are one thing.
    others
        All else but folders that were entered.
    """

    files: list[Path] = field(default_factory=list)
    others: list[Other] = field(default_factory=list)


def walk(folder: Path, *, is_one: Callable[[Path], bool] = lambda _: False) -> Walked:
    """What lies in a folder and below it; nothing is opened.

    Links to folders are not followed, and hidden folders are not entered, nor are those for which
    `is_one` is true: these count as files.
    """
    found = Walked()
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            entries = list(os.scandir(place))
        except OSError as error:
            why = f"a folder that cannot be read ({error.strerror})"
            found.others.append(Other(place, why, "make it readable", may_hold_files=True))
            continue
        for entry in entries:
            path = place / entry.name
            other = _other(entry, path, folder)
            if other is not None:
                found.others.append(other)
            elif entry.is_dir() and not is_one(path):
                waiting.append(path)
            else:
                found.files.append(path)
    found.files.sort()
    found.others.sort(key=lambda each: each.path)
    return found


# What a file that is not a plain one is, by its type.
_SPECIAL: Final = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _other(entry: os.DirEntry[str], path: Path, root: Path) -> Other | None:
    """Why an entry of a folder is neither a plain file nor a folder to enter; None if it is."""
    if entry.name.startswith("."):
        what = "a hidden folder" if entry.is_dir() else "a hidden file"
        return Other(path, what, "name it itself to read it", is_hidden=True)
    if entry.name == "__pycache__":
        return Other(path, "a cache of Python", "it holds no traces")
    try:
        mode = entry.stat().st_mode
    except OSError:
        return Other(path, f"a broken link to {_link_target(path)}", "restore the file it leads to")
    if stat.S_ISDIR(mode) and entry.is_symlink():
        is_inside = root.resolve() in (path.resolve(), *path.resolve().parents)
        what = f"a link to the folder {_link_target(path)}, which is not followed"
        return Other(path, what, "name that folder, too", may_hold_files=not is_inside)
    special = _SPECIAL.get(stat.S_IFMT(mode))
    return None if special is None else Other(path, special, "only plain files are read")


def _link_target(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return "nowhere"


def has_wildcards(source: PathLike) -> bool:
    """Whether a name is a glob."""
    return glob.has_magic(os.fspath(source))


def _expand_local(source: PathLike, suffixes: tuple[str, ...]) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        matches = _archives_below(path, suffixes)
    elif path.exists():
        matches = [path]
    else:
        found = sorted(Path(each) for each in glob.glob(str(source), recursive=True))  # noqa: PTH207  # Path.glob takes no absolute pattern
        matches = found if len(found) == 1 else _without_other_files(found, [])
    if not matches and path.is_dir():
        message = f"{source}: holds no {' or '.join(suffixes)} file"
        batches = sum(_BATCH_NAME.search(each.name) is not None for each in walk(path).files)
        if batches:
            message += (
                f", but {batches} pickled batch{'es' * (batches != 1)}; h5traces.convert makes "
            )
            message += "archives of them"
        raise FileNotFoundError(message)
    if not matches:
        message = f"{source}: no such file, and nothing that matches; expected a file, a glob "
        message += "or a folder"
        raise FileNotFoundError(message)
    return matches


def _archives_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    walked = walk(folder)
    skipped = [
        f"{each.path} is {each.what}"
        for each in walked.others
        if each.may_hold_files or (each.is_hidden and each.path.name.endswith(suffixes))
    ]
    # A broken link and a pipe end the reading with an error that names them.
    special = [each.path for each in walked.others if not each.is_hidden]
    found = [each for each in (*walked.files, *special) if each.name.endswith(suffixes)]
    return _without_other_files(sorted(found), skipped)


def _without_other_files(found: list[Path], skipped: list[str]) -> list[Path]:
    """The files but features and scales; what is skipped is named in a warning."""
    others = [each for each in found if _is_other_file(each)]
    matches = [each for each in found if each not in others]
    if not matches:
        return found
    skipped = [*(f"{each} is of features or scales" for each in others), *skipped]
    if skipped:
        warn(f"skipped, as no archives: {and_more(skipped, separator='; ')}", UserWarning)
    return matches


def _is_other_file(path: Path) -> bool:
    """Whether a file is one of features or scales, as h5traces writes them, without HDF5.

    Opening every file of a folder with HDF5 would be slow, and unsafe outside of a child process.
    """
    if not path.name.endswith(ARCHIVE_SUFFIXES):
        return False
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            head = file.read(_ROOT_ADDRESS.size)
            if len(head) < _ROOT_ADDRESS.size or not head.startswith(layout.HDF5_SIGNATURE):
                return False
            file.seek(_ROOT_ADDRESS.unpack(head)[0])
            return _OTHER_FORMAT.search(file.read(_ROOT_NBYTES)) is not None
    except (OSError, OverflowError, ValueError, H5TracesError):
        return False


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


def check_not_among(target: Target, sources: Iterable[Source]) -> None:
    """Reject an output that a folder or glob of the sources would find beside what it was made of.

    Whoever names that folder or glob again would read every sample twice.
    """
    path = target.shard(0)
    for source in sources:
        place = _place(source)
        if isinstance(place, RemotePath):
            continue
        folder = Path(place)
        if folder.is_dir():
            found = folder.resolve() in path.resolve().parents
        else:
            found = not folder.exists() and _would_match(path, os.fspath(place))
        if found:
            message = (
                f"{path} would lie among its sources: {source} names it, too, so its samples would "
                "be read twice from now on; choose another folder"
            )
            raise TargetError(message)


def _would_match(path: Path, pattern: str) -> bool:
    """Whether a glob would find a file that may not exist yet."""
    folder, name = os.path.split(os.path.abspath(pattern))  # noqa: PTH100  # resolve follows links
    if not fnmatch.fnmatchcase(path.name, name):
        return False
    place = os.path.realpath(path.parent)
    return any(place == os.path.realpath(each) for each in glob.glob(folder, recursive=True))  # noqa: PTH207  # as above


def _identities(path: PathLike) -> Iterator[object]:
    """What two names of one file have in common: the path without links, device and inode."""
    yield os.path.realpath(path)
    try:
        status = Path(path).stat()
    except OSError:
        return
    yield status.st_dev, status.st_ino
