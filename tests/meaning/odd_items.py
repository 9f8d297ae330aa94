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


_WITH_WEIGHTS = ("both", "weights")
_PADS = ("none", "none", "ones", "left", "right", "both", "holes")
_FURTHER = ("", "mlp_outputs", "heads", "stacked")


@dataclass
class OddBatch:
    """A batch, and what it stands for.

    Attributes
    ----------
    items, meant
        What is pickled, and what that means: the same without pads at the ends.
    blocks, embeddings, attentions
        The truth by sample: arrays by block, or lists of generation steps; None for a block
        without attention, and where there is no embedding.
    masks
        By sample, which of the stored positions are tokens; None if all are.
    num_cut
        Positions that are pads, and not stored.
    has_states, has_attentions, has_embedding
        Which of these the items hold.
    in_steps
        Whether arrays are generation steps.
    keeps_padding
        Whether to convert with ``keep_padding``.
    may_fail, must_fail
        Why a reader may reject the batch, empty if it has to read it; what the message says
        where it has to reject it.
    form
        What was drawn, for messages.
    """

    items: list[dict[str, Any]] = field(default_factory=list)
    meant: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[list[Any]] = field(default_factory=list)
    embeddings: list[Any] = field(default_factory=list)
    attentions: list[list[Any]] = field(default_factory=list)
    masks: list[np.ndarray | None] = field(default_factory=list)
    num_cut: int = 0
    has_states: bool = True
    has_attentions: bool = True
    has_embedding: bool = False
    in_steps: bool = False
    keeps_padding: bool = False
    may_fail: str = ""
    must_fail: str = ""
    form: str = ""


def odd_batch(seed: int) -> OddBatch:
    """The batch of that seed."""
    rng = np.random.default_rng(seed)
    family = rng.choice(["sequences"] * 5 + ["steps", "steps", "real batch"])
    if family == "steps":
        found = _steps(rng)
    elif family == "real batch":
        found = _real_batch(rng)
    else:
        found = _sequences(rng)
    found.form = f"seed {seed}: {family}, {found.form}"
    return found


@dataclass
class _Drawn:
    """What is the same in all samples of a batch."""

    layers: int
    heads: int
    hidden: int
    what: str
    states: str
    weights: str
    dtype: str
    tensors: bool
    one_less: bool
    no_tokens: bool
    pads: str = "none"
    further: str = ""
    gaps: bool = False


def _sequences(rng: np.random.Generator) -> OddBatch:
    """Samples of one sequence each, some of them padded."""
    states, weights = str(rng.choice(_STATE_FORMS)), str(rng.choice(_FORMS))
    dtype = str(rng.choice(["<f2", "<f4", "<f8", ">f4"]))
    drawn = _Drawn(
        layers=int(rng.integers(1, 6)),
        heads=int(rng.integers(1, 4)),
        hidden=int(rng.integers(1, 9)),
        what=str(rng.choice(["both", "both", "both", "states", "None", "Nones", "weights"])),
        states=states,
        weights=states if rng.random() < 0.5 and states in _FORMS else weights,
        dtype=dtype,
        tensors=bool(rng.random() < 0.25) and dtype != ">f4",
        one_less=bool(rng.random() < 0.25),
        no_tokens=bool(rng.random() < 0.15),
    )
    if not drawn.no_tokens and states != "vectors":
        drawn.pads = str(rng.choice(_PADS))
    if drawn.layers > 1:
        drawn.further = str(rng.choice(_FURTHER))
    found = OddBatch(keeps_padding=bool(rng.random() < 0.25))
    found.has_states, found.has_attentions = drawn.what != "weights", drawn.what in _WITH_WEIGHTS
    found.has_embedding = found.has_states and bool(rng.random() < 0.5)
    # Hybrid models have attention in some of their blocks only.
    if drawn.weights in (*_LISTS, *_DICTS) and drawn.layers > 2:
        drawn.gaps = found.has_attentions and bool(rng.random() < 0.3)
    found.form = f"{drawn}, embedding {found.has_embedding}, kept {found.keeps_padding}"
    for number in range(int(rng.integers(1, 4))):
        _add_sequence(rng, found, drawn, number)
    return found


def _add_sequence(rng: np.random.Generator, found: OddBatch, drawn: _Drawn, number: int) -> None:
    layers, heads, dtype = drawn.layers, drawn.heads, drawn.dtype
    positions = 1 if drawn.states == "vectors" else int(rng.integers(1, 8))
    mask = _mask(rng, positions + drawn.one_less, drawn.pads)
    full = len(mask) - drawn.one_less
    blocks = [_numbers(rng, (full, drawn.hidden), dtype) for _ in range(layers)]
    embedding = [_numbers(rng, (full, drawn.hidden), dtype)] * found.has_embedding
    weights: list[np.ndarray | None] = [
        None if drawn.gaps and layer % 2 == 0 else _numbers(rng, (heads, full, full), dtype)
        for layer in range(layers)
    ]
    order = rng.permutation(layers + found.has_embedding).tolist()
    # Widths that no sequence has: exactly one axis may be that of tokens.
    shape = (29, full, 23) if drawn.further == "heads" else (full, 23)
    # Further fields keep the byte order of the file.
    more = [_numbers(rng, shape, dtype.replace(">", "<")) for _ in range(layers)]
    everything = slice(0, len(mask))

    def item(stays: slice) -> dict[str, Any]:
        """The sample with these positions."""
        held: dict[str, Any] = {}
        if found.has_states:
            states = [each[stays] for each in (*embedding, *blocks)]
            held["hidden_states"] = _held(order, states, drawn.states)
        if found.has_attentions:
            cut = [each if each is None else each[:, stays, stays] for each in weights]
            held["attentions"] = _held([n for n in order if n < layers], cut, drawn.weights)
        elif drawn.what.startswith("None"):
            held["attentions"] = None if drawn.what == "None" else (None,) * layers
        if not drawn.no_tokens:
            held["tokens"] = (np.arange(len(mask)) + 5)[stays]
        if drawn.further:
            # Without attentions nobody knows which fields have one array per block.
            kept = stays if found.has_attentions else everything
            arrays = [each[..., kept, :] for each in more]
            stacked = drawn.further == "stacked"
            held[drawn.further] = np.stack(arrays) if stacked else tuple(arrays)
        held["question_id"] = f"q{number}"
        if drawn.pads != "none":
            held["attention_mask"] = mask[stays].astype(np.int64)
        return with_torch(held) if drawn.tensors else held

    stays = _stays(mask, everything, keeps=found.keeps_padding)
    _note_doubts(found, drawn, full, len(mask))
    found.items.append(item(everything))
    found.meant.append(item(stays))
    found.num_cut += len(mask) - len(mask[stays])
    found.masks.append(None if mask[stays].all() else mask[stays])
    found.blocks.append([each[stays] for each in blocks])
    found.embeddings.append(embedding[0][stays] if embedding else None)
    found.attentions.append([w if w is None else w[:, stays, stays] for w in weights])


def _mask(rng: np.random.Generator, length: int, pads: str) -> np.ndarray:
    """A mask with `length` ones, and with zeros where pads are."""
    left = int(rng.integers(1, 4)) if pads in ("left", "both") else 0
    right = int(rng.integers(1, 4)) if pads in ("right", "both") else 0
    tokens = np.ones(length, bool)
    if pads == "holes" and length > 2:
        tokens[rng.integers(1, length - 1)] = False
    return np.concatenate([np.zeros(left, bool), tokens, np.zeros(right, bool)])


def _stays(mask: np.ndarray, everything: slice, *, keeps: bool) -> slice:
    """Positions that are stored: all, but for pads at the ends."""
    tokens = np.flatnonzero(mask)
    ends = slice(int(tokens[0]), int(tokens[-1]) + 1)
    return everything if keeps or not mask[ends].all() else ends


def _steps(rng: np.random.Generator) -> OddBatch:
    """What ``generate(..., output_hidden_states=True)`` returns, also of beams."""
    layers, heads, hidden = (
        int(rng.integers(1, 5)),
        int(rng.integers(1, 4)),
        int(rng.integers(1, 6)),
    )
    found = OddBatch(in_steps=True)
    beams, cached = int(rng.choice([1, 1, 3])), bool(rng.random() < 0.8)
    found.has_attentions = bool(rng.random() < 0.7)
    found.has_embedding = bool(rng.random() < 0.7)
    outermost = str(rng.choice(["steps", "steps", "layers"]))
    sequence: Any = [tuple, list][int(rng.integers(2))]
    stated = bool(rng.random() < 0.5)
    found.form = (
        f"{layers} layers, {beams} beams, cached {cached}, weights {found.has_attentions}, "
        f"embedding {found.has_embedding}, {outermost} outermost, stated {stated}"
    )
    for number in range(int(rng.integers(1, 3))):
        prompt, num_steps = int(rng.integers(1, 5)), int(rng.integers(1, 5))
        more = [(1 if cached else prompt + n, prompt + n) for n in range(1, num_steps)]
        lengths = [(prompt, prompt), *more]
        # By layer, then by step.
        states = [
            [_numbers(rng, (beams, q, hidden), "<f4") for q, _ in lengths]
            for _ in range(layers + found.has_embedding)
        ]
        weights = [
            [_numbers(rng, (beams, heads, q, k), "<f4") for q, k in lengths] for _ in range(layers)
        ]
        item = {}
        for kind, by_layer in (("hidden_states", states), ("attentions", weights)):
            rows = by_layer if outermost == "layers" else zip(*by_layer, strict=True)
            if kind == "hidden_states" or found.has_attentions:
                item[kind] = sequence(sequence(row) for row in rows)
        item |= {"num_layers": layers} if stated else {}
        item["sequences"] = rng.integers(0, 90, (beams, prompt + num_steps))
        item["question_id"] = f"q{number}"
        # One state more than attentions, or a number of steps that is none of layers, decides.
        decided = stated and num_steps not in (layers, layers + 1)
        if not decided and not (found.has_attentions and found.has_embedding):
            found.may_fail = "nothing says which of two lengths is that of the layers"
        found.items.append(item)
        found.meant.append(item)
        found.masks.append(None)
        found.embeddings.append(states.pop(0) if found.has_embedding else None)
        found.blocks.append(states)
        found.attentions.append(weights)
    return found


def _real_batch(rng: np.random.Generator) -> OddBatch:
    """Several sequences in one sample, as a forward pass gives them."""
    layers, size, positions = (
        int(rng.integers(2, 5)),
        int(rng.integers(2, 5)),
        int(rng.integers(2, 8)),
    )
    what = str(rng.choice(["both", "states", "weights"]))
    form = str(rng.choice([*_LISTS, "by number", "stacked"]))
    found = OddBatch(must_fail="is a batch of|fits", form=f"{what}, {form}, {size} sequences")
    states = [_numbers(rng, (size, positions, 6), "<f4") for _ in range(layers)]
    weights = [_numbers(rng, (size, 2, positions, positions), "<f4") for _ in range(layers)]
    item: dict[str, Any] = {}
    for kind, arrays in (("hidden_states", states), ("attentions", weights)):
        if what in ("both", {"hidden_states": "states"}.get(kind, "weights")):
            item[kind] = np.stack(arrays) if form == "stacked" else _held([], arrays, form)
    item["tokens"] = rng.integers(0, 90, (size, positions))
    found.items.append(item)
    return found


def _note_doubts(found: OddBatch, drawn: _Drawn, positions: int, num_tokens: int) -> None:
    """Stacked states whose axes nothing tells apart may be rejected."""
    if not found.has_states or drawn.states not in (*_STACKS, "token first"):
        return
    num_states = drawn.layers + found.has_embedding
    counts = {drawn.layers, drawn.layers + 1} if found.has_attentions else None
    lengths = {positions} if found.has_attentions else {num_tokens, num_tokens - 1, 1}
    if drawn.no_tokens and not found.has_attentions:
        lengths = set()
    other_way = (counts is None or positions in counts) and (not lengths or num_states in lengths)
    if other_way and (num_states != positions or positions > 1):
        found.may_fail = "the axes of stacked states fit two readings"


def _numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float16).astype(dtype)


def _held(order: list[int], arrays: list[Any], form: str) -> Any:
    """The arrays in a container; `order` is that of keys."""
    if form == "tuple":
        return tuple(arrays)
    if form == "batch of one":
        return [each[None] for each in arrays]
    if form == "by number":
        return dict(enumerate(arrays))
    if form == "by name":
        return {f"layer_{number}": each for number, each in enumerate(arrays)}
    if form == "by number, shuffled":
        return {number: arrays[number] for number in order}
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
