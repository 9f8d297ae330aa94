"""Which files of a folder are sources of traces, by their content, and what becomes of the others.

Nothing is passed over in silence. A file that is not read is either *left*: it seems to belong to
the same run (by its name, or because it should hold traces), so that a conversion without it is not
whole; or it is *unrelated*: a README, a table of labels, h5traces' own files.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from h5traces.errors import ConversionError, H5TracesError, warn
from h5traces.format.text import and_more
from h5traces.paths import (
    ARCHIVE_SUFFIXES,
    expand_paths,
    expand_sources,
    has_wildcards,
    listed_sources,
    walk,
)
from h5traces.sources.opening import SOURCE_SUFFIXES, open_source, recognise, source_stem
from h5traces.sources.runs import run_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from h5traces.meaning.options import ReadingOptions
    from h5traces.paths import Other, Source
    from h5traces.sources.opening import Recognised
    from h5traces.sources.source import TraceSource
    from h5traces.storage.remote.paths import RemotePath

# Users expect such a file in a folder of traces to be read. Of pickles, only those that
# are named so: many files of other kinds begin like one.
_OF_TRACES: Final = frozenset({"torch", "torch-old", "safetensors"})
_NAMED_AS_TRACES: Final = re.compile(
    r"\.(?:pkl|pickle|pt|pth|ckpt|safetensors)(?:\.(?:gz|bz2|xz|lzma|zstd?|lz4))?\Z", re.IGNORECASE
)
# Files beside the configuration of a model belong to it, not to a run.
_WEIGHTS: Final = re.compile(
    r"(?:model|pytorch_model|adapter_model|consolidated|optimizer|scheduler|training_args|rng_state)"
    r"\b.*\.(?:safetensors|bin|pt|pth)\Z"
)
_CONFIGURATIONS: Final = ("config.json", "adapter_config.json", "params.json")
# Files beside a batch that describe it, under its name.
_COMPANIONS: Final = frozenset(
    {"json", "jsonl", "csv", "text", "html", "xml", "office", "image", "pdf", "empty"}
)
_SUFFIXES: Final = re.compile(r"(?:\.[A-Za-z]\w{0,7})+\Z", re.ASCII)
_PART: Final = ".part"
_EXAMPLES: Final = "pickles, files of torch.save or safetensors"


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file that is not read.

    Attributes
    ----------
    path
        The file.
    kind
        What it is, by its content, such as ``a zip file``.
    reason
        Why it is not read, and what to do.
    """

    path: str
    kind: str
    reason: str


@dataclass(slots=True)
class Collected:
    """What a name stands for.

    Attributes
    ----------
    sources
        Files to read, each with its path relative to the folder that was named.
    left
        Files that are not read though they seem to belong to them.
    unrelated
        Files that are not read and need not be.
    """

    sources: list[tuple[Path, Path]] = field(default_factory=list)
    left: list[Leftover] = field(default_factory=list)
    unrelated: list[Leftover] = field(default_factory=list)

    def add(self, other: Collected) -> None:
        """Add what another name stands for."""
        self.sources += other.sources
        self.left += other.left
        self.unrelated += other.unrelated


def collect(source: str | os.PathLike[str], reading: ReadingOptions | None = None) -> Collected:
    """The sources that a file, glob or folder stands for, and what is not read.

    A file that is named itself is a source whatever it holds: its reader says what is wrong.

    Parameters
    ----------
    source
        As the user gives it.
    reading
        What the user says about sources; files that may be anything are tried with it.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    ConversionError
        A folder holds no source.
    """
    path = Path(source)
    if path.is_dir() and not _is_set(path, reading):
        return _of_folder(path, reading)
    if path.is_dir():
        return Collected([(path, Path(path.name))])
    if path.exists() or not has_wildcards(source):
        (path,) = expand_paths(source, SOURCE_SUFFIXES)
        if _is_part(path):
            return Collected(left=[_unfinished(path)])
        return Collected([(path, Path(path.name))])
    return _of_glob(expand_paths(source, SOURCE_SUFFIXES), reading)


def archives_and_sources(
    named: Source | Iterable[Source], reading: ReadingOptions | None = None
) -> list[Path | RemotePath]:
    """The archives and the files of other programs that names stand for, in the order given.

    In folders, the content decides; a warning names files that seem to belong to them and are not
    read. Addresses of servers stand for archives.

    Raises
    ------
    FileNotFoundError
        Nothing is there, or a folder holds neither.
    """
    found: list[Path | RemotePath] = []
    for each in listed_sources(named):
        if isinstance(each, (str, os.PathLike)) and Path(each).is_dir():
            found += _in_folder(Path(each), reading)
        else:
            found += expand_sources(each, (*SOURCE_SUFFIXES, *ARCHIVE_SUFFIXES))
    return list(dict.fromkeys(found))


def _in_folder(folder: Path, reading: ReadingOptions | None) -> list[Path]:
    found: list[Path] = []
    with contextlib.suppress(FileNotFoundError):
        found += expand_paths(folder)
    try:
        collected = collect(folder, reading)
    except ConversionError as error:
        if not found:
            raise FileNotFoundError(str(error)) from error
        return found
    if collected.left:
        reasons = and_more([each.reason for each in collected.left], 5)
        warn(f"not read: {reasons}", UserWarning)
    return sorted({*found, *(path for path, _ in collected.sources)})


def _is_set(folder: Path, reading: ReadingOptions | None) -> bool:
    """Whether a folder as a whole is one source."""
    return recognise(folder, reading).is_readable


def _of_folder(folder: Path, reading: ReadingOptions | None) -> Collected:
    walked = walk(folder, is_one=lambda each: _is_set(each, reading))
    found = _sorted_out(walked.files, reading)
    found.sources = [(path, path.relative_to(folder)) for path, _ in found.sources]
    _place_others(found, walked.others)
    if not found.sources and not found.left:
        message = f"{folder}: the folder holds no batch; expected {_EXAMPLES}"
        if found.unrelated:
            named = "; ".join(f"{each.path} is {each.kind}" for each in found.unrelated[:5])
            message += f" (found: {named}{'; and more' if len(found.unrelated) > 5 else ''})"
        raise ConversionError(message)
    return found


def _of_glob(matches: list[Path], reading: ReadingOptions | None) -> Collected:
    files = [path for path in matches if not path.is_dir() or _is_set(path, reading)]
    found = _sorted_out(files, reading)
    for folder in (path for path in matches if path not in files):
        # '**' also matches the folders on its way.
        if any(folder in path.parents for path in files):
            continue
        message = f"{folder}: is a folder; name it itself, or end the glob in '/**/*'"
        found.unrelated.append(Leftover(str(folder), "a folder", message))
    return found


def _sorted_out(files: list[Path], reading: ReadingOptions | None) -> Collected:
    """Sources among files, and the others."""
    found = Collected()
    unsure: list[Recognised] = []
    for path in files:
        if _is_part(path):
            _place_part(found, path)
            continue
        if _is_of_a_model(path) and not _holds_traces(path, reading):
            message = f"{path}: is of a model, whose configuration lies beside it, and no traces"
            found.unrelated.append(Leftover(str(path), "weights of a model", message))
            continue
        try:
            recognised = recognise(path, reading)
        except (H5TracesError, OSError) as error:
            message = str(error) if str(path) in str(error) else f"{path}: {error}"
            found.left.append(Leftover(str(path), "a file that cannot be read", message))
            continue
        if recognised.is_readable and _is_of_traces(recognised):
            found.sources.append((path, Path(path.name)))
        else:
            unsure.append(recognised)
    names = _Names([path for path, _ in found.sources])
    # Files of unclear content are tried, those whose names differ only in numbers until one holds
    # traces: a first sample may be a whole file.
    runs: set[tuple[Path, str, str]] = set()
    no_traces: list[Recognised] = []
    for each in unsure:
        is_named_so = names.continues(each.path) and each.kind.id not in _COMPANIONS
        if each.is_readable and (
            is_named_so or _run_of(each) in runs or _holds_traces(each.path, reading)
        ):
            runs.add(_run_of(each))
            found.sources.append((each.path, Path(each.path.name)))
        else:
            no_traces.append(each)
    for each in no_traces:
        leftover = Leftover(str(each.path), str(each.kind), each.reason)
        belongs = _run_of(each) in runs or _belongs(each, names)
        (found.left if belongs else found.unrelated).append(leftover)
    found.sources.sort()
    return found


def _run_of(found: Recognised) -> tuple[Path, str, str]:
    """What is common to files of one kind whose names differ only in numbers."""
    return *run_of(found.path), found.kind.id


def _is_of_a_model(path: Path) -> bool:
    """Whether a file has a name that transformers gives to weights, and its folder is a model's."""
    return _WEIGHTS.match(path.name) is not None and any(
        (path.parent / each).is_file() for each in _CONFIGURATIONS
    )


def _is_of_traces(found: Recognised) -> bool:
    """Whether a file should hold traces, by its kind or its name."""
    return found.kind.id in _OF_TRACES or _NAMED_AS_TRACES.search(found.path.name) is not None


def _holds_traces(path: Path, reading: ReadingOptions | None) -> bool:
    """Whether the first sample of a file that may be anything is a trace."""
    try:
        with open_source(path, reading) as source:
            return _has_a_record(source)
    except (H5TracesError, OSError):
        return False


def _has_a_record(source: TraceSource) -> bool:
    return next(source.records(), None) is not None


def _belongs(found: Recognised, names: _Names) -> bool:
    """Whether a file that is not read seems to be one of the run's."""
    if found.is_ours:
        return False
    if _is_of_traces(found):
        return True
    path = found.path
    if found.kind.id in _COMPANIONS:
        return names.continues(path) and not names.has_stem(path)
    return names.continues(path) or names.continues(
        path.with_name(_SUFFIXES.sub("", path.name) or path.name)
    )


class _Names:
    """How the sources of a run are named: ``run_batch_0003`` continues ``run_batch_0000``."""

    def __init__(self, sources: list[Path]) -> None:
        self._stems = {(path.parent, source_stem(path.name)) for path in sources}
        self._patterns = {run_of(path) for path in sources}

    def has_stem(self, path: Path) -> bool:
        """Whether a source has this name, but for the suffix."""
        return (path.parent, source_stem(path.name)) in self._stems

    def continues(self, path: Path) -> bool:
        """Whether sources have this name, but for numbers and the suffix."""
        return run_of(path) in self._patterns


def _is_part(path: Path) -> bool:
    return path.name.endswith(_PART) and not path.is_dir()


def _place_part(found: Collected, path: Path) -> None:
    """An unfinished batch is missing in the conversion; an unfinished archive is none of it."""
    if any(suffix in path.name for suffix in SOURCE_SUFFIXES):
        found.left.append(_unfinished(path))
        return
    message = f"{path}: is an unfinished write of another program or run"
    found.unrelated.append(Leftover(str(path), "an unfinished write", message))


def _unfinished(path: Path) -> Leftover:
    message = f"{path}: is an unfinished write; extract or copy the batch again"
    return Leftover(str(path), "an unfinished write", message)


def _place_others(found: Collected, others: list[Other]) -> None:
    """What is not a plain file, and folders that the walk did not enter."""
    names = _Names([path for path, _ in found.sources])
    for each in others:
        message = f"{each.path}: is {each.what}; {each.remedy}"
        leftover = Leftover(str(each.path), each.what, message)
        (found.left if _may_belong(each, names) else found.unrelated).append(leftover)


def _may_belong(other: Other, names: _Names) -> bool:
    if other.may_hold_files:
        return True
    path = other.path
    if not other.is_hidden:
        return names.continues(path) or _NAMED_AS_TRACES.search(path.name) is not None
    # macOS writes '._name' beside every file, 'rsync' '.name.Ab3dE9' until a file is whole.
    if path.name.startswith("._"):
        return False
    bare = path.with_name(path.name.removeprefix("."))
    return names.continues(bare) or names.continues(bare.with_suffix(""))
