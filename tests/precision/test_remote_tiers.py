"""Lossy archives on a server: as few requests as for exact ones, and scales only once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from attention import attention
from legacy_batches import assert_same, write_batch

import h5traces
from h5traces.graph import TraceGraphDataset
from h5traces.rewriting.repack import repack
from h5traces.storage.remote.paths import RemoteOptions

sys.path.append(str(Path(__file__).parents[1] / "remote"))
from servers import Server, running

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYERS, HIDDEN, HEADS, TOKENS = 4, 256, 4, 40
# So that not even a small archive lies in the first request as a whole.
SMALL = RemoteOptions(tail_nbytes=8 << 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("served")
    made = [
        {
            "hidden_states": list(rng.standard_normal((LAYERS, TOKENS, HIDDEN)).astype(np.float16)),
            "attentions": [attention(rng, HEADS, TOKENS) for _ in range(LAYERS)],
            "tokens": np.arange(TOKENS),
            "tokens_decoded": [f"t{each}" for each in range(TOKENS)],
            "question_id": f"q{number}",
        }
        for number in range(5)
    ]
    made[2]["hidden_states"][1][3, 3] = np.inf
    source = write_batch(folder / "source.pkl", made)
    for tier in ("exact", "fine", "compact"):
        assert h5traces.convert(source, folder / f"{tier}.h5", precision=tier).ok
    return folder


@pytest.fixture(scope="module")
def process(folder: Path) -> Iterator[Server]:
    with running("web_server.py", str(folder)) as server:
        yield server


@pytest.fixture
def server(process: Server) -> Server:
    process.requests()
    return process


@pytest.mark.parametrize("tier", ["fine", "compact"])
def test_everything_reads_as_from_disk(server: Server, folder: Path, tier: str) -> None:
    far = h5traces.open(f"{server.url}/{tier}.h5", remote=SMALL)
    for one, other in zip(far, h5traces.open(folder / f"{tier}.h5"), strict=True):
        assert_same(one.to_dict(), other.to_dict())
    assert far.metadata.precision is not None


def test_scales_are_fetched_once(server: Server) -> None:
    """Opening takes two requests; then every array takes one, and every layer's scale one more."""
    archive = h5traces.open(f"{server.url}/compact.h5", remote=SMALL)
    archive.ids  # noqa: B018  # reads the table of samples
    assert len(server.requests()) <= 2
    archive[0].layer(1)
    assert len(server.requests()) <= 2
    archive[1].layer(1)
    archive[3].layer(1)
    assert len(server.requests()) == 2
    archive[0].layer(2, "attention_mean")
    assert len(server.requests()) == 1


def test_a_sample_is_few_requests(server: Server) -> None:
    archive = h5traces.open(f"{server.url}/fine.h5", remote=SMALL)
    archive[0].to_dict()
    server.requests()
    archive[3].to_dict()
    assert len(server.requests()) == 1
    # One with exceptions.
    found = archive[2].to_dict()
    assert np.isposinf(found["hidden_states"][1][3, 3])
    assert len(server.requests()) <= 2


def test_batches_are_coalesced(server: Server, folder: Path) -> None:
    archive = h5traces.open(f"{server.url}/compact.h5", remote=SMALL)
    kinds = ("hidden_states", "attention_mean")
    archive.read([0], kinds=kinds)
    server.requests()
    found = archive.read([4, 1, 2], kinds=kinds)
    assert len(server.requests()) <= 4
    local = h5traces.open(folder / "compact.h5").read([4, 1, 2], kinds=kinds)
    for one, other in zip(found, local, strict=True):
        assert_same(one, other)


def test_graphs_and_rewriting_from_a_server(server: Server, folder: Path, tmp_path: Path) -> None:
    far = TraceGraphDataset(f"{server.url}/compact.h5", 0.01, non_finite="keep")
    near = TraceGraphDataset(folder / "exact.h5", 0.01, non_finite="keep")
    for one, other in zip(far, near, strict=True):
        assert one.edge_index.equal(other.edge_index)
    repack(f"{server.url}/fine.h5", tmp_path / "near.h5", layers=[1])
    assert h5traces.verify(tmp_path / "near.h5", deep=True).ok
    assert_same(
        h5traces.open(tmp_path / "near.h5")[2].layer(1),
        h5traces.open(folder / "fine.h5")[2].layer(1),
    )
