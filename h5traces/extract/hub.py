"""Data sets of the hub, through ``datasets``."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from h5traces.errors import ExtractionError, MissingDependencyError
from h5traces.extract.questions import Question, QuestionSet, checked

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class HubDataset:
    """Where a data set lies on the hub, and how its rows read.

    Attributes
    ----------
    path, config, split
        As ``datasets.load_dataset`` takes them.
    question
        Makes a question of a row and its number.
    """

    path: str
    config: str
    split: str
    question: Callable[[int, dict[str, Any]], Question]


def _trivia_qa(number: int, row: dict[str, Any]) -> Question:
    answer = row["answer"]
    answers = dict.fromkeys([answer["value"], *answer["aliases"]])
    return Question(row["question"], row["question_id"], tuple(answers), number)


def _truthful_qa(number: int, row: dict[str, Any]) -> Question:
    answers = dict.fromkeys([row["best_answer"], *row["correct_answers"]])
    # The data set has no ids; the pipeline that wrote the pickles numbered its rows.
    return Question(row["question"], f"truthfulqa_{number}", tuple(answers), number)


HUB_DATASETS: Final = {
    "triviaqa": HubDataset("mandarjoshi/trivia_qa", "rc.nocontext", "validation", _trivia_qa),
    "truthfulqa": HubDataset("truthful_qa", "generation", "validation", _truthful_qa),
}


def load_questions(
    name: str, *, path: str | None = None, revision: str | None = None
) -> QuestionSet:
    """The questions of a data set that is known by name.

    Parameters
    ----------
    name
        A key of `HUB_DATASETS`.
    path
        A local copy of the data set's repository, instead of the hub.
    revision
        Commit, branch or tag on the hub.

    Raises
    ------
    ExtractionError
        The data set cannot be loaded.
    MissingDependencyError
        ``datasets`` is not installed.
    """
    known = HUB_DATASETS[name]
    with tempfile.TemporaryDirectory(prefix="h5traces-questions-") as folder:
        # The library's cache knows local copies by the name of their folder alone, and would return
        # the rows of another one.
        cache = folder if path is not None else None
        rows = _load(known, path or known.path, revision, cache)
        questions = _questions(known, rows, path or known.path)
    return QuestionSet(
        known.path,
        questions,
        config=known.config,
        split=known.split,
        revision=f"copy in {path}" if path is not None else revision or _commit(rows),
    )


def _questions(known: HubDataset, rows: Any, place: str) -> tuple[Question, ...]:
    try:
        found = [known.question(number, row) for number, row in enumerate(rows)]
    except (KeyError, TypeError) as error:
        message = (
            f"{place}: rows are not those of {known.path} ({error!r}); columns: "
            f"{', '.join(rows.column_names)}"
        )
        raise ExtractionError(message) from error
    return checked(found, place)


def _load(known: HubDataset, path: str, revision: str | None, cache: str | None) -> Any:
    try:
        import datasets  # heavy, and needed for these data sets only
    except ImportError as error:
        message = (
            f"{known.path} is read with the library 'datasets'; install it with "
            "pip install 'h5traces[extract]', or give a .jsonl or .csv file"
        )
        raise MissingDependencyError(message) from error
    try:
        return datasets.load_dataset(
            path, known.config, split=known.split, revision=revision, cache_dir=cache
        )
    # Whatever goes wrong comes as an error of one of four libraries.
    except Exception as error:
        message = (
            f"the data set {path} ({known.config}, {known.split}) cannot be loaded: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; without "
            "a network it must be in the cache (HF_HOME), or name a local copy with "
            "--dataset-path; or give a .jsonl or .csv file"
        )
        raise ExtractionError(message) from error


def _commit(rows: Any) -> str | None:
    """The commit that was loaded: the hub's cache addresses files by it."""
    for address in rows.download_checksums or {}:
        _, at, rest = str(address).rpartition("@")
        if at:
            return rest.partition("/")[0]
    return None
