"""`collect`: one report of a run of several ranks, and one archive or catalogue of its shards."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import xxhash

from h5traces.archive.opening import open as open_archive
from h5traces.arguments import checked
from h5traces.checking.verify import verify as verify_archive
from h5traces.errors import H5TracesError, TargetError
from h5traces.format.digests import content_digest
from h5traces.format.html import Report
from h5traces.format.text import and_more, counted
from h5traces.meaning.checks import FindingSummary
from h5traces.paths import Target, expand_sources
from h5traces.ranks.status import RunStatus, last_lines, planned, room_of, status
from h5traces.rewriting.repack import merge
from h5traces.rewriting.reports import ConversionReport, FileReport
from h5traces.storage.remote.file import RemoteFile
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemotePath, is_url
from h5traces.writing.finish import take_over
from h5traces.writing.spool_folder import spool_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from h5traces.archive.file import ArchiveFile
    from h5traces.paths import PathLike
    from h5traces.ranks.plan import RunPlan
    from h5traces.ranks.status import Room
    from h5traces.rewriting.ordering import Order

# If 5 % of many archives were damaged, a sample of this size would show it with 95 % probability.
NUM_SAMPLED: Final = 60
CATALOGUE_SUFFIX: Final = ".parquet"
_MOST_NAMED: Final = 3
_FETCHED_NBYTES: Final = 16 << 20


@dataclass(slots=True)
class CollectReport(Report):
    """What became of a run of several ranks.

    Attributes
    ----------
    status
        Ranks, pieces of work, samples and bytes, see `h5traces.status`.
    num_archives, num_samples
        What lies in the folder.
    packed
        Archives that were made now, of samples that ranks had left in their spool.
    missing
        What the run lacks: sources that no rank has converted, ids of samples that none has
        extracted.
    left_out
        Samples that an extraction left out, and why.
    duplicates
        Archives that are copies, samples with the same contents, and ids that several archives
        have.
    problems
        Damaged, missing and foreign archives, and what failed.
    warnings
        What the ranks of an extraction reported.
    files
        Of a conversion, the report of every archive.
    num_verified
        Archives that were compared with their checksums.
    output
        The archive or catalogue that was written; None if there is none.
    """

    status: RunStatus
    num_archives: int = 0
    num_samples: int = 0
    packed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    files: list[FileReport] = field(default_factory=list)
    num_verified: int = 0
    output: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all the work is done and none of it is lost."""
        return self.status.ok and not self.missing and not self.left_out

    @property
    def ok(self) -> bool:
        """Whether the run is complete, and no archive has a problem."""
        return self.is_complete and not self.problems

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "ok": self.ok,
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "status": self.status.as_dict(),
            "files": [each.as_dict() for each in self.files],
        }


@checked
def collect(
    folder: PathLike,
    output: PathLike | None = None,
    *,
    verify: Literal["sample", "all", "none"] = "sample",
    order: Order | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CollectReport:
    """Make one report of a run of several ranks, check its archives, and join them.

    Of an extraction, samples that dead ranks left in the spool are packed where their shard is
    complete.

    Parameters
    ----------
    folder
        The output of a command that was started with ``rank``, also ``s3://bucket/run/``; archives
        to verify are fetched from there, one at a time.
    output
        A name ending in ``.h5`` for one archive of all, as by `h5traces.merge`, or in ``.parquet``
        for a catalogue, as by `h5traces.index`. It is written if the run is complete and nothing is
        damaged. The default is neither.
    verify
        Which archives are compared with their checksums: 60 drawn at random (all, if there are
        fewer), all, or none. The index of every archive is read in any case.
    order
        Of the samples of the one archive, as for `h5traces.merge`.
    workers
        Threads; one per core by default.
    progress
        Called with the number of archives verified, and of those to verify.

    Returns
    -------
    CollectReport
        ``report.ok`` says whether the run is complete and nothing is damaged.

    Raises
    ------
    TargetError
        There is no run in `folder`, or `output` has another suffix.
    ArchiveExistsError
        The archive `output` exists.
    """
    room = room_of(folder)
    target = None if output is None else Path(output)
    if target is not None and target.suffix not in (".h5", CATALOGUE_SUFFIX):
        message = (
            f"{output}: expected a name that ends in .h5 (an archive) or .parquet (a catalogue)"
        )
        raise TargetError(message)
    plan, place = planned(room), str(room)
    if plan.command in ("features", "index"):
        message = (
            f"{place}: is a run of {plan.command}, whose ranks write one file and collect it "
            "themselves; 'h5traces status' says how far it is"
        )
        raise TargetError(message)
    packed = _packed(place, plan)
    report = CollectReport(
        status(place),
        packed=packed.archives,
        problems=packed.problems,
        warnings=packed.warnings,
    )
    paths = [each for each in _archives(place) if each != target]
    report.num_archives = len(paths)
    seen = _Seen(place)
    for path in paths:
        try:
            with open_archive(path) as archive:
                seen.add(archive._files[0])
        except H5TracesError as error:
            report.problems.append(str(error))
    report.num_samples = len(seen.keys)
    report.duplicates = seen.duplicates()
    if plan.command == "extract":
        _extracted(report, room, plan, seen)
    else:
        _converted(report, plan, room.whole(last_lines(room)), seen)
    chosen = paths if verify == "all" else _drawn(paths) if verify == "sample" else []
    for number, path in enumerate(chosen):
        with _on_disk(path) as local:
            (found,) = verify_archive(local, workers=workers)
        report.problems += [f"{path}: {each.loc}: {each.message}" for each in found.problems]
        report.num_verified += 1
        if progress is not None:
            progress(number + 1, len(chosen))
    if target is not None and report.ok:
        _write(paths, target, order, workers)
        report.output = str(target)
    return report


@dataclass(slots=True)
class _Packed:
    archives: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _packed(place: str, plan: RunPlan) -> _Packed:
    """Pack what dead ranks of an extraction have left; a run that cannot be packed is reported."""
    if plan.command != "extract" or is_url(place):
        # Of a run in a bucket, spools are on the machines of its ranks.
        return _Packed()
    try:
        found = _Packed([str(each) for each in take_over(Path(place), plan)])
    except H5TracesError as error:
        return _Packed(problems=[str(error)])
    spool = spool_path(Target.of(f"{place}/"))
    waiting = sum(1 for _ in spool.glob("*.sample"))
    if waiting:
        found.warnings.append(
            f"{spool}: {counted(waiting, 'sample')} wait for the rest of their shards; ranks that "
            f"are started again compute only that, and 'h5traces finish {place}/' packs what is "
            "there, if nobody will"
        )
    return found


def _archives(place: str) -> list[Path | RemotePath]:
    try:
        return expand_sources(place)
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def _on_disk(path: Path | RemotePath) -> Iterator[Path]:
    """The file of an archive; one that is on a server is fetched."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        file = RemoteFile(path, DEFAULT_REMOTE)
        with local.open("wb") as copy:
            for start in range(0, file.nbytes, _FETCHED_NBYTES):
                copy.write(file.read_at(start, min(_FETCHED_NBYTES, file.nbytes - start)))
        yield local


def _drawn(paths: Sequence[Path | RemotePath]) -> list[Path | RemotePath]:
    """Archives to verify; the same ones in every call."""
    if len(paths) <= NUM_SAMPLED:
        return list(paths)
    numbers = random.Random(len(paths)).sample(range(len(paths)), NUM_SAMPLED)
    return [paths[each] for each in sorted(numbers)]


def _write(
    paths: list[Path | RemotePath], target: Path, order: Order | None, workers: int | None
) -> None:
    if target.suffix == CATALOGUE_SUFFIX:
        from h5traces.rewriting.cataloguing import index

        index(paths, target, workers=workers)
    else:
        merge([each if isinstance(each, Path) else each.url for each in paths], target, order=order)


def _converted(
    report: CollectReport,
    plan: RunPlan,
    lines: dict[int, dict[str, Any]],
    seen: _Seen,
) -> None:
    """What became of every source; an archive is searched under any name of the folder."""
    names = {field.name for field in fields(FileReport)}
    held_by = seen.num_by_path
    by_name = {seen.name(path): path for path in held_by}
    known: set[Path | RemotePath] = set()
    for item in range(len(plan.costs)):
        line = lines.get(item)
        if line is None or line["status"] == "failed":
            is_batch = plan.command == "convert"
            report.missing.append(plan.sources[item][0] if is_batch else f"shard {item}")
        if line is None:
            continue
        one = FileReport(**{"sources": [], **{name: line[name] for name in names & line.keys()}})
        one.findings = [FindingSummary(**each) for each in line.get("findings", ())]
        report.files.append(one)
        if one.status == "failed":
            continue
        found = [(each, _named(each, by_name)) for each in one.targets]
        report.problems += [
            f"{each}: was written, and is not there any more; start the ranks again"
            for each, path in found
            if path is None
        ]
        held = [path for _, path in found if path is not None]
        known.update(held)
        count = sum(held_by[path] for path in held)
        if len(held) == len(found) and one.num_samples and count != one.num_samples:
            message = (
                f"{and_more(map(str, held))}: {count} samples, and {one.num_samples} were written"
            )
            report.problems.append(message)
    report.problems += ConversionReport(files=report.files).problems
    others = [str(path) for path in held_by if path not in known]
    if others:
        message = f"{and_more(others)}: not of this run, though in its folder; move it away"
        report.problems.append(message)


def _named(written: str, by_name: dict[str, Path | RemotePath]) -> Path | RemotePath | None:
    """The archive that a rank wrote; its node may have another name for the folder."""
    parts = PurePosixPath(written).parts
    names = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((by_name[each] for each in names if each in by_name), None)


def _extracted(report: CollectReport, room: Room, plan: RunPlan, seen: _Seen) -> None:
    """Which samples of an extraction are there, and which were left out."""
    # A restarted rank reports what it did since; its lines say what it did before.
    for document in (*room.reports(), *room.whole(last_lines(room)).values()):
        warnings, skipped = document.get("warnings", ()), document.get("skipped", ())
        report.warnings += [each for each in warnings if each not in report.warnings]
        report.left_out += [each for each in skipped if each not in report.left_out]
    planned_keys = _hashes(plan.ids)
    stored = np.isin(planned_keys, seen.keys)
    report.left_out = [
        each
        for each, is_stored in zip(
            report.left_out,
            np.isin(
                _hashes((e["sample_id"], e["generation_index"]) for e in report.left_out), seen.keys
            ),
            strict=True,
        )
        if not is_stored
    ]
    out = {(each["sample_id"], each["generation_index"]) for each in report.left_out}
    report.missing += [
        name if not number else f"{name} (answer {number})"
        for (name, number), is_stored in zip(plan.ids, stored, strict=True)
        if not is_stored and (name, number) not in out
    ]
    num_unknown = int(np.isin(seen.keys, planned_keys, invert=True).sum())
    if num_unknown:
        message = f"{room}: holds {counted(num_unknown, 'sample')} that are not of this run"
        report.problems.append(message)


class _Seen:
    """What archives hold: their numbers of samples, and which share contents or ids.

    A sample takes 16 bytes.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._paths: list[Path | RemotePath] = []
        self._keys: list[NDArray[np.uint64]] = []
        self._contents: list[NDArray[np.uint64]] = []

    @property
    def num_by_path(self) -> dict[Path | RemotePath, int]:
        """Samples of every archive."""
        return dict(zip(self._paths, map(len, self._keys), strict=True))

    @property
    def keys(self) -> NDArray[np.uint64]:
        """Hashes of ids and generation indices of all samples."""
        return np.concatenate([np.zeros(0, np.uint64), *self._keys])

    def add(self, file: ArchiveFile) -> None:
        """Look at the index of an archive."""
        contents = np.empty(file.num_samples, np.uint64)
        for index in range(file.num_samples):
            digests = file.digests(file.sample(index))
            contents[index] = int(content_digest(digests)[:16], 16)
        self._paths.append(file.path)
        self._keys.append(_hashes(file.keys()))
        self._contents.append(contents)

    def duplicates(self) -> list[str]:
        """What occurs twice: whole archives, samples, and ids."""
        counts = [len(each) for each in self._keys]
        files = np.repeat(np.arange(len(counts)), counts)
        starts = np.concatenate([[0], np.cumsum(counts)])
        contents = np.concatenate([np.zeros(0, np.uint64), *self._contents])
        same, keys = _repeated(contents, files), self.keys
        ids = [each for each in _repeated(keys, files) if keys[each[0]]]
        twice = {second for second, _ in same}
        ids = [each for each in ids if each[0] not in twice]
        pairs = Counter((int(files[second]), int(files[first])) for second, first in same)
        copies = {pair for pair, count in pairs.items() if count == counts[pair[0]]}
        found = [
            f"{self._place_of(second)} holds the same samples as {self._place_of(first)}"
            for second, first in sorted(copies)
        ]
        same = [each for each in same if (files[each[0]], files[each[1]]) not in copies]
        for some, rest in (
            (same, "the contents of another"),
            (ids, "the id of another, and other contents"),
        ):
            if some:
                named = [
                    " as ".join(self._name(each, files, starts) for each in pair)
                    for pair in some[:_MOST_NAMED]
                ]
                more = f"; and {len(some) - len(named)} more" if len(some) > len(named) else ""
                what = counted(len(some), "sample has", "samples have")
                found.append(f"{what} {rest}: {'; '.join(named)}{more}")
        return found

    def name(self, path: Path | RemotePath) -> str:
        """The name of an archive in the folder."""
        if isinstance(path, RemotePath):
            return path.url.removeprefix(self._place)
        return path.relative_to(self._place).as_posix()

    def _place_of(self, number: int) -> str:
        return self.name(self._paths[number])

    def _name(self, sample: int, files: NDArray[np.int64], starts: NDArray[np.int64]) -> str:
        number = int(files[sample])
        index = sample - int(starts[number])
        with open_archive(self._paths[number]) as archive:
            return f"{archive.ids[index]!r} (sample {index} of {self._place_of(number)})"


def _hashes(keys: Iterable[tuple[str | None, int | None]]) -> NDArray[np.uint64]:
    """A hash of every id with its generation index; 0 where there is no id."""
    found = [
        0
        if name is None
        else xxhash.xxh3_64_intdigest(f"{number or 0} {name}".encode("utf-8", "surrogatepass"))
        for name, number in keys
    ]
    return np.array(found, np.uint64)


def _repeated(values: NDArray[np.uint64], files: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Samples that share a value with an earlier one of another file, and that sample."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    firsts = first[inverse]
    (seconds,) = np.nonzero(files != files[firsts])
    return list(zip(seconds.tolist(), firsts[seconds].tolist(), strict=True))
