"""Joins labels and scores to the samples of archives by id."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from h5traces.archive.labels import FileLabels, largest_sidecar, sidecar_path
from h5traces.archive.opening import open as open_archive
from h5traces.arguments import checked
from h5traces.errors import ArchiveExistsError, OptionError, SchemaError, __version__
from h5traces.format import layout
from h5traces.format.archive import LabelSidecar
from h5traces.format.html import Report
from h5traces.format.text import and_more, counted, utc_now
from h5traces.paths import Target, check_not_a_source
from h5traces.rewriting.label_table import Entry, LabelOptions, LabelTable, read_table
from h5traces.rewriting.repack import repack
from h5traces.storage.publish import PartFile, make_folder, remove_abandoned_parts
from h5traces.writing.options import TargetOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from h5traces.archive.archive import Archive
    from h5traces.archive.file import ArchiveFile
    from h5traces.paths import PathLike, Source
    from h5traces.rewriting.label_table import HigherMeans, Key


# Characters that spreadsheets, editors and copying put around an id.
_AROUND: Final = " \t\r\n\ufeff\u200b\u00a0'\"\u2018\u2019\u201c\u201d"


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
class LabelReport(Report):
    """What joining found; complete before anything is written.

    Attributes
    ----------
    archives, targets
        Files read, and sidecars or archives that are written (or, in a dry run, would be).
    table
        The file with the labels or scores.
    label_column
        The column that labels come from; None if it is not one of classes.
    threshold, higher_means
        How labels are made of scores; None if they are not.
    num_samples, num_labelled
        Samples in the archives, and those that get a label or scores.
    labels
        How many samples get which label.
    classes, class_labels
        How many samples have which class of the column, and the label of each class.
    scores
        Statistics by name of score.
    missing
        Samples that the table has nothing for: file, index and id.
    ambiguous
        Samples that share an id which the table has without a generation.
    unknown
        Ids of the table that no archive has.
    similar
        Those among them that differ from an id of the archives in spaces, case, quotes or zeros
        only, with that id; they are never taken for it.
    unscored
        Ids whose label or score is empty.
    num_excluded
        Samples of a class that gets no label.
    num_repeated
        Rows that repeat an earlier one with the same values.
    num_replaced
        Samples that had another label before.
    """

    archives: list[str]
    table: str
    label_column: str | None = None
    threshold: float | None = None
    higher_means: HigherMeans | None = None
    targets: list[str] = field(default_factory=list)
    num_samples: int = 0
    num_labelled: int = 0
    labels: dict[int, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    class_labels: dict[str, int | None] = field(default_factory=dict)
    scores: dict[str, ScoreStats] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    similar: list[str] = field(default_factory=list)
    unscored: list[str] = field(default_factory=list)
    num_excluded: int = 0
    num_repeated: int = 0
    num_replaced: int = 0

    @property
    def complete(self) -> bool:
        """Whether the table has a value for every sample."""
        return not self.missing and not self.ambiguous

    @property
    def num_without_label(self) -> int:
        """Samples that get no label."""
        return self.num_samples - sum(self.labels.values())

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "complete": self.complete,
            "num_without_label": self.num_without_label,
            **asdict(self),
        }


@checked
def label(
    sources: Source | Iterable[Source],
    table: PathLike,
    *,
    options: LabelOptions = LabelOptions(),
    output: PathLike | None = None,
    folder: PathLike | None = None,
    partial: bool = False,
    target: TargetOptions = TargetOptions(),
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LabelReport:
    """Join a table of labels or scores to archives by sample id; the archives are not changed.

    Writes a sidecar for every archive, which `h5traces.open` picks up, or, with `output`, one new
    archive by copying chunks.

    Parameters
    ----------
    sources
        Archives, globs and folders; also on servers, then with `folder` or `output`.
    table
        CSV or TSV with a header, or JSON Lines, in UTF-8; its content decides. The columns are
        ``question_id``, that of the labels or scores, and ``generation_index`` where questions were
        answered more than once. ``min_score`` and ``avg_score`` are kept beside a score.
    options
        Which columns hold what, and what their values mean. By default, labels are made of
        ``bleurt_score``: 1 (hallucination) below 0.5, else 0.
    output
        A new archive of all samples, labels and scores among their attributes.
    folder
        Folder of the sidecars; beside the archives by default.
    partial
        Write although the table has nothing for some samples; these stay without a label.
    target
        Whether to replace existing sidecars or `output`, and to write at all; verification and
        workers are for `output`. ``TargetOptions(dry_run=True)`` gives the report and writes
        nothing.
    storage_options
        As for `h5traces.open`.
    progress
        Called with the samples joined and the samples there are.

    Raises
    ------
    OptionError
        The table has no column or class of that name, or it is not known what its values mean.
    SchemaError
        The table is wrong, no id of it is in the archives, or it has nothing for some samples and
        `partial` is false.
    ArchiveExistsError
        A sidecar or `output` exists.

    Examples
    --------
    >>> from h5traces import LabelOptions
    >>> human = LabelOptions(label_column="label", positive="hallucinated")
    >>> h5traces.label("run.h5", "human.csv", options=human).labels  # doctest: +SKIP
    {0: 61, 1: 39}
    """
    joining = joined(
        sources,
        table,
        options=options,
        output=output,
        folder=folder,
        overwrite=target.overwrite,
        storage_options=storage_options,
        progress=progress,
    )
    with joining as found:
        found.check(partial=partial)
        found.write(target)
        return found.report


@contextlib.contextmanager
def joined(
    sources: Source | Iterable[Source],
    table: PathLike,
    *,
    options: LabelOptions = LabelOptions(),
    output: PathLike | None = None,
    folder: PathLike | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Joined]:
    """Join as `label` does, and leave it to the caller to look at the report, check and write."""
    if output is not None and folder is not None:
        message = (
            f"output={str(output)!r} makes a new archive, folder={str(folder)!r} is for labels "
            "beside archives; name one"
        )
        raise OptionError(message)
    if not isinstance(options, LabelOptions):
        message = f"options is a {type(options).__name__}, expected LabelOptions"
        raise OptionError(message)
    if not isinstance(table, (str, os.PathLike)):
        message = f"table is a {type(table).__name__}, expected the name of a file"
        raise OptionError(message)
    rows = read_table(Path(table), options)
    # Not those of an earlier run, which may be of an archive that was replaced since.
    with open_archive(sources, storage_options=storage_options, labels=False) as archive:
        report = LabelReport(
            [str(path) for path in archive.paths],
            str(table),
            options.label_column,
            rows.threshold,
            rows.higher_means,
        )
        if output is not None:
            new = Target.of(output).for_sources(archive.paths)
            check_not_a_source(new, table)
            report.targets = [str(new.path)]
        else:
            places = _sidecar_places(archive, None if folder is None else Path(folder))
            check_not_a_source(places, table)
            if not overwrite:
                _check_free(places)
            report.targets = [str(place) for place in places]
        sidecars = _Joining(rows, options, report).join(archive, progress)
        yield Joined(report, archive, rows, sidecars, output)


@dataclass(frozen=True, slots=True)
class Joined:
    """A table that was joined to archives; nothing is written yet.

    Attributes
    ----------
    report
        What joining found.
    """

    report: LabelReport
    _archive: Archive
    _table: LabelTable
    _sidecars: list[LabelSidecar]
    _output: PathLike | None

    @property
    def joins(self) -> bool:
        """Whether any id of the table is in the archives."""
        report = self.report
        return bool(report.num_labelled or report.num_excluded or report.ambiguous)

    def check(self, *, partial: bool) -> None:
        """Reject a table that leaves samples out, unless `partial`."""
        report = self.report
        if report.similar and report.missing:
            message = (
                f"{report.table}: ids differ from those of the archives in spaces, case, quotes or "
                f"zeros only: {and_more(report.similar, separator='; ')}; nothing was written. "
                "Correct the table"
            )
            raise SchemaError(message)
        if not self.joins:
            example = next(iter(self._table.entries), ("none", None))[0]
            message = (
                f"{report.table}: none of its {self._table.num_questions} ids is in the archives; "
                f"it has ids such as {example!r}, they have "
                f"{and_more(report.missing) or 'no sample'}"
            )
            raise SchemaError(message)
        if not (report.complete or (partial and report.num_labelled + report.num_excluded)):
            raise SchemaError(_incomplete(report))

    def write(self, target: TargetOptions) -> None:
        """Write the sidecars or the archive, unless it is a dry run."""
        if self._output is not None:
            for file, sidecar in zip(self._archive._files, self._sidecars, strict=True):
                file.labels = FileLabels(sidecar, self.report.table)
            self.report.targets = repack(self._archive, self._output, target=target).targets
        elif not target.dry_run:
            for place, sidecar in zip(self.report.targets, self._sidecars, strict=True):
                _write_sidecar(Path(place), sidecar, overwrite=target.overwrite)


class _Joining:
    """Looks every sample up in the table."""

    def __init__(self, table: LabelTable, options: LabelOptions, report: LabelReport) -> None:
        self._table, self._options, self._report = table, options, report
        self._joined: set[Key] = set()
        self._found: list[tuple[float, ...]] = []
        self._labels: Counter[int] = Counter()
        self._classes: Counter[str] = Counter()

    def join(
        self, archive: Archive, progress: Callable[[int, int], None] | None
    ) -> list[LabelSidecar]:
        """A sidecar for every file; the report lists rows that do not join."""
        report, table = self._report, self._table
        repeats = Counter(each for each in archive.ids if each is not None)
        sidecars, total = [], len(archive)
        for file in archive._files:
            sidecars.append(self._join_file(file, repeats))
            if progress is not None:
                progress(report.num_samples, total)
        known = {sample_id for sample_id, _ in self._joined}
        unknown = [key for key in table.entries if key not in self._joined]
        # Ids whose samples are ambiguous are known, if not joined.
        unknown = [key for key in unknown if key[0] in known or not repeats[key[0]]]
        report.unknown = [_named(key) for key in unknown]
        report.similar = _similar([key[0] for key in unknown], repeats)
        report.unscored = list(table.empty)
        report.num_repeated = table.num_repeated
        report.labels = dict(sorted(self._labels.items()))
        report.classes = {name: self._classes[name] for name in table.classes}
        report.class_labels = dict(table.classes)
        for name, column in zip(table.score_names, zip(*self._found, strict=True), strict=False):
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
            found = self._entry(file, ordinal, attrs.get("sample_id"), attrs, repeats)
            if found is None:
                continue
            sample_id, entry = found
            ordinals.append(ordinal)
            ids.append(sample_id)
            rows.append(entry.scores)
            if entry.label is not None:
                labels.append(entry.label)
                self._report.num_replaced += attrs.get(layout.LABEL, entry.label) != entry.label
        self._report.num_labelled += len(rows)
        self._found += rows
        self._labels.update(labels)
        columns = list(zip(*rows, strict=True)) or [()] * len(self._table.score_names)
        return self._sidecar(file, ordinals, ids, labels, columns)

    def _sidecar(
        self,
        file: ArchiveFile,
        ordinals: list[int],
        ids: list[str],
        labels: list[int],
        columns: list[tuple[float, ...]],
    ) -> LabelSidecar:
        table, options = self._table, self._options
        classes = {name: number for name, number in table.classes.items() if number is not None}
        return LabelSidecar(
            format_version=layout.FORMAT_VERSION,
            generator=f"h5traces {__version__}",
            created=utc_now(),
            archive_id=file.metadata.archive_id,
            num_samples=file.num_samples,
            source=table.path.name,
            label_column=options.label_column,
            classes=None if options.label_column is None else classes,
            label_score=None if table.threshold is None else table.score_names[0],
            threshold=table.threshold,
            higher_means=table.higher_means,
            ordinals=tuple(ordinals),
            sample_ids=tuple(ids),
            labels=None if options.scores_only else tuple(labels),
            scores=dict(zip(table.score_names, columns, strict=True)),
        )

    def _entry(
        self,
        file: ArchiveFile,
        ordinal: int,
        sample_id: object,
        attrs: Mapping[str, object],
        repeats: Counter[str],
    ) -> tuple[str, Entry] | None:
        """The id and values of one sample; None without any, which the report notes."""
        place = f"{file.path}: sample {ordinal} ({sample_id!r})"
        if not isinstance(sample_id, str):
            self._report.missing.append(f"{file.path}: sample {ordinal} (without an id)")
            return None
        generation = attrs.get("generation_index")
        key: Key = (sample_id, generation if isinstance(generation, int) else None)
        if key not in self._table.entries:
            key = (sample_id, None)
            if key not in self._table.entries:
                self._report.missing.append(place)
                return None
            if repeats[sample_id] > 1:
                self._report.ambiguous.append(place)
                return None
        self._joined.add(key)
        entry = self._table.entries[key]
        if entry.name is not None:
            self._classes[entry.name] += 1
            if entry.label is None:
                self._report.num_excluded += 1
                return None
        return sample_id, entry


def _named(key: Key) -> str:
    sample_id, generation = key
    return sample_id if generation is None else f"{sample_id} (generation {generation})"


def _similar(unknown: list[str], ids: Iterable[str]) -> list[str]:
    """Ids of a table that are not ids of the archives, but nearly."""
    if not unknown:
        return []
    known = set(ids)
    plain = {_plain(each): each for each in known}
    found = []
    for each in dict.fromkeys(unknown):
        other = plain.get(_plain(each))
        if other is not None and each not in known:
            found.append(f"{each!r} is {other!r} in the archives")
    return found


def _plain(sample_id: str) -> str:
    """An id without the changes that tables make: spaces, quotes, case, zeros."""
    text = " ".join(unicodedata.normalize("NFKC", sample_id).strip(_AROUND).split()).casefold()
    if text.isascii() and text.replace(".", "", 1).isdigit():
        whole, _, rest = text.partition(".")
        return (whole.lstrip("0") or "0") + (f".{rest}" if rest.strip("0") else "")
    return text


def _incomplete(report: LabelReport) -> str:
    """The faults of a table that leaves samples out."""
    what = "score" if report.label_column is None else "label"
    said = []
    if report.missing:
        samples = counted(len(report.missing), "sample has", "samples have")
        said.append(f"{samples} no {what}: {and_more(report.missing)}")
    if report.ambiguous:
        said.append(
            f"{len(report.ambiguous)} samples share an id, and the column 'generation_index', "
            f"which distinguishes them, is missing: {and_more(report.ambiguous)}; label archives "
            "that repeat ids one by one"
        )
    return (
        f"{report.table}: {'; '.join(said)}; nothing was written. Complete the table, or "
        "pass partial=True to leave these without a label"
    )


def _sidecar_places(archive: Archive, folder: Path | None) -> list[Path]:
    places: list[Path] = []
    for path in archive.paths:
        place = sidecar_path(path, folder)
        if place is None:
            message = (
                f"{path}: labels cannot be written on a server; name a folder for them "
                "(folder='...')"
            )
            raise SchemaError(message)
        if place in places:
            message = f"{place}: two archives have this name; label them into different folders"
            raise SchemaError(message)
        places.append(place)
    return places


def _check_free(places: list[Path]) -> None:
    for place in places:
        if place.exists() or place.is_symlink():
            message = f"{place} exists; pass overwrite=True to replace it"
            raise ArchiveExistsError(message)


def _write_sidecar(place: Path, sidecar: LabelSidecar, *, overwrite: bool) -> None:
    make_folder(place.parent)
    remove_abandoned_parts(place)
    with PartFile(place) as part:
        part.append(sidecar_json(sidecar))
        part.publish(overwrite=overwrite)


def sidecar_json(sidecar: LabelSidecar) -> bytes:
    """The document as text: a line for every key, since columns are long.

    SchemaError where it would be larger than readers take.
    """
    plain = sidecar.model_dump(exclude_none=True)
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in plain.items())
    text = ("{\n" + ",\n".join(lines) + "\n}\n").encode("ascii")
    most = largest_sidecar(sidecar.num_samples)
    if len(text) > most:
        message = (
            f"the labels of {counted(sidecar.num_samples, 'sample')} take {len(text)} bytes beside "
            f"the archive, and readers take {most}; write them into a new archive (output='...')"
        )
        raise SchemaError(message)
    return text
