"""From questions to records: generate, then one clean forward pass over prompt and answer."""

from __future__ import annotations

import itertools
import json
import platform
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import transformers
import xxhash

from h5traces.errors import ExtractionError, NanError, TooLongError
from h5traces.extract.capture import CaptureOptions, Capturer, check_capture
from h5traces.extract.generation import (
    Answer,
    Prompter,
    answer_text,
    clean_answer,
    decoded_tokens,
    generate,
    generation_config,
    padding_token,
    sample_seed,
)
from h5traces.extract.models import BATCHING_FAMILIES, anatomy_of, check_eager
from h5traces.extract.options import ExtractOptions, layer_numbers
from h5traces.extract.questions import Question
from h5traces.format import layout
from h5traces.format.archive import ExtractionMetadata, SampleExtraction
from h5traces.format.dtypes import TypedArray, cast_values
from h5traces.format.record import LayeredArrays, TraceRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from h5traces.extract.capture import Captured
    from h5traces.extract.questions import QuestionSet
    from h5traces.format.record import LayerArray


def plain_json(document: Any) -> Any:
    """A document as JSON gives it back; what JSON has no type for as its text."""
    return json.loads(json.dumps(document, default=str))


def weights_digest(model: Any) -> str | None:
    """xxh3-128 over name, type, shape and bytes of every parameter and stored buffer.

    None where some are not in memory, as when a model is spread over devices and disk.
    """
    digest = xxhash.xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_meta:
            return None
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        values = value.detach().cpu().contiguous()
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """xxh3-128 over a tokenizer's rules, or where it has none its vocabulary, and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = (
        json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    )
    text = f"{rules}\0{tokenizer.chat_template or ''}"
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def device_name(device: torch.device) -> str:
    """What a device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _quantization(model: Any) -> str | None:
    found = getattr(model.config, "quantization_config", None)
    if found is None:
        return None
    document = found if isinstance(found, dict) else found.to_dict()
    return json.dumps(plain_json(document), sort_keys=True)


def extraction_metadata(
    model: Any,
    tokenizer: Any,
    options: ExtractOptions,
    *,
    generation: Any,
    questions: QuestionSet | None = None,
) -> ExtractionMetadata:
    """Everything that decided what a run stores.

    Parameters
    ----------
    model, tokenizer
        What computes.
    options
        The options of the run.
    generation
        The generation config in force.
    questions
        The data set.
    """
    drawing = {
        name: getattr(options.generation, name) for name in ("temperature", "top_k", "top_p")
    }
    return ExtractionMetadata(
        model_class=type(model).__name__,
        config=plain_json(model.config.to_dict()),
        weights_digest=weights_digest(model),
        tokenizer_class=type(tokenizer).__name__,
        tokenizer_digest=tokenizer_digest(tokenizer),
        transformers_version=transformers.__version__,
        torch_version=torch.__version__,
        model_dtype=str(model.dtype).removeprefix("torch."),
        quantization=_quantization(model),
        device=device_name(model.get_input_embeddings().weight.device),
        generation=plain_json(
            {
                **generation.to_diff_dict(),
                "max_new_tokens": options.generation.max_new_tokens,
                "num_beams": options.generation.num_beams,
                "do_sample": options.generation.do_sample,
                **(drawing if options.generation.do_sample else {}),
            }
        ),
        seed=options.seed,
        batch_size=options.batch_size,
        prompt_template=options.prompt_template,
        chat_template=tokenizer.chat_template if options.chat else None,
        answer_cut=options.answer_cut,
        dataset_config=questions.config if questions else None,
        dataset_split=questions.split if questions else None,
        dataset_revision=questions.revision if questions else None,
    )


REFERENCE_ANSWERS: Final = "ground_truth_answers"


class Extractor:
    """Makes records of questions with one model.

    Parameters
    ----------
    model, tokenizer
        A causal language model of transformers in evaluation mode, and its tokenizer.
    options
        What to extract, and how.

    Raises
    ------
    ExtractionError
        The model is no decoder, gives no attention weights, is in training mode or does not batch;
        the tokenizer lacks what is needed; or an option has a value that it cannot have.
    LayerIndexError
        The model has no such layer.
    """

    def __init__(self, model: Any, tokenizer: Any, options: ExtractOptions) -> None:
        options.check()
        self.anatomy = anatomy_of(model)
        self.layers = layer_numbers(options.layers, self.anatomy.num_layers)
        if model.training:
            message = f"{self.anatomy.model_class} is in training mode; call model.eval() first"
            raise ExtractionError(message)
        if layout.ATTENTIONS in options.kinds:
            check_eager(model)
        if options.batch_size > 1 and self.anatomy.family not in BATCHING_FAMILIES:
            message = (
                f"{self.anatomy.model_class} ({self.anatomy.family}) was not tried in batches; use "
                f"a batch size of 1. Batches work with {', '.join(sorted(BATCHING_FAMILIES))}"
            )
            raise ExtractionError(message)
        check_capture(model, self.anatomy, options.kinds)
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._pad_id = padding_token(tokenizer, batch_size=options.batch_size)
        self._capturer = Capturer(
            self.anatomy,
            CaptureOptions(
                layers=self.layers,
                kinds=options.kinds,
                embedding=options.embedding,
                last_state=options.last_state,
                dtype=options.dtype,
            ),
        )

    def metadata(self, questions: QuestionSet | None = None) -> ExtractionMetadata:
        """What archives record of the run."""
        config = generation_config(self._model, self._options.generation, self._pad_id)
        return extraction_metadata(
            self._model, self._tokenizer, self._options, generation=config, questions=questions
        )

    def run(self, jobs: Sequence[Job]) -> list[TraceRecord | NanError]:
        """Records of a batch; an error in the place of each sample with NaN that is not kept.

        Raises
        ------
        ExtractionError
            The model's arrays are not those of the sequence.
        """
        answers = generate(
            self._model,
            [each.prompt for each in jobs],
            [each.seed for each in jobs],
            self._options.generation,
            pad_id=self._pad_id,
        )
        sequences = [
            (*job.prompt, *answer.tokens) for job, answer in zip(jobs, answers, strict=True)
        ]
        captured = self._capturer.run(sequences, pad_id=self._pad_id)
        return [
            self._record(job, answer, arrays)
            for job, answer, arrays in zip(jobs, answers, captured, strict=True)
        ]

    def _record(self, job: Job, answer: Answer, captured: Captured) -> TraceRecord | NanError:
        if captured.num_nan and self._options.on_nan != "keep":
            (kind, name), count = next(iter(captured.num_nan.items()))
            message = (
                f"{job.question.sample_id}: {kind}/{name} has {count} NaN values; compute in "
                "bfloat16 or float32 (--model-dtype), or choose --on-nan skip or keep"
            )
            return NanError(message)
        tokens = (*job.prompt, *answer.tokens)
        text = answer_text(self._tokenizer, answer.tokens)
        texts = {
            "question": job.question.text,
            "generated_answer": text,
            "generated_answer_clean": clean_answer(text, self._options.answer_cut),
        }
        extra = {REFERENCE_ANSWERS: list(job.question.answers)} if job.question.answers else {}
        return TraceRecord(
            sample_id=job.question.sample_id,
            prompt_len=len(job.prompt),
            extraction=SampleExtraction(
                finish_reason=answer.finish_reason, seed=job.seed, row=job.question.row
            ),
            # The keys of the newest pickles first, in their order.
            fields=(
                *self._options.kinds,
                layout.TOKENS,
                layout.TOKENS_DECODED,
                "generated_answer_clean",
                layout.QUESTION_ID,
                "question",
                "generated_answer",
                layout.PROMPT_LENGTH,
                *extra,
            ),
            tokens=np.array(tokens, dtype=np.int64),
            tokens_decoded=decoded_tokens(self._tokenizer, tokens),
            texts=texts,
            layered={
                kind: LayeredArrays(tuple(captured.arrays.get(kind, ())))
                for kind in self._options.kinds
            },
            extra=extra,
        )


@dataclass(frozen=True)
class Job:
    """A question on its way through the model.

    Attributes
    ----------
    question
        What is asked.
    prompt
        Its token ids.
    seed
        Of the sample's random numbers.
    """

    question: Question
    prompt: tuple[int, ...]
    seed: int


class Planner:
    """Makes jobs of questions; needs a tokenizer and a configuration, but no weights.

    Parameters
    ----------
    tokenizer
        The model's.
    config
        The model's configuration.
    options
        What to extract, and how.

    Raises
    ------
    ExtractionError
        The prompt template cannot be used, or an option has a value that it cannot have.
    """

    def __init__(self, tokenizer: Any, config: Any, options: ExtractOptions) -> None:
        options.check()
        self._options = options
        self._prompter = Prompter(tokenizer, options.prompt_template, chat=options.chat)
        self._family = config.model_type
        self._context = getattr(config.get_text_config(), "max_position_embeddings", None)

    def job(self, question: Question) -> Job:
        """A question with its prompt.

        Raises
        ------
        TooLongError
            Prompt and answer may exceed the model's context.
        ExtractionError
            The question is empty.
        """
        try:
            prompt = self._prompter.token_ids(question.text)
        except ExtractionError as error:
            message = f"{question.sample_id}: {error}"
            raise ExtractionError(message) from error
        longest = self._options.generation.max_new_tokens
        if self._context is not None and len(prompt) + longest > self._context:
            message = (
                f"{question.sample_id}: the prompt has {len(prompt)} tokens, and with up to "
                f"{longest} of the answer it exceeds the {self._context} that {self._family} "
                "takes; shorten it, or lower --max-new-tokens"
            )
            raise TooLongError(message)
        return Job(question, prompt, sample_seed(self._options.seed, question.sample_id))


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
