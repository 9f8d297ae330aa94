"""Questions as the token ids of prompts, and token ids as answers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from h5traces.errors import ExtractionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from h5traces.format.extraction import AnswerCut

PLACE: Final = "{question}"
# What the pipeline behind the old batches asked.
DEFAULT_TEMPLATE: Final = "Answer the question concisely. Q: {question} A:"
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
