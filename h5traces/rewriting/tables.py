"""Tables of scores: CSV files with a row per question."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from h5traces.errors import Problem, SchemaError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ID_COLUMN: Final = "question_id"
SCORE_COLUMN: Final = "bleurt_score"
GENERATION_COLUMN: Final = "generation_index"
# What the ``_full`` tables have beside; the score itself is the best of all references.
OTHER_SCORES: Final = ("min_score", "avg_score")
_MOST_NAMED = 5

# Sample id, and generation index where the table has one.
Key = tuple[str, int | None]


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


def read_scores(
    path: Path, *, id_column: str = ID_COLUMN, score_column: str = SCORE_COLUMN
) -> ScoreTable:
    """A CSV file with a header, in UTF-8; texts may hold newlines.

    Raises
    ------
    SchemaError
        A column is missing, a score is no number, or rows of one id contradict each other; the
        problems name the lines.
    OSError
        The file cannot be read.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            columns = tuple(reader.fieldnames or ())
            names = _score_columns(path, columns, id_column, score_column)
            table = ScoreTable(path, tuple(score_name(each) for each in names))
            table.has_generations = GENERATION_COLUMN in columns
            problems = _read_rows(reader, table, id_column, names)
        except (csv.Error, UnicodeDecodeError) as error:
            message = f"{path}: line {reader.line_num}: is no CSV in UTF-8: {error}"
            raise SchemaError(message) from error
    if problems:
        named = "; ".join(f"{each.loc}: {each.message}" for each in problems[:_MOST_NAMED])
        more = f" and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        message = f"{path}: {named}{more}"
        raise SchemaError(message, problems)
    return table


def _score_columns(
    path: Path, columns: Sequence[str], id_column: str, score_column: str
) -> tuple[str, ...]:
    missing = [each for each in (id_column, score_column) if each not in columns]
    if missing:
        message = (
            f"{path}: has no column {' and no column '.join(map(repr, missing))}; its columns are "
            f"{', '.join(columns) or 'none'}; name yours with --id-column and --score-column"
        )
        raise SchemaError(message)
    repeated = sorted({each for each in columns if columns.count(each) > 1})
    if repeated:
        message = f"{path}: the columns {', '.join(repeated)} occur more than once"
        raise SchemaError(message)
    others = (each for each in OTHER_SCORES if each in columns and each != score_column)
    return (score_column, *others)


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
