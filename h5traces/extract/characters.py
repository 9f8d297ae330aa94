"""Which characters of a text the tokens of a sample stand for."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from h5traces.extract.generation import Job

# Bytes that are not a whole character yet.
_INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"
# Tokens before one that decide how it is decoded.
_CONTEXT: Final = 6


def sample_text(tokenizer: Any, job: Job, answer: Sequence[int]) -> tuple[str, str]:
    """Prompt and answer as text: as they were given, or decoded without special tokens."""
    prompt, text = job.text, job.given_text
    if prompt is None:
        prompt = tokenizer.decode(list(job.prompt), skip_special_tokens=True)
    if text is None:
        text = tokenizer.decode(list(answer), skip_special_tokens=True)
    return prompt, text


@lru_cache(maxsize=1 << 16)
def token_text(tokenizer: Any, token: int, *, skip_special_tokens: bool = False) -> str:
    """A token decoded by itself; kept, since the same ones come again in every sample."""
    found: str = tokenizer.decode([token], skip_special_tokens=skip_special_tokens)
    return found


def char_offsets(tokenizer: Any, job: Job, answer: Sequence[int]) -> NDArray[np.int32]:
    """First character of every token in prompt and answer, and the one after its last.

    Returns
    -------
    numpy.ndarray
        int32 ``(S, 2)``. Tokens without characters, such as special ones, begin where they end;
        tokens that share a character both have it.
    """
    prompt, text = sample_text(tokenizer, job, answer)
    if job.given_text is not None:
        whole = _encoded(tokenizer, job, prompt + text, (*job.prompt, *answer))
        if whole is not None:
            return whole
    of_prompt = _encoded(tokenizer, job, prompt, job.prompt)
    if of_prompt is None:
        of_prompt = decoded_offsets(tokenizer, job.prompt, prompt)
    of_answer = decoded_offsets(tokenizer, answer, text)
    return np.concatenate([of_prompt, of_answer + np.int32(len(prompt))])


def tokens_in_spans(job: Job, offsets: NDArray[np.int32], answer_start: int) -> NDArray[np.bool_]:
    """Which tokens have a character of a span of the answer, which begins at `answer_start`."""
    found = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in job.question.char_spans:
        found |= (offsets[:, 0] < answer_start + end) & (offsets[:, 1] > answer_start + start)
    return found


def _encoded(
    tokenizer: Any, job: Job, text: str, tokens: Sequence[int]
) -> NDArray[np.int32] | None:
    """Offsets as the tokenizer gives them; None if it does not, or the text has other tokens."""
    if job.text is None or not tokenizer.is_fast:
        return None
    found = tokenizer(
        text, add_special_tokens=not job.is_chat, return_offsets_mapping=True, verbose=False
    )
    if tuple(found["input_ids"]) != tuple(tokens):
        return None
    return np.array(found["offset_mapping"], dtype=np.int32).reshape(-1, 2)


def decoded_offsets(tokenizer: Any, tokens: Sequence[int], text: str) -> NDArray[np.int32]:
    """Offsets of tokens in the text that they decode to, int32 ``(tokens, 2)``."""

    def decode(ids: Sequence[int]) -> str:
        found: str = tokenizer.decode(list(ids), skip_special_tokens=True)
        return found

    pieces = [token_text(tokenizer, int(each), skip_special_tokens=True) for each in tokens]
    lengths = list(map(len, pieces))
    if "".join(pieces) != text:
        lengths = _in_context(decode, tokens, text) or _of_prefixes(decode, tokens, text)
    ends = np.cumsum(lengths, dtype=np.int32)
    starts = ends - np.array(lengths, dtype=np.int32)
    for number in reversed(range(len(tokens) - 1)):
        # A part of a character has the whole of it.
        if not lengths[number] and _INCOMPLETE in pieces[number]:
            ends[number] = ends[number + 1]
    return np.stack([starts, ends], axis=1).reshape(-1, 2)


def _in_context(decode: Any, tokens: Sequence[int], text: str) -> list[int] | None:
    """Characters that every token adds to the few before it; None if that is not the text."""
    lengths, place = [], 0
    for number in range(len(tokens)):
        context = tokens[max(0, number - _CONTEXT) : number]
        before = decode(context).rstrip(_INCOMPLETE)
        after = decode([*context, tokens[number]]).rstrip(_INCOMPLETE)
        added = after[len(before) :]
        if not after.startswith(before) or text[place : place + len(added)] != added:
            return None
        lengths.append(len(added))
        place += len(added)
    return lengths if place == len(text) else None


def _of_prefixes(decode: Any, tokens: Sequence[int], text: str) -> list[int]:
    """Characters that every token adds to all before it, as far as they agree with the text."""
    lengths, place = [], 0
    for number in range(len(tokens)):
        found = decode(tokens[: number + 1])
        pairs = enumerate(zip(found, text, strict=False))
        reached = next((n for n, (a, b) in pairs if a != b), min(len(found), len(text)))
        lengths.append(max(0, reached - place))
        place = max(place, reached)
    return lengths
