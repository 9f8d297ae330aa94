"""The functions for programs that hold a model already."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from h5traces.errors import ExtractionError, NanError
from h5traces.extract.extractor import Extractor
from h5traces.extract.options import ExtractOptions
from h5traces.extract.planning import Planner
from h5traces.extract.questions import Question
from h5traces.format import layout
from h5traces.format.dtypes import TypedArray, cast_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from h5traces.extract.planning import Job
    from h5traces.format.record import LayerArray, TraceRecord


def extract(
    model: Any,
    tokenizer: Any,
    questions: Iterable[str | Mapping[str, Any] | Question],
    options: ExtractOptions | None = None,
) -> Iterator[TraceRecord]:
    """Generate answers and yield a record of each, ready for ``h5traces.create``.

    Nothing is gathered: a record is computed when it, or another of its batch, is asked for.

    Parameters
    ----------
    model, tokenizer
        A causal language model of transformers in evaluation mode, loaded with
        ``attn_implementation="eager"``, and its tokenizer.
    questions
        Texts, dicts with ``question`` and perhaps ``question_id`` and ``answers``, or `Question`
        objects. Questions without an id are numbered.
    options
        What to extract, and how.

    Yields
    ------
    TraceRecord
        In the order of the questions.

    Raises
    ------
    ExtractionError
        The model or tokenizer cannot be used, a question is empty or too long, or a value is NaN.
    LayerIndexError
        The model has no such layer.
    """
    options = options or ExtractOptions()
    extractor = Extractor(model, tokenizer, options)
    planner = Planner(tokenizer, model.config, options)
    jobs = (planner.job(as_question(each, number)) for number, each in enumerate(questions))
    return _records(extractor, options, jobs)


def _records(
    extractor: Extractor, options: ExtractOptions, jobs: Iterator[Job]
) -> Iterator[TraceRecord]:
    while batch := list(itertools.islice(jobs, options.batch_size)):
        for each in extractor.run(batch):
            if not isinstance(each, NanError):
                yield each
            elif options.on_nan == "error":
                raise each


def as_question(value: str | Mapping[str, Any] | Question, number: int) -> Question:
    """Whatever a caller has of a question.

    Raises
    ------
    ExtractionError
        It is none of what `extract` takes.
    """
    if isinstance(value, Question):
        return value
    if isinstance(value, str):
        return Question(value, str(number), row=number)
    try:
        text, sample_id = value["question"], value.get("question_id", number)
        return Question(text, str(sample_id), tuple(value.get("answers", ())), number)
    except (KeyError, TypeError, AttributeError) as error:
        message = (
            f"question {number}: found a {type(value).__name__}, expected text, or a dict with "
            "'question' and perhaps 'question_id' and 'answers'"
        )
        raise ExtractionError(message) from error


def extract_activations_and_attentions(
    model: Any,
    tokenizer: Any,
    question: str,
    max_new_tokens: int = 64,
    *,
    question_id: str | None = None,
    options: ExtractOptions | None = None,
) -> dict[str, Any]:
    """The dict of old: what a pickled batch held of one question.

    Parameters
    ----------
    model, tokenizer
        As for `extract`.
    question
        The question; the prompt is made by ``options.prompt_template``.
    max_new_tokens
        Tokens of the answer, at most.
    question_id
        Becomes a key of the dict where it is given.
    options
        Everything else. With ``dtype`` ``auto`` arrays have the type that the model computed in.

    Returns
    -------
    dict
        ``hidden_states`` (one ``(S, H)`` array per layer), ``attentions`` (one ``(A, S, S)`` array
        per layer), ``tokens``, ``tokens_decoded``, ``generated_answer_clean`` and
        ``question_id``. bfloat16 comes as float32, since numpy has no such type.

    Raises
    ------
    ExtractionError
        As for `extract`; also if an embedding was asked for, which the dict has no place for.
    """
    options = options or ExtractOptions()
    if options.embedding:
        message = "the dict has no place for the embedding; use h5traces.extract.extract"
        raise ExtractionError(message)
    options = replace(
        options, generation=replace(options.generation, max_new_tokens=max_new_tokens)
    )
    named = Question(question, question_id or "0")
    (record,) = extract(model, tokenizer, [named], options)
    found: dict[str, Any] = {
        kind: [_stored(each, options) for each in layered.arrays]
        for kind, layered in record.layered.items()
    }
    found[layout.TOKENS] = record.tokens
    found[layout.TOKENS_DECODED] = list(record.tokens_decoded or ())
    found["generated_answer_clean"] = record.texts["generated_answer_clean"]
    if question_id is not None:
        found[layout.QUESTION_ID] = question_id
    return found


def _stored(entry: LayerArray, options: ExtractOptions) -> Any:
    """The array as an archive would give it back; one that overflowed keeps its own type."""
    if not isinstance(entry.array, TypedArray):
        message = f"{entry.name}: is no array"
        raise ExtractionError(message)
    array = entry.array
    if options.dtype == "float32" and array.dtype != "float64":
        array = cast_values(array, "float32")
    return array.to_numpy()
