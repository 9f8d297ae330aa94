"""Generates answers, each sample with random numbers of its own."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from h5traces.errors import ExtractionError
from h5traces.extract.capture import padded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from h5traces.extract.options import GenerationOptions
    from h5traces.format.archive import AnswerCut, FinishReason


@dataclass(frozen=True)
class Answer:
    """Generated tokens, the end-of-text token included where the model gave one."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason


def sample_seed(seed: int, sample_id: str) -> int:
    """A sample's own seed: 63 bits of BLAKE2b over the run's seed and the sample's id."""
    text = f"{seed}:{sample_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class Drawing(LogitsProcessor):
    """Adds each row's own Gumbel noise, so that the highest score is a draw from the softmax.

    torch.multinomial draws for the whole batch from one stream, so what a sample got would depend
    on its neighbours. The noise comes from the processor: it is the same on every device.

    Parameters
    ----------
    seeds
        One per row.
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
    """The model's own generation config with ours laid over it; drawing is ours, see `Drawing`."""
    config = copy.deepcopy(model.generation_config)
    config.update(
        do_sample=False,
        num_beams=options.num_beams,
        max_new_tokens=options.max_new_tokens,
        max_length=None,
        pad_token_id=pad_id,
        use_cache=True,
        num_return_sequences=1,
        temperature=None,
        top_k=None,
        top_p=None,
    )
    return config


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    options: GenerationOptions,
    *,
    pad_id: int,
) -> list[Answer]:
    """Answers to a batch of prompts.

    Parameters
    ----------
    model
        A causal language model.
    prompts
        Token ids; shorter ones are padded on the left.
    seeds
        Every sample's own.
    options
        How to generate.
    pad_id
        Token to pad with; it is masked.
    """
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
    inputs.pop("position_ids", None)  # generate counts them itself, from the mask
    config = generation_config(model, options, pad_id)
    with torch.inference_mode(), _in_force(model, config):
        generated = model.generate(**inputs, generation_config=config, logits_processor=processors)
    length = inputs["input_ids"].shape[1]
    ends = end_tokens(config)
    return [_answer(row[length:], ends, options) for row in generated.tolist()]


@contextlib.contextmanager
def _in_force(model: Any, config: Any) -> Iterator[None]:
    """Inside, the model has no generation config but this one.

    transformers fills what a config leaves open from the model's own, so that its temperature, say,
    would come back, with a warning that it means nothing.
    """
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


def end_tokens(config: Any) -> frozenset[int]:
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


PLACE: Final = "{question}"
_SENTENCE_END: Final = re.compile(r"[.!?](?=\s|\Z)")


class Prompter:
    """Makes token ids of questions.

    Parameters
    ----------
    tokenizer
        The model's.
    template
        Text around ``{question}``.
    chat
        Put the text into the tokenizer's chat template, as a user's message.

    Raises
    ------
    ExtractionError
        The template does not hold ``{question}``, or the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, template: str, *, chat: bool) -> None:
        if PLACE not in template:
            message = f"the prompt template {template!r} does not hold {PLACE}"
            raise ExtractionError(message)
        if chat and not tokenizer.chat_template:
            message = (
                f"{type(tokenizer).__name__} has no chat template; leave --chat out and give a "
                "--prompt-template, or set tokenizer.chat_template"
            )
            raise ExtractionError(message)
        self._tokenizer, self._template, self._chat = tokenizer, template, chat

    def token_ids(self, question: str) -> tuple[int, ...]:
        """The prompt of one question.

        Raises
        ------
        ExtractionError
            The question is empty, or the prompt has no tokens.
        """
        if not question.strip():
            message = "the question is empty; expected text"
            raise ExtractionError(message)
        text = self._template.replace(PLACE, question)
        if self._chat:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        # A chat template writes the special tokens itself.
        ids = self._tokenizer(text, add_special_tokens=not self._chat)["input_ids"]
        if not ids:
            message = f"the prompt {text!r} has no tokens"
            raise ExtractionError(message)
        return tuple(ids)


def padding_token(tokenizer: Any, *, batch_size: int) -> int:
    """The token that fills shorter sequences of a batch; masked, so any will do that is there.

    Raises
    ------
    ExtractionError
        The tokenizer has neither a padding nor an end token, and batches need one.
    """
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    if batch_size > 1:
        message = (
            f"{type(tokenizer).__name__} has neither a pad token nor an end token, which batches "
            "are filled with; set tokenizer.pad_token, or use a batch size of 1"
        )
        raise ExtractionError(message)
    return 0


def decoded_tokens(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token decoded by itself."""
    return tuple(tokenizer.decode([each]) for each in ids)


def answer_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """An answer as the model gave it, without special tokens."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text


def clean_answer(text: str, cut: AnswerCut) -> str:
    """The answer up to its first sentence or newline, without space around it."""
    found = text.strip()
    if cut == "newline":
        found = found.partition("\n")[0]
    elif cut == "sentence":
        end = _SENTENCE_END.search(found)
        found = found[: end.end()] if end else found
    return found.strip()
