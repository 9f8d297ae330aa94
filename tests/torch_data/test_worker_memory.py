"""Memory of workers stays flat from epoch to epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from legacy_batches import make_archive
from torch.utils.data import DataLoader

from h5traces.graph import TraceGraphDataset
from h5traces.torch_data import TraceDataset

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc"),
]
NUM_SAMPLES, LAYERS, TOKENS, HIDDEN = 40, 4, 32, 512


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    batch = [
        {
            "hidden_states": list(rng.standard_normal((LAYERS, TOKENS, HIDDEN)).astype(np.float16)),
            "attentions": list(rng.random((LAYERS, 4, TOKENS, TOKENS)).astype(np.float16)),
            "tokens": np.arange(TOKENS),
            "tokens_decoded": ["token"] * TOKENS,
            "question_id": f"q{number}",
        }
        for number in range(NUM_SAMPLES)
    ]
    return make_archive(tmp_path_factory.mktemp("memory"), batch)


def resident_megabytes(_: Any) -> float:
    """Resident memory of the process that made the item."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


@pytest.mark.parametrize("make", [TraceDataset, TraceGraphDataset])
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_flat_over_epochs(archive: Path, make: Any, workers: int) -> None:
    options: dict[str, Any] = {"kinds": ("hidden_states", "attentions")}
    dataset = make(archive, transform=resident_megabytes, **options if make is TraceDataset else {})
    workers_options: dict[str, Any] = {}
    if workers:
        workers_options = {"multiprocessing_context": "fork", "persistent_workers": True}
    loader = DataLoader(
        torch.utils.data.Subset(dataset, range(0, len(dataset), 1 if len(dataset) < 50 else 2)),
        batch_size=None,
        num_workers=workers,
        **workers_options,
    )
    peaks = [max(float(each) for each in loader) for _ in range(4)]
    epoch_megabytes = NUM_SAMPLES * LAYERS * TOKENS * (HIDDEN + 4 * TOKENS) * 2 / 1e6
    # Every epoch reads this much: keeping even a part of it would show.
    assert epoch_megabytes > 6
    assert peaks[3] - peaks[0] < epoch_megabytes / 2, peaks
