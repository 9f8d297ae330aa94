"""Batches come out of a pickle one by one, equal to pickle.load and in bounded memory."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import tracemalloc
import weakref
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h5traces.errors import ConversionError, UnsafePickleError
from h5traces.sources.pickle.source import PickleLimits
from h5traces.sources.pickle.stream import BatchStream

if TYPE_CHECKING:
    from pathlib import Path

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def write(tmp_path: Path, value: Any, protocol: int = 4, *, compressed: bool = False) -> Path:
    path = tmp_path / "batch.pkl"
    data = pickle.dumps(value, protocol)
    path.write_bytes(gzip.compress(data, 1) if compressed else data)
    return path


def write_raw(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "batch.pkl"
    path.write_bytes(data)
    return path


def make_item(index: int, *, size: int = 100) -> dict[str, Any]:
    rng = np.random.default_rng(index)
    return {
        "hidden_states": [rng.random(size).astype(np.float16) for _ in range(3)],
        "attentions": [rng.random((2, size)) for _ in range(3)],
        "tokens": np.arange(index),
        "tokens_decoded": [f"token {number}" for number in range(index)],
        "question_id": f"q_{index}",
        "nothing": {},
    }


def assert_equal(expected: Any, found: Any) -> None:
    np.testing.assert_equal(found, expected)
    assert repr(expected) == repr(found)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("num_items", [0, 1, 2, 7])
def test_gives_the_items_of_a_list(
    tmp_path: Path, num_items: int, protocol: int, compressed: bool
) -> None:
    items = [make_item(index) for index in range(num_items)]
    path = write(tmp_path, items, protocol, compressed=compressed)
    with BatchStream(path) as batch:
        assert_equal(items, list(batch))
        assert batch.num_read == num_items
        assert batch.num_passes == 1
        assert batch.progress == (path.stat().st_size,) * 2
        assert list(batch) == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("num_items", [999, 1000, 1001, 2001])
def test_gives_items_across_the_picklers_portions(
    tmp_path: Path, num_items: int, protocol: int
) -> None:
    items = [{"index": index} for index in range(num_items)]
    with BatchStream(write(tmp_path, items, protocol)) as batch:
        assert list(batch) == items


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "item",
    [
        {"a": ({}, {})},
        {"a": ({}, [], {})},
        {"a": ({"b": ({}, {})}, {"c": [{}]})},
        {"a": [{}]},
        {"a": {"b": {"c": {}}}},
        {"a": ([], [], {}, {}, {})},
        {},
    ],
)
def test_containers_inside_items_are_no_items(
    tmp_path: Path, item: dict[str, Any], protocol: int
) -> None:
    # A dict of one entry is written without a mark, so its values lie on the items' level.
    for items in ([item], [item, dict(item)], [{}, item, {"b": 1}, dict(item), {}]):
        with BatchStream(write(tmp_path, items, protocol)) as batch:
            assert list(batch) == items


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_what_the_python_pickler_writes(tmp_path: Path, protocol: int) -> None:
    items = [make_item(index) for index in range(4)]
    buffer = io.BytesIO()
    pickle._Pickler(buffer, protocol).dump(items)
    with BatchStream(write_raw(tmp_path, buffer.getvalue())) as batch:
        assert_equal(items, list(batch))


def test_reports_progress(tmp_path: Path) -> None:
    path = write(tmp_path, [make_item(1, size=100_000) for _ in range(5)])
    with BatchStream(path) as batch:
        positions = [batch.progress[0] for _ in batch]
    assert positions == sorted(positions)
    assert 0 < positions[0] < positions[-1] <= path.stat().st_size


# --- objects that items share ------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_objects_come_back(tmp_path: Path, protocol: int, compressed: bool) -> None:
    # Too large to be kept for later items without knowing that they are shared.
    items = [make_item(index, size=140_000) for index in range(8)]
    items[3]["hidden_states"] = items[1]["hidden_states"]
    items[6]["attentions"][0] = items[1]["attentions"][2]
    items[6]["nothing"] = items[5]
    items[7]["tokens_decoded"] = ["x" * 1000] * 3
    items[5]["tokens_decoded"] = [items[7]["tokens_decoded"][0]]
    path = write(tmp_path, items, protocol, compressed=compressed)
    with BatchStream(path) as batch:
        found = list(batch)
        assert batch.num_passes == 3
    assert_equal(items, found)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_small_shared_objects_need_one_pass(
    tmp_path: Path, protocol: int, compressed: bool
) -> None:
    config = {"model": "tiny", "layers": [1, 2, 3], "seed": 0, "stop": ("a", None)}
    tokens, names = np.arange(2000), [f"token {number}" for number in range(2000)]
    items = [
        {**make_item(index, size=20_000), "tokens": tokens, "names": names, "config": config}
        for index in range(60)
    ]
    path = write(tmp_path, items, protocol, compressed=compressed)
    with BatchStream(path) as batch:
        found = list(batch)
        assert batch.num_passes == 1
    assert_equal(items, found)
    assert found[0]["tokens"] is found[59]["tokens"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_same_item_several_times(tmp_path: Path, protocol: int) -> None:
    one, other = make_item(1), make_item(2)
    for items in ([one, one], [one, one, one], [one, other, one, one, other], [{}] * 1500):
        with BatchStream(write(tmp_path, items, protocol)) as batch:
            assert_equal(items, list(batch))


@pytest.mark.parametrize("protocol", [2, 4])
def test_shared_texts_need_no_second_pass(tmp_path: Path, protocol: int) -> None:
    shared = ["a short text", b"bytes", 1.5]
    items = [{"index": index, "shared": tuple(shared)} for index in range(50)]
    with BatchStream(write(tmp_path, items, protocol)) as batch:
        assert list(batch) == items
        assert batch.num_passes == 1


def test_more_shared_texts_than_are_kept(tmp_path: Path) -> None:
    texts = [f"text {index}" for index in range(100)]
    items = [{"texts": list(texts)}, {"texts": list(texts)}]
    limits = PickleLimits(max_kept_entries=150)
    with BatchStream(write(tmp_path, items), limits=limits) as batch:
        assert list(batch) == items
        assert batch.num_passes == 1
    items = [{f"text {index}": f"value {index}"} for index in range(200)]
    items.append(items[0])
    limits = PickleLimits(max_kept_entries=20)
    with BatchStream(write(tmp_path, items), limits=limits) as batch:
        assert list(batch) == items
        assert batch.num_passes == 1  # the dict itself is small
    items = [{"texts": texts}, {"texts": list(texts)}]
    with (
        BatchStream(write(tmp_path, items), limits=limits) as batch,
        pytest.raises(UnsafePickleError, match=r"shared between items.*max_kept_entries"),
    ):
        list(batch)


def test_limits_what_shared_objects_keep_alive(tmp_path: Path) -> None:
    items = [{"array": np.zeros(100_000)} for _ in range(10)]
    limits = PickleLimits(max_kept_nbytes=3_000_000)
    with BatchStream(write(tmp_path, items + items), limits=limits) as batch:
        next(batch)
        with pytest.raises(UnsafePickleError, match=r"shared between items.*max_kept_nbytes"):
            list(batch)
    pairs = [item for item in items for _ in range(2)]
    with BatchStream(write(tmp_path, pairs), limits=limits) as batch:
        assert_equal(pairs, list(batch))


atoms = st.integers(0, 3) | st.text(max_size=2) | st.just("long" * 100)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), protocol=st.sampled_from(PROTOCOLS))
def test_equals_pickle_load_whatever_is_shared(
    data: st.DataObject, protocol: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pool: list[Any] = [
        {},
        {},
        np.arange(3.0),
        np.arange(40, dtype=">i2"),
        "long" * 100,
        b"raw" * 100,
    ]
    for _ in range(data.draw(st.integers(0, 4))):
        members = data.draw(st.lists(st.sampled_from(range(len(pool))), max_size=3))
        pool.append([pool[index] for index in members])
        pool.append(tuple(pool[index] for index in members))
    dicts = []
    for _ in range(data.draw(st.integers(0, 4))):
        fields = data.draw(st.dictionaries(atoms, st.sampled_from(range(len(pool))), max_size=3))
        dicts.append({key: pool[index] for key, index in fields.items()})
        pool.append(dicts[-1])
    order = data.draw(st.lists(st.sampled_from(range(len(dicts))), max_size=6)) if dicts else []
    items = [dicts[index] for index in order]
    path = tmp_path_factory.getbasetemp() / "shared.pkl"
    path.write_bytes(pickle.dumps(items, protocol))
    with BatchStream(path) as batch:
        assert_equal(items, list(batch))


def test_an_item_that_was_handed_out_cannot_be_changed(tmp_path: Path) -> None:
    changed = [
        b"](}q\x01h\x01K\x01K\x02se.",  # [d, d], then d[1] = 2
        b"](}q\x01}h\x01K\x01K\x02se.",  # [d, {}, d], then the same
        b"](}q\x01X\x01\x00\x00\x00a]q\x02s}X\x01\x00\x00\x00ah\x02K\x01ase.",  # its list grows
    ]
    for body in changed:
        path = write_raw(tmp_path, b"\x80\x02]q\x00" + body[1:])
        with BatchStream(path) as batch, pytest.raises(UnsafePickleError, match="changed after"):
            list(batch)


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("compressed", [False, True])
def test_memory_is_bounded_by_one_item(tmp_path: Path, protocol: int, compressed: bool) -> None:
    item_nbytes = 4 << 20
    array = np.random.default_rng(0).integers(0, 127, item_nbytes // 4, np.uint8)
    items = [{"arrays": [array + index for index in range(4)]} for _ in range(12)]
    path = write(tmp_path, items, protocol, compressed=compressed)
    del items
    tracemalloc.start()
    try:
        with BatchStream(path) as batch:
            for item in batch:
                assert len(item["arrays"]) == 4
                del item
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Old protocols hold a string and its bytes until the item ends.
    assert peak < item_nbytes * (3 if protocol < 3 else 1) + (6 << 20)


def test_memory_is_bounded_with_shared_objects(tmp_path: Path) -> None:
    array = np.zeros(1 << 20, np.uint8)
    items = [{"own": array + index, "next": array} for index in range(30)]
    path = write(tmp_path, [{**one, "next": two["own"]} for one, two in pairwise(items)])
    del items
    tracemalloc.start()
    try:
        with BatchStream(path) as batch:
            for item in batch:
                del item
            assert batch.num_passes == 3
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_keeps_no_reference_to_items(tmp_path: Path) -> None:
    # Smaller arrays may be kept: later items may share them.
    path = write(tmp_path, [make_item(index, size=140_000) for index in range(4)])
    with BatchStream(path) as batch:
        for item in batch:
            alive = weakref.ref(item["hidden_states"][0])
            del item
            assert alive() is None


# --- containers --------------------------------------------------------------------------------


def make_container(num_items: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "traces": [
            [(rng.random((4, 8)), rng.random((4, 4))) for _ in range(index % 3)]
            for index in range(num_items)
        ],
        "labels": [index % 2 for index in range(num_items)],
        "question_ids": [f"q_{index}" for index in range(num_items)],
    }


def layers_of(item: dict[str, Any]) -> list[tuple[Any, Any]]:
    return list(zip(item["hidden_states"], item["attention_mean"], strict=True))


@pytest.mark.parametrize("whole_nbytes", [1 << 26, 0])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("num_items", [0, 1, 2, 5, 1001])
def test_gives_the_items_of_a_container(
    tmp_path: Path, num_items: int, protocol: int, order: int, whole_nbytes: int
) -> None:
    container = dict(list(make_container(num_items).items())[::order])
    path = write(tmp_path, container, protocol)
    with BatchStream(path, whole_nbytes=whole_nbytes) as batch:
        found = list(batch)
        # A small dict is read at once.
        assert batch.num_passes == 1 if whole_nbytes else batch.num_passes <= 4
    assert all(type(item) is dict for item in found)
    assert_equal(container["traces"], [layers_of(item) for item in found])
    assert container["labels"] == [item["label"] for item in found]
    assert container["question_ids"] == [item["question_id"] for item in found]


@pytest.mark.parametrize("whole_nbytes", [1 << 26, 0])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_may_share_objects_and_lack_lists(
    tmp_path: Path, protocol: int, whole_nbytes: int
) -> None:
    container = make_container(6)
    container["traces"][5] = container["traces"][2]
    container["traces"][4][0] = container["traces"][2][1]
    container["labels"] = np.arange(6)
    del container["question_ids"]
    path = write(tmp_path, container, protocol)
    with BatchStream(path, whole_nbytes=whole_nbytes) as batch:
        found = list(batch)
    assert_equal(container["traces"], [layers_of(item) for item in found])
    assert [item["label"] for item in found] == list(range(6))
    assert all("question_id" not in item for item in found)
    with BatchStream(write(tmp_path, {"traces": container["traces"]}, protocol)) as batch:
        assert all("label" not in item for item in batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1]}, "'labels' has 1 values for 3 traces"),
        ({"question_ids": ["a"] * 4}, "'question_ids' has 4 values for 3 traces"),
        ({"labels": 7}, "'labels' is an int, expected a list"),
        ({"scores": []}, "unknown keys scores"),
        ({"traces": [[(1, 2)]] * 3}, "layer 0 of item 0 in 'traces'"),
        ({"traces": [{}, {}, {}]}, "item 0 of the batch is a dict"),
        ({"traces": ()}, "a dict with the keys .*'traces'"),
    ],
)
@pytest.mark.parametrize("whole_nbytes", [1 << 26, 0])
def test_refuses_containers_that_do_not_fit(
    tmp_path: Path, change: dict[str, Any], message: str, whole_nbytes: int
) -> None:
    path = write(tmp_path, make_container(3) | change)
    with (
        BatchStream(path, whole_nbytes=whole_nbytes) as batch,
        pytest.raises(ConversionError, match=message),
    ):
        list(batch)


# --- what is not a batch --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (7, "an int"),
        ("text", "a str"),
        (None, "None"),
        ({}, "an empty dict"),
        ({"a": 1}, "a dict with the keys 'a'"),
        ((), "a tuple"),
        (([{}],), "a tuple that starts with a (batch|list)"),
        ([1, 2], "item 0 of the batch is an int"),
        ([{}, 1], "item 1 of the batch is an int"),
        ([[{}]], "a list that starts with a list"),
        ([({},)], "a list that starts with a tuple"),
        ([None], "item 0 of the batch is None"),
        ([np.zeros(3)], "a list that starts with a ndarray"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_refuses_what_is_no_batch(tmp_path: Path, value: Any, found: str, protocol: int) -> None:
    path = write(tmp_path, value, protocol)
    with pytest.raises(ConversionError, match=rf"batch\.pkl.*{found}"):
        read_all(path)


def read_all(path: Path) -> list[Any]:
    with BatchStream(path) as batch:
        return list(batch)


def test_other_bytes_after_a_pickle_are_named(tmp_path: Path) -> None:
    data = pickle.dumps([{"a": 1}])
    with pytest.raises(ConversionError, match=r"other bytes .* follow the end of the pickle"):
        read_all(write_raw(tmp_path, data + bytes(7)))


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"PK\x03\x04", "zip file"), (b"\x89HDF\r\n\x1a\n", "HDF5"), (b"\x93NUMPY", "numpy.save")],
)
def test_names_other_formats(tmp_path: Path, head: bytes, kind: str) -> None:
    path = write_raw(tmp_path, head + bytes(100))
    with pytest.raises(ConversionError, match=kind):
        BatchStream(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_batches_give_their_complete_items(tmp_path: Path, compressed: bool) -> None:
    items = [make_item(index, size=40_000) for index in range(6)]
    path = write(tmp_path, items, compressed=compressed)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = []
    with BatchStream(path) as batch:
        with pytest.raises(ConversionError, match=r"batch\.pkl: truncated .* unfinished write"):
            found.extend(batch)  # list(batch) would lose them
        assert 1 <= batch.num_read <= 3
        with pytest.raises(ValueError, match="closed"):
            next(batch)


def test_every_cut_is_an_error(tmp_path: Path) -> None:
    data = pickle.dumps([{"a": np.arange(3), "b": ["x", 1.5]}, {"c": (1, 2)}], 4)
    for length in range(len(data)):
        with pytest.raises(ConversionError, match="truncated"):
            read_all(write_raw(tmp_path, data[:length]))


def test_corrupted_checksum(tmp_path: Path) -> None:
    path = write(tmp_path, [make_item(1)], compressed=True)
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConversionError, match="corrupted gzip"):
        read_all(path)


@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_damaged_batches_give_errors_of_ours_or_other_values(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(
        pickle.dumps([make_item(1, size=4), make_item(2, size=4)], data.draw(st.integers(0, 5)))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    path.write_bytes(raw)
    with suppress(ConversionError):  # all other errors fail the test
        read_all(path)


@pytest.mark.parametrize("text", [b"hello, a text\n", b"This is a note.\n", b"# a comment"])
def test_text_is_no_pickle(tmp_path, text):
    path = tmp_path / "junk.pkl"
    path.write_bytes(text)
    with pytest.raises(
        ConversionError, match=re.escape(f"{path}: is ") + "(text|a table of text);"
    ):
        BatchStream(path)


def test_one_array_of_unknown_axes_says_what_to_do(tmp_path):
    path = tmp_path / "stacked.pkl"
    path.write_bytes(pickle.dumps([{"hidden_states": np.zeros((2, 3, 4), np.float32)}]))
    with (
        BatchStream(path) as stream,
        pytest.raises(ConversionError, match="one array per layer, or name its axes"),
    ):
        list(stream.records())
