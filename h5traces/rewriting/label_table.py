"""Tables of labels and scores: which columns there are, and what their values mean."""

from __future__ import annotations

import math
import re
import stat
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from h5traces.arguments import checked_options
from h5traces.errors import OptionError, Problem, SchemaError
from h5traces.format.text import and_more, counted, short_repr
from h5traces.sources.rows import foreign, no_column, read_rows, short, text_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from h5traces.sources.rows import TextTable

HigherMeans = Literal["correct", "hallucinated"]
GENERATION_COLUMN: Final = "generation_index"
THRESHOLD: Final = 0.5
DEFAULT_SCORE: Final = "bleurt_score"
# Scores whose direction is known from their definition, by column.
KNOWN_SCORES: Final[dict[str, tuple[HigherMeans, str]]] = {
    # A learned measure of how well a text says what its reference says.
    "bleurt_score": ("correct", "Sellam, Das and Parikh 2020, BLEURT"),
}
# Further columns of the ``_full`` tables; the score itself is the best of all references.
_OTHER_SCORES: Final = ("min_score", "avg_score")
# Separators of columns, for messages.
_SEPARATORS: Final = {
    "CSV": ", separated by commas,",
    "CSV with semicolons": ", separated by semicolons,",
    "TSV": ", separated by tabs,",
}
_NUMBER: Final = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_WHOLE: Final = re.compile(r"([+-]?[0-9]+)\.0*", re.ASCII)
_MOST_PROBLEMS: Final = 1000
_INFINITE: Final = ("inf", "infinity")
_CLASS_TYPES: Final = (str, int)
_INT64: Final = range(-(2**63), 2**63)

# Sample id, and generation index where the table has one.
Key = tuple[str, int | None]


@checked_options
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class LabelOptions:
    """Which columns of a table hold what, and what their values mean.

    Labels are either classes, in a column, or made from a score by a threshold.

    Attributes
    ----------
    label_column
        Column of classes: ``0`` and ``1``, words, any names. Case and spaces around do not count.
    positive
        The class of the two that gets label 1, hallucination; the other one gets 0.
    class_labels
        Instead of `positive`, the label of every class, also of more than two; None for a class
        that gets no label.
    score_column
        Column of scores; ``bleurt_score`` by default, where no `label_column` is named. Beside a
        `label_column`, scores are kept and make no labels.
    higher_means
        Whether high scores are those of correct or of hallucinated answers. Required, but for
        ``bleurt_score``, where they are those of correct ones (Sellam, Das and Parikh 2020,
        https://doi.org/10.18653/v1/2020.acl-main.704).
    threshold
        Scores from here on are high, 0.5 by default. With ``higher_means='correct'``, a label is 1
        where the score is below it, else 0; with ``'hallucinated'``, 0 below it, else 1.
    scores_only
        Keep the scores and make no labels.
    id_column
        Column of sample ids.

    Raises
    ------
    OptionError
        Options contradict each other, or have a value that means nothing.
    """

    label_column: str | None = None
    positive: str | int | bool | None = None
    class_labels: Mapping[str, int | None] | Mapping[int, int | None] | None = None
    score_column: str | None = None
    higher_means: HigherMeans | None = None
    threshold: float | None = None
    scores_only: bool = False
    id_column: str = "question_id"

    def __post_init__(self) -> None:
        message = self._mistake()
        if message is not None:
            raise OptionError(message)

    def _mistake(self) -> str | None:
        named = [each for each in (self.positive, self.class_labels) if each is not None]
        if self.label_column is None and named:
            return "positive and class_labels are about classes of a label_column; name the column"
        if len(named) > 1:
            return "positive and class_labels both say which class gets label 1; leave one out"
        return self._wrong_scores() or self._wrong_classes()

    def _wrong_scores(self) -> str | None:
        about = {"threshold": self.threshold, "higher_means": self.higher_means}
        said = [name for name, value in about.items() if value is not None]
        if self.label_column is not None and (self.scores_only or said):
            said = said or ["scores_only=True"]
            return f"label_column gives labels as they are; leave out {' and '.join(said)}"
        if self.scores_only and said:
            return f"scores_only=True makes no labels; leave out {' and '.join(said)}"
        if self.threshold is not None and not _is_finite(self.threshold):
            return f"the threshold is {self.threshold!r}, expected a finite number"
        return None

    def _wrong_classes(self) -> str | None:
        labels = self.class_labels
        if labels is None:
            return None
        if not labels:
            return f"class_labels is {labels!r}, expected the label of every class, by name"
        for name, number in labels.items():
            is_label = number is None or (type(number) is int and number in _INT64)
            if not (isinstance(name, _CLASS_TYPES) and is_label):
                return f"class_labels has {name!r}: {number!r}, expected an integer or None by name"
        if len({class_key(each) for each in labels}) < len(labels):
            return f"class_labels names a class twice: {', '.join(map(repr, labels))}"
        return None

    __repr__ = short_repr

    @property
    def scores(self) -> str | None:
        """The column of scores, if there is one to read."""
        if self.score_column is None and self.label_column is None:
            return DEFAULT_SCORE
        return self.score_column

    @property
    def makes_labels(self) -> bool:
        """Whether labels are made of scores."""
        return self.label_column is None and not self.scores_only


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class Entry:
    """What a table says about one sample.

    Attributes
    ----------
    scores
        The number of every score.
    label
        None if it makes none.
    name
        The class, where the table has classes.
    """

    scores: tuple[float, ...] = ()
    label: int | None = None
    name: str | None = None


@dataclass(slots=True)
class LabelTable:
    """The labels and scores of a table.

    Attributes
    ----------
    path
        The file.
    score_names
        Scores by name, the one that labels are made of first.
    entries
        By id and generation; only rows that are not empty.
    classes
        The label of every class, by its name in the table.
    higher_means, threshold
        How labels were made of scores; None if they were not.
    num_rows, num_repeated
        Rows in the file, and those that repeat an earlier one.
    empty
        Ids whose label or score is empty.
    """

    path: Path
    score_names: tuple[str, ...] = ()
    entries: dict[Key, Entry] = field(default_factory=dict)
    classes: dict[str, int | None] = field(default_factory=dict)
    higher_means: HigherMeans | None = None
    threshold: float | None = None
    num_rows: int = 0
    num_repeated: int = 0
    empty: list[str] = field(default_factory=list)

    @property
    def num_questions(self) -> int:
        """Different ids."""
        return len({sample_id for sample_id, _ in self.entries})


def read_table(path: Path, options: LabelOptions) -> LabelTable:
    """Read a table of labels or scores: CSV or TSV with a header, or JSON Lines; in UTF-8.

    Raises
    ------
    OptionError
        A column or class is not in the table, or the options do not say what values mean.
    SchemaError
        Rows are wrong, or contradict each other; the message names their lines.
    """
    if path.is_dir():
        message = f"{path}: is a folder, expected a table of labels or scores"
        raise OptionError(message)
    # A pipe is what a shell's <(...) gives; a device may have no end.
    if stat.S_ISCHR(path.stat().st_mode):
        message = f"{path}: is a device, expected a table of labels or scores"
        raise OptionError(message)
    with text_of(path.open("rb")) as file:
        found = read_rows(path, file)
        reading = _Reading(found, options)
        reading.read()
    if reading.problems:
        message = f"{path}: {and_more(reading.problems, separator='; ')}"
        raise SchemaError(message, reading.problems)
    return reading.finished()


def class_key(name: str | int) -> str:
    """What tells classes apart: neither case, nor spaces around them, nor ``1`` from ``1.0``."""
    plain = str(name).strip()
    whole = _WHOLE.fullmatch(plain)
    return whole[1] if whole else plain.casefold()


class _Reading:
    """Collects rows; labels are known once all classes are."""

    def __init__(self, rows: TextTable, options: LabelOptions) -> None:
        self._rows, self._options = rows, options
        self._table = LabelTable(rows.path)
        self._columns = self._score_columns()
        self._table.score_names = tuple(
            each.removesuffix("_score") or each for each in self._columns
        )
        self._lines: dict[Key, str] = {}
        # Classes by key: the first spelling and the number of rows.
        self._spellings: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self.problems: list[Problem] = []

    def _score_columns(self) -> tuple[str, ...]:
        options, found = self._options, self._rows.columns
        named = (options.id_column, options.label_column, options.scores)
        wanted = [each for each in named if each is not None]
        missing = [each for each in wanted if each not in found]
        if missing:
            raise OptionError(foreign(self._rows.path) or self._missing(missing))
        repeated = sorted(each for each in (*wanted, *_OTHER_SCORES) if found.count(each) > 1)
        if repeated:
            message = f"{self._rows.path}: the columns {', '.join(repeated)} occur more than once"
            raise SchemaError(message)
        if options.scores is None:
            return ()
        others = (each for each in _OTHER_SCORES if each in found and each != options.scores)
        return (options.scores, *others)

    def _missing(self, missing: Sequence[str]) -> str:
        found = self._rows.columns
        separated = _SEPARATORS.get(self._rows.format, "")
        message = (
            f"{no_column(str(self._rows.path), missing, found, separated)}; name those of the ids "
            "(id_column) and of the labels (label_column) or scores (score_column)"
        )
        if len(found) == 1 and (other := next((each for each in ";\t|" if each in found[0]), None)):
            message += f", and replace the delimiter {other!r} by ','"
        return message

    def read(self) -> None:
        for row in self._rows.rows:
            self._table.num_rows += 1
            try:
                self._add(row.place, row.cells)
            except ValueError as error:
                self.problems.append(Problem(row.place, str(error), "bad_row"))
                if len(self.problems) == _MOST_PROBLEMS:
                    break

    def _add(self, place: str, cells: dict[str, Any]) -> None:
        sample_id = _sample_id(cells, self._options.id_column)
        try:
            key = sample_id, _generation(cells)
            scores = tuple(_score(cells, column) for column in self._columns)
            name = self._class(cells)
        except ValueError as error:
            message = f"{short(sample_id)}: {error}"
            raise ValueError(message) from None
        if any(map(math.isnan, scores)) or name == "":
            self._table.empty.append(sample_id)
            return
        if name is not None:
            self._counts[name] += 1
        entry = Entry(scores, None, name)
        known = self._table.entries.setdefault(key, entry)
        if key in self._lines:
            self._table.num_repeated += 1
        if known != entry:
            what = "scores" if name is None else "values"
            message = f"{short(sample_id)} has other {what} than on {self._lines[key]}"
            raise ValueError(message)
        self._lines.setdefault(key, place)

    def _class(self, cells: dict[str, Any]) -> str | None:
        """The key of a row's class, empty if the cell is; None if no column is named."""
        column = self._options.label_column
        if column is None:
            return None
        text = _text(_cell(cells, column), column)
        key = class_key(text)
        self._spellings.setdefault(key, text.strip())
        return key

    def finished(self) -> LabelTable:
        """The table with its labels."""
        table, options = self._table, self._options
        if options.label_column is not None:
            labels = self._labels_of_classes(options.label_column)
            table.classes = {self._spellings[key]: labels[key] for key in self._counts}
            for key, each in table.entries.items():
                name = str(each.name)
                table.entries[key] = Entry(each.scores, labels[name], self._spellings[name])
        elif options.makes_labels:
            table.threshold = THRESHOLD if options.threshold is None else options.threshold
            table.higher_means = self._direction(self._columns[0])
            for key, each in table.entries.items():
                is_high = each.scores[0] >= table.threshold
                label = int(is_high == (table.higher_means == "hallucinated"))
                table.entries[key] = Entry(each.scores, label)
        return table

    def _labels_of_classes(self, column: str) -> dict[str, int | None]:
        """The label of every class that occurs, by key."""
        options = self._options
        found = [
            f"{short(self._spellings[key])} ({counted(n, 'row')})"
            for key, n in self._counts.items()
        ]
        has = f"{self._rows.path}: the column {column!r} has the classes {and_more(found, 10)}"
        if options.class_labels is not None:
            labels = {class_key(name): number for name, number in options.class_labels.items()}
            unnamed = [self._spellings[key] for key in self._counts if key not in labels]
            if unnamed:
                message = f"{has}; class_labels does not say which label {unnamed[0]!r} gets"
                raise OptionError(message)
            return labels
        if options.positive is None:
            message = (
                f"{has}; name the one that gets label 1, hallucination (positive='...'), or the "
                "label of each (class_labels)"
            )
            raise OptionError(message)
        positive = class_key(options.positive)
        if self._counts and positive not in self._counts:
            message = f"{has}, and not positive={options.positive!r}"
            raise OptionError(message)
        if len(self._counts) > 2:
            message = (
                f"{has}; with more than two, give the label of each by class_labels instead of "
                "positive, None for a class that gets no label"
            )
            raise OptionError(message)
        return {key: int(key == positive) for key in self._counts}

    def _direction(self, column: str) -> HigherMeans:
        stated, (known, source) = self._options.higher_means, KNOWN_SCORES.get(column, (None, ""))
        if stated is None and known is None:
            message = (
                f"{self._rows.path}: what high values of {column!r} mean is not known; say "
                "higher_means='correct' or higher_means='hallucinated', or, if the column holds "
                "labels, name it as label_column"
            )
            raise OptionError(message)
        if known is not None and stated not in (None, known):
            message = (
                f"{self._rows.path}: high values of {column!r} mean {known} ({source}), and not "
                f"higher_means={stated!r}; rename the column if it holds something else"
            )
            raise OptionError(message)
        values = {each.scores[0] for each in self._table.entries.values()}
        if stated is None and len(values) > 1 and values <= {0.0, 1.0}:
            message = (
                f"{self._rows.path}: the column {column!r} holds nothing but 0 and 1, which looks "
                "like labels; name it as label_column, or say what high scores mean (higher_means)"
            )
            raise OptionError(message)
        return stated or known  # type: ignore[return-value]  # one of them is there


def _cell(cells: dict[str, Any], column: str) -> Any:
    try:
        return cells[column]
    except KeyError:
        message = f"has no {column!r}"
        raise ValueError(message) from None


def _text(value: Any, column: str) -> str:
    """The text of a cell as a table writes it; empty for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value)
    message = f"{column} holds {type(value).__name__}, expected text or a number"
    raise ValueError(message)


def _sample_id(cells: dict[str, Any], column: str) -> str:
    value = _cell(cells, column)
    found = _text(value, column)
    if type(value) in (bool, float):
        message = f"{column} is {value!r}, expected text or an integer"
        raise ValueError(message)
    if not found:
        message = f"{column} is empty"
        raise ValueError(message)
    return found


def _generation(cells: dict[str, Any]) -> int | None:
    value = _text(cells.get(GENERATION_COLUMN), GENERATION_COLUMN)
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and len(value) < 20):
        message = f"{GENERATION_COLUMN} is {short(value)}, expected a number from 0"
        raise ValueError(message)
    return int(value)


def _score(cells: dict[str, Any], column: str) -> float:
    """A score; NaN for a missing one."""
    value = _cell(cells, column)
    text = "" if value is None else value.strip() if isinstance(value, str) else repr(value)
    if text.lower() in ("", "nan"):
        return math.nan
    if not _NUMBER.fullmatch(text):
        what = "a finite number" if text.lstrip("+-").lower() in _INFINITE else "a number"
        message = f"the score is {short(value)}, expected {what}"
        raise ValueError(message)
    number = float(text)
    if math.isinf(number):
        message = f"the score is {short(value)}, expected a finite number"
        raise ValueError(message)
    return number
