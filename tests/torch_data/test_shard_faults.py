"""What goes wrong during training: shards replaced, edited, deleted or damaged, also in workers."""

from __future__ import annotations

import os
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import h5py
import pytest
from shards import LAYERS, make_legacy, make_shards, plain_batch
from torch.utils.data import DataLoader

import h5traces
from h5traces.errors import CorruptArchiveError, DatasetError, LayerIndexError, StoredStateWarning
from h5traces.graph import TraceGraphDataset
from h5traces.torch_data import IterableTraceDataset, ShardSampler, TraceDataset

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)
REPLACED = r"batch-00001\.h5: the shard was replaced or edited during training"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_shards(tmp_path)


def replace(shards: Path, tmp_path: Path) -> None:
    """Put another run's second shard in the place of this one's."""
    other = make_shards(tmp_path / "other", plain_batch(seed=1))
    (other / "batch-00001.h5").replace(shards / "batch-00001.h5")


def edit(shards: Path) -> None:
    """Change the second shard in place, as any HDF5 tool can."""
    with h5py.File(shards / "batch-00001.h5", "a") as file:
        file.attrs["x_note"] = "edited"


def both(shards: Path) -> list[tuple[Any, int]]:
    """Datasets that read the second shard already, and an item in it."""
    samples, graphs = TraceDataset(shards), TraceGraphDataset(shards)
    samples[5]
    graphs[5 * LAYERS]
    return [(samples, 5), (graphs, 5 * LAYERS)]


def test_a_shard_replaced_while_it_is_open(shards: Path, tmp_path: Path) -> None:
    datasets = both(shards)
    replace(shards, tmp_path)
    for dataset, index in datasets:
        assert dataset[0] is not None
        with pytest.raises(DatasetError, match=REPLACED):
            dataset[index]


def test_a_shard_edited_in_place(shards: Path) -> None:
    datasets = both(shards)
    edit(shards)
    for dataset, index in datasets:
        with pytest.raises(DatasetError, match=REPLACED):
            dataset[index]


def test_a_shard_deleted(shards: Path) -> None:
    datasets = both(shards)
    (shards / "batch-00001.h5").unlink()
    for dataset, index in datasets:
        with pytest.raises(DatasetError, match=r"batch-00001\.h5: the shard cannot be read any"):
            dataset[index]


def test_a_shard_that_was_touched_or_copied_back_is_the_same(shards: Path, tmp_path: Path) -> None:
    path = shards / "batch-00001.h5"
    datasets = both(shards)
    os.utime(path, (1, 1))
    for dataset, index in datasets:
        dataset[index]
    shutil.copy(path, tmp_path / "copy.h5")
    (tmp_path / "copy.h5").replace(path)
    for dataset, index in datasets:
        dataset[index]
        dataset[index]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("make", [TraceDataset, TraceGraphDataset])
def test_workers_notice_too(shards: Path, tmp_path: Path, make: Any, workers: int) -> None:
    dataset = make(shards)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    for _ in loader:
        pass
    replace(shards, tmp_path)
    with pytest.raises(DatasetError, match=REPLACED):
        for _ in loader:
            pass


def test_a_damaged_chunk_names_shard_and_layer(shards: Path) -> None:
    path = shards / "batch-00001.h5"
    chunk = h5traces.open(path)[1]._stored.entry("hidden_states/layer_002").chunks
    assert chunk is not None
    with path.open("r+b") as file:
        file.seek(chunk.offsets[0])
        file.write(b"\xff" * chunk.sizes[0])
    loader = DataLoader(TraceDataset(shards), batch_size=None)
    with pytest.raises(CorruptArchiveError, match=r"batch-00001\.h5.*hidden_states/layer_002"):
        list(loader)


def test_an_archive_without_footer_trains_just_the_same(shards: Path) -> None:
    wanted = TraceDataset(shards)[5]["hidden_states"]
    edit(shards)
    with pytest.warns(StoredStateWarning, match="reading through HDF5"):
        dataset = TraceDataset(shards)
    assert (dataset[5]["hidden_states"] == wanted).all()
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(loader)
    assert (found[5]["hidden_states"] == wanted).all()


def test_a_checkpoint_of_other_shards_is_refused(shards: Path, tmp_path: Path) -> None:
    for make in (TraceDataset, TraceGraphDataset):
        state = ShardSampler(make(shards)).state_dict()
        stream: Any = iter(IterableTraceDataset(make(shards)))
        states = stream.state_dict()
        other = make(make_shards(tmp_path / make.__name__, plain_batch(seed=1)))
        with pytest.raises(DatasetError, match=r"saved with dataset=.*shards that were rewritten"):
            ShardSampler(other).load_state_dict(state)
        resumed: Any = iter(IterableTraceDataset(other))
        with pytest.raises(DatasetError, match=r"saved with dataset=.*shards that were rewritten"):
            resumed.load_state_dict(states)


def test_a_pickle_replaced_during_training(tmp_path: Path) -> None:
    make_legacy(tmp_path)
    with pytest.warns(StoredStateWarning, match="legacy pickles"):
        dataset = TraceGraphDataset(tmp_path / "*.pkl")
    dataset[0]
    shutil.copy(tmp_path / "m_d_batch_0000.pkl", tmp_path / "m_d_batch_0001.pkl.gz")
    with pytest.raises(DatasetError, match=r"m_d_batch_0001\.pkl\.gz: the shard was replaced"):
        dataset[5 * LAYERS]


@pytest.mark.parametrize("make", [TraceDataset, TraceGraphDataset])
def test_a_missing_layer_does_not_end_a_loop_early(tmp_path: Path, make: Any) -> None:
    batch = plain_batch(3)
    batch[1] |= {"hidden_states": [], "attentions": []}
    dataset = make(make_shards(tmp_path, batch))
    for loop in (dataset, DataLoader(dataset, batch_size=None), IterableTraceDataset(dataset)):
        with pytest.raises(LayerIndexError, match=r"batch-00000\.h5.*'tc_1'.*not stored"):
            for _ in loop:
                pass
