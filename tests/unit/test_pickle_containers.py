"""Batches in every outer container that people pickle, read at once and in bounded memory."""

from __future__ import annotations

import collections
import pickle
import tracemalloc
from typing import TYPE_CHECKING, Any

import dill
import h5py
import joblib
import numpy as np
import pytest
import torch

import h5traces
from h5traces.archive.tensors import materialised
from h5traces.errors import ConversionError
from h5traces.sources.pickle.stream import BatchStream

if TYPE_CHECKING:
    from pathlib import Path

WAYS = pytest.mark.parametrize("whole_nbytes", [1 << 26, 0], ids=["at once", "in passes"])
PROTOCOLS = pytest.mark.parametrize("protocol", [0, 2, 4, 5])


def trace(index: int, *, tokens: int = 5, layers: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(index)
    weights = np.tril(rng.random((layers, 2, tokens, tokens))) + np.eye(tokens)
    weights /= weights.sum(-1, keepdims=True)
    return {
        "hidden_states": [rng.random((tokens, 8)).astype(np.float16) for _ in range(layers)],
        "attentions": list(weights.astype(np.float16)),
        "tokens": np.arange(tokens) + index,
        "tokens_decoded": [f"t{number}" for number in range(tokens)],
        "generated_answer_clean": f"answer {index}",
        "question_id": f"q{index}",
    }


ROWS = [trace(index) for index in range(4)]


def without(name: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != name} for row in ROWS]


def gathered() -> dict[str, list[Any]]:
    found = collections.defaultdict(list)
    for row in ROWS:
        for key, value in row.items():
            found[key].append(value)
    return found


def arrays() -> dict[str, Any]:
    """Columns as arrays and tensors, and as ragged lists of them."""
    return {
        "hidden_states": np.stack([np.stack(row["hidden_states"]) for row in ROWS]),
        "attentions": torch.from_numpy(np.stack([np.stack(row["attentions"]) for row in ROWS])),
        "question_ids": np.array([row["question_id"] for row in ROWS]),
        "labels": torch.tensor([0, 1, 0, 1]),
    }


NO_IDS = without("question_id")
# What is pickled, the samples that it stands for, and what is said of it.
CONTAINERS: dict[str, tuple[Any, list[Any], str]] = {
    "list": (ROWS, ROWS, ""),
    "one dict": (ROWS[0], ROWS[:1], "one sample"),
    "ordered dict": (collections.OrderedDict(ROWS[0]), ROWS[:1], "one sample"),
    "list of ordered dicts": ([collections.OrderedDict(row) for row in ROWS], ROWS, ""),
    "tuple of one": (tuple(ROWS[:1]), ROWS[:1], ""),
    "tuple of two": (tuple(ROWS[:2]), ROWS[:2], ""),
    "tuple of three": (tuple(ROWS[:3]), ROWS[:3], ""),
    "tuple of four": (tuple(ROWS), ROWS, ""),
    "by id": ({row["question_id"]: row for row in ROWS}, ROWS, "samples by id"),
    "by id alone": (
        {row["question_id"]: bare for row, bare in zip(ROWS, NO_IDS, strict=True)},
        ROWS,
        "samples by id",
    ),
    "by id, one field each": (
        {row["question_id"]: {"hidden_states": row["hidden_states"]} for row in ROWS},
        [
            {"hidden_states": row["hidden_states"], "question_id": row["question_id"]}
            for row in ROWS
        ],
        "samples by id",
    ),
    "one by id": ({"q0": ROWS[0]}, ROWS[:1], "samples by id"),
    "one of one field by id": (
        {"q0": {"hidden_states": ROWS[0]["hidden_states"]}},
        [{"hidden_states": ROWS[0]["hidden_states"], "question_id": "q0"}],
        "samples by id",
    ),
    "by number": (dict(enumerate(ROWS)), ROWS, "samples by id"),
    "by number alone": (
        {number + 7: row for number, row in enumerate(NO_IDS)},
        [{**row, "question_id": number + 7} for number, row in enumerate(NO_IDS)],
        "samples by id",
    ),
    "by another id": (
        {f"run {index}": row for index, row in enumerate(ROWS)},
        [{**row, "key": f"run {index}"} for index, row in enumerate(ROWS)],
        "samples by id",
    ),
    "columns": (dict(gathered()), ROWS, "4 samples as columns"),
    "defaultdict": (gathered(), ROWS, "4 samples as columns"),
    "plural columns": (
        {
            **{key: value for key, value in gathered().items() if key != "question_id"},
            "question_ids": gathered()["question_id"],
            "labels": [1, 0, 1, 1],
        },
        [{**row, "label": label} for row, label in zip(ROWS, [1, 0, 1, 1], strict=True)],
        "'question_ids', 'labels'",
    ),
    "columns of arrays": (
        arrays(),
        [
            {
                "hidden_states": np.stack(row["hidden_states"]),
                "attentions": torch.from_numpy(np.stack(row["attentions"])),
                "question_id": row["question_id"],
                "label": index % 2,
            }
            for index, row in enumerate(ROWS)
        ],
        "columns",
    ),
    "columns of stacked layers": (
        {
            "hidden_states": [np.stack(row["hidden_states"]) for row in ROWS],
            "question_ids": [row["question_id"] for row in ROWS],
        },
        [
            {"hidden_states": np.stack(row["hidden_states"]), "question_id": row["question_id"]}
            for row in ROWS
        ],
        "columns",
    ),
    "columns of pairs": (
        {
            "hidden_states": [tuple(row["hidden_states"][:2]) for row in ROWS],
            "attentions": [tuple(row["attentions"][:2]) for row in ROWS],
            "question_ids": [row["question_id"] for row in ROWS],
        },
        [
            {
                "hidden_states": tuple(row["hidden_states"][:2]),
                "attentions": tuple(row["attentions"][:2]),
                "question_id": row["question_id"],
            }
            for row in ROWS
        ],
        "columns",
    ),
    "wrapper": ({"data": ROWS}, ROWS, "under 'data'"),
    "wrapper with columns": (
        {"samples": NO_IDS, "question_ids": [row["question_id"] for row in ROWS]},
        ROWS,
        "under 'samples'",
    ),
    "traces of dicts": ({"traces": ROWS}, ROWS, "under 'traces'"),
    "samples by id in a wrapper": (
        {"results": {row["question_id"]: row for row in ROWS}},
        ROWS,
        "under 'results'",
    ),
}


def plain(value: Any) -> Any:
    """As numpy compares it."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value


def assert_equal(expected: Any, found: Any) -> None:
    np.testing.assert_equal(plain(found), plain(expected))


@WAYS
@PROTOCOLS
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_its_samples(
    tmp_path: Path, name: str, protocol: int, whole_nbytes: int
) -> None:
    value, samples, said = CONTAINERS[name]
    path = tmp_path / "batch.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    with BatchStream(path, whole_nbytes=whole_nbytes) as batch:
        found = [materialised(each) for each in batch]
        assert said in " ".join(batch.understood)
        assert not batch.unread
    assert [set(each) for each in found] == [set(each) for each in samples]
    assert_equal([{key: row[key] for key in sorted(row)} for row in samples],
                 [{key: row[key] for key in sorted(row)} for row in found])  # fmt: skip


@pytest.mark.parametrize("name", ["one dict", "by id alone", "columns", "tuple of two", "wrapper"])
def test_archives_of_containers_equal_their_source(tmp_path: Path, name: str) -> None:
    value, samples, _ = CONTAINERS[name]
    path = tmp_path / "batch.pkl"
    path.write_bytes(pickle.dumps(value))
    assert h5traces.convert(path, tmp_path / "batch.h5").ok
    assert h5traces.verify(tmp_path / "batch.h5", against=path).ok
    found = h5traces.load(tmp_path / "batch.h5")
    assert_equal([dict(sorted(row.items())) for row in samples],
                 [dict(sorted(row.items())) for row in found])  # fmt: skip
    with h5py.File(tmp_path / "batch.h5") as file:
        states = file["samples/00000001/hidden_states/layer_001" if len(samples) > 1 else
                      "samples/00000000/hidden_states/layer_001"][()]  # fmt: skip
    np.testing.assert_array_equal(states, ROWS[min(1, len(samples) - 1)]["hidden_states"][1])


@WAYS
@pytest.mark.parametrize(
    "values",
    [ROWS, [ROWS[:2], ROWS[2:]], [tuple(ROWS[:2]), ROWS[2], [ROWS[3]]]],
    ids=["dicts", "lists", "mixed"],
)
def test_several_pickles_in_one_file(tmp_path: Path, values: Any, whole_nbytes: int) -> None:
    path = tmp_path / "batch.pkl"
    path.write_bytes(b"".join(map(pickle.dumps, values)))
    with BatchStream(path, whole_nbytes=whole_nbytes) as batch:
        assert_equal(ROWS, list(batch))
        assert f"{len(values)} pickles follow one another" in " ".join(batch.understood)


@WAYS
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"train": ROWS[:1], "test": ROWS[1:]}, r"samples in each of 'train', 'test'; save each"),
        ({**dict(gathered()), "labels": [1, 2]}, "unequal numbers of values: 'hidden_states' 4"),
        (
            {**dict(gathered()), "question_id": "q"},
            "one value in 'question_id', and one per sample in 'generated_answer_clean'",
        ),
        (
            {"hidden_states": [row["hidden_states"] for row in ROWS]},
            "no other entry tells; save a list of dicts, or add 'question_ids'",
        ),
        ({"q0": ROWS[0], "q1": 7}, r"entry 'q1' of a dict of samples is an int|keys 'q0', 'q1'"),
        ({"mean": np.zeros(5), "std": np.zeros(5)}, "a dict with the keys 'mean', 'std'"),
        (np.zeros((3, 4)), "found a ndarray, expected a list of dicts"),
    ],
)
def test_unclear_containers_are_rejected_in_one_sentence(
    tmp_path: Path, value: Any, message: str, whole_nbytes: int
) -> None:
    path = tmp_path / "batch.pkl"
    path.write_bytes(pickle.dumps(value))
    with (
        pytest.raises(ConversionError, match=message),
        BatchStream(path, whole_nbytes=whole_nbytes) as batch,
    ):
        list(batch)


@WAYS
def test_what_belongs_to_no_sample_is_named(tmp_path: Path, whole_nbytes: int) -> None:
    path = tmp_path / "batch.pkl"
    path.write_bytes(pickle.dumps({"model": "tiny", "data": ROWS, "layers": [1, 2]}))
    with BatchStream(path, whole_nbytes=whole_nbytes) as batch:
        assert_equal(ROWS, list(batch))
        assert (
            batch.unread
            == [
                "the entry 'model' of the outer dict belongs to no sample",
                "the entry 'layers' of the outer dict belongs to no sample",
            ]
            or whole_nbytes == 0
        )
        assert len(batch.unread) == 2


@pytest.mark.parametrize("name", ["by id", "columns", "appended"])
def test_large_dicts_are_read_in_bounded_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "batch.pkl"
    sample_nbytes = 8 << 20

    def sample(index: int) -> dict[str, Any]:
        states = [np.full((1 << 10, 1 << 10), index + each, np.float32) for each in range(2)]
        return {"hidden_states": states, "question_id": f"q{index}"}

    if name == "appended":
        with path.open("wb") as file:
            for index in range(16):
                pickle.dump(sample(index), file)
    else:
        samples = [sample(index) for index in range(16)]
        by_id = {each["question_id"]: each for each in samples}
        columns = {key: [each[key] for each in samples] for key in samples[0]}
        path.write_bytes(pickle.dumps(by_id if name == "by id" else columns))
        del samples, by_id, columns
    tracemalloc.start()
    try:
        with BatchStream(path) as batch:
            numbers = [int(item["hidden_states"][1][0, 0]) for item in batch]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert numbers == [index + 1 for index in range(16)]
    # A dict of up to 64 MiB is tried at once.
    assert peak < (64 << 20) + 3 * sample_nbytes


# --- other picklers ------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("bz2", 3), ("xz", 1), ("lzma", 1)])
@pytest.mark.parametrize("name", ["list", "by id", "columns", "one dict"])
def test_joblib(tmp_path: Path, name: str, compress: Any) -> None:
    value, samples, _ = CONTAINERS[name]
    path = tmp_path / "batch.joblib"
    joblib.dump(value, path, compress=compress)
    with BatchStream(path) as batch:
        assert_equal([dict(sorted(row.items())) for row in samples],
                     [dict(sorted(row.items())) for row in batch])  # fmt: skip


def test_joblib_of_odd_arrays(tmp_path: Path) -> None:
    rows = [
        {
            **ROWS[0],
            "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            "objects": np.array(["a", None, [1]], dtype=object),
            "words": np.array(["a", "bcd"]),
            "empty": np.zeros((0, 3)),
            "scalar": np.float32(1.5),
            "zero axes": np.array(3.0),
            "dates": np.array(["2024-01-01"], "M8[D]"),
        }
    ]
    joblib.dump(rows, tmp_path / "batch.joblib")
    with BatchStream(tmp_path / "batch.joblib") as batch:
        found = list(batch)
    assert_equal(rows, found)
    assert found[0]["fortran"].flags.f_contiguous


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", ["list", "by id", "defaultdict", "one dict"])
def test_dill(tmp_path: Path, name: str, protocol: int) -> None:
    value, samples, _ = CONTAINERS[name]
    path = tmp_path / "batch.dill"
    path.write_bytes(dill.dumps(value, protocol))
    with BatchStream(path) as batch:
        assert_equal([dict(sorted(row.items())) for row in samples],
                     [dict(sorted(row.items())) for row in batch])  # fmt: skip


def test_functions_in_dill_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "batch.dill"
    path.write_bytes(dill.dumps([{**ROWS[0], "key": lambda each: each}], recurse=True))
    said = r"'dill\._dill' '_create_function' in the field 'key', .* It was written by dill"
    with BatchStream(path) as batch, pytest.raises(ConversionError, match=said):
        list(batch)


# --- generations of uncertainty studies ----------------------------------------------------------


def generations(layers: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def states() -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(layers + 1, 1, 8)).astype(np.float16))

    return {
        f"qid-{index}": {
            "question": f"Q {index}?",
            "context": None,
            "most_likely_answer": {
                "response": f"answer {index}",
                "token_log_likelihoods": [-0.1, -0.2],
                "accuracy": 1.0,
                "emb_last_tok_before_gen": states(),
                "emb_tok_before_eos": states(),
            },
            "responses": [("b", [-0.3], torch.zeros(1, 8), 0.0)] * 2,
        }
        for index in range(3)
    }


@WAYS
def test_generations_of_uncertainty_studies(tmp_path: Path, whole_nbytes: int) -> None:
    path = tmp_path / "validation_generations.pkl"
    source = generations()
    path.write_bytes(pickle.dumps(source))
    with BatchStream(path, whole_nbytes=whole_nbytes) as batch:
        found = [materialised(each) for each in batch]
        assert "generations of an uncertainty study" in " ".join(batch.understood)
    for (key, entry), sample in zip(source.items(), found, strict=True):
        answer = entry["most_likely_answer"]
        assert sample["question_id"] == key
        assert sample["generated_answer"] == answer["response"]
        states = torch.stack(sample["hidden_states"])
        assert torch.equal(states, answer["emb_tok_before_eos"])
        # Nothing is lost: the sample is the entry, but for what has its own place.
        rest = {
            **answer,
            "response": sample["generated_answer"],
            "emb_tok_before_eos": states,
        }
        assert set(rest) - set(sample["most_likely_answer"]) == {
            "response", "emb_tok_before_eos", "emb_last_tok_before_gen"
        }  # fmt: skip
        assert_equal(entry["responses"], sample["responses"])
        before = answer["emb_last_tok_before_gen"]
        assert torch.equal(sample["emb_last_tok_before_gen"], before)


def test_archives_of_generations(tmp_path: Path) -> None:
    path = tmp_path / "validation_generations.pkl"
    source = generations()
    path.write_bytes(pickle.dumps(source))
    assert h5traces.convert(path, tmp_path / "a.h5").ok
    assert h5traces.verify(tmp_path / "a.h5", against=path).ok
    with h5traces.open(tmp_path / "a.h5") as archive:
        assert archive[1].metadata.coverage == "last_position"
        assert archive[1].metadata.sample_id == "qid-1"
    found = h5traces.load(tmp_path / "a.h5")
    assert [list(row) for row in found] == [list(row) for row in h5traces.load(path)]
    assert_equal(h5traces.load(path), found)
    with h5py.File(tmp_path / "a.h5") as file:
        stored = file["samples/00000001/hidden_states"]
        expected = source["qid-1"]["most_likely_answer"]["emb_tok_before_eos"]
        np.testing.assert_array_equal(stored["embedding"][()], expected[0])
        np.testing.assert_array_equal(stored["layer_003"][()], expected[4])
