"""Whether an archive that exists is the one that a conversion would write.

An archive records the files that it was made of (name, size, time, digests) and the options that
shaped it. Both are compared: a stale archive must not be kept for a finished one.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import xxhash

from h5traces.archive.opening import open as open_archive
from h5traces.archive.selection import choose_layers
from h5traces.errors import (
    ConversionError,
    H5TracesError,
    LayerIndexError,
    StoredStateWarning,
    TargetError,
)
from h5traces.format.archive import SourceFile
from h5traces.format.precision import EXACT
from h5traces.format.text import and_more
from h5traces.meaning.options import RunFacts
from h5traces.storage.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from h5traces.archive.selection import LayerChoice
    from h5traces.format.archive import ArchiveMetadata
    from h5traces.meaning.options import ReadingOptions
    from h5traces.storage.remote.paths import RemotePath
    from h5traces.writing.options import Compare, WriteOptions

# Bytes of each end of a source that its digest covers.
_END_NBYTES: Final = 1 << 16
_BLOCK_NBYTES: Final = 8 << 20
_SECOND: Final = 10**9


def source_file(path: Path, *, whole: bool = False) -> SourceFile:
    """Recorded facts about a source: size, time, and digests of its ends or, if `whole`, of all.

    A folder that is one source counts with all files below it.
    """
    if path.is_dir():
        return _source_folder(path, whole=whole)
    with os.fdopen(open_regular(path, ConversionError), "rb") as file:
        status = os.fstat(file.fileno())
        ends = xxhash.xxh3_128(file.read(_END_NBYTES))
        file.seek(max(file.tell(), status.st_size - _END_NBYTES))
        ends.update(file.read(_END_NBYTES))
        digest = None
        if whole:
            file.seek(0)
            state = xxhash.xxh3_128()
            while block := file.read(_BLOCK_NBYTES):
                state.update(block)
            digest = state.hexdigest()
    return SourceFile(
        name=path.name,
        nbytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        ends_digest=ends.hexdigest(),
        digest=digest,
    )


def _source_folder(folder: Path, *, whole: bool) -> SourceFile:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [source_file(path, whole=whole) for path in paths]
    ends, digest = xxhash.xxh3_128(), xxhash.xxh3_128()
    for path, file in zip(paths, files, strict=True):
        name = os.fsencode(path.relative_to(folder)) + b"\0"
        ends.update(name + str(file.ends_digest).encode())
        digest.update(name + str(file.digest).encode())
    return SourceFile(
        name=folder.name,
        nbytes=sum(each.nbytes for each in files),
        modified_ns=max((each.modified_ns or 0 for each in files), default=0),
        ends_digest=ends.hexdigest(),
        digest=digest.hexdigest() if whole else None,
    )


def recorded_options(
    reading: ReadingOptions, scales: str | None, layers: LayerChoice = None
) -> dict[str, Any]:
    """The options of a conversion that no other attribute of an archive shows, but defaults.

    `scales` says where those of a lossy tier come from.
    """
    found: dict[str, Any] = {}
    if reading.first_state is not None:
        found["first_state"] = reading.first_state
    if reading.keep_padding:
        found["keep_padding"] = True
    if reading.layer_ids is not None:
        found["layer_ids"] = list(reading.layer_ids)
    for name in ("mapping", "responses"):
        path = getattr(reading, name)
        if path is not None:
            with os.fdopen(open_regular(Path(path), ConversionError), "rb") as file:
                found[name] = xxhash.xxh3_128_hexdigest(file.read())
    if scales is not None:
        found["scales"] = scales
    if layers is not None:
        found["layers"] = layers if isinstance(layers, (int, str)) else list(layers)
    return found


class Archives(Protocol):
    """The archives of a `Target`, on disk or on a server."""

    @property
    def shard_samples(self) -> int | None:
        """The largest number of samples in one."""

    def existing(self) -> Sequence[Path | RemotePath]:
        """Where they are, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a conversion would write.

    Attributes
    ----------
    sources
        The files that it reads, in order.
    write
        How arrays are stored.
    layers
        Layers to keep.
    facts
        ``model_id`` and ``dataset``.
    options
        As `recorded_options` gives them.
    compare
        How thoroughly sources are compared.
    """

    sources: Sequence[Path]
    write: WriteOptions
    layers: LayerChoice
    facts: Mapping[str, str | None]
    options: Mapping[str, Any]
    compare: Compare


@dataclass(slots=True)
class Comparison:
    """How archives differ from what a conversion would write.

    Attributes
    ----------
    differs
        What differs; empty if they can be kept.
    unknown
        What their writer did not record.
    """

    differs: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def message(self, target: Path | RemotePath) -> str:
        """Why the archives cannot be kept, and what to do."""
        return (
            f"{target} exists, but is not what this command would write: "
            f"{'; '.join(self.differs)}. overwrite=True writes it anew; else choose another output"
        )

    def warning(self) -> str:
        """What could not be compared."""
        return f"kept, although its writer did not record {and_more(self.unknown, 9)}"


def compare_existing(target: Archives, wanted: Wanted) -> Comparison:
    """Compare the archives of a target with what a conversion would write.

    Raises
    ------
    TargetError
        A file with the name of an archive is none, or cannot be read.
    """
    shards = target.existing()
    found = Comparison()
    documents = [_metadata(path) for path in shards]
    _compare_options(found, documents[0], wanted)
    _compare_layers(found, documents[0], wanted)
    for number, metadata in enumerate(documents):
        if number == 0 or metadata.sources != documents[0].sources:
            _compare_sources(found, metadata.sources, wanted)
    size = target.shard_samples
    counts = [each.num_samples for each in documents]
    if size is not None and (any(each != size for each in counts[:-1]) or counts[-1] > size):
        sizes = and_more([str(each) for each in counts])
        found.differs.append(f"its shards hold {sizes} samples, not {size} each")
    found.differs = list(dict.fromkeys(found.differs))
    found.unknown = list(dict.fromkeys(found.unknown))
    return found


def _metadata(path: Path | RemotePath) -> ArchiveMetadata:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StoredStateWarning)
            with open_archive(path, labels=False) as archive:
                return archive._files[0].metadata
    except (H5TracesError, OSError) as error:
        message = f"{error}; it has the name of the new archive: move it, or pass overwrite=True"
        raise TargetError(message) from error


def _compare_options(found: Comparison, metadata: ArchiveMetadata, wanted: Wanted) -> None:
    write = wanted.write
    pairs: dict[str, tuple[Any, Any]] = {
        "precision": (str(metadata.precision or EXACT), str(write.precision)),
        "dtype": (metadata.dtype_policy, write.dtype),
        "on_overflow": (metadata.on_overflow, write.on_overflow),
        "codec": (metadata.codec, write.codec),
        **{name: (getattr(metadata, name), value) for name, value in wanted.facts.items()},
    }
    if metadata.conversion is None:
        found.unknown.append("how its source was read")
    else:
        _compare_reading(found, metadata.conversion, wanted.options)
    for name, (old, new) in pairs.items():
        if old != new:
            found.differs.append(f"its {name} is {old or 'none'}, not {new or 'none'}")


def _compare_reading(found: Comparison, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """The given facts about the source, as `recorded_options` returns them, without defaults."""
    runs = [RunFacts.from_dict(each.get("run")) for each in (before, now)]
    # A file alone says less than one among others of its run.
    if runs[0].contradicts(runs[1]):
        found.differs.append(
            "the other files of its run now say otherwise what its layers or axes are"
        )
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if old == new or name in ("run", "layers"):
            continue
        if name == "scales":
            found.differs.append("it was written with other scales")
        elif name == "mapping":
            which = "another" if old and new else "a"
            how = "without" if old is None else "with"
            found.differs.append(f"it was written {how} {which} mapping")
        elif old is None:
            found.differs.append(f"it was written without {name}={new!r}")
        else:
            found.differs.append(f"it was written with {name}={old!r}")


def _compare_layers(found: Comparison, metadata: ArchiveMetadata, wanted: Wanted) -> None:
    layers = wanted.layers
    if metadata.num_layers is None:
        # Positions: how many there are is not known before the source is read.
        before = (metadata.conversion or {}).get("layers")
        if before != wanted.options.get("layers") and metadata.conversion is not None:
            found.differs.append(f"it was written with layers={before!r}")
        return
    every = range(metadata.num_layers)
    stored = tuple(every) if metadata.layers is None else metadata.layers
    try:
        chosen = tuple(every) if layers is None else choose_layers(layers, every, "its source has")
    except LayerIndexError as error:
        found.differs.append(str(error))
        return
    if stored != chosen:
        names = (and_more([str(each) for each in one]) for one in (stored, chosen))
        found.differs.append("it holds the layers {}, not {}".format(*names))


def _compare_sources(
    found: Comparison, recorded: tuple[SourceFile, ...] | None, wanted: Wanted
) -> None:
    if recorded is None:
        found.differs.append("it does not say that it was converted from anything")
        return
    before, now = [each.name for each in recorded], [path.name for path in wanted.sources]
    if before != now:
        added = [name for name in now if name not in before]
        removed = [name for name in before if name not in now]
        changes = [f"{and_more(added)} {_is_are(added)} not in it"] if added else []
        changes += (
            [f"{and_more(removed)} {_is_are(removed)} not among the sources any more"]
            if removed
            else []
        )
        found.differs += changes or ["its sources came in another order"]
        return
    for old, path in zip(recorded, wanted.sources, strict=True):
        with contextlib.suppress(StopIteration):
            found.differs.append(next(_changes(found, old, path, wanted.compare)))


def _is_are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _changes(found: Comparison, old: SourceFile, path: Path, compare: Compare) -> Iterator[str]:
    """Signs that a source is not the recorded one, the cheapest first."""
    new = source_file(path)
    if new.nbytes != old.nbytes:
        yield f"{path} has {new.nbytes:,} bytes, and had {old.nbytes:,}"
    if old.ends_digest is None:
        found.unknown.append("when its source was last changed, and digests of it")
        return
    if new.ends_digest != old.ends_digest:
        yield f"{path} has another content"
    if compare == "ends" or (compare == "time" and _same_time(old, new)):
        return
    if old.digest is not None:
        if source_file(path, whole=True).digest != old.digest:
            yield f"{path} has another content"
    elif compare == "content":
        yield f"there is no digest of the whole of {path} in it, which compare='content' records"
    else:
        yield (
            f"{path} was written or copied after it was converted, though its size and its ends "
            "are the same (compare='ends' keeps such archives)"
        )


def _same_time(old: SourceFile, new: SourceFile) -> bool:
    """Whether both were changed at one time; some file systems and programs keep seconds only."""
    first, second = old.modified_ns or 0, new.modified_ns or 0
    in_seconds = first % _SECOND == 0 or second % _SECOND == 0
    return first == second or (in_seconds and first // _SECOND == second // _SECOND)
