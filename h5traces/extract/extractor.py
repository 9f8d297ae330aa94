"""From questions to records: generate, then one clean forward pass over prompt and answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import ExtractionError, NanError
from h5traces.extract.anatomy import BATCHING_FAMILIES, anatomy_of, check_eager
from h5traces.extract.capture import CaptureOptions, Capturer
from h5traces.extract.generation import Answer, generate, generation_config
from h5traces.extract.layer_ranges import layer_numbers
from h5traces.extract.prompts import answer_text, clean_answer, decoded_tokens, padding_token
from h5traces.extract.provenance import extraction_metadata
from h5traces.extract.self_check import check_capture
from h5traces.format import layout
from h5traces.format.extraction import SampleExtraction
from h5traces.format.record import LayeredArrays, TraceRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from h5traces.extract.capture import Captured
    from h5traces.extract.options import ExtractOptions
    from h5traces.extract.planning import Job
    from h5traces.extract.questions import QuestionSet
    from h5traces.format.extraction import ExtractionMetadata

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
