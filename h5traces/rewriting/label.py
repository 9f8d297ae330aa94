"""Joins scores to the samples of archives, and writes labels."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from h5traces.archive.labels import FileLabels, sidecar_path
from h5traces.archive.opening import open as open_archive
from h5traces.errors import ArchiveExistsError, OptionError, Problem, SchemaError, __version__
from h5traces.format import layout
from h5traces.format.archive import LabelSidecar
from h5traces.format.text import and_more, counted, utc_now
from h5traces.paths import Target, check_not_a_source
from h5traces.rewriting.repack import repack
from h5traces.storage.publish import PartFile, make_folder, remove_abandoned_parts
from h5traces.writing.options import TargetOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from h5traces.archive.archive import Archive
    from h5traces.archive.file import ArchiveFile
    from h5traces.paths import PathLike, Source


GENERATION_COLUMN: Final = "generation_index"
# Further columns of the ``_full`` tables; the score itself is the best of all references.
OTHER_SCORES: Final = ("min_score", "avg_score")

# Sample id, and generation index where the table has one.
Key = tuple[str, int | None]


@dataclass(frozen=True, slots=True)
class ScoreColumns:
    """Names of a table's columns.

    Attributes
    ----------
    id
        The column of sample ids.
    score
        The column of the scores that labels are made from.
    """

    id: str = "question_id"
    score: str = "bleurt_score"


@dataclass(slots=True)
class ScoreTable:
    """The scores of a table.

    Attributes
    ----------
    path
        The file.
    names
        Scores by name, the one that labels are made of first.
    scores
        By id and generation, the number of every score; only rows that have all of them.
    has_generations
        Whether rows tell generations of a question apart.
    num_rows, num_repeated
        Rows in the file, and those that repeat an earlier one.
    unscored
        Ids whose score is empty or not a number.
    """

    path: Path
    names: tuple[str, ...]
    scores: dict[Key, tuple[float, ...]] = field(default_factory=dict)
    has_generations: bool = False
    num_rows: int = 0
    num_repeated: int = 0
    unscored: list[str] = field(default_factory=list)

    @property
    def num_questions(self) -> int:
        """Different ids."""
        return len({sample_id for sample_id, _ in self.scores})


def score_name(column: str) -> str:
    """The name of a score by its column: ``bleurt`` of ``bleurt_score``."""
    return column.removesuffix("_score") or column


def read_scores(path: Path, columns: ScoreColumns = ScoreColumns()) -> ScoreTable:
    """A CSV file with a header, in UTF-8; texts may hold newlines."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            found = tuple(reader.fieldnames or ())
            names = _score_columns(path, found, columns)
            table = ScoreTable(path, tuple(score_name(each) for each in names))
            table.has_generations = GENERATION_COLUMN in found
            problems = _read_rows(reader, table, columns.id, names)
        except (csv.Error, UnicodeDecodeError) as error:
            message = f"{path}: line {reader.line_num}: is not UTF-8 CSV: {error}"
            raise SchemaError(message) from error
    if problems:
        message = f"{path}: {and_more(problems, separator='; ')}"
        raise SchemaError(message, problems)
    return table


def _score_columns(path: Path, found: Sequence[str], columns: ScoreColumns) -> tuple[str, ...]:
    missing = [each for each in (columns.id, columns.score) if each not in found]
    if missing:
        message = (
            f"{path}: has no column {' and no column '.join(map(repr, missing))}; its columns, "
            f"separated by commas, are {', '.join(map(repr, found)) or 'none'}; name those of the "
            "ids (id_column) and scores (score_column)"
        )
        if len(found) == 1 and (other := next((each for each in ";\t" if each in found[0]), None)):
            message += f", and replace the delimiter {other!r} by ','"
        raise OptionError(message)
    repeated = sorted({each for each in found if found.count(each) > 1})
    if repeated:
        message = f"{path}: the columns {', '.join(repeated)} occur more than once"
        raise SchemaError(message)
    others = (each for each in OTHER_SCORES if each in found and each != columns.score)
    return (columns.score, *others)


def _read_rows(
    reader: csv.DictReader[str], table: ScoreTable, id_column: str, names: tuple[str, ...]
) -> list[Problem]:
    """Fill the table; what is wrong with rows."""
    problems: list[Problem] = []
    lines: dict[Key, int] = {}
    for row in reader:
        table.num_rows += 1
        place = f"line {reader.line_num}"
        sample_id = row[id_column]
        if not sample_id:
            problems.append(Problem(place, f"{id_column} is empty", "missing_id"))
            continue
        try:
            key = (sample_id, _generation(row))
            scores = tuple(_number(row[name]) for name in names)
        except ValueError as error:
            problems.append(Problem(place, f"{sample_id!r}: {error}", "bad_number"))
            continue
        if any(map(math.isnan, scores)):
            table.unscored.append(sample_id)
            continue
        known = table.scores.setdefault(key, scores)
        if key in lines:
            table.num_repeated += 1
        if known != scores:
            message = f"{sample_id!r} has other scores than on line {lines[key]}"
            problems.append(Problem(place, message, "contradicting_rows"))
        lines.setdefault(key, reader.line_num)
    return problems


def _generation(row: dict[str, str]) -> int | None:
    value = row.get(GENERATION_COLUMN)
    if not value:
        return None
    if not (value.isascii() and value.isdigit()):
        message = f"{GENERATION_COLUMN} is {value!r}, expected a number from 0"
        raise ValueError(message)
    return int(value)


def _number(value: str | None) -> float:
    """A score; NaN where there is none."""
    if value is None or not value.strip():
        return math.nan
    try:
        number = float(value)
    except ValueError:
        message = f"the score is {value!r}, expected a number"
        raise ValueError(message) from None
    if math.isinf(number):
        message = f"the score is {value!r}, expected a finite number"
        raise ValueError(message)
    return number


THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class ScoreStats:
    """How scores are distributed.

    Attributes
    ----------
    minimum, median, mean, maximum
        Of the scores that were joined.
    """

    minimum: float
    median: float
    mean: float
    maximum: float


@dataclass(slots=True)
class LabelReport:
    """What joining found.

    Attributes
    ----------
    archives, targets
        Files read, and sidecars or archives written (or, in a dry run, that would be).
    table
        The file with the scores.
    threshold
        Labels are 1 below it; None if only scores are given.
    num_samples, num_labelled
        Samples in the archives, and those that got scores.
    labels
        How many samples have which label.
    scores
        Statistics by name of score.
    missing
        Samples that the table has no score for: file, index and id.
    ambiguous
        Samples that share an id which the table has without a generation.
    unknown
        Ids of the table that no archive has.
    unscored
        Ids whose row has no score.
    num_repeated
        Rows that repeat an earlier one with the same scores.
    num_replaced
        Samples that had another label before.
    """

    archives: list[str]
    table: str
    threshold: float | None
    targets: list[str] = field(default_factory=list)
    num_samples: int = 0
    num_labelled: int = 0
    labels: dict[int, int] = field(default_factory=dict)
    scores: dict[str, ScoreStats] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    unscored: list[str] = field(default_factory=list)
    num_repeated: int = 0
    num_replaced: int = 0

    @property
    def complete(self) -> bool:
        """Whether every sample got its scores."""
        return not self.missing and not self.ambiguous

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {"complete": self.complete, **asdict(self)}


def label(
    sources: Source | Iterable[Source],
    table: PathLike,
    *,
    output: PathLike | None = None,
    folder: PathLike | None = None,
    threshold: float | None = THRESHOLD,
    columns: ScoreColumns = ScoreColumns(),
    partial: bool = False,
    target: TargetOptions = TargetOptions(),
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LabelReport:
    """Join a table of scores to archives by sample id; the archives are not changed.

    Writes a sidecar for every archive, which `h5traces.open` picks up, or, with `output`, one new
    archive by copying chunks.

    Parameters
    ----------
    sources
        Archives, globs and folders; also on servers, then with `folder` or `output`.
    table
        CSV with a header: ``question_id``, ``bleurt_score``, and ``generation_index`` where
        questions were answered more than once; ``min_score`` and ``avg_score`` are taken, too.
    output
        A new archive of all samples, labels and scores among their attributes.
    folder
        Folder of the sidecars; beside the archives by default.
    threshold
        A label is 1 where the score is below it, else 0; None gives scores only.
    columns
        Names of the columns, where they differ.
    partial
        Write although samples have no score; these stay without a label.
    target
        Whether to replace existing sidecars or `output`, and to write at all; verification and
        workers are for `output`.
    storage_options
        As for `h5traces.open`.
    progress
        Called with the samples joined and the samples there are.

    Raises
    ------
    OptionError
        The table has no column of that name.
    SchemaError
        The table is wrong, no id of it is in the archives, or samples have no score and `partial`
        is false.
    ArchiveExistsError
        A sidecar or `output` exists.
    """
    scores = read_scores(Path(table), columns)
    if threshold is not None and not math.isfinite(threshold):
        message = f"the threshold is {threshold}, expected a finite number"
        raise SchemaError(message)
    # Not those of an earlier run, which may be of an archive that was replaced since.
    with open_archive(sources, storage_options=storage_options, labels=False) as archive:
        if output is not None:
            check_not_a_source(Target.of(output).for_sources(archive.paths), table)
        else:
            beside = (
                sidecar_path(path, None if folder is None else Path(folder))
                for path in archive.paths
            )
            check_not_a_source([place for place in beside if place is not None], table)
        report = LabelReport([str(path) for path in archive.paths], str(table), threshold)
        sidecars = _Joining(scores, threshold, report).join(archive, progress)
        _check(report, scores, partial=partial)
        if output is not None:
            _write_archive(archive, sidecars, output, report, target)
        else:
            place = None if folder is None else Path(folder)
            _write_sidecars(archive, sidecars, place, report, target)
    return report


class _Joining:
    """Looks every sample up in the table."""

    def __init__(self, table: ScoreTable, threshold: float | None, report: LabelReport) -> None:
        self._table, self._threshold, self._report = table, threshold, report
        self._joined: set[Key] = set()
        self._found: list[tuple[float, ...]] = []
        self._counts: Counter[int] = Counter()

    def join(
        self, archive: Archive, progress: Callable[[int, int], None] | None
    ) -> list[LabelSidecar]:
        """A sidecar for every file; the report lists samples without scores."""
        report = self._report
        repeats = Counter(each for each in archive.ids if each is not None)
        sidecars, total = [], len(archive)
        for file in archive._files:
            sidecars.append(self._join_file(file, repeats))
            if progress is not None:
                progress(report.num_samples, total)
        known = {sample_id for sample_id, _ in self._joined}
        unknown = (key for key in self._table.scores if key not in self._joined)
        # Ids whose samples are ambiguous are known, if not joined.
        report.unknown = [_named(key) for key in unknown if key[0] in known or not repeats[key[0]]]
        report.unscored = list(self._table.unscored)
        report.num_repeated = self._table.num_repeated
        report.labels = dict(sorted(self._counts.items()))
        for name, column in zip(self._table.names, zip(*self._found, strict=True), strict=False):
            report.scores[name] = ScoreStats(
                min(column), statistics.median(column), statistics.fmean(column), max(column)
            )
        return sidecars

    def _join_file(self, file: ArchiveFile, repeats: Counter[str]) -> LabelSidecar:
        ordinals: list[int] = []
        ids: list[str] = []
        rows: list[tuple[float, ...]] = []
        labels: list[int] = []
        for ordinal in range(file.num_samples):
            attrs = file.sample_attrs(ordinal)
            self._report.num_samples += 1
            found = self._row(file, ordinal, attrs.get("sample_id"), attrs, repeats)
            if found is None:
                continue
            sample_id, row = found
            ordinals.append(ordinal)
            ids.append(sample_id)
            rows.append(row)
            if self._threshold is not None:
                labels.append(int(row[0] < self._threshold))
                self._report.num_replaced += attrs.get(layout.LABEL, labels[-1]) != labels[-1]
        self._report.num_labelled += len(rows)
        self._found += rows
        self._counts.update(labels)
        columns = list(zip(*rows, strict=True)) or [()] * len(self._table.names)
        return LabelSidecar(
            format_version=layout.FORMAT_VERSION,
            generator=f"h5traces {__version__}",
            created=utc_now(),
            archive_id=file.metadata.archive_id,
            num_samples=file.num_samples,
            source=self._table.path.name,
            label_score=None if self._threshold is None else self._table.names[0],
            threshold=self._threshold,
            ordinals=tuple(ordinals),
            sample_ids=tuple(ids),
            labels=None if self._threshold is None else tuple(labels),
            scores=dict(zip(self._table.names, columns, strict=True)),
        )

    def _row(
        self,
        file: ArchiveFile,
        ordinal: int,
        sample_id: object,
        attrs: Mapping[str, object],
        repeats: Counter[str],
    ) -> tuple[str, tuple[float, ...]] | None:
        """The id and scores of one sample; None if there are none, which the report notes."""
        place = f"{file.path}: sample {ordinal} ({sample_id!r})"
        if not isinstance(sample_id, str):
            self._report.missing.append(f"{file.path}: sample {ordinal} (without an id)")
            return None
        generation = attrs.get("generation_index")
        key: Key = (sample_id, generation if isinstance(generation, int) else None)
        if key not in self._table.scores:
            key = (sample_id, None)
            if key not in self._table.scores:
                self._report.missing.append(place)
                return None
            if repeats[sample_id] > 1:
                self._report.ambiguous.append(place)
                return None
        self._joined.add(key)
        return sample_id, self._table.scores[key]


def _named(key: Key) -> str:
    sample_id, generation = key
    return sample_id if generation is None else f"{sample_id} (generation {generation})"


def _check(report: LabelReport, table: ScoreTable, *, partial: bool) -> None:
    """Reject a table that leaves samples out, unless `partial`."""
    if not report.num_labelled and not report.ambiguous:
        example = next(iter(table.scores), ("none", None))[0]
        message = (
            f"{report.table}: none of its {table.num_questions} ids is in the archives; it has ids "
            f"such as {example!r}, they have {and_more(report.missing) or 'no sample'}"
        )
        raise SchemaError(message)
    if report.complete or (partial and report.num_labelled):
        return
    said = []
    if report.missing:
        samples = counted(len(report.missing), "sample has", "samples have")
        said.append(f"{samples} no score: {and_more(report.missing)}")
    if report.ambiguous:
        said.append(
            f"{len(report.ambiguous)} samples share an id, and the column 'generation_index', "
            f"which distinguishes them, is missing: {and_more(report.ambiguous)}; label archives "
            "that repeat ids one by one"
        )
    message = (
        f"{report.table}: {'; '.join(said)}; nothing was written. Complete the table, or "
        "pass partial=True to leave these without a label"
    )
    raise SchemaError(message)


def _write_archive(
    archive: Archive,
    sidecars: list[LabelSidecar],
    output: PathLike,
    report: LabelReport,
    target: TargetOptions,
) -> None:
    for file, sidecar in zip(archive._files, sidecars, strict=True):
        file.labels = FileLabels(sidecar, report.table)
    report.targets = repack(archive, output, target=target).targets


def _write_sidecars(
    archive: Archive,
    sidecars: list[LabelSidecar],
    folder: Path | None,
    report: LabelReport,
    target: TargetOptions,
) -> None:
    places: dict[Path, LabelSidecar] = {}
    for file, sidecar in zip(archive._files, sidecars, strict=True):
        place = sidecar_path(file.path, folder)
        if place is None:
            message = (
                f"{file.path}: labels cannot be written on a server; name a folder for them "
                "(folder='...')"
            )
            raise SchemaError(message)
        if place in places:
            message = f"{place}: two archives have this name; label them into different folders"
            raise SchemaError(message)
        if place.exists() and not target.overwrite:
            message = f"{place} exists; pass overwrite=True to replace it"
            raise ArchiveExistsError(message)
        places[place] = sidecar
    report.targets = [str(place) for place in places]
    if target.dry_run:
        return
    for place, sidecar in places.items():
        make_folder(place.parent)
        remove_abandoned_parts(place)
        with PartFile(place) as part:
            part.append(sidecar_json(sidecar))
            part.publish(overwrite=target.overwrite)


def sidecar_json(sidecar: LabelSidecar) -> bytes:
    """The document as it is written: a line for every key, since columns are long."""
    plain = sidecar.model_dump(exclude_none=True)
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in plain.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("ascii")
