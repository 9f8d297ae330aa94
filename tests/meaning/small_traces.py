"""Small legacy dicts with sound numbers: states that grow from layer to layer, causal softmax."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.format.record import SourcePosition, TraceRecord
from h5traces.meaning.options import ReadingOptions
from h5traces.meaning.records import to_record

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LAYERS, TOKENS, HIDDEN, HEADS = 4, 7, 8, 2


def states(seed: int, *, tokens: int = TOKENS, layers: int = LAYERS) -> list[NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(tokens, HIDDEN)) * (1 + layer)).astype(np.float16)
        for layer in range(layers)
    ]


def weights(
    seed: int, *, tokens: int = TOKENS, layers: int = LAYERS, mask: NDArray[Any] | None = None
) -> list[NDArray[Any]]:
    """Causal attentions; masked keys get nothing, and masked queries are zero."""
    rng = np.random.default_rng(seed + 1000)
    seen = np.tri(tokens, dtype=bool)
    if mask is not None:
        seen &= (mask != 0)[None, :] & (mask != 0)[:, None]
    found = []
    for _ in range(layers):
        rows = np.where(seen, np.exp(rng.normal(size=(HEADS, tokens, tokens))), 0)
        sums = rows.sum(-1, keepdims=True)
        found.append((rows / np.where(sums == 0, 1, sums)).astype(np.float16))
    return found


def trace(seed: int = 0, *, tokens: int = TOKENS, **changes: Any) -> dict[str, Any]:
    return {
        "hidden_states": states(seed, tokens=tokens),
        "attentions": weights(seed, tokens=tokens),
        "tokens": np.arange(tokens, dtype=np.int64) + 10,
        "tokens_decoded": [f"t{each}" for each in range(tokens)],
        "generated_answer_clean": f"answer {seed}",
        "question_id": f"q{seed}",
        **changes,
    }


def padded(seed: int, mask: list[int], **changes: Any) -> dict[str, Any]:
    """A row of a padded batch: states of pads are 99, their ids 0."""
    found = trace(seed, tokens=len(mask), **changes)
    marks = np.array(mask, dtype=np.int64)
    for state in found["hidden_states"]:
        state[marks == 0] = 99
    found["attentions"] = weights(seed, tokens=len(mask), mask=marks)
    found["tokens"][marks == 0] = 0
    found["tokens_decoded"] = [
        each if real else "<pad>" for each, real in zip(found["tokens_decoded"], mask, strict=True)
    ]
    return {**found, "attention_mask": marks}


def record(item: dict[str, Any], **options: Any) -> TraceRecord:
    place = SourcePosition(file=0, position=0)
    return to_record(item, source=place, options=ReadingOptions(**options))


def dump(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_bytes(pickle.dumps(items))
    return path
