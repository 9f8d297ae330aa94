"""Sharded archives of small traces without edge cases, for datasets to read."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
from legacy_batches import grouped, write_batch

import h5traces

ROOT = Path(__file__).parents[2]
LAYERS, HIDDEN, HEADS, PROMPT = 3, 8, 2, 3
NUM_SAMPLES, SHARD_SAMPLES = 18, 4


def plain_batch(num_samples: int = NUM_SAMPLES, *, seed: int = 0, dtype: str = "float16") -> list:
    """Legacy dicts of random numbers: causal attentions, lengths from 4 to 9."""
    rng = np.random.default_rng(seed)
    return [_sample(rng, number, dtype) for number in range(num_samples)]


def _sample(rng: np.random.Generator, number: int, dtype: str) -> dict[str, Any]:
    seq_len = int(rng.integers(PROMPT + 1, PROMPT + 7))
    scores = np.tril(np.exp(2 * rng.standard_normal((LAYERS, HEADS, seq_len, seq_len))))
    weights = scores / scores.sum(-1, keepdims=True)
    hidden = rng.standard_normal((LAYERS, seq_len, HIDDEN))
    return {
        "hidden_states": [each.astype(dtype) for each in hidden],
        "attentions": [each.astype(dtype) for each in weights],
        "tokens": rng.integers(3, 32000, seq_len),
        "tokens_decoded": [f"w{token} " for token in range(seq_len)],
        "generated_answer_clean": f"answer {number}",
        "question_id": f"tc_{number}",
        "prompt_length": PROMPT,
    }


def make_shards(folder: Path, batch: list | None = None, **options: Any) -> Path:
    """A folder with archives of four samples each, made of `batch`."""
    source = write_batch(folder / "batch.pkl", plain_batch() if batch is None else batch)
    target = folder / "shards"
    report = h5traces.convert(
        source, f"{target}/", **grouped(shard_samples=SHARD_SAMPLES, **options)
    )
    assert report.ok, report.files[0].error
    return target


def make_legacy(folder: Path, batch: list | None = None) -> Path:
    """The same samples as pickles of four, two of them in gzip."""
    samples = plain_batch() if batch is None else batch
    for number, start in enumerate(range(0, len(samples), SHARD_SAMPLES)):
        suffix = ".pkl.gz" if number % 2 else ".pkl"
        path = folder / f"m_d_batch_{number:04d}{suffix}"
        write_batch(path, samples[start : start + SHARD_SAMPLES])
    return folder


def load_script(path: str) -> Any:
    """A script of the repository as a module."""
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def only_item(items: list[Any]) -> Any:
    """Collates batches of one; here, where spawned workers find it without heavy imports."""
    (item,) = items
    return item
