"""Random odd batches become the right archive, or one clear error; never a wrong one."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from legacy_batches import assert_same, grouped
from odd_items import OddBatch, odd_batch

import h5traces
from h5traces.checking.validate import validate
from h5traces.format import layout

if TYPE_CHECKING:
    from pathlib import Path

GROUPS, GROUP_SIZE = 12, 25


def check(batch: OddBatch, folder: Path) -> bool:
    """Whether the batch was read; AssertionError where the archive is not the truth."""
    source, target = folder / "batch.pkl", folder / "batch.h5"
    source.write_bytes(pickle.dumps(batch.items))
    report = h5traces.convert(source, target, **grouped(dtype="auto", overwrite=True))
    (file,) = report.files
    if file.error is not None:
        assert batch.may_fail, f"{batch.form}: {file.error}"
        assert "expected" in file.error or "fits" in file.error, file.error
        assert len(file.error.removeprefix(str(source))) < 300, file.error
        return False
    assert not validate(target)[0].problems, batch.form
    plain = pickle.loads(source.read_bytes())
    with h5traces.open(target) as archive:
        for number, trace in enumerate(archive):
            assert_same(trace.to_dict(), _native(plain[number]), batch.form)
            _compare(batch, number, trace)
    return True


def _native(value: Any) -> Any:
    """Arrays in native byte order, as pickle.load gives them."""
    if isinstance(value, dict):
        return {key: _native(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_native, value))
    if isinstance(value, np.ndarray):
        return value.astype(value.dtype.newbyteorder("="))
    return value


def _compare(batch: OddBatch, number: int, trace: h5traces.Trace) -> None:
    """What the archive says of blocks is true, and where it cannot know it says nothing."""
    stored = trace._stored
    names = [path.partition("/")[2] for path in stored.objects if path.startswith("hidden_states/")]
    if batch.has_states and batch.has_attentions:
        blocks = [layout.layer_name(layer) for layer in range(len(batch.blocks[number]))]
        assert names == ["embedding"] * batch.has_embedding + blocks, batch.form
    for name in names:
        layer = layout.parse_layer_name(name)
        truth = batch.embeddings[number] if layer is None else batch.blocks[number]
        if layer is not None and layout.is_position(name):
            truth = [*([batch.embeddings[number]] * batch.has_embedding), *batch.blocks[number]]
        expected = truth if layer is None else truth[layer]
        found = stored.read_layer("hidden_states", name)
        np.testing.assert_array_equal(np.asarray(found), expected, err_msg=batch.form)
    for layer, expected in enumerate(batch.attentions[number] if batch.has_attentions else ()):
        found = np.asarray(trace.layer(layer, "attentions"))
        np.testing.assert_array_equal(found, expected, err_msg=batch.form)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group", range(GROUPS))
def test_random_items_become_what_they_are(tmp_path: Path, group: int) -> None:
    read = [
        check(odd_batch(seed), tmp_path)
        for seed in range(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
    ]
    assert sum(read) > GROUP_SIZE // 2
