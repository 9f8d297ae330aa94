"""Existing code takes traces for dicts and batches for lists: each idiom against plain results."""

from __future__ import annotations

import copy
import json
import pickle
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from legacy_batches import assert_same, make_archive, make_batch, with_torch, write_batch

import h5traces
from h5traces.errors import ArchiveError, ReadOnlyError, SampleIndexError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BATCH = make_batch("full_pkl", num_samples=6)  # sample 2 holds NaN and infinite values


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("idioms"), BATCH)


@pytest.fixture
def archive(path: Path) -> h5traces.Archive:
    return h5traces.open(path)


def plain(value: Any) -> Any:
    """Lazy values as the lists and dicts that they stand for."""
    if isinstance(value, (h5traces.Archive, list)):
        return [plain(each) for each in value]
    if isinstance(value, h5traces.Trace):
        return value.to_dict()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return list(value) if type(value).__name__ == "LayerSequence" else value


# --- one trace as a dict ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "idiom",
    [
        lambda t: t.copy(),
        lambda t: t | {"label": 1},
        lambda t: {"label": 1, "question_id": "x"} | t,
        lambda t: {**t, "label": 1},
        lambda t: dict(t),
        lambda t: {key: t[key] for key in t if key != "tokens"},
        lambda t: dict(sorted(t.items(), key=lambda item: item[0])),
        lambda t: t.get("question_id", "unknown"),
        lambda t: t.get("nothing", "unknown"),
        lambda t: ["tokens" in t, "nothing" in t, len(t), list(t), bool(t)],
        lambda t: list(t.keys()),
        lambda t: [type(each).__name__ for each in plain(list(t.values()))],
        lambda t: t["hidden_states"] + t["hidden_states"],
        lambda t: t["hidden_states"] + [t["attentions"][0]],
        lambda t: [t["attentions"][0]] + t["hidden_states"],
        lambda t: sum([t["hidden_states"], t["attentions"]], []),  # noqa: RUF017  # the idiom
        lambda t: t["hidden_states"].copy(),
        lambda t: t["hidden_states"][1:],
        lambda t: t["hidden_states"][::-1],
        lambda t: list(reversed(t["hidden_states"])),
        lambda t: list(zip(t["hidden_states"], t["attentions"], strict=True)),
        lambda t: np.stack(t["hidden_states"]),
        lambda t: np.concatenate(t["hidden_states"], axis=-1),
        lambda t: json.dumps({key: t[key] for key in t if isinstance(t[key], str)}),
    ],
)
def test_a_trace_as_a_dict(archive: h5traces.Archive, idiom: Callable[[Any], Any]) -> None:
    for trace, source in zip(archive, BATCH, strict=True):
        found, expected = idiom(trace), idiom(source)
        if isinstance(expected, dict):
            assert type(found) is dict
            assert list(found) == list(expected)
        assert_same(plain(found), expected)


def test_a_merged_dict_reads_its_layers_when_they_are_used(archive: h5traces.Archive) -> None:
    labelled = [trace | {"label": number} for number, trace in enumerate(archive)]
    labelled[5]["hidden_states"] = labelled[5]["hidden_states"][-1:]
    assert_same(labelled[5]["hidden_states"], BATCH[5]["hidden_states"][-1:])
    assert labelled[4]["label"] == 4


def test_a_tuple_stays_one(tmp_path: Path) -> None:
    source = {key: tuple(v) if isinstance(v, list) else v for key, v in BATCH[5].items()}
    trace = h5traces.open(make_archive(tmp_path, [source]))[0]
    states = source["hidden_states"]
    assert_same(trace["hidden_states"] + trace["hidden_states"], states + states)
    assert_same(trace["hidden_states"] + states, states + states)
    assert trace["hidden_states"] == states
    assert trace["hidden_states"] != list(states)
    with pytest.raises(TypeError):
        _ = trace["hidden_states"] + list(states)


def test_equal_traces(archive: h5traces.Archive, path: Path) -> None:
    for trace, again, source in zip(archive, h5traces.open(path), BATCH, strict=True):
        assert trace == again
        assert trace == source  # NaN and infinite values included
        assert source == trace
        assert trace == dict(reversed(source.items()))
        assert not trace != again  # the operator is what is tested
    assert archive[4] != archive[5]
    assert archive[5] != "a trace"
    assert archive == h5traces.open(path)
    assert archive == BATCH
    assert archive[1:] != BATCH
    assert archive != BATCH[::-1]
    for unhashable in (archive, archive[0], archive[0]["hidden_states"]):
        with pytest.raises(TypeError, match="unhashable"):
            hash(unhashable)


def changed(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    found = copy.deepcopy(BATCH[5])
    change(found)
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(extra=1),
        lambda t: t.pop("tokens"),
        lambda t: t.update(tokens=t["tokens"].astype(np.int32)),
        lambda t: t.update(tokens=t["tokens"].tolist()),
        lambda t: t.update(tokens=t["tokens"][:-1]),
        lambda t: t.update(question_id="other"),
        lambda t: t.update(hidden_states=tuple(t["hidden_states"])),
        lambda t: t.update(hidden_states=t["hidden_states"][:-1]),
        lambda t: t.update(hidden_states=np.stack(t["hidden_states"])),
        lambda t: t["hidden_states"].__setitem__(0, t["hidden_states"][0].astype(np.float32)),
        lambda t: t["attentions"][2].__setitem__((0, -1, 0), np.nan),
        lambda t: t["hidden_states"][1].__setitem__((0, 0), 77),
    ],
)
def test_traces_that_differ(archive: h5traces.Archive, change: Any) -> None:
    assert archive[5] != changed(change)
    assert changed(change) != archive[5]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_equal_tensors(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("torch")
    batch = with_torch(make_batch("full_pkl", num_samples=6, dtype="float32"), dtype)
    archive = h5traces.open(make_archive(tmp_path, batch, dtype=dtype))
    assert archive == batch
    assert archive[4] != batch[5]
    assert archive[5] != h5traces.open(tmp_path / "batch.h5", container="numpy")[5]


def test_copies_and_pickles(archive: h5traces.Archive) -> None:
    for again in (
        copy.copy(archive[5]),
        copy.deepcopy(archive[5]),
        pickle.loads(pickle.dumps(archive[5])),
        pickle.loads(pickle.dumps(archive))[5],
        copy.deepcopy(archive)[5],
    ):
        assert isinstance(again, h5traces.Trace)
        assert_same(again.to_dict(), BATCH[5])
    states = pickle.loads(pickle.dumps(archive[5]["hidden_states"]))
    assert_same(list(states), BATCH[5]["hidden_states"])
    used = archive[5]
    _ = used["hidden_states"][0], used.metadata
    assert len(pickle.dumps(used)) < 20_000  # where it lies, not what it holds


# --- an archive as a list -----------------------------------------------------------------------

ORDER = [3, 0, -1, 3]
MASK = [True, False, False, True, False, True]


@pytest.mark.parametrize(
    "idiom",
    [
        lambda a: a[1:4],
        lambda a: a[-2:],
        lambda a: a[::-2],
        lambda a: a[-1],
        lambda a: a + a[:2],
        lambda a: a[:2] + a[4:],
        lambda a: a + [{"question_id": "more"}],  # noqa: RUF005  # the idiom
        lambda a: [{"question_id": "more"}] + a,  # noqa: RUF005  # the idiom
        lambda a: sum([a[:1], a[3:4]], []),  # noqa: RUF017  # the idiom
        lambda a: list(reversed(a)),
        lambda a: sorted(a, key=lambda each: each["question_id"], reverse=True),
        lambda a: sorted(a, key=lambda each: len(each["tokens"])),
        lambda a: a.index(a[3]),
        lambda a: a.count(a[0]),
        lambda a: a[4] in a,
        lambda a: random.Random(0).sample(a, 3),
        lambda a: random.Random(0).choice(a),
        lambda a: [each["question_id"] for each in a if len(each["tokens"]) > 6],
        lambda a: [(number, each["question_id"]) for number, each in enumerate(a)],
        lambda a: max(a, key=lambda each: each["question_id"])["question_id"],
        lambda a: [len(a), bool(a), bool(a[:0])],
    ],
)
def test_an_archive_as_a_list(archive: h5traces.Archive, idiom: Callable[[Any], Any]) -> None:
    # Plain dicts have no order, and cannot be looked for where they hold arrays.
    expected = idiom([ById(each) for each in BATCH])
    assert_same(plain(idiom(archive)), plain(expected))


class ById(dict):  # type: ignore[type-arg]
    """A legacy dict that a list can look for: plain ones fail where they hold arrays."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and self["question_id"] == other["question_id"]

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("make", [list, tuple, np.array, iter])
def test_lists_of_indices_and_masks(archive: h5traces.Archive, make: Any) -> None:
    assert_same(plain(archive[make(ORDER)]), [BATCH[each] for each in ORDER])
    if make is not iter:
        assert_same(plain(archive[make(MASK)]), [BATCH[0], BATCH[3], BATCH[5]])
    assert isinstance(archive[make([])], h5traces.Archive)
    assert len(archive[make([])]) == 0
    assert archive[make(ORDER)][1:].ids == ("tc_0", "tc_5", "tc_3")


def test_tensors_and_single_numbers_as_indices(archive: h5traces.Archive) -> None:
    torch = pytest.importorskip("torch")
    assert archive[torch.tensor([4, 1])].ids == ("tc_4", "tc_1")
    assert archive[torch.tensor([4])].ids == ("tc_4",)
    assert archive[torch.tensor(MASK)].ids == ("tc_0", "tc_3", "tc_5")
    for one in (np.int64(4), np.array(4), torch.tensor(4)):
        assert archive[one].metadata.sample_id == "tc_4"
    assert archive[np.array([4])].ids == ("tc_4",)


def test_indices_that_are_none(archive: h5traces.Archive) -> None:
    with pytest.raises(SampleIndexError, match="a mask of 2 was given for 6 samples"):
        archive[[True, False]]
    with pytest.raises(SampleIndexError, match="sample 6 was asked for, but there are 6"):
        archive[[0, 6]]
    with pytest.raises(SampleIndexError, match="a mask of 2 was given"):
        archive.select(samples=[True, False])
    for wrong in (1.5, None, [1.5], ["tc_1"]):
        with pytest.raises(TypeError):
            archive[wrong]  # type: ignore[index]


def test_joined_archives(archive: h5traces.Archive, tmp_path: Path) -> None:
    other = h5traces.open(make_archive(tmp_path, BATCH[:2], name="other.pkl"))
    both = archive[4:] + other
    assert isinstance(both, h5traces.Archive)
    assert both.ids == ("tc_4", "tc_5", "tc_0", "tc_1")
    assert both.paths == (*archive.paths, *other.paths)
    assert_same(plain(both), [*BATCH[4:], *BATCH[:2]])
    assert both.by_id("tc_1").path == other.paths[0]
    assert both.metadata.num_samples == 4
    assert pickle.loads(pickle.dumps(both))[2] == other[0]
    with pytest.raises(ArchiveError, match=r"cannot be joined: layers \(0, 1, 2\) and \(1,\)"):
        _ = archive + archive.select(layers=1)
    with pytest.raises(ArchiveError, match="cannot be joined: container 'source' and 'numpy'"):
        _ = archive + h5traces.open(other.paths[0], container="numpy")
    few = h5traces.open(make_archive(tmp_path, BATCH[:2], name="few.pkl", layers=[0]))
    with pytest.raises(ArchiveError, match="cannot be joined"):
        _ = archive + few
    with pytest.raises(TypeError):
        _ = archive + 5  # type: ignore[operator]


# --- what cannot be changed says what can -------------------------------------------------------


def assigned(view: Any, key: Any) -> None:
    view[key] = 1


def deleted(view: Any, key: Any) -> None:
    del view[key]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: assigned(t, "x"),
        lambda t: deleted(t, "tokens"),
        lambda t: t.update(x=1),
        lambda t: t.pop("tokens"),
        lambda t: t.setdefault("x", 1),
    ],
)
def test_changing_a_trace(archive: h5traces.Archive, change: Any) -> None:
    with pytest.raises(ReadOnlyError, match=r"'tc_5'.*trace\.to_dict\(\).*trace\.copy\(\)"):
        change(archive[5])
    change(archive[5].to_dict())
    change(archive[5].copy())


@pytest.mark.parametrize(
    "change",
    [
        lambda a: assigned(a, 0),
        lambda a: deleted(a, 0),
        lambda a: a.append(1),
        lambda a: a.extend([1]),
        lambda a: a.sort(),
        lambda a: random.shuffle(a),
    ],
)
def test_changing_an_archive(archive: h5traces.Archive, change: Any) -> None:
    with pytest.raises(ReadOnlyError, match=r"batch\.h5.*list\(archive\).*random\.sample"):
        change(archive)


def test_changing_layers(archive: h5traces.Archive) -> None:
    states = archive[5]["hidden_states"]
    for change in (lambda: assigned(states, 0), lambda: states.append(1)):
        with pytest.raises(ReadOnlyError, match=r"hidden_states: 3 arrays.*list\(trace\[kind\]\)"):
            change()
    assert not hasattr(states, "append")
    with pytest.raises(AttributeError, match="'Archive' object has no attribute 'shape'"):
        _ = archive.shape  # type: ignore[attr-defined]


def test_the_ways_out(archive: h5traces.Archive) -> None:
    order = random.Random(0).sample(range(len(archive)), len(archive))
    expected = list(BATCH)
    assert_same(plain(archive[order]), [expected[each] for each in order])
    changed = list(archive)
    random.Random(1).shuffle(changed)
    assert sorted(each["question_id"] for each in changed) == list(archive.ids)


def test_json_of_what_is_no_array(archive: h5traces.Archive, tmp_path: Path) -> None:
    document = json.loads(archive[5].metadata.model_dump_json(exclude_none=True))
    assert document["sample_id"] == "tc_5"
    with pytest.raises(TypeError, match="not JSON serializable"):
        json.dumps(archive[5])  # as the legacy dict, which holds arrays
    with pytest.raises(TypeError, match="not JSON serializable"):
        json.dumps(BATCH[5])
    assert write_batch(tmp_path / "again.pkl", [trace.to_dict() for trace in archive]).exists()
