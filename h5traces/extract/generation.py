"""Prompts and answers: questions to token ids, generation, and token ids to text."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from h5traces.arguments import shown
from h5traces.errors import ExtractionError, TooLongError
from h5traces.extract.capture import padded
from h5traces.extract.kept import SPANS, kept_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from h5traces.extract.options import ExtractOptions, GenerationOptions
    from h5traces.extract.questions import Given, Question
    from h5traces.format.archive import AnswerCut, FinishReason


_PLACE: Final = "{question}"
_SENTENCE_END: Final = re.compile(r"[.!?](?=\s|\Z)")


@dataclass(frozen=True)
class Job:
    """A question, its prompt as token ids, and the seed of the sample's random numbers.

    `given` are the tokens of an answer that is not generated, and `given_text` its text, if it came
    as text. `index` counts the answers to the question. `text` is the prompt, if it was tokenised;
    of chats, with the special tokens.
    """

    question: Question
    prompt: tuple[int, ...]
    seed: int
    given: tuple[int, ...] | None = None
    given_text: str | None = None
    index: int = 0
    text: str | None = None
    is_chat: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """What tells the sample apart from others of the run."""
        return self.question.sample_id, self.index

    @property
    def name(self) -> str:
        """The sample, for messages."""
        return self.question.sample_id + (f", answer {self.index}" if self.index else "")

    def num_tokens(self, max_new_tokens: int) -> int:
        """Tokens of prompt and answer, at most."""
        answer = max_new_tokens if self.given is None else len(self.given)
        return len(self.prompt) + answer

    def num_kept(self, options: ExtractOptions) -> int:
        """Those that are stored, at most."""
        length = self.num_tokens(options.generation.max_new_tokens)
        return len(kept_tokens(options.tokens, len(self.prompt), length))


# Batches that are sorted together, so that an archive follows its data set but for a few samples.
_SORTED_BATCHES: Final = 64


def batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Jobs that are computed together; neighbours have prompts of similar length, longest first.

    The same jobs make the same batches.
    """
    window = size * _SORTED_BATCHES
    for start in range(0, len(jobs), window):
        part = list(jobs[start : start + window])
        if size > 1:
            part.sort(key=lambda each: each.num_tokens(0), reverse=True)
        for first in range(0, len(part), size):
            yield part[first : first + size]


class UnfitAnswerError(ExtractionError):
    """A given answer cannot follow its prompt."""


@dataclass(frozen=True)
class _Prompt:
    """A prompt as text and token ids; `answer` is what an assistant replies to it in a chat.

    A chat template wrote the special tokens of a chat.
    """

    text: str | None
    ids: tuple[int, ...]
    is_chat: bool = False
    answer: str | None = None


class Planner:
    """Makes jobs from questions; needs a tokenizer and a configuration, but no weights."""

    def __init__(
        self, tokenizer: Any, config: Any, options: ExtractOptions, *, spare_tokens: int = 0
    ) -> None:
        if _PLACE not in options.prompt_template:
            message = f"the prompt template {options.prompt_template!r} does not hold {_PLACE}"
            raise ExtractionError(message)
        if options.chat:
            _check_chat(tokenizer)
        self._tokenizer, self._options = tokenizer, options
        self._family = config.model_type
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._context = None if context is None else context - spare_tokens

    def jobs(
        self, question: Question
    ) -> Iterator[tuple[int, Job | TooLongError | UnfitAnswerError]]:
        """The jobs of a question by index, one for each answer, or why there can be none."""
        try:
            prompt = self._prompt(question)
        except UnfitAnswerError as error:
            yield 0, error
            return
        answers: Sequence[Given | None] = question.given_answers
        if prompt.answer is not None:
            answers = (prompt.answer, *answers)
        num_generations = self._options.generation.num_generations
        if answers and num_generations > 1:
            message = (
                f"{question.sample_id}: has a given answer, and num_generations is "
                f"{num_generations}; give answers, or have them drawn"
            )
            raise ExtractionError(message)
        for index, given in enumerate(answers or [None] * num_generations):
            try:
                yield index, self._job(question, prompt, index, given)
            except (TooLongError, UnfitAnswerError) as error:
                yield index, error

    def _job(self, question: Question, prompt: _Prompt, index: int, given: Given | None) -> Job:
        job = Job(
            question,
            prompt.ids,
            sample_seed(self._options.seed, question.sample_id, index),
            index=index,
            text=prompt.text,
            is_chat=prompt.is_chat,
        )
        if given is not None:
            text = given if isinstance(given, str) else None
            job = replace(job, given=self._given(job.name, prompt, given), given_text=text)
        self._check_spans(job)
        if not job.num_kept(self._options):
            message = f"{job.name}: has no answer whose tokens could be stored"
            raise UnfitAnswerError(message)
        longest = job.num_tokens(self._options.generation.max_new_tokens)
        if self._context is not None and longest > self._context:
            message = (
                f"{job.name}: the prompt has {len(prompt.ids)} tokens, and with up to "
                f"{longest - len(prompt.ids)} of the answer it exceeds the {self._context} that "
                f"{self._family} takes; shorten it, or lower max_new_tokens"
            )
            raise TooLongError(message)
        return job

    def _given(self, name: str, prompt: _Prompt, given: Given) -> tuple[int, ...]:
        """The tokens of a given answer: those that its text has after the prompt."""
        if not given:
            message = f"{name}: the given answer is empty; expected text or tokens"
            raise UnfitAnswerError(message)
        if not isinstance(given, str):
            self._check_ids(name, "given answer", given)
            return given
        if prompt.text is None:
            # No text was tokenised, so none can be joined.
            return tuple(self._encoded(given, add_special_tokens=False))
        whole = tuple(self._tokens(prompt.text + given, is_chat=prompt.is_chat))
        if whole[: len(prompt.ids)] != prompt.ids or len(whole) == len(prompt.ids):
            message = (
                f"{name}: with the given answer {shown(given)} after it, the prompt "
                "has other tokens; begin the answer with a space or a line, or give token ids"
            )
            raise UnfitAnswerError(message)
        return whole[len(prompt.ids) :]

    def _check_spans(self, job: Job) -> None:
        """Reject spans that are not of the given answer, or none where they are to be kept."""
        spans, text = job.question.spans, job.given_text
        if not spans:
            if self._options.tokens == SPANS:
                message = f"{job.name}: has no spans whose tokens could be stored"
                raise UnfitAnswerError(message)
            return
        if text is None or job.index:
            message = f"{job.name}: has spans, which need one given answer as text"
            raise UnfitAnswerError(message)
        for span, (start, end) in zip(spans, job.question.char_spans, strict=True):
            if end <= start:
                message = (
                    f"{job.name}: the span {start} to {end} holds nothing; expected its first "
                    "character and the one after its last"
                )
                raise UnfitAnswerError(message)
            if start < 0 or end > len(text):
                message = (
                    f"{job.name}: the span {start} to {end} lies outside of the given answer, "
                    f"which has {len(text)} characters"
                )
                raise UnfitAnswerError(message)
            expected = span.get("text") if isinstance(span, dict) else None
            if expected is not None and text[start:end] != expected:
                message = (
                    f"{job.name}: the span {start} to {end} of the given answer is "
                    f"{shown(text[start:end])}, expected {shown(expected)}"
                )
                raise UnfitAnswerError(message)

    def _check_ids(self, name: str, what: str, ids: Sequence[int]) -> None:
        known = range(len(self._tokenizer))
        odd = [each for each in ids if each not in known]
        if odd:
            message = f"{name}: the {what} has the token {odd[0]}, expected 0 to {len(known) - 1}"
            raise UnfitAnswerError(message)

    def _tokens(self, text: str, *, is_chat: bool) -> list[int]:
        return self._encoded(text, add_special_tokens=not is_chat)

    def _encoded(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # Not verbose: prompts that are too long are left out, and named.
        options = {"add_special_tokens": add_special_tokens, "verbose": False}
        found: list[int] = self._tokenizer(text, **options)["input_ids"]
        return found

    def _prompt(self, question: Question) -> _Prompt:
        if question.prompt_ids:
            self._check_ids(question.sample_id, "prompt", question.prompt_ids)
            return _Prompt(None, question.prompt_ids)
        if question.messages:
            return self._chat(question)
        if not question.text.strip():
            message = f"{question.sample_id}: the question is empty; expected text"
            raise ExtractionError(message)
        text = self._options.prompt_template.replace(_PLACE, question.text)
        if self._options.chat:
            text = self._rendered(question, [{"role": "user", "content": text}])
        return self._prompt_of(question, text, is_chat=self._options.chat)

    def _chat(self, question: Question) -> _Prompt:
        """The prompt of a chat, whose last message may be the answer."""
        _check_chat(self._tokenizer)
        messages = list(question.messages)
        is_answered = messages[-1].get("role") == "assistant"
        text = self._rendered(question, messages[:-1] if is_answered else messages)
        prompt = self._prompt_of(question, text, is_chat=True)
        if not is_answered:
            return prompt
        whole = self._rendered(question, messages, add_generation_prompt=False)
        if not whole.startswith(text):
            message = (
                f"{question.sample_id}: the chat template writes the prompt otherwise where an "
                "answer follows; give the answer in a separate column"
            )
            raise UnfitAnswerError(message)
        return replace(prompt, answer=whole[len(text) :])

    def _prompt_of(self, question: Question, text: str, *, is_chat: bool) -> _Prompt:
        ids = self._tokens(text, is_chat=is_chat)
        if not ids:
            message = f"{question.sample_id}: the prompt {text!r} has no tokens"
            raise ExtractionError(message)
        return _Prompt(text, tuple(ids), is_chat)

    def _rendered(
        self,
        question: Question,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(question.tools) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        # Templates raise what they like.
        except Exception as error:
            message = (
                f"{question.sample_id}: the chat template rejects the messages: "
                f"{type(error).__name__}: {error}"
            )
            raise UnfitAnswerError(message) from error
        return text


def _check_chat(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        message = (
            f"{type(tokenizer).__name__} has no chat template; use a prompt template without "
            "chat or messages, or set tokenizer.chat_template"
        )
        raise ExtractionError(message)


@dataclass(frozen=True)
class Answer:
    """Tokens of an answer, with the end-of-text token if the model gave one."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason


def sample_seed(seed: int, sample_id: str, index: int = 0) -> int:
    """A sample's own seed: 63 bits of BLAKE2b over the seed of the run, the id and its answer."""
    answer = f"\0{index}" if index else ""
    text = f"{seed}:{sample_id}{answer}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class Drawing(LogitsProcessor):
    """Adds Gumbel noise to each row, so that the highest score is a draw from the softmax.

    torch.multinomial draws for the whole batch from one stream, so a sample would depend on its
    neighbours. Here every row has a generator, on the CPU: the noise is the same on every device.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The scores with noise."""
        noise = torch.stack(
            [
                torch.empty(scores.shape[-1]).exponential_(generator=each)
                for each in self._generators
            ]
        )
        return cast("torch.FloatTensor", scores.float() - noise.log().to(scores.device))


def generation_config(model: Any, options: GenerationOptions, pad_id: int) -> Any:
    """The model's own generation config, changed by `options`; `Drawing` draws at random."""
    config = copy.deepcopy(model.generation_config)
    config.update(
        do_sample=False,
        num_beams=options.num_beams,
        # transformers rejects 0, which is not asked of it.
        max_new_tokens=max(1, options.max_new_tokens),
        max_length=None,
        pad_token_id=pad_id,
        use_cache=True,
        num_return_sequences=1,
        temperature=None,
        top_k=None,
        top_p=None,
    )
    return config


def answers_to(
    model: Any, jobs: Sequence[Job], options: GenerationOptions, *, pad_id: int
) -> list[Answer]:
    """The answers of a batch: given ones, none, or those that the model generates."""
    asked = [each for each in jobs if each.given is None]
    if options.max_new_tokens and asked:
        prompts, seeds = [each.prompt for each in asked], [each.seed for each in asked]
        made = iter(generate(model, prompts, seeds, options, pad_id=pad_id))
    else:
        made = iter([Answer((), "none")] * len(asked))
    return [next(made) if each.given is None else Answer(each.given, "given") for each in jobs]


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    options: GenerationOptions,
    *,
    pad_id: int,
) -> list[Answer]:
    """Answers to a batch of prompts; shorter ones are padded on the left, and masked there."""
    processors = LogitsProcessorList()
    if options.do_sample:
        processors.append(TemperatureLogitsWarper(float(options.temperature)))
        if options.top_k:
            processors.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            processors.append(TopPLogitsWarper(options.top_p))
        processors.append(Drawing(seeds))
    device = model.get_input_embeddings().weight.device
    inputs = padded(prompts, pad_id, device)
    inputs.pop("position_ids", None)  # generate derives them from the mask
    config = generation_config(model, options, pad_id)
    with torch.inference_mode(), in_force(model, config):
        generated = model.generate(**inputs, generation_config=config, logits_processor=processors)
    length = inputs["input_ids"].shape[1]
    ends = _end_tokens(config)
    return [_answer(row[length:], ends, options) for row in generated.tolist()]


@contextlib.contextmanager
def in_force(model: Any, config: Any) -> Iterator[None]:
    """Use this generation config alone.

    transformers fills missing values from the model's own config, so that its temperature would
    come back, with a warning that it has no effect.
    """
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


def _end_tokens(config: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    found = config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, (list, tuple)) else [found])


def _answer(row: list[int], ends: frozenset[int], options: GenerationOptions) -> Answer:
    for position, token in enumerate(row):
        if token in ends:
            return Answer(tuple(row[: position + 1]), "stop")
    return Answer(tuple(row[: options.max_new_tokens]), "length")


def padding_token(tokenizer: Any, *, batch_size: int) -> int:
    """The token that fills shorter sequences of a batch. It is masked, so any token will do."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    if batch_size > 1:
        message = (
            f"{type(tokenizer).__name__} has neither a pad token nor an end token to fill batches "
            "with; set tokenizer.pad_token, or use a batch size of 1"
        )
        raise ExtractionError(message)
    return 0


def clean_answer(text: str, cut: AnswerCut) -> str:
    """The answer up to the end of its first sentence or line, without space around it."""
    found = text.strip()
    if cut == "newline":
        found = found.partition("\n")[0]
    elif cut == "sentence":
        end = _SENTENCE_END.search(found)
        found = found[: end.end()] if end else found
    return found.strip()
