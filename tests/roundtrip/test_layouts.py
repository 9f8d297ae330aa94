"""Every legacy layout, in every type it was written in, comes back as it was."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from legacy_batches import (
    DTYPES,
    LAYOUTS,
    as_dicts,
    assert_same,
    grouped,
    in_float16,
    make_archive,
    make_batch,
    native,
    with_torch,
    write_batch,
    write_layout,
)

import h5traces
from h5traces.checking.validate import validate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def convert(source: Path, **options: Any) -> Path:
    target = source.with_name("archive.h5")
    report = h5traces.convert(source, target, **grouped(**options))
    assert report.ok, report.files[0].error
    assert report.files[0].status == "converted"
    found = validate(target)
    assert found.ok, found.problems
    return target


def arrays_in(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from arrays_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from arrays_in(each)


@pytest.mark.parametrize("policy", ["auto", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_comes_back(tmp_path: Path, layout: str, dtype: str, policy: Any) -> None:
    batch = make_batch(layout, dtype=dtype)
    archive_path = convert(write_layout(tmp_path, layout, batch), dtype=policy)
    change = native if policy == "auto" else in_float16
    expected = [change(trace) for trace in as_dicts(batch)]
    loaded = h5traces.load(archive_path)
    assert_same(loaded, expected)
    for array in arrays_in(loaded):
        assert array.flags.writeable
        assert array.dtype.isnative
    with h5traces.open(archive_path) as archive:
        assert_same([trace.to_dict() for trace in archive], expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float32-from-bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_gives_the_same_from_every_container(tmp_path: Path, layout: str, dtype: str) -> None:
    batch = make_batch(layout, dtype=dtype)
    plain = write_batch(tmp_path / "batch.pkl", batch)
    zipped = write_batch(tmp_path / "batch.pkl.gz", batch, protocol=5)
    archive = make_archive(tmp_path / "made", batch, dtype="auto")
    expected = as_dicts(pickle.loads(plain.read_bytes()))
    for path in (plain, zipped, archive):
        found = h5traces.load(path)
        assert_same(found, expected)
        assert all(array.flags.writeable for array in arrays_in(found))


@pytest.mark.parametrize("numpy1", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("layout", ["full_pkl", "step_clean", "container_dict"])
def test_every_protocol_and_numpy_s_old_names(
    tmp_path: Path, layout: str, protocol: int, numpy1: bool
) -> None:
    batch = make_batch(layout)
    source = write_layout(tmp_path, layout, batch, protocol=protocol, numpy1=numpy1)
    assert (b"numpy.core" in source.read_bytes()) is numpy1
    assert_same(h5traces.load(convert(source)), as_dicts(batch))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("layout", ["full_pkl", "step_min", "final_cut", "container_dict"])
def test_torch_tensors_come_back_as_tensors(tmp_path: Path, layout: str, dtype: str) -> None:
    pytest.importorskip("torch")
    batch = with_torch(make_batch(layout, dtype="float64"), dtype)
    exact = convert(write_layout(tmp_path / "exact", layout, batch), dtype="auto")
    assert_same(h5traces.load(exact), as_dicts(batch))
    narrow = convert(write_layout(tmp_path / "narrow", layout, batch))
    assert_same(h5traces.load(narrow), [in_float16(trace) for trace in as_dicts(batch)])


def test_torch_tensors_as_arrays(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    tensors = with_torch(make_batch("full_pkl"), "bfloat16")
    target = make_archive(tmp_path, tensors, dtype="auto")
    kinds = ("hidden_states", "attentions")
    batch = [
        {
            key: [each.float().numpy() for each in value] if key in kinds else value
            for key, value in trace.items()
        }
        | {"tokens": trace["tokens"].numpy()}
        for trace in tensors
    ]
    with h5traces.open(target) as archive:
        found = [trace.to_dict(container="numpy") for trace in archive]
    with h5traces.open(target, container="numpy") as archive:
        # bfloat16 comes as float32, which is exact.
        assert_same(archive[5]["attentions"][1], batch[5]["attentions"][1])
    assert_same(found, batch)


def test_float_policies(tmp_path: Path) -> None:
    batch = make_batch("full_pkl", dtype="float64")
    wide = make_archive(tmp_path / "wide", batch, dtype="float32")
    expected = batch[5]["hidden_states"][0].astype(np.float32)
    assert_same(h5traces.load(wide)[5]["hidden_states"][0], expected)
    torch = pytest.importorskip("torch")
    brain = make_archive(tmp_path / "brain", make_batch("full_pkl"), dtype="bfloat16")
    source = torch.from_numpy(make_batch("full_pkl")[5]["hidden_states"][0])
    rounded = source.bfloat16().float().numpy()
    assert_same(h5traces.load(brain)[5]["hidden_states"][0], rounded)


def test_arrays_beyond_float16_stay_wide(tmp_path: Path) -> None:
    batch = make_batch("full_pkl", dtype="float32", num_samples=6)
    batch[5]["hidden_states"][1][0, 0] = 1e6
    found = h5traces.load(make_archive(tmp_path, batch))[5]["hidden_states"]
    assert [array.dtype.name for array in found] == ["float16", "float32", "float16"]
    assert_same(found[1], batch[5]["hidden_states"][1])


@pytest.mark.parametrize("layout", ["full_gz", "step_min", "final_full"])
def test_subset_of_layers(tmp_path: Path, layout: str) -> None:
    batch = make_batch(layout)
    target = convert(write_layout(tmp_path, layout, batch), layers=[2, 0])
    with h5traces.open(target) as archive:
        assert archive.layers == (0, 2)
        assert archive.metadata.num_layers == 3
        assert archive.metadata.layers == (0, 2)
        for trace, source in zip(archive, batch, strict=True):
            for kind in ("hidden_states", "attentions"):
                assert_same(trace.to_dict()[kind], [source[kind][0], source[kind][2]])
                assert_same(trace.layer(2, kind), source[kind][2])
                assert trace[kind].layers == (0, 2)


def test_sites_tell_where_states_were_taken(tmp_path: Path) -> None:
    with h5traces.open(make_archive(tmp_path, make_batch("full_pkl"))) as archive:
        states = archive[5]["hidden_states"]
        assert states.sites == ("block_output", "block_output", "final_norm")
        assert archive[5]["attentions"].sites == (None, None, None)


@pytest.mark.parametrize(
    ("layout", "coverage"),
    [
        ("full_gz", ["full"] * 6),
        ("final_full", ["partial", *["last_position"] * 5]),
        ("final_cut", ["partial", *["last_position"] * 5]),
        ("step_min", ["steps", "empty", "steps", "steps", "steps", "steps"]),
        ("container_dict", ["full"] * 6),
    ],
)
def test_coverage_names_what_arrays_cover(tmp_path: Path, layout: str, coverage: list[str]) -> None:
    source = write_layout(tmp_path, layout)
    report = h5traces.convert(source, tmp_path / "a.h5")
    with h5traces.open(tmp_path / "a.h5") as archive:
        assert [trace.metadata.coverage for trace in archive] == coverage
    told = " ".join(map(str, report.files[0].findings))
    assert ("350 MB bug" in told) is ("last_position" in coverage)
    assert ("generation steps" in told) is ("steps" in coverage)


def test_names_from_the_file_name_are_recorded(tmp_path: Path) -> None:
    source = write_layout(tmp_path, "split")
    h5traces.convert(source, tmp_path / "named.h5")
    h5traces.convert(source, tmp_path / "given.h5", model_id="m", dataset="d")
    metadata = h5traces.open(tmp_path / "named.h5").metadata
    assert (metadata.model_id, metadata.dataset) == ("llama2_chat_7B", "triviaqa")
    assert (metadata.num_layers, metadata.hidden_size, metadata.num_heads) == (3, 8, 2)
    (recorded,) = metadata.sources or ()
    assert (recorded.name, recorded.num_samples) == (source.name, 6)
    assert recorded.nbytes == source.stat().st_size
    given = h5traces.open(tmp_path / "given.h5").metadata
    assert (given.model_id, given.dataset) == ("m", "d")


def test_digests_do_not_depend_on_how_the_batch_was_pickled(tmp_path: Path) -> None:
    batch = make_batch("full_pkl")
    digests = []
    for number, options in enumerate([{}, {"protocol": 2, "numpy1": True}, {"protocol": 5}]):
        source = write_batch(tmp_path / str(number) / "batch.pkl", batch, **options)
        with h5traces.open(convert(source)) as archive:
            digests.append([trace.metadata.digest for trace in archive])
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests[0])) == len(batch)
