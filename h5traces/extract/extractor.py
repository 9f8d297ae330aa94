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

from h5traces.archive.selection import choose_layers
from h5traces.arguments import checked
from h5traces.errors import ExtractionError, NanError
from h5traces.extract.anatomy import anatomy_of
from h5traces.extract.batches import check_batches
from h5traces.extract.capture import CaptureOptions, Capturer
from h5traces.extract.characters import (
    char_offsets,
    sample_text,
    token_text,
    tokens_in_spans,
)
from h5traces.extract.generation import (
    Planner,
    answers_to,
    clean_answer,
    generation_config,
    padding_token,
)
from h5traces.extract.kept import ALL, kept_tokens
from h5traces.extract.options import ExtractOptions, window_of
from h5traces.extract.questions import Question
from h5traces.extract.trials import check_capture, with_kinds
from h5traces.format import layout
from h5traces.format.archive import ExtractionMetadata, SampleExtraction
from h5traces.format.dtypes import DTYPE_POLICIES, TypedArray, cast_values
from h5traces.format.kinds import (
    CHAR_OFFSETS,
    MODEL_KINDS,
    POSITIONS,
    PROMPT_TEXT,
    SEQUENCE,
    SPANS,
)
from h5traces.format.record import LayeredArrays, TraceRecord
from h5traces.meaning.sample_checks import vocabulary_of
from h5traces.precision.attention import MEAN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from h5traces.extract.capture import Captured
    from h5traces.extract.generation import Answer, Job
    from h5traces.extract.questions import QuestionSet
    from h5traces.format.dtypes import DtypePolicy
    from h5traces.format.record import LayerArray

_REFERENCE_ANSWERS: Final = "ground_truth_answers"


def extract(
    model: Any,
    tokenizer: Any,
    questions: Iterable[str | Mapping[str, Any] | Question],
    options: ExtractOptions | None = None,
    *,
    dtype: DtypePolicy = "float16",
) -> Iterator[TraceRecord]:
    """Generate answers and yield a record of each, ready for ``h5traces.create``.

    A batch is computed when its first record is requested; nothing else is kept in memory.

    Parameters
    ----------
    model, tokenizer
        A causal language model of transformers in evaluation mode, loaded with
        ``attn_implementation="eager"``, and its tokenizer.
    questions
        Texts, dicts with the attributes of `Question` (``question`` for its text, and
        ``question_id``), or `Question` objects. Questions without an id are numbered.
    options
        What is computed.
    dtype
        Type that the arrays will be stored in, as in `PrecisionOptions`; casts to ``float16`` and
        ``bfloat16`` are made on the device.

    Yields
    ------
    TraceRecord
        In the order of the questions: hidden states ``(S, H)`` and attentions ``(A, S, S)``.

    Raises
    ------
    ExtractionError
        The model or tokenizer cannot be used, a question is empty or too long, or a value is NaN.
    LayerIndexError
        The model has no such layer.
    """
    options = options or ExtractOptions()
    extractor = Extractor(model, tokenizer, options, dtype=dtype)
    planner = Planner(tokenizer, model.config, options)
    return _records(extractor, options, _jobs(planner, questions))


def _jobs(
    planner: Planner, questions: Iterable[str | Mapping[str, Any] | Question]
) -> Iterator[Job]:
    for number, each in enumerate(questions):
        for _, job in planner.jobs(Question.of(each, number)):
            if isinstance(job, ExtractionError):
                raise job
            yield job


def _records(
    extractor: Extractor, options: ExtractOptions, jobs: Iterator[Job]
) -> Iterator[TraceRecord]:
    while batch := list(itertools.islice(jobs, options.batch_size)):
        for each in extractor.run(batch):
            if not isinstance(each, NanError):
                yield each
            elif options.on_nan == "error":
                raise each


@checked
def extract_activations_and_attentions(
    model: Any,
    tokenizer: Any,
    question: str,
    max_new_tokens: int = 64,
    *,
    question_id: str | None = None,
    options: ExtractOptions | None = None,
    dtype: DtypePolicy = "float16",
) -> dict[str, Any]:
    """Extract one question into the dict of a pickled batch.

    Parameters
    ----------
    model, tokenizer
        As for `extract`.
    question
        The question; the prompt is made by ``options.prompt_template``.
    max_new_tokens
        Largest number of tokens of the answer.
    question_id
        A key of the dict, if given.
    options
        Everything else.
    dtype
        Type of the arrays. ``auto`` is the type that the model computed in.

    Returns
    -------
    dict
        ``hidden_states`` (one ``(S, H)`` array per layer), ``attentions`` (one ``(A, S, S)`` array
        per layer), ``tokens`` (int64 ``(S,)``), ``tokens_decoded``, ``generated_answer_clean`` and
        ``question_id``. bfloat16 values come as float32, since numpy has no such type.

    Raises
    ------
    ExtractionError
        As for `extract`; also for an embedding, which has no key in the dict.
    """
    options = options or ExtractOptions()
    if options.embedding:
        message = "the dict has no key for the embedding; use h5traces.extract.extract"
        raise ExtractionError(message)
    options = replace(
        options, generation=replace(options.generation, max_new_tokens=max_new_tokens)
    )
    named = Question(question, question_id or "0")
    (record,) = extract(model, tokenizer, [named], options, dtype=dtype)
    found: dict[str, Any] = {
        kind: [_stored(each, dtype) for each in layered.arrays]
        for kind, layered in record.layered.items()
    }
    found[layout.TOKENS] = record.tokens
    found[layout.TOKENS_DECODED] = list(record.tokens_decoded or ())
    found["generated_answer_clean"] = record.texts["generated_answer_clean"]
    if question_id is not None:
        found[layout.QUESTION_ID] = question_id
    return found


def _stored(entry: LayerArray, dtype: DtypePolicy) -> Any:
    """The array as an archive would return it; one that overflowed keeps its type."""
    if not isinstance(entry.array, TypedArray):
        message = f"{entry.name}: expected an array in memory"
        raise ExtractionError(message)
    array = entry.array
    if dtype == "float32" and array.dtype != "float64":
        array = cast_values(array, "float32")
    return array.to_numpy()


class Extractor:
    """Makes records of questions with one model; arguments as for `extract`.

    Attributes
    ----------
    num_layers
        Blocks of the model.
    keeps_batches
        Whether a sample that is computed again needs the same neighbours.
    """

    keeps_batches = True

    def __init__(
        self, model: Any, tokenizer: Any, options: ExtractOptions, *, dtype: DtypePolicy = "float16"
    ) -> None:
        if dtype not in DTYPE_POLICIES:
            message = f"dtype is {dtype!r}, expected {', '.join(DTYPE_POLICIES)}"
            raise ExtractionError(message)
        anatomy = anatomy_of(model)
        self.num_layers = anatomy.num_layers
        layers = choose_layers(options.layers, range(anatomy.num_layers))
        if model.training:
            message = f"{anatomy.model_class} is in training mode; call model.eval() first"
            raise ExtractionError(message)
        anatomy = with_kinds(anatomy, options.kinds, layers, needs_rules=options.attentions == "qk")
        size = vocabulary_of(model.config.to_dict())
        if size is not None and (options.top_logits or 0) > size:
            message = (
                f"top_logits is {options.top_logits}, but {anatomy.model_class} has {size} tokens"
            )
            raise ExtractionError(message)
        self._pad_id = padding_token(tokenizer, batch_size=options.batch_size)
        self._difference = check_capture(model, anatomy, options.kinds)
        self._batch_difference = (
            check_batches(model, anatomy, options.kinds, self._pad_id)
            if options.batch_size > 1
            else None
        )
        self._anatomy, self._layers = anatomy, layers
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._capturer = Capturer(
            anatomy,
            CaptureOptions(
                layers=layers,
                kinds=options.kinds,
                embedding=options.embedding,
                last_state=options.last_state,
                dtype=dtype,
                top_logits=options.top_logits,
                window=window_of(options.attentions),
                needs_rules=options.attentions == "qk",
            ),
        )

    def close(self) -> None:
        """Release what the model holds beyond memory: nothing, in transformers."""

    def metadata(self, questions: QuestionSet | None = None) -> ExtractionMetadata:
        """What archives record of the run."""
        model = self._model
        return ExtractionMetadata(
            model_class=type(model).__name__,
            config=_plain_json(model.config.to_dict()),
            weights_digest=weights_digest(model),
            transformers_version=transformers.__version__,
            torch_version=torch.__version__,
            engine="transformers",
            attention=model.config.get_text_config()._attn_implementation,
            sites=self._sites(),
            difference=self._difference,
            batch_difference=self._batch_difference,
            model_dtype=str(model.dtype).removeprefix("torch."),
            quantization=_quantization(model),
            device=_device_name(self._anatomy.device),
            threads=torch.get_num_threads() if self._anatomy.device.type == "cpu" else None,
            generation=self._generation(),
            **self._asked(questions),
        )

    def _asked(self, questions: QuestionSet | None) -> dict[str, Any]:
        """What archives record of tokenizer, options and data set, whichever engine runs."""
        tokenizer, options = self._tokenizer, self._options
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "tokenizer_digest": tokenizer_digest(tokenizer),
            "seed": options.seed,
            "batch_size": options.batch_size,
            "prompt_template": options.prompt_template,
            "chat_template": tokenizer.chat_template if options.chat else None,
            "answer_cut": options.answer_cut,
            "tokens": None if options.tokens == ALL else options.tokens,
            "kept": options.kept(self._layers),
            "dataset_config": questions.config if questions else None,
            "dataset_split": questions.split if questions else None,
            "dataset_revision": questions.revision if questions else None,
        }

    def _sites(self) -> dict[str, dict[str, list[int]]] | None:
        """Where kinds were taken that no output of the model gives: layers by place, by kind."""
        found: dict[str, dict[str, list[int]]] = {}
        for kind in self._options.kinds:
            for layer, site in self._anatomy.sites.get(kind, {}).items():
                found.setdefault(kind, {}).setdefault(str(site), []).append(layer)
        return found or None

    def _generation(self) -> Any:
        """All generation parameters in force."""
        options = self._options.generation
        names = ["max_new_tokens", "num_beams", "do_sample"]
        names += ["temperature", "top_k", "top_p", "num_generations"] if options.do_sample else []
        config = generation_config(self._model, options, self._pad_id)
        return _plain_json(
            {**config.to_diff_dict(), **{name: getattr(options, name) for name in names}}
        )

    def run(self, jobs: Sequence[Job]) -> Iterable[TraceRecord | NanError]:
        """Records of a batch, with an error in place of each sample rejected for NaN values."""
        answers = answers_to(self._model, jobs, self._options.generation, pad_id=self._pad_id)
        sequences = [
            (*job.prompt, *answer.tokens) for job, answer in zip(jobs, answers, strict=True)
        ]
        texts = [
            Texts.of(self._tokenizer, job, answer, self._options.tokens)
            for job, answer in zip(jobs, answers, strict=True)
        ]
        kept = [each.kept for each in texts]
        captured = self._capturer.run(sequences, pad_id=self._pad_id, kept=kept)
        longest = max(map(len, sequences))
        return [
            self._record(
                job,
                found,
                arrays,
                SampleExtraction(
                    finish_reason=answer.finish_reason,
                    seed=job.seed,
                    row=job.question.row,
                    num_together=len(jobs),
                    num_padding=longest - len(sequence),
                ),
                sequence,
            )
            for job, answer, sequence, found, arrays in zip(
                jobs, answers, sequences, texts, captured, strict=True
            )
        ]

    def _record(
        self,
        job: Job,
        found: Texts,
        captured: Captured,
        extraction: SampleExtraction,
        token_ids: Sequence[int],
    ) -> TraceRecord | NanError:
        if captured.num_nan and self._options.on_nan != "keep":
            (kind, name), count = next(iter(captured.num_nan.items()))
            message = (
                f"{job.name}: {kind}/{name} has {count} NaN values; compute in "
                "bfloat16 or float32, or set on_nan to skip or keep"
            )
            return NanError(message)
        sequence = np.array(token_ids, dtype=np.int64)
        tokens = sequence[found.kept]
        texts = {
            "question": job.question.text,
            "generated_answer": found.answer,
            "generated_answer_clean": clean_answer(found.answer, self._options.answer_cut),
        }
        extra: dict[str, Any] = {
            PROMPT_TEXT: found.prompt,
            CHAR_OFFSETS: found.offsets[found.kept],
            **captured.of_tokens,
        }
        if self._options.tokens != ALL:
            extra |= {POSITIONS: found.kept, SEQUENCE: sequence}
        if job.question.spans is not None:
            extra[SPANS] = list(job.question.spans)
        if job.question.answers:
            extra[_REFERENCE_ANSWERS] = list(job.question.answers)
        layered = {
            kind: LayeredArrays(
                tuple(captured.arrays.get(kind, ())),
                reduction=MEAN if kind == layout.ATTENTION_MEAN else None,
                axes=None if kind in layout.KINDS else MODEL_KINDS[kind].axes,
                definition=None if kind in layout.KINDS else MODEL_KINDS[kind].definition,
            )
            for kind in self._options.kinds
            if kind in MODEL_KINDS
        }
        return TraceRecord(
            sample_id=job.question.sample_id,
            generation_index=job.index,
            prompt_len=int(np.sum(found.kept < len(job.prompt))),
            extraction=extraction,
            # The keys of the newest pickles first, in their order.
            fields=(
                *layered,
                layout.TOKENS,
                layout.TOKENS_DECODED,
                "generated_answer_clean",
                layout.QUESTION_ID,
                "question",
                "generated_answer",
                layout.PROMPT_LENGTH,
                *extra,
            ),
            tokens=tokens,
            tokens_decoded=tuple(token_text(self._tokenizer, each) for each in tokens.tolist()),
            texts=texts,
            layered=layered,
            extra=extra,
        )


@dataclass(frozen=True)
class Texts:
    """Prompt and answer as text, the characters of tokens, and the places of those to keep."""

    prompt: str
    answer: str
    offsets: NDArray[np.int32]
    kept: NDArray[np.int64]

    @classmethod
    def of(cls, tokenizer: Any, job: Job, answer: Answer, tokens: str) -> Texts:
        prompt, text = sample_text(tokenizer, job, answer.tokens)
        offsets = char_offsets(tokenizer, job, answer.tokens)
        in_spans = tokens_in_spans(job, offsets, len(prompt))
        kept = kept_tokens(tokens, len(job.prompt), len(offsets), in_spans)
        return cls(prompt, text, offsets, kept)


def weights_digest(model: Any) -> str | None:
    """xxh3-128 over name, type, shape and bytes of every parameter and stored buffer.

    None if some are not in memory, as when a model is spread over devices and disk.
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
    """xxh3-128 over a tokenizer's rules (its vocabulary if it has none) and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = (
        json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    )
    text = f"{rules}\0{tokenizer.chat_template or ''}"
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _quantization(model: Any) -> str | None:
    found = getattr(model.config, "quantization_config", None)
    if found is None:
        return None
    document = found if isinstance(found, dict) else found.to_dict()
    return json.dumps(_plain_json(document), sort_keys=True)


def _plain_json(document: Any) -> Any:
    """A document as JSON returns it; values that JSON has no type for become text."""
    return json.loads(json.dumps(document, default=str))
