"""Questions, from files and from data sets on the hub."""

from __future__ import annotations

import io
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import xxhash

from h5traces.archive.characters import span_of
from h5traces.errors import ExtractionError, MissingDependencyError, OptionError, SchemaError
from h5traces.extract.options import Columns
from h5traces.sources.rows import foreign, listed, no_column, read_rows, short, text_of
from h5traces.storage.files import read_document

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from h5traces.extract.options import DatasetChoice
    from h5traces.sources.rows import TextTable

_QUESTION_COLUMNS: Final = ("question", "prompt")
_ID_COLUMNS: Final = ("question_id", "id")
_ANSWER_COLUMNS: Final = ("answers", "answer", "ground_truth_answers", "reference_answers")
_SUFFIXES: Final = (".jsonl", ".json", ".csv", ".tsv")
_MAX_QUESTIONS_NBYTES: Final = 1 << 30


# An answer that the model is given, as text or as token ids.
Given = str | tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes
    ----------
    text
        The question itself; of a chat, what the user said last.
    sample_id
        Its id, unique in the data set.
    answers
        Reference answers, if there are any.
    row
        0-based row in the data set.
    given
        An answer that the model is given, as text that follows the prompt or as token ids, or
        several of them; None to generate.
    messages, tools
        A chat, and the tools that it may call, for the tokenizer's chat template.
    prompt_ids
        The prompt as token ids.
    spans
        Characters of the given answer, such as hallucinated ones: pairs of the first and the one
        behind the last, or dicts with ``start`` and ``end``, and ``text`` if it is to be compared.
    """

    text: str
    sample_id: str
    answers: tuple[str, ...] = ()
    row: int = 0
    given: Given | tuple[Given, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    prompt_ids: tuple[int, ...] = ()
    spans: tuple[Any, ...] | None = None

    @property
    def char_spans(self) -> list[tuple[int, int]]:
        """First characters of spans, and those after their last."""
        return [span_of(each) for each in self.spans or ()]

    @property
    def given_answers(self) -> tuple[Given, ...]:
        """All answers that the model is given."""
        if self.given is None:
            return ()
        is_one = isinstance(self.given, str) or not any(
            isinstance(each, (str, tuple)) for each in self.given
        )
        return (cast("Given", self.given),) if is_one else cast("tuple[Given, ...]", self.given)

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | Question, number: int) -> Question:
        """A question from text or a dict; those without an id are named by their number.

        Raises
        ------
        ExtractionError
            `value` is something else.
        """
        if isinstance(value, Question):
            return value
        if isinstance(value, str):
            return cls(value, str(number), row=number)
        try:
            messages = tuple(value.get("messages", ()))
            prompt_ids = tuple(value.get("prompt_ids", ()))
            has_text = not messages and not prompt_ids
            text = value["question"] if has_text else value.get("question", said_last(messages))
            return cls(
                text,
                str(value.get("question_id", number)),
                tuple(value.get("answers", ())),
                number,
                _given(value.get("given")),
                messages,
                tuple(value.get("tools", ())),
                prompt_ids,
                None if value.get("spans") is None else tuple(value["spans"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            message = (
                f"question {number}: found {type(value).__name__}, expected text, or a dict with "
                "'question', 'messages' or 'prompt_ids', and optionally 'question_id', 'answers', "
                "'given', 'tools' and 'spans'"
            )
            raise ExtractionError(message) from error


def said_last(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the user said last in a chat, as far as it is text."""
    said = [each.get("content") for each in messages if each.get("role") == "user"]
    return said[-1] if said and isinstance(said[-1], str) else ""


def _given(value: Any) -> Any:
    """Text, token ids, or several answers, with tuples for lists."""
    if not isinstance(value, (list, tuple)):
        return value
    return tuple(_given(each) for each in value)


@dataclass(frozen=True)
class QuestionSet:
    """Questions and where they come from; the revision of a file is a digest of its bytes."""

    name: str
    questions: tuple[Question, ...]
    config: str | None = None
    split: str | None = None
    revision: str | None = None


def load_dataset(choice: DatasetChoice) -> QuestionSet:
    """Load the questions of a data set."""
    name = choice.dataset
    if name in HUB_DATASETS:
        found = load_questions(name, path=choice.path, revision=choice.revision)
    elif Path(name).is_file():
        found = read_questions(Path(name), choice.columns)
    else:
        message = (
            f"no data set is known as {name!r}, and no file has that name; expected "
            f"{', '.join(HUB_DATASETS)}, or a .jsonl or .csv file"
        )
        raise ExtractionError(message)
    return replace(found, questions=found.questions[: choice.num_samples])


def _checked(questions: Iterable[tuple[str, Question]], source: str) -> tuple[Question, ...]:
    """All questions, each with its place, or an error that names the first that is wrong."""
    found: list[Question] = []
    places: dict[str, str] = {}
    for place, each in questions:
        if not (each.text.strip() or each.messages or each.prompt_ids):
            message = f"{source}: {place}: the question is empty; fill it in, or remove it"
            raise ExtractionError(message)
        if each.sample_id in places:
            message = (
                f"{source}: {place}: the id {short(each.sample_id)} is that of "
                f"{places[each.sample_id]} already; ids must be unique"
            )
            raise ExtractionError(message)
        places[each.sample_id] = place
        found.append(each)
    if not found:
        message = f"{source}: holds no questions"
        raise ExtractionError(message)
    return tuple(found)


def read_questions(path: Path, columns: Columns | None = None) -> QuestionSet:
    """Questions of a file: CSV or TSV with a header, or JSON Lines; in UTF-8.

    The content decides which. Questions without an id are named by the file and their row.

    Raises
    ------
    ExtractionError
        The file is no such table, a row has no question, or repeats an id; the message names it.
    """
    if path.suffix.lower() not in _SUFFIXES:
        message = f"{path}: expected a file of questions, .jsonl or .csv (or .json, .tsv)"
        raise ExtractionError(message)
    data = read_document(
        path, ExtractionError, "a file of questions", max_nbytes=_MAX_QUESTIONS_NBYTES
    )
    try:
        table = read_rows(path, text_of(io.BytesIO(data)))
        questions = _checked(_from_rows(table, columns or Columns()), str(path))
    except SchemaError as error:
        raise ExtractionError(str(error)) from error
    digest = xxhash.xxh3_128_hexdigest(data)
    return QuestionSet(path.name, questions, revision=f"xxh3-128:{digest}")


def _from_rows(table: TextTable, columns: Columns) -> Iterator[tuple[str, Question]]:
    path = table.path
    other = foreign(path)
    if other is not None and not any(each in table.columns for each in _QUESTION_COLUMNS):
        raise ExtractionError(other)
    repeated = sorted({each for each in table.columns if table.columns.count(each) > 1})
    if repeated:
        message = f"{path}: the columns {', '.join(map(repr, repeated))} occur more than once"
        raise ExtractionError(message)
    named = {name for name in asdict(columns).values() if name is not None}
    unseen = named - set(table.columns)
    number = -1
    for number, row in enumerate(table.rows):
        place = f"{path}: {row.place}"
        unseen -= row.cells.keys()
        if missing := named - row.cells.keys() - {columns.answers, columns.tools}:
            raise ExtractionError(no_column(place, sorted(missing)[:1], row.cells))
        messages = _listed(row.cells, columns.messages, place, dict, "messages, as dicts")
        prompt_ids = _listed(row.cells, columns.prompt_ids, place, int, "token ids")
        tools = _listed(row.cells, columns.tools, place, dict, "tools, as dicts", may_lack=True)
        question = _cell(row.cells, columns.question, _QUESTION_COLUMNS)
        if not isinstance(question, str) and (messages or prompt_ids):
            question = said_last(messages)
        if not isinstance(question, str):
            wanted = columns.question or " or ".join(_QUESTION_COLUMNS)
            message = (
                f"{place}: found no text in a column {wanted}; choose the column of questions "
                f"among {listed(row.cells)}"
            )
            raise ExtractionError(message)
        found_id = _cell(row.cells, columns.sample_id, _ID_COLUMNS)
        if columns.sample_id is not None and found_id is None:
            message = f"{place}: the column {columns.sample_id!r} is empty, expected an id"
            raise ExtractionError(message)
        if isinstance(found_id, (bool, float, list, dict)):
            message = f"{place}: the id is {short(found_id)}, expected text or an integer"
            raise ExtractionError(message)
        sample_id = f"{path.stem}_{number}" if found_id in (None, "") else str(found_id)
        answers = _answers(_cell(row.cells, columns.answers, _ANSWER_COLUMNS))
        given = _given_cell(row.cells, columns.given, place)
        spans = _spans(row.cells, columns.spans, place)
        yield (
            row.place,
            Question(
                question, sample_id, answers, number, given, messages, tools, prompt_ids, spans
            ),
        )
    # Rows may lack reference answers and tools, but not all of them.
    if unseen and number >= 0:
        raise ExtractionError(no_column(str(path), sorted(unseen)[:1], table.columns))


def _spans(cells: dict[str, Any], name: str | None, place: str) -> tuple[Any, ...] | None:
    if name is None:
        return None
    value = _parsed(cells.get(name))
    if not isinstance(value, list):
        message = f"{place}: the column {name!r} holds {short(value)}, expected a list of spans"
        raise ExtractionError(message)
    for each in value:
        try:
            span_of(each)
        except OptionError as error:
            message = f"{place}: the column {name!r}: {error}"
            raise ExtractionError(message) from error
    return tuple(value)


def _given_cell(cells: dict[str, Any], name: str | None, place: str) -> Any:
    """The given answers of a row: text, token ids, or a list of both; in CSV, lists as JSON."""
    if name is None:
        return None
    value = _given(_parsed(cells.get(name)))
    parts = value if isinstance(value, tuple) else ()
    if not isinstance(value, str) and not (parts and all(map(_is_answer, parts))):
        message = (
            f"{place}: found no text in the column {name!r}, expected an answer, its token ids, or "
            "a list of answers"
        )
        raise ExtractionError(message)
    if len({type(each) is int for each in parts}) > 1:
        message = f"{place}: the column {name!r} mixes token ids and answers in one list"
        raise ExtractionError(message)
    return value


def _is_answer(value: Any) -> bool:
    is_ids = isinstance(value, tuple) and all(type(each) is int for each in value)
    return isinstance(value, str) or type(value) is int or is_ids


def _parsed(value: Any) -> Any:
    """A cell of CSV that holds a list as JSON; others as they are."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, list) else value
    return value


def _listed(
    cells: dict[str, Any],
    name: str | None,
    place: str,
    kind: type,
    what: str,
    *,
    may_lack: bool = False,
) -> tuple[Any, ...]:
    """A cell that holds a list."""
    if name is None:
        return ()
    value = _parsed(cells.get(name))
    if may_lack and value in (None, "", []):
        return ()
    is_list = isinstance(value, list) and value and all(type(each) is kind for each in value)
    if not is_list:
        message = f"{place}: the column {name!r} holds {short(value)}, expected a list of {what}"
        raise ExtractionError(message)
    return tuple(value)


def _cell(row: dict[str, Any], name: str | None, usual: tuple[str, ...]) -> Any:
    for each in usual if name is None else (name,):
        if row.get(each) is not None:
            return row[each]
    return None


def _answers(value: Any) -> tuple[str, ...]:
    """Reference answers of a cell: a list, one text, or (in CSV) a list as JSON."""
    value = _parsed(value)
    if isinstance(value, list):
        return tuple(str(each) for each in value)
    return () if value in (None, "") else (str(value),)


@dataclass(frozen=True)
class HubDataset:
    """A data set on the hub; ``question`` makes a question from the number of a row and the row."""

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
    """Questions of a data set on the hub, or of a local copy of its repository."""
    known = HUB_DATASETS[name]
    place = path or known.path
    with tempfile.TemporaryDirectory(prefix="h5traces-questions-") as folder:
        # The library's cache knows local copies by the name of their folder alone, and would return
        # the rows of another one.
        rows = _load(known, place, revision, folder if path is not None else None)
        questions = _questions(known, rows, place)
    return QuestionSet(
        known.path,
        questions,
        config=known.config,
        split=known.split,
        revision=f"copy in {path}" if path is not None else revision or _commit(rows),
    )


def _load(known: HubDataset, path: str, revision: str | None, cache: str | None) -> Any:
    try:
        import datasets  # heavy, and needed for these data sets only
    except ImportError as error:
        message = (
            f"{known.path} is read with the library 'datasets', which is not installed; "
            "pip install 'h5traces[extract]', or give a .jsonl or .csv file"
        )
        raise MissingDependencyError(message) from error
    try:
        return datasets.load_dataset(
            path, known.config, split=known.split, revision=revision, cache_dir=cache
        )
    # Failures come as errors of four libraries.
    except Exception as error:
        message = (
            f"the data set {path} ({known.config}, {known.split}) cannot be loaded: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; without "
            "a network it must be in the cache (HF_HOME), or name the path of a local copy, or "
            "give a .jsonl or .csv file"
        )
        raise ExtractionError(message) from error


def _questions(known: HubDataset, rows: Any, place: str) -> tuple[Question, ...]:
    try:
        found = [known.question(number, row) for number, row in enumerate(rows)]
    except (KeyError, TypeError) as error:
        message = (
            f"{place}: rows are not those of {known.path} ({error!r}); columns: "
            f"{', '.join(rows.column_names)}"
        )
        raise ExtractionError(message) from error
    return _checked(((f"row {each.row}", each) for each in found), place)


def _commit(rows: Any) -> str | None:
    """The loaded commit, from the addresses of files in the hub's cache."""
    for address in rows.download_checksums or {}:
        _, at, rest = str(address).rpartition("@")
        if at:
            return rest.partition("/")[0]
    return None
