"""Batches for engines, with so many samples that work takes as long as a test needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from legacy_batches import write_batch

if TYPE_CHECKING:
    from pathlib import Path


def write_batches(folder: Path, count: int, num_samples: int = 2, seq_len: int = 5) -> Path:
    folder.mkdir()
    for number in range(count):
        rng = np.random.default_rng(number)
        samples = [
            {
                "hidden_states": [rng.random((seq_len, 8)).astype("f2") for _ in range(2)],
                "attentions": [rng.random((2, seq_len, seq_len)).astype("f2") for _ in range(2)],
                "question_id": f"q_{number}_{each}",
            }
            for each in range(num_samples)
        ]
        write_batch(folder / f"b{number}.pkl", samples)
    return folder
