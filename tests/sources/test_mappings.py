"""Mappings: other people's HDF5, numpy, raw numbers, tables, pickles and torch files."""

from __future__ import annotations

import json
import pickle
import sys
from typing import TYPE_CHECKING, Any

import datasets
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file

import h5traces
from h5traces.errors import ConversionError
from h5traces.sources.drafting import drafted
from h5traces.storage.hdf5.others import OtherHdf5

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

LAYERS, TOKENS, HIDDEN, HEADS = 4, 7, 8, 2
AUTO = h5traces.PrecisionOptions(dtype="auto")


def states(seed: int = 0) -> NDArray[Any]:
    """``(layers, tokens, hidden)``."""
    return np.random.default_rng(seed).normal(size=(LAYERS, TOKENS, HIDDEN)).astype(np.float16)


def mapping(path: Path, text: str) -> h5traces.ReadingOptions:
    path.write_text(text)
    return h5traces.ReadingOptions(mapping=path)


def converted(source: Path, reading: h5traces.ReadingOptions) -> list[dict[str, Any]]:
    """The samples of a source, which its archive must give back."""
    items = h5traces.load(source, reading=reading)
    target = source.with_name(f"{source.name}.archive.h5")
    report = h5traces.convert(source, target, reading=reading, precision=AUTO)
    assert report.ok, report.problems
    assert all(each.ok for each in h5traces.verify(target, against=source, reading=reading))
    back = [trace.to_dict() for trace in h5traces.open(target)]
    assert len(back) == len(items)
    for found, expected in zip(back, items, strict=True):
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert_same(found[name], value)
    (inspection,) = h5traces.inspect(source, reading=reading)
    assert inspection.num_samples == len(items)
    return items


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        np.testing.assert_array_equal(found, expected)


# --- HDF5 -----------------------------------------------------------------------------------------


def test_hdf5_one_dataset_per_layer(tmp_path: Path) -> None:
    path = tmp_path / "q7.h5"
    with h5py.File(path, "w") as file:
        file.attrs["model_id"] = "some/model"
        for layer, values in enumerate(states()):
            file.create_dataset(f"layer_{layer}/inputs", data=values, compression="gzip")
    text = """
        first_state = "block"
        [fields]
        model = "@model_id"
        [fields.hidden_states]
        name = "layer_{layer}/inputs"
        axes = "token hidden"
    """
    (item,) = converted(path, mapping(tmp_path / "m.toml", text))
    assert (item["question_id"], item["model"]) == ("q7", "some/model")
    for layer, values in enumerate(states()):
        np.testing.assert_array_equal(item["hidden_states"][layer], values)
    (trace,) = h5traces.open(tmp_path / "q7.h5.archive.h5")
    assert trace["hidden_states"].layers == (0, 1, 2, 3)


@pytest.mark.parametrize("chunks", [None, (1, HIDDEN), (2, 4)])
def test_hdf5_samples_along_an_axis(tmp_path: Path, chunks: Any) -> None:
    path = tmp_path / "run.hdf5"
    rows = np.stack([states(seed)[:, -1] for seed in range(5)], axis=1)
    with h5py.File(path, "w") as file:
        for layer in range(LAYERS):
            file.create_dataset(f"activations/layer_{layer}", data=rows[layer], chunks=chunks)
        file["labels"] = np.array([0, 1, 0, 1, 1])
        file["texts"] = ["a", "b", "c", "d", "é"]
    text = """
        first_state = "embedding"
        fields.label = { name = "labels", axes = "sample" }
        fields.generated_answer = { name = "texts", axes = "sample" }
        fields.hidden_states = { name = "activations/layer_{layer}", axes = "sample hidden" }
    """
    items = converted(path, mapping(tmp_path / "m.toml", text))
    assert [each["label"] for each in items] == [0, 1, 0, 1, 1]
    assert [each["question_id"] for each in items] == [f"run_{i}" for i in range(5)]
    assert items[4]["generated_answer"] == "é"
    for seed, item in enumerate(items):
        for layer in range(LAYERS):
            np.testing.assert_array_equal(item["hidden_states"][layer], states(seed)[layer, -1:])
    (trace, *_) = h5traces.open(tmp_path / "run.hdf5.archive.h5")
    assert trace["hidden_states"].layers == (None, 0, 1, 2)


def test_hdf5_one_group_per_id(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    with h5py.File(path, "w") as file:
        for number in (0, 2, 10):
            file[f"{number}/hidden_states"] = states(number)
            file[f"{number}/prompt"] = f"question {number}"
        file["version"] = 3
    text = """
        ignore = ["version"]
        fields.question = "{id}/prompt"
        fields.hidden_states = { name = "{id}/hidden_states", axes = "layer token hidden" }
    """
    items = converted(path, mapping(tmp_path / "m.toml", text))
    assert [each["question_id"] for each in items] == ["0", "2", "10"]
    assert items[2]["question"] == "question 10"
    np.testing.assert_array_equal(items[2]["hidden_states"], states(10))


@pytest.mark.parametrize("limit", [1, 5_000, 1 << 20])
def test_blocks_of_compressed_hdf5_are_held_within_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr("h5traces.storage.hdf5.others._MAX_BLOCKS_NBYTES", limit)
    path = tmp_path / "run.h5"
    values = np.random.default_rng(0).normal(size=(6, 10, 4, 8)).astype(np.float32)
    with h5py.File(path, "w") as file:
        for index, each in enumerate(values):
            file.create_dataset(f"{index}", data=each, chunks=(3, 2, 8), compression="gzip")
    held = []
    other = OtherHdf5(path)
    for row in range(10):
        for index in range(6):
            np.testing.assert_array_equal(
                other.datasets[f"{index}"].read(0, row), values[index, row]
            )
            held.append(sum(each._block[2] is not None for each in other.datasets.values()))
    other.close()
    assert max(held) == min(max(limit // values[0].nbytes, 1), 6)


def test_a_draft_takes_rows_with_a_label_each_for_samples(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    with h5py.File(path, "w") as file:
        for layer in range(3):
            file[f"activations/layer_{layer}"] = np.ones((5, 8), np.float32)
        file["labels"] = np.arange(5)
    draft = drafted(path)
    assert draft is not None
    assert 'label = { name = "labels", axes = "batch" }' in draft.text
    assert 'axes = "batch hidden"  # as labels has a value per row' in draft.text
    items = converted(path, mapping(tmp_path / "m.toml", draft.text))
    assert [each["label"] for each in items] == list(range(5))


def test_what_no_field_names_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    with h5py.File(path, "w") as file:
        file["a/states"], file["b/states"], file["scores"] = states(), states(1), np.zeros(2)
    reading = mapping(
        tmp_path / "m.toml",
        'fields.hidden_states = { name = "{id}/states", axes = "layer token hidden" }',
    )
    report = h5traces.convert(path, tmp_path / "o.h5", reading=reading)
    assert not report.ok
    assert "'scores': in no field of the mapping" in " ".join(report.problems)


# --- numpy and raw numbers ------------------------------------------------------------------------


def test_npy(tmp_path: Path) -> None:
    path = tmp_path / "run_q3.npy"
    np.save(path, states().transpose(1, 0, 2))
    text = """
        file = "run_{id}.npy"
        fields.hidden_states = { name = "array", axes = "token layer hidden" }
    """
    (item,) = converted(path, mapping(tmp_path / "m.toml", text))
    assert item["question_id"] == "q3"
    np.testing.assert_array_equal(item["hidden_states"], states())


@pytest.mark.parametrize(
    ("dtype", "array"),
    [
        ("<f2", 'dtype = "float16"\nshape = [4, 7, 8]'),
        ("<f2", 'dtype = "float16"\nshape = [4, -1, 8]'),
        (">f4", 'dtype = "float32"\nshape = [4, 7, 8]\nbyte_order = "big"'),
        ("<f8", 'dtype = "float64"\nshape = [4, 7, 8]\norder = "F"'),
    ],
)
def test_raw_numbers(tmp_path: Path, dtype: str, array: str) -> None:
    path = tmp_path / "states.bin"
    order: Any = "F" if "order = " in array and '"F"' in array else "C"
    path.write_bytes(b"head" + states().astype(dtype).tobytes(order))
    text = f"""
        [array]
        offset = 4
        {array}
        [fields.hidden_states]
        name = "array"
        axes = "layer token hidden"
        layers = [0, 5, 10, 31]
    """
    (item,) = converted(path, mapping(tmp_path / "m.toml", text))
    assert list(item["hidden_states"]) == [0, 5, 10, 31]
    np.testing.assert_array_equal(item["hidden_states"][31], states()[3])


def test_bfloat16_in_integers(tmp_path: Path) -> None:
    values = torch.arange(LAYERS * TOKENS * HIDDEN).reshape(LAYERS, TOKENS, HIDDEN).bfloat16()
    path = tmp_path / "a.npz"
    np.savez(path, hs=values.view(torch.uint16).numpy())
    text = """
        [fields.hidden_states]
        name = "hs"
        axes = "layer token hidden"
        dtype = "bfloat16"
    """
    (item,) = h5traces.load(path, reading=mapping(tmp_path / "m.toml", text))
    assert torch.equal(torch.stack(item["hidden_states"]), values)


def test_npz_with_batches_and_an_embedding(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    batch = np.stack([states(seed) for seed in range(3)])
    arrays = {f"blocks.{layer}.out": batch[:, layer] for layer in range(1, LAYERS)}
    np.savez_compressed(path, **arrays, embed=batch[:, 0], ids=np.arange(21).reshape(3, 7))
    text = """
        fields.tokens = { name = "ids", axes = "batch token" }
        [fields.hidden_states]
        name = "blocks.{layer}.out"
        axes = "batch token hidden"
        embedding = "embed"
        layers = [0, 1, 2]
    """
    items = converted(path, mapping(tmp_path / "m.toml", text))
    assert list(items[1]["hidden_states"]) == ["embedding", 0, 1, 2]
    np.testing.assert_array_equal(list(items[1]["hidden_states"].values()), batch[1])
    np.testing.assert_array_equal(items[2]["tokens"], np.arange(14, 21))
    (trace, *_) = h5traces.open(tmp_path / "a.npz.archive.h5")
    assert trace["hidden_states"].layers == (None, 0, 1, 2)


# --- tables ---------------------------------------------------------------------------------------

ROWS = [
    {"qid": f"q{seed}", "answer": "yes", "score": seed / 2, "hs": states(seed).tolist()}
    for seed in range(3)
]
TABLE = """
    fields.question_id = "qid"
    fields.generated_answer = "answer"
    fields.hidden_states = { name = "hs", axes = "layer token hidden" }
"""


def _fixed(path: Path) -> None:
    features = datasets.Features(
        {
            "qid": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "score": datasets.Value("float64"),
            "hs": datasets.Array3D((LAYERS, TOKENS, HIDDEN), "float16"),
        }
    )
    datasets.Dataset.from_list(ROWS, features=features).save_to_disk(str(path))


TABLES: dict[str, Callable[[Path], object]] = {
    "jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "parquet": lambda path: pd.DataFrame(ROWS).to_parquet(path),
    "arrow": lambda path: pd.DataFrame(ROWS).to_feather(path),
    "datasets-folder": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(str(path)),
    "datasets-fixed": _fixed,
    "datasets-splits": lambda path: datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS)}
    ).save_to_disk(str(path)),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run"
    TABLES[kind](path)
    items = converted(path, mapping(tmp_path / "m.toml", TABLE))
    assert [each["question_id"] for each in items] == ["q0", "q1", "q2"]
    assert (items[1]["generated_answer"], items[1]["score"]) == ("yes", 0.5)
    for seed, item in enumerate(items):
        np.testing.assert_array_equal(item["hidden_states"], states(seed))


@pytest.mark.parametrize("kind", TABLES)
def test_tables_with_known_names_need_no_mapping(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind in ("json", "datasets-fixed"):
        pytest.skip("names of these are others, or it is only read with a mapping")
    rows = [
        {
            "id": f"q{seed}",
            "hidden_states": states(seed).tolist(),
            "input_ids": list(range(TOKENS)),
            "label": seed % 2,
        }
        for seed in range(3)
    ]
    monkeypatch.setitem(globals(), "ROWS", rows)
    path = tmp_path / "run"
    TABLES[kind](path)
    items = h5traces.load(path)
    assert [(each["question_id"], each["label"]) for each in items] == [
        ("q0", 0),
        ("q1", 1),
        ("q2", 0),
    ]
    np.testing.assert_array_equal(items[2]["hidden_states"], states(2))
    np.testing.assert_array_equal(items[2]["tokens"], range(TOKENS))
    report = h5traces.convert(path, tmp_path / "out.h5", precision=AUTO)
    assert report.ok, report.problems
    assert len(h5traces.open(tmp_path / "out.h5")) == 3


def test_many_row_groups_stream(tmp_path: Path) -> None:
    frame = pd.DataFrame({"qid": range(2000), "hs": [[[float(i)] * 4] * 3 for i in range(2000)]})
    path = tmp_path / "run.parquet"
    frame.to_parquet(path, row_group_size=300)
    text = """
        fields.question_id = "qid"
        fields.hidden_states = { name = "hs", axes = "layer hidden" }
    """
    items = h5traces.load(path, reading=mapping(tmp_path / "m.toml", text))
    assert [each["question_id"] for each in items] == list(range(2000))
    assert all(item["hidden_states"][2][0, 3] == i for i, item in enumerate(items))


# --- pickles, torch, safetensors ------------------------------------------------------------------


def test_nested_dicts_of_pickles_and_torch(tmp_path: Path) -> None:
    value = {
        "meta": {"question": "who?"},
        "acts": {f"L{layer}": each[None] for layer, each in enumerate(states())},
        "ids": list(range(TOKENS)),
    }
    text = """
        fields.question = "meta/question"
        fields.tokens = "ids"
        fields.hidden_states = { name = "acts/L{layer}", axes = "batch token hidden" }
    """
    reading = mapping(tmp_path / "m.toml", text)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value))
    (tmp_path / "b.pkl").write_bytes(pickle.dumps([value, value]))
    for name, count in (("a.pkl", 1), ("b.pkl", 2)):
        items = converted(tmp_path / name, reading)
        assert len(items) == count
        assert items[-1]["question"] == "who?"
        np.testing.assert_array_equal(list(items[-1]["hidden_states"].values()), states())
    value["acts"] = {name: torch.tensor(each) for name, each in value["acts"].items()}
    torch.save(value, tmp_path / "a.pt")
    (item,) = h5traces.load(tmp_path / "a.pt", reading=reading)
    assert torch.equal(item["hidden_states"][3], torch.tensor(states()[3]))
    assert item["tokens"].tolist() == list(range(TOKENS))


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weights = np.full((HEADS, LAYERS, TOKENS, TOKENS), 1 / TOKENS, np.float32)
    save_file({"x": states(), "w": weights}, path)
    text = """
        fields.hidden_states = { name = "x", axes = "layer token hidden" }
        fields.attentions = { name = "w", axes = "head layer query key" }
    """
    (item,) = h5traces.load(path, reading=mapping(tmp_path / "m.toml", text))
    assert [tuple(each.shape) for each in item["attentions"]] == [(HEADS, TOKENS, TOKENS)] * 4


def test_a_folder_with_a_mapping(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for seed in range(3):
        np.save(folder / f"q{seed}.npy", states(seed))
    (folder / "README.md").write_text("# Run\n")
    reading = mapping(
        tmp_path / "m.toml",
        'fields.hidden_states = { name = "array", axes = "layer token hidden" }',
    )
    report = h5traces.convert(folder, tmp_path / "o.h5", merge=True, reading=reading)
    assert report.ok, report.problems
    found = h5traces.open(tmp_path / "o.h5")
    assert [each.metadata.sample_id for each in found] == ["q0", "q1", "q2"]


# --- what does not fit ----------------------------------------------------------------------------

HS = "[fields.hidden_states]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fields = 3", "fields"),
        ("x = [", "is not TOML"),
        ("x = " + "[" * 100_000, "is not TOML"),
        ("[" + ".".join("x" * 50_000) + "]", "is not TOML"),
        ("fields.tokens = 'a'", "neither hidden_states nor attentions"),
        (HS + "name = 'x'\naxes = 'layer layer'", "different names"),
        (HS + "name = '{layer}'\naxes = 'layer token hidden'", "expected one of them"),
        (HS + "name = '{layer}{id}'", "side by side"),
        (HS + "name = '{layer}_{layer}'", "a place twice"),
        (HS + "name = '{head}'", "expected {layer} or {id}"),
        (HS + "name = 'x'\nfield = 'y'", "fields.hidden_states.field: Extra inputs"),
        (HS + "name = 'x'\ndtype = 'float12'", "fields.hidden_states.dtype"),
        ("version = 2\n" + HS + "name = 'x'", "version: Input should be 1"),
        (HS + "name = 'y'\naxes = 'layer token hidden'", "nothing is named 'y'; found x (4, 7, 8)"),
        (HS + "name = 'x'\naxes = 'layer hidden'", "has 3 axes, expected 2: (layer, hidden)"),
        (HS + "name = 'x'\naxes = 'layer query hidden'", "expected 'layer' and some of token"),
        (
            HS + "name = 'x'\naxes = 'layer token hidden'\nlayers = [1, 2]",
            "layers has 2 numbers for 4 layers",
        ),
        ("file = 'r_{id}.npz'\n" + HS + "name = 'x'", "does not fit file = 'r_{id}.npz'"),
        ("kind = 'hdf5'\n" + HS + "name = 'x'", "is a file of numpy.savez, and the mapping is"),
        (
            "[array]\ndtype = 'float32'\nshape = [7]\n" + HS + "name = 'array'",
            "bytes after an offset of 0, expected 28 for shape (7,) of float32",
        ),
    ],
)
def test_a_mapping_that_does_not_fit(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=states())
    with pytest.raises(ConversionError) as caught:
        h5traces.load(path, reading=mapping(tmp_path / "m.toml", text))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


# --- drafts ---------------------------------------------------------------------------------------


def test_inspect_drafts_a_mapping_that_reads_the_file(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from h5traces.cli import main

    path = tmp_path / "run.h5"
    with h5py.File(path, "w") as file:
        for number in range(2):
            file[f"q{number}/hidden_states"] = states(number)
    monkeypatch.setattr(sys, "argv", ["h5traces", "inspect", str(path)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert "HDF5, but no archive of h5traces" in printed.err
    assert "q0/hidden_states  (4, 7, 8) float16; 2 names as {id}/hidden_states" in printed.out
    draft = printed.out[printed.out.index("# first_state") :]
    items = h5traces.load(path, reading=mapping(tmp_path / "m.toml", draft))
    np.testing.assert_array_equal(items[1]["hidden_states"], states(1))


def test_drafts_of_other_kinds(tmp_path: Path) -> None:
    from h5traces.sources.drafting import drafted

    (tmp_path / "a.bin").write_bytes(bytes(range(64)) + states().tobytes())
    found = drafted(tmp_path / "a.bin")
    assert found is not None
    assert "[array]" in found.text
    torch.save({"acts": torch.zeros(4, 1, 7, 8), "input_ids": torch.zeros(1, 7)}, tmp_path / "a.pt")
    found = drafted(tmp_path / "a.pt")
    assert found is not None
    assert 'name = "acts"\naxes = "batch layer token hidden"' in found.text
    (tmp_path / "a.html").write_text("<!doctype html>")
    assert drafted(tmp_path / "a.html") is None


def test_a_draft_names_the_mask_of_a_batch(tmp_path: Path) -> None:
    from h5traces.sources.drafting import drafted

    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    path = tmp_path / "a.pt"
    arrays = [torch.randn(2, 7, 8) for _ in range(4)]
    torch.save(
        {"acts": arrays, "input_ids": torch.arange(14).view(2, 7), "attention_mask": mask}, path
    )
    found = drafted(path)
    assert found is not None
    h5traces.convert(
        path, tmp_path / "a.h5", reading=mapping(tmp_path / "m.toml", found.text)
    ).raise_for_errors()
    archive = h5traces.open(tmp_path / "a.h5")
    assert [list(each["tokens"]) for each in archive] == [[2, 3, 4, 5, 6], list(range(7, 14))]
    assert [each["hidden_states"][3].shape for each in archive] == [(5, 8), (7, 8)]
