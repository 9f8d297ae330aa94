"""Random batches of one model: odd but legal containers, axes, types, masks and missing fields.

Each batch knows what its numbers are, so that an archive can be compared with the truth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from legacy_batches import with_torch

_LISTS = ("list", "tuple")
_DICTS = ("by number", "by name", "by number, shuffled")
_STACKS = ("layer first", "batch, layer first", "layer, batch")
_FORMS = (*_LISTS, *_LISTS, "batch of one", *_DICTS, *_STACKS)
_STATE_FORMS = (*_FORMS, "token first", "vectors")


@dataclass
class OddBatch:
    """A batch, and what it stands for.

    Attributes
    ----------
    items
        What is pickled.
    blocks, embeddings, attentions, further
        The truth by sample: arrays by block, the embedding or None, and further kinds by name.
    has_attentions, has_embedding
        Whether items hold weights, and whether states begin with the embedding.
    may_fail
        Why a reader may reject the batch; empty where it has to read it.
    form
        What was drawn, for messages.
    """

    items: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[list[np.ndarray]] = field(default_factory=list)
    embeddings: list[np.ndarray | None] = field(default_factory=list)
    attentions: list[list[np.ndarray]] = field(default_factory=list)
    has_states: bool = True
    has_attentions: bool = True
    has_embedding: bool = False
    may_fail: str = ""
    form: str = ""


def odd_batch(seed: int) -> OddBatch:
    """The batch of that seed."""
    rng = np.random.default_rng(seed)
    layers, heads, hidden = (
        int(rng.integers(1, 6)),
        int(rng.integers(1, 4)),
        int(rng.integers(1, 9)),
    )
    found = OddBatch()
    states_form, weights_form = str(rng.choice(_STATE_FORMS)), str(rng.choice(_FORMS))
    if rng.random() < 0.5 and states_form in _FORMS:
        weights_form = states_form
    what = str(rng.choice(["both", "both", "both", "states", "None", "Nones", "weights"]))
    found.has_states, found.has_attentions = what != "weights", what in ("both", "weights")
    found.has_embedding = found.has_states and bool(rng.random() < 0.5)
    dtype = str(rng.choice(["<f2", "<f4", "<f8", ">f4"]))
    tensors = bool(rng.random() < 0.25) and dtype != ">f4"
    one_less, masked = bool(rng.random() < 0.25), bool(rng.random() < 0.2)
    further = str(rng.choice(["", "", "mlp_outputs", "heads"]))
    no_tokens = bool(rng.random() < 0.15)
    found.form = (
        f"seed {seed}: {what}, states {states_form}, weights {weights_form}, {dtype}, "
        f"{layers} layers, {heads} heads, {hidden} wide, embedding {found.has_embedding}, "
        f"tensors {tensors}, one less {one_less}, further {further!r}, no tokens {no_tokens}"
    )
    for _ in range(int(rng.integers(1, 4))):
        positions = int(rng.integers(1, 8))
        if states_form == "vectors":
            positions = 1
        blocks = [_numbers(rng, (positions, hidden), dtype) for _ in range(layers)]
        embedding = _numbers(rng, (positions, hidden), dtype) if found.has_embedding else None
        weights = [_numbers(rng, (heads, positions, positions), dtype) for _ in range(layers)]
        num_tokens = positions + one_less
        item: dict[str, Any] = {}
        states = [*([] if embedding is None else [embedding]), *blocks]
        if found.has_states:
            item["hidden_states"] = _held(rng, states, states_form)
        if found.has_attentions:
            item["attentions"] = _held(rng, weights, weights_form)
        elif what.startswith("None"):
            item["attentions"] = None if what == "None" else (None,) * layers
        if not no_tokens:
            item["tokens"] = np.arange(num_tokens) + 5
        # Further fields keep the byte order of the file.
        plain = dtype.replace(">", "<")
        if further == "mlp_outputs":
            item[further] = [_numbers(rng, (positions, 11), plain) for _ in range(layers)]
        elif further == "heads":
            item[further] = tuple(
                _numbers(rng, (heads, positions, 11), plain) for _ in range(layers)
            )
        item["question_id"] = f"q{len(found.items)}"
        if masked and not no_tokens:
            item["attention_mask"] = np.ones(num_tokens, np.int64)
        _note_doubts(found, states_form, positions, num_tokens, len(states), layers, no_tokens)
        found.items.append(with_torch(item) if tensors else item)
        found.blocks.append(blocks)
        found.embeddings.append(embedding)
        found.attentions.append(weights)
    return found


def _note_doubts(
    found: OddBatch,
    form: str,
    positions: int,
    num_tokens: int,
    num_states: int,
    layers: int,
    no_tokens: bool,
) -> None:
    """Stacked states whose axes nothing tells apart may be rejected."""
    if not found.has_states or form not in (*_STACKS, "token first"):
        return
    counts = {layers, layers + 1} if found.has_attentions else None
    lengths = {positions} if found.has_attentions else {num_tokens, num_tokens - 1, 1}
    if no_tokens and not found.has_attentions:
        lengths = set()
    other_way = (counts is None or positions in counts) and (not lengths or num_states in lengths)
    if other_way and (num_states != positions or positions > 1):
        found.may_fail = "the axes of stacked states fit two readings"


def _numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float16).astype(dtype)


def _held(rng: np.random.Generator, arrays: list[np.ndarray], form: str) -> Any:
    """The arrays in a container."""
    if form == "tuple":
        return tuple(arrays)
    if form == "batch of one":
        return [each[None] for each in arrays]
    if form == "by number":
        return dict(enumerate(arrays))
    if form == "by name":
        return {f"layer_{number}": each for number, each in enumerate(arrays)}
    if form == "by number, shuffled":
        order = rng.permutation(len(arrays))
        return {int(number): arrays[number] for number in order}
    if form == "vectors":
        return [each[0] for each in arrays]
    if form == "list":
        return arrays
    stacked = np.stack(arrays)
    if form == "token first":
        return np.ascontiguousarray(stacked.swapaxes(0, 1))
    if form == "batch, layer first":
        return stacked[None]
    return stacked[:, None] if form == "layer, batch" else stacked
