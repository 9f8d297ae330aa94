"""The register of readers: opens files of other programs by their content.

A reader is a `TraceSource`. Which one opens a file is decided by its content (`signatures`), never
by its name. Other packages add readers in the entry-point group `ENTRY_POINTS`; these are asked
first.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Final

from h5traces.errors import ConversionError, warn
from h5traces.meaning.options import ReadingOptions
from h5traces.paths import is_archive
from h5traces.sources.signatures import KINDS, identify
from h5traces.storage.files import open_regular

if TYPE_CHECKING:
    from h5traces.sources.signatures import Kind
    from h5traces.sources.source import TraceSource

ENTRY_POINTS: Final = "h5traces.sources"
# Bytes that readers of other packages get to see.
_HEAD_NBYTES: Final = 4096

# Module and class by kind: loaded on first use, as archives are read without them.
_READERS: Final[dict[str, tuple[str, str]]] = {
    "pickle": ("h5traces.sources.pickle.stream", "BatchStream"),
    "torch": ("h5traces.sources.torch_file", "TorchZipStream"),
    "torch-old": ("h5traces.sources.torch_file", "OldTorchStream"),
    "safetensors": ("h5traces.sources.safetensors", "SafetensorsSource"),
    "npz": ("h5traces.sources.numpy_file", "NpzSource"),
    "npy": ("h5traces.sources.numpy_file", "NpySource"),
    **dict.fromkeys(
        ("parquet", "arrow", "jsonl", "json", "datasets-folder"),
        ("h5traces.sources.tables", "TableSource"),
    ),
}
# Reads what a mapping describes.
_MAPPED: Final = ("h5traces.sources.mapped_source", "MappedSource")
# Kinds that their readers decompress, and from what.
DECOMPRESSED: Final = frozenset(
    ("pickle", "torch", "torch-old", "safetensors", "npz", "npy", "jsonl", "json")
)
_DECOMPRESSORS: Final = frozenset(("gzip", "bz2", "xz", "lzma", "zstd", "zlib"))

_SUFFIX: Final = re.compile(
    r"\.(?:pkl|pickle|p|pt|pth|ckpt|safetensors|npz|npy|bin|dat|raw|jsonl?|parquet|arrow|feather|joblib|h5|hdf5|hdf)\Z"
)
_PACKED_SUFFIX: Final = re.compile(r"\.(?:gz|bz2|xz|lzma|zst|zstd|z|lz4)\Z", re.IGNORECASE)
SOURCE_SUFFIXES: Final = (".pkl.gz", ".pickle.gz", ".pkl", ".pickle")
# Digits, or an id such as that of a request: 8 or more hexadecimal digits and dashes.
_NUMBERS: Final = re.compile(r"(?<![0-9A-Za-z])(?=[a-f-]*[0-9])[0-9a-f-]{8,}(?![0-9A-Za-z])|[0-9]+")
_BATCH_NAME: Final = re.compile(
    r"(?P<model_id>.+)_(?P<dataset>triviaqa|trivia_qa|truthfulqa|truthful_qa|[A-Za-z0-9-]+)"
    r"_batch_\d+(_sub\d+)?\Z"
)


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a file is, and who reads it.

    Attributes
    ----------
    path
        The file or folder.
    kind
        What it is.
    reader
        Reads it as a source of traces; None if nothing does, as for archives.
    """

    path: Path
    kind: Kind
    reader: type[TraceSource] | None

    @property
    def is_readable(self) -> bool:
        """Whether `open_source` opens it."""
        return self.reader is not None

    @property
    def is_ours(self) -> bool:
        """Whether h5traces wrote it: an archive, scales or features."""
        return self.kind.is_ours

    @property
    def reason(self) -> str:
        """Why it is not read, and what to do: a sentence that begins with its name."""
        remedy = self.kind.remedy
        if self.kind.compression and self.kind.id in _READERS:
            remedy = KINDS[self.kind.compression].remedy
        return f"{self.path}: is {self.kind}; {remedy}"


def recognise(path: str | os.PathLike[str], options: ReadingOptions | None = None) -> Recognised:
    """What a file or folder is, and which reader opens it.

    Parameters
    ----------
    path
        The file or folder.
    options
        What the user says about it: a mapping opens what nothing else reads.

    Raises
    ------
    FileNotFoundError, PermissionError
        It does not exist, or cannot be read.
    ConversionError
        It is a pipe or a device.
    """
    path = Path(path)
    kind = identify(path)
    if kind.is_ours:
        return Recognised(path, kind, None)
    if options is not None and options.mapping is not None:
        # A mapping may say that any file is raw numbers, or that a folder is one source.
        is_read = kind.id != "folder" or _takes_folders(options)
        return Recognised(path, kind, _loaded(_MAPPED) if is_read else None)
    return Recognised(path, kind, _reader_of(path, kind))


def open_source(path: str | os.PathLike[str], options: ReadingOptions | None = None) -> TraceSource:
    """Open a source, a context manager: it yields dicts, its `records` yields records.

    Parameters
    ----------
    path
        A file, or a folder that is one set, of any kind that a reader takes.
    options
        What the user says about it.

    Raises
    ------
    FileNotFoundError, PermissionError
        It does not exist, or cannot be read.
    ConversionError
        No reader takes it: the message says what it is, and what to do.
    """
    found = recognise(path, options)
    if found.reader is None:
        raise ConversionError(found.reason)
    from h5traces.sources.source import errors_of

    with errors_of(found.reader, path):
        source = found.reader(path, options=options or ReadingOptions())
        if not hasattr(source, "established"):
            message = "its __init__ does not call super().__init__(path, options=options)"
            raise TypeError(message)
        return source


def is_read_as_archive(path: Path, options: ReadingOptions) -> bool:
    """Whether a file is opened as an archive; one that a mapping describes is if we wrote it."""
    if options.mapping is not None or path.is_dir():
        return recognise(path).is_ours
    return is_archive(path)


def _reader_of(path: Path, kind: Kind) -> type[TraceSource] | None:
    added = added_readers()
    if added:
        from h5traces.sources.source import errors_of

        head = _head(path)
        for reader in added:
            with errors_of(reader, path):
                if reader.recognises(path, head):
                    return reader
    is_packed = kind.compression is not None
    if kind.id not in _READERS or (
        is_packed and not (kind.id in DECOMPRESSED and kind.compression in _DECOMPRESSORS)
    ):
        return None
    return _loaded(_READERS[kind.id])


def _takes_folders(options: ReadingOptions) -> bool:
    from h5traces.sources.mapping import mapping_of

    mapping = mapping_of(options)
    return mapping is not None and mapping.folder


def _loaded(reader: tuple[str, str]) -> type[TraceSource]:
    module, name = reader
    found: type[TraceSource] = getattr(importlib.import_module(module), name)
    return found


def _head(path: Path) -> bytes:
    if path.is_dir():
        return b""
    with os.fdopen(open_regular(path, ConversionError), "rb") as file:
        return file.read(_HEAD_NBYTES)


@functools.cache
def added_readers() -> tuple[type[TraceSource], ...]:
    """The readers of other packages, sorted by name; one that cannot be loaded is named, once."""
    from h5traces.sources.source import TraceSource

    found: list[type[TraceSource]] = []
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda each: each.name):
        where = f"the reader {entry.name!r} ({entry.value}, entry points {ENTRY_POINTS!r})"
        try:
            reader = entry.load()
        except Exception as error:  # noqa: BLE001, RUF100  # whatever another package raises
            problem = f"cannot be imported: {type(error).__name__}: {error}"
        else:
            if isinstance(reader, type) and issubclass(reader, TraceSource):
                found.append(reader)
                continue
            problem = "is not a class of h5traces.TraceSource"
        warn(f"{where} {problem}; files are read without it", UserWarning)
    return tuple(found)


def source_stem(name: str) -> str:
    """A source's file name without the suffixes of its kind and its compressor."""
    unpacked = _PACKED_SUFFIX.sub("", name)
    stem = _SUFFIX.sub("", unpacked)
    return stem if stem and stem != unpacked else name


def run_stem(name: str) -> str:
    """A source's stem with ``#`` for the numbers and ids that tell files of a run apart."""
    return _NUMBERS.sub("#", source_stem(name))


def facts_in_name(path: str | os.PathLike[str]) -> dict[str, str]:
    """``model_id`` and ``dataset`` of ``{model}_{dataset}_batch_0000.pkl.gz``; else nothing."""
    found = _BATCH_NAME.match(source_stem(Path(path).name))
    return {} if found is None else found.groupdict()
