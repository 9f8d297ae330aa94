"""Which fields of a trace the output of a model holds: of transformers, and of TransformerLens.

Values are numpy arrays and `TorchValue`. A batch is taken apart, one dict per sequence, and the
steps of ``generate()`` are joined into the sequence that they are of.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.meaning.axes import data_of, with_data
from h5traces.meaning.containers import Array, is_absent, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from h5traces.meaning.options import FirstState

    Item = dict[str, Any]

_IDS: Final = "input_ids"
_SEQUENCES: Final = "sequences"
# Fields of an output by their names; logits, scores, loss and key cache are not stored.
TAKEN_OF_OUTPUTS: Final = (
    *(layout.HIDDEN_STATES, layout.ATTENTIONS, _SEQUENCES),
    *("decoder_hidden_states", "encoder_hidden_states"),
)
# The model's inputs that are stored beside the tokens.
_TAKEN_OF_INPUTS: Final = (
    layout.ATTENTION_MASK, "token_type_ids", "position_ids", "special_tokens_mask"
)  # fmt: skip
_HOOK: Final = re.compile(r"blocks\.(\d{1,4})\.((?:.+\.)?hook_.+)\Z", re.ASCII)
_RESID_PRE: Final = "hook_resid_pre"
_RESID_POST: Final = "hook_resid_post"
_PATTERN: Final = "attn.hook_pattern"
_EMBEDDING: Final = "embedding"


def is_of_hooks(names: Any) -> bool:
    """Whether these are names of TransformerLens' hooks, such as ``blocks.3.hook_resid_post``."""
    return any(isinstance(each, str) and _HOOK.match(each) for each in names)


def items_of_output(output: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[Item]:
    """One dict per sequence of what a forward pass or ``generate()`` of transformers returned.

    Parameters
    ----------
    output
        ``hidden_states`` and ``attentions``: one array per layer, ``(batch, tokens, hidden)`` and
        ``(batch, heads, queries, keys)``, or one such sequence per generation step; and
        ``sequences`` ``(batch, tokens)`` of ``generate()``.
    inputs
        What the model was given: ``input_ids`` and ``attention_mask``, ``(batch, tokens)``.

    Raises
    ------
    ConversionError
        There are neither states nor attentions, or the batches differ.
    """
    found = {
        kind: output[kind]
        for kind in (layout.HIDDEN_STATES, layout.ATTENTIONS)
        if not is_absent(output.get(kind))
    }
    if not found:
        _reject_output(output)
    fields = {key: inputs[key] for key in _TAKEN_OF_INPUTS if key in inputs}
    prompt = inputs.get(_IDS)
    tokens = output.get(_SEQUENCES, prompt)
    is_generated = _SEQUENCES in output
    size = _batch_size(found, tokens)
    if _are_steps(found):
        prompt_len = shape_of(_first(found))[-2]
        joined = _joined(found, size)
        if joined is None and size > 1:
            message = (
                "the generation steps of this batch are of beams, or without a cache; generate one "
                "sequence at a time, or with num_beams=1"
            )
            raise ConversionError(message)
        if joined is None:
            item = {**found, **_row({**fields, layout.TOKENS: tokens}, 0, 1)}
            return [_with_prompt(item, prompt, prompt_len)]
        found = joined
    elif is_generated and isinstance(prompt, Array):
        prompt_len = shape_of(prompt)[-1]
    else:
        prompt_len = None
    fields |= {} if tokens is None else {layout.TOKENS: tokens}
    rows = [_row({**found, **fields}, row, size) for row in range(size)]
    return [_with_prompt(each, prompt, prompt_len) for each in rows]


def _reject_output(output: Mapping[str, Any]) -> None:
    if any(key in output for key in ("decoder_hidden_states", "encoder_hidden_states")):
        message = (
            "the output is of a model with an encoder and a decoder, which see two sequences; "
            "append a dict with the states of one: {'hidden_states': out.decoder_hidden_states}"
        )
    else:
        message = (
            "the output holds neither hidden states nor attentions; call the model with "
            "output_hidden_states=True and output_attentions=True, generate() also with "
            "return_dict_in_generate=True"
        )
    raise ConversionError(message)


def items_of_hooks(
    cache: Mapping[str, Any], inputs: Mapping[str, Any], *, has_batch: bool
) -> tuple[list[Item], FirstState | None]:
    """One dict per sequence of a cache of TransformerLens, and what its first state is.

    The residual stream after block i is ``blocks.i.hook_resid_post``, which is
    ``blocks.(i+1).hook_resid_pre``; in front of block 0 it is the embedding. The last one is taken
    before the final norm. ``attn.hook_pattern`` are the attentions. Other hooks of blocks are
    fields by their names, such as ``hook_mlp_out``; hooks outside of blocks are extra fields.

    Parameters
    ----------
    cache
        Arrays by the names of hooks; other names are fields.
    inputs
        As for `items_of_output`.
    has_batch
        Whether arrays begin with a batch axis.
    """
    hooks: defaultdict[str, dict[int, Any]] = defaultdict(dict)
    fields: Item = {}
    for name, value in cache.items():
        match = _HOOK.match(name)
        if match is None:
            fields[name] = value
        else:
            hooks[match[2]][int(match[1])] = value
    given = {key: inputs[key] for key in _TAKEN_OF_INPUTS if key in inputs}
    tokens = inputs.get(_IDS)
    given |= {} if tokens is None else {layout.TOKENS: tokens}
    before, states = hooks.pop(_RESID_PRE, {}), dict(hooks.pop(_RESID_POST, {}))
    for layer, value in before.items():
        if layer:
            states.setdefault(layer - 1, value)
    found: Item = {}
    if states:
        ordered = {str(layer): states[layer] for layer in sorted(states)}
        embedding = {_EMBEDDING: before[0]} if 0 in before else {}
        found[layout.HIDDEN_STATES] = {**embedding, **ordered}
    if _PATTERN in hooks:
        patterns = hooks.pop(_PATTERN)
        found[layout.ATTENTIONS] = {str(layer): patterns[layer] for layer in sorted(patterns)}
    for name, layers in hooks.items():
        found[name] = [layers[layer] for layer in sorted(layers)]
        if sorted(layers) != list(range(len(layers))):
            found[name] = {str(layer): layers[layer] for layer in sorted(layers)}
    first: FirstState | None = None if 0 in before else "block"
    if not has_batch:
        return [{**found, **fields, **_row(given, 0, 1)}], first
    size = _batch_size(found, tokens)
    return [_row({**found, **fields, **given}, row, size) for row in range(size)], first


# --- batches --------------------------------------------------------------------------------------


def _first(value: Any) -> Any:
    """The first array inside."""
    while not isinstance(value, Array):
        items = value.values() if isinstance(value, dict) else value
        value = next(each for each in items if not is_absent(each))
    return value


def _batch_size(found: Item, tokens: Any) -> int:
    if isinstance(tokens, Array) and len(shape_of(tokens)) == 2:
        return shape_of(tokens)[0]
    shape = shape_of(_first(found))
    return shape[0] if shape else 1


def _row(value: Any, row: int, size: int) -> Any:
    """One sequence of every array inside that has the batch axis.

    Inputs of ``num_return_sequences`` answers are given once, answers of one follow each other.
    """
    if isinstance(value, dict):
        return {key: _row(each, row, size) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_row(each, row, size) for each in value)
    if not isinstance(value, Array) or not shape_of(value):
        return value
    rows = shape_of(value)[0]
    if rows == 0 or size % rows or len(shape_of(value)) == 1:
        return value
    return with_data(value, data_of(value)[row * rows // size])


def _with_prompt(item: Item, prompt: Any, prompt_len: int | None) -> Item:
    """The dict with the length of the prompt, where an answer was generated."""
    if isinstance(prompt, Array) and prompt_len is not None:
        prompt_len = shape_of(prompt)[-1]
    return item if prompt_len is None else {**item, layout.PROMPT_LENGTH: prompt_len}


# --- generation steps -----------------------------------------------------------------------------


def _are_steps(found: Item) -> bool:
    return any(isinstance(next(iter(value)), (list, tuple)) for value in found.values())


def _joined(found: Item, size: int) -> Item | None:
    """Steps of ``generate()`` as the arrays of the sequence; None if they do not form one.

    The first step holds the prompt, each later one the token that was generated before it. What a
    token pays to later ones, which the model did not see, is 0.
    """
    joined: Item = {}
    for kind, steps in found.items():
        grid = [[shape_of(each) for each in step if each is not None] for step in steps]
        first, later = grid[0][0], [step[0] for step in grid[1:]]
        # Layers of windows keep fewer keys; beams are not sequences.
        if first[0] != size or any(len(set(step)) > 1 for step in grid):
            return None
        if any(shape[-2] != 1 for shape in later):
            return None
        length = first[-2] + len(later)
        if kind == layout.ATTENTIONS:
            keys = [step[0][-1] for step in grid]
            if keys != list(range(first[-2], length + 1))[: len(keys)]:
                return None
        join = _joined_weights if kind == layout.ATTENTIONS else _joined_states
        joined[kind] = [
            None if is_absent(layers) else join(list(layers)) for layers in zip(*steps, strict=True)
        ]
    return joined


def _joined_states(steps: list[Any]) -> Any:
    return with_data(steps[0], np.concatenate([data_of(each) for each in steps], axis=1))


def _joined_weights(steps: list[Any]) -> Any:
    size, heads = shape_of(steps[0])[:2]
    length = shape_of(steps[-1])[-1]
    joined = np.zeros((size, heads, length, length), data_of(steps[0]).dtype)
    start = 0
    for each in map(data_of, steps):
        joined[:, :, start : start + each.shape[2], : each.shape[3]] = each
        start += each.shape[2]
    return with_data(steps[0], joined)
