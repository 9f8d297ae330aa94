"""Random odd batches become the right archive, or one clear error; never a wrong one."""

from __future__ import annotations

import pickle
import re
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
    report = h5traces.convert(
        source,
        target,
        **grouped(dtype="auto", overwrite=True),
        reading=h5traces.ReadingOptions(keep_padding=batch.keeps_padding),
    )
    (file,) = report.files
    if file.error is not None:
        assert batch.may_fail or re.search(batch.must_fail or r"\Z.", file.error), (
            f"{batch.form}: {file.error}"
        )
        assert re.search("expected|fits|may be", file.error), file.error
        assert len(file.error.removeprefix(str(source))) < 300, file.error
        return False
    assert not batch.must_fail, batch.form
    assert not validate(target)[0].problems, batch.form
    assert file.num_cut == batch.num_cut, batch.form
    if not batch.num_cut:
        for item, meant in zip(pickle.loads(source.read_bytes()), batch.meant, strict=True):
            assert_same(_native(item), _native(meant), batch.form)
    with h5traces.open(target) as archive:
        for number, trace in enumerate(archive):
            assert_same(trace.to_dict(), _native(batch.meant[number]), batch.form)
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
    names = [each for each in names if each not in layout.TABLES]
    weights = batch.attentions[number] if batch.has_attentions else []
    # Keys of some blocks with attention do not count blocks.
    if batch.has_states and batch.has_attentions:
        blocks = [layout.layer_name(layer) for layer in range(len(batch.blocks[number]))]
        assert names == ["embedding"] * batch.has_embedding + blocks, batch.form
    for name in names:
        layer = layout.parse_layer_name(name)
        truth = batch.embeddings[number] if layer is None else batch.blocks[number]
        if layer is not None and layout.is_position(name):
            truth = [*([batch.embeddings[number]] * batch.has_embedding), *batch.blocks[number]]
        expected = truth if layer is None else truth[layer]
        _same(stored.read_layer("hidden_states", name), expected, batch.form)
    for layer, expected in enumerate(weights):
        if expected is None:
            assert f"attentions/{layout.layer_name(layer)}" not in stored.objects, batch.form
        else:
            _same(trace.layer(layer, "attentions"), expected, batch.form)
    mask = batch.masks[number]
    assert (trace.mask is None) == (mask is None), batch.form
    if mask is not None:
        np.testing.assert_array_equal(trace.mask, mask, err_msg=batch.form)


def _same(found: Any, expected: Any, form: str) -> None:
    in_steps = isinstance(expected, (list, tuple))
    assert not in_steps or len(found) == len(expected), form
    for one, other in zip(found, expected, strict=True) if in_steps else [(found, expected)]:
        np.testing.assert_array_equal(np.asarray(one), other, err_msg=form)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group", range(GROUPS))
def test_random_items_become_what_they_are(tmp_path: Path, group: int) -> None:
    read = [
        check(odd_batch(seed), tmp_path)
        for seed in range(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
    ]
    assert sum(read) > GROUP_SIZE // 2
