"""Answers of a server beside the files of states that it wrote, with what these lack.

A file of responses is JSON Lines or JSON. A row is the response itself, as the client of a server
of vLLM got it, or says the same in columns. It belongs to the file that it names
(``kv_transfer_params.hidden_states_path``, or ``file``), else to that whose id it has; ids are
compared whole.
"""

from __future__ import annotations

import contextlib
import os
import re
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import ConversionError, H5TracesError, SchemaError
from h5traces.format import layout
from h5traces.format.text import and_more, counted
from h5traces.format.values import TorchValue
from h5traces.sources.collecting import Leftover
from h5traces.sources.opening import open_source
from h5traces.sources.rows import read_rows, text_of
from h5traces.storage.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from h5traces.meaning.options import ReadingOptions

Row = dict[str, Any]

_IDS: Final = ("file", "request_id", "id", layout.QUESTION_ID)
_FINISH: Final = "finish_reason"
_OUTPUT_IDS: Final = "output_ids"
_PROMPT_IDS: Final = "prompt_token_ids"
# Of vLLM: which of several answers, the id, which of several prompts, and eight random digits.
_REQUEST: Final = re.compile(r"(?:(?P<answer>\d+)_)?(?P<id>.+?)-[0-9a-f]{8}\Z")
_PROMPT: Final = re.compile(r"(?P<id>.+)-(?P<prompt>\d+)\Z")
# Parts of a response that are not facts about one sample, or are taken apart.
_LEFT: Final = frozenset(
    (
        *("file", "id", "request_id", "object", "created", "model", "choices", "usage", "outputs"),
        *("kv_transfer_params", "activations", "service_tier", "system_fingerprint", "prompt"),
        *("prompt_logprobs", "metrics", "finished", "lora_request", "num_cached_tokens"),
        _PROMPT_IDS,
    )
)


def add_response(item: dict[str, Any], stem: str, path: Path, responses: str) -> None:
    """Add what the response to a file's request says to its sample.

    Parameters
    ----------
    item
        The sample; added to.
    stem
        Name of the file without its suffix.
    path
        The file, for messages.
    responses
        The file of responses.

    Raises
    ------
    ConversionError
        It has no response to this request, or several; or the response has other tokens.
    """
    row, answer, prompt = _found(_rows(responses, _state(responses)), stem, path, responses)
    ids = _listed(_choice(row, answer, prompt).get(_PROMPT_IDS) or row.get(_PROMPT_IDS))
    _add(item, fields_of(row, answer, prompt), ids, f"{path}: the response in {responses}")


def unused_responses(paths: Iterable[Path], reading: ReadingOptions) -> list[Leftover]:
    """One entry for the responses that belong to no sample of these files, if any.

    Files that cannot be read are named when they are converted.

    Raises
    ------
    ConversionError
        The file of responses is damaged.
    """
    if reading.responses is None:
        return []
    responses = os.fspath(reading.responses)
    rows = _rows(responses, _state(responses))
    used: set[int] = set()
    for path in paths:
        with contextlib.suppress(H5TracesError, OSError), open_source(path, reading) as source:
            for stem in source.requests():
                names, _, _ = _names_of_file(stem)
                first = next((rows[name] for name in names if name in rows), [])
                used.update(map(id, first))
    left: dict[int, str] = {}
    for name, found in rows.items():
        for row in found:
            if id(row) not in used:
                left.setdefault(id(row), name)
    if not left:
        return []
    message = (
        f"{responses}: {counted(len(left), 'response')} of {len(used) + len(left)} belong to no "
        f"file that is converted: {and_more(left.values())}; name their files as well, or leave "
        "these responses out"
    )
    return [Leftover(responses, "a file of responses", message)]


def fields_of(row: Mapping[str, Any], answer: int = 0, prompt: int = 0) -> dict[str, Any]:
    """Fields of a sample that a response says, with the names of the format where it has some.

    Parameters
    ----------
    row
        The response.
    answer, prompt
        Which of several answers to one prompt, and which of several prompts of one request.
    """
    found = {name: value for name, value in row.items() if name not in _LEFT and value is not None}
    choice = _choice(row, answer, prompt)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    usage = row.get("usage")
    ids = _listed(choice.get(_PROMPT_IDS) or row.get(_PROMPT_IDS))
    length = len(ids) or None
    if length is None and isinstance(usage, dict) and prompt == 0:
        length = usage.get("prompt_tokens")
    of_choice = {
        "generated_answer": text,
        _FINISH: choice.get(_FINISH),
        _OUTPUT_IDS: _listed(choice.get("token_ids")) or None,
        layout.PROMPT_LENGTH: length,
        "question": row.get("prompt") if isinstance(row.get("prompt"), str) else None,
    }
    return {**{name: each for name, each in of_choice.items() if each is not None}, **found}


def _choice(row: Mapping[str, Any], answer: int, prompt: int) -> dict[str, Any]:
    """One answer of a response; a request of several prompts numbers all its answers."""
    choices = _listed(row.get("choices") or row.get("outputs"))
    by_number = {each.get("index", 0): each for each in choices if isinstance(each, dict)}
    if len(by_number) == 1:
        return next(iter(by_number.values()))
    # Where there are several prompts, each has one answer or as many as the others.
    return by_number.get(answer or prompt, {})


def _listed(value: Any) -> list[Any]:
    """A list of JSON, or of a table, where numbers are arrays."""
    return value.tolist() if isinstance(value, np.ndarray) else list(value or ())


def _add(item: dict[str, Any], fields: dict[str, Any], ids: list[int], where: str) -> None:
    """Add fields to a sample, where they do not contradict its tokens."""
    tokens = _numbers(item.get(layout.TOKENS))
    length = fields.get(layout.PROMPT_LENGTH)
    if length is not None and (type(length) is not int or length < 0):
        message = f"{where}: {layout.PROMPT_LENGTH} is {length!r:.60}, expected a number"
        raise ConversionError(message)
    if tokens is not None and length is not None and length > len(tokens):
        message = (
            f"{where} has a prompt of {length} tokens, but the file has {len(tokens)}; name the "
            "responses of this run"
        )
        raise ConversionError(message)
    known = [*ids, *(fields.get(_OUTPUT_IDS) or [])] if ids else []
    count = min(len(known), len(tokens or []))
    if tokens is not None and known and tokens[:count] != known[:count]:
        at = next(n for n in range(count) if tokens[n] != known[n])
        message = (
            f"{where} has the token {known[at]} at place {at}, but the file has {tokens[at]}; name "
            "the responses of this run"
        )
        raise ConversionError(message)
    for name, value in fields.items():
        item.setdefault(name, value)


def _numbers(value: Any) -> list[int] | None:
    array = value.data if isinstance(value, TorchValue) else value
    if not isinstance(array, np.ndarray) or array.ndim != 1:
        return None
    return [int(each) for each in array]


def _found(
    rows: Mapping[str, list[Row]], stem: str, path: Path, responses: str
) -> tuple[Row, int, int]:
    """The row of a file, and which answer and prompt of it."""
    names, answer, prompt = _names_of_file(stem)
    for name in names:
        found = rows.get(name, [])
        if len(found) > 1:
            message = (
                f"{responses}: has {len(found)} responses with the id {name!r} of {path}; expected "
                "one, or the name of the file in each"
            )
            raise ConversionError(message)
        if found:
            return found[0], answer, prompt
    message = (
        f"{path}: {responses} has no response with the id {' or '.join(map(repr, names))}; it has "
        f"{and_more(sorted(rows), 5) or 'none'}"
    )
    raise ConversionError(message)


def _names_of_file(stem: str) -> tuple[list[str], int, int]:
    """Ids that the response to a file's request may have, and which answer and prompt of it."""
    answer = prompt = 0
    names = [stem]
    match = _REQUEST.fullmatch(stem)
    if match is not None:
        answer = int(match["answer"] or 0)
        names.append(match["id"])
        several = _PROMPT.fullmatch(match["id"])
        if several is not None:
            prompt = int(several["prompt"])
            names.append(several["id"])
    return names, answer, prompt


def _state(path: str) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=2)
def _rows(path: str, _state: tuple[int, int]) -> dict[str, list[Row]]:
    """Responses by every name that they have."""
    found: dict[str, list[Row]] = {}
    descriptor = open_regular(Path(path), ConversionError, "a file of responses")
    with os.fdopen(descriptor, "rb") as file, text_of(file) as text:
        try:
            for row in read_rows(Path(path), text).rows:
                names = _names(row.cells)
                if not names:
                    message = f"{path}: {row.place}: has no id; expected one of {', '.join(_IDS)}"
                    raise ConversionError(message)
                for name in names:
                    found.setdefault(name, []).append(row.cells)
        except SchemaError as error:
            raise ConversionError(str(error)) from error
    return found


def _names(row: Row) -> list[str]:
    """What a response calls its file or request: the file alone where it names it."""
    parameters = row.get("kv_transfer_params")
    written = parameters.get("hidden_states_path") if isinstance(parameters, dict) else None
    written = written or row.get("file")
    if isinstance(written, str) and written:
        return [PurePosixPath(written).name.removesuffix(".safetensors")]
    ids = (row.get(name) for name in _IDS)
    return list(dict.fromkeys(str(each) for each in ids if type(each) in (str, int) and str(each)))
