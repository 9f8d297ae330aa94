"""Values without names, frames of pandas, and objects of which only the arrays are wanted."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
import zstandard

import h5traces
from h5traces.cli.reports import print_conversion
from h5traces.errors import ConversionError, UnsafePickleError
from h5traces.sources.compressed import _check_frames

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, TOKENS, HIDDEN = 4, 6, 16


def states(tokens: int = TOKENS, seed: int = 0) -> Any:
    """``(layers, tokens, hidden)``."""
    return torch.tensor(np.random.default_rng(seed).normal(size=(LAYERS, tokens, HIDDEN)))


# --- arrays without names ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "count"),
    [
        pytest.param(states(), 1, id="all layers"),
        pytest.param(list(states()), 1, id="list of layers"),
        pytest.param(tuple(each[None] for each in states()), 1, id="tuple of batches of one"),
        pytest.param([states(5), states(6)], 2, id="samples of unequal lengths"),
        pytest.param([list(states(5)), list(states(5))], 2, id="lists of layers"),
    ],
)
@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_arrays_without_names(tmp_path: Path, value: Any, count: int, save: str) -> None:
    path = tmp_path / "run.pt"
    torch.save(value, path) if save == "torch" else path.write_bytes(pickle.dumps(value))
    found = h5traces.load(path, container="numpy")
    assert len(found) == count
    assert [each["question_id"] for each in found] == (
        ["run"] if count == 1 else ["run_0", "run_1"]
    )
    last = value[-1] if count > 1 else value
    got, wanted = (
        np.stack([np.asarray(layer) for layer in each])
        for each in (found[-1]["hidden_states"], last)
    )
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([states(), states()], "may hold layers or samples; name its axes in a mapping"),
        ([states()[0], states(5)[0]], "may hold layers or samples"),
        (states()[0], "name its axes in a mapping"),
        ([1, 2, 3], "item 0 of the batch is an int"),
    ],
)
def test_what_may_be_either_asks_for_a_mapping(tmp_path: Path, value: Any, message: str) -> None:
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match=message):
        h5traces.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("value", "name", "axes"),
    [
        (torch.stack([states(), states(seed=1)]), "array", "sample layer token hidden"),
        ([states(), states(seed=1)], "{id}", "layer token hidden"),
        (list(torch.stack([states(), states(seed=1)], 1)), "{layer}", "sample token hidden"),
    ],
)
def test_a_mapping_says_which(tmp_path: Path, value: Any, name: str, axes: str) -> None:
    torch.save(value, tmp_path / "a.pt")
    mapping = tmp_path / "m.toml"
    mapping.write_text(f'[fields.hidden_states]\nname = "{name}"\naxes = "{axes}"\n')
    found = h5traces.load(
        tmp_path / "a.pt", container="numpy", reading=h5traces.ReadingOptions(mapping=mapping)
    )
    assert len(found) == 2
    got = found[1]["hidden_states"]
    got = list(got.values()) if isinstance(got, dict) else got
    np.testing.assert_array_equal(np.stack(list(got)), states(seed=1))


def test_dtypes_become_text(tmp_path: Path) -> None:
    item = {"hidden_states": list(states()), "dtype": torch.bfloat16, "more": {"of": torch.int8}}
    torch.save([item], tmp_path / "a.pt")
    (found,) = h5traces.load(tmp_path / "a.pt")
    assert (found["dtype"], found["more"]) == ("torch.bfloat16", {"of": "torch.int8"})


# --- frames --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4)])
def test_lists_in_cells_of_a_frame_are_arrays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Also as `read_parquet` of pandas gives them: arrays of arrays of objects."""
    values = [np.random.default_rng(each).normal(size=shape).astype(np.float32) for each in (0, 1)]
    frame = pd.DataFrame(
        {
            "hidden_states": [each.tolist() for each in values],
            "tokens_decoded": [["a", "b"], ["c"]],
            "ragged": [[[1], [2, 3]], [[4], []]],
        }
    )
    frame.to_pickle(tmp_path / "lists.pkl")
    frame.to_parquet(tmp_path / "lists.parquet")
    pd.read_parquet(tmp_path / "lists.parquet").to_pickle(tmp_path / "arrays.pkl")
    for name in ("lists.pkl", "arrays.pkl"):
        for row, wanted in zip(
            h5traces.load(tmp_path / name, container="numpy"), values, strict=True
        ):
            np.testing.assert_array_equal(row["hidden_states"], wanted)
    rows = h5traces.load(tmp_path / "lists.pkl", container="numpy")
    assert [row["tokens_decoded"] for row in rows] == [["a", "b"], ["c"]]
    assert [row["ragged"] for row in rows] == [[[1], [2, 3]], [[4], []]]


@pytest.mark.parametrize("kind", ["parquet", "pickle"])
def test_one_vector_per_row_may_be_a_token_or_a_layer(tmp_path: Path, kind: str) -> None:
    """The same rule for every table; tokens of another length decide, and a mapping."""
    values = [np.arange(32, dtype=np.float32).reshape(4, 8) + each for each in (0, 1)]
    frame = pd.DataFrame({"hidden_states": [each.tolist() for each in values]})
    path = tmp_path / "a"
    for num_tokens in (None, 4, 5):
        if num_tokens is not None:
            frame["tokens"] = [list(range(num_tokens))] * 2
        getattr(frame, f"to_{kind}")(path)
        with pytest.raises(ConversionError, match=r"fits \(layer, hidden\) and \(token, hidden\)"):
            h5traces.inspect(path)
    (tmp_path / "m.toml").write_text(
        'fields.hidden_states = { name = "hidden_states", axes = "token hidden" }'
    )
    reading = h5traces.ReadingOptions(mapping=tmp_path / "m.toml", first_state="block")
    assert h5traces.convert(path, tmp_path / "m.h5", reading=reading).ok
    for trace, wanted in zip(h5traces.open(tmp_path / "m.h5"), values, strict=True):
        np.testing.assert_array_equal(trace["hidden_states"][0], wanted)
    frame["tokens"] = [list(range(9))] * 2
    getattr(frame, f"to_{kind}")(path)
    assert h5traces.convert(path, tmp_path / "o.h5").ok
    for trace, wanted in zip(h5traces.open(tmp_path / "o.h5"), values, strict=True):
        np.testing.assert_array_equal(np.concatenate(list(trace["hidden_states"])), wanted)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("series", pickle.dumps(pd.Series([np.ones(2)])), r"series\.to_frame\('hidden_states'\)"),
        ("neurox", b'{"linex_index": 0, "features": []}\n', "JSON of NeuroX.*neurox-hdf5"),
        (
            "lists",
            pickle.dumps([{"hidden_states": [[[1.0, 2.0]], [[3.0, 4.0]]]}]),
            r"found list, expected a numpy array.*save lists of numbers as numpy\.asarray",
        ),
        ("names", pickle.dumps([{"acts": np.ones((2, 3, 4))}]), "found acts.*h5traces inspect"),
        ("dict", pickle.dumps({"acts": np.ones((2, 3, 4)), "x": 1}), "mapping.*h5traces inspect"),
    ],
)
def test_a_message_says_what_to_do(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        h5traces.inspect(tmp_path / name)


@pytest.mark.parametrize("kind", ["parquet", "feather", "jsonl"])
def test_nan_that_pandas_writes_as_null_is_nan(tmp_path: Path, kind: str) -> None:
    values = np.arange(24, dtype=np.float32).reshape(3, 2, 4) / 4
    values[1, 0, 2] = values[0, 0, 0] = np.nan
    frame = pd.DataFrame({"hidden_states": [values.tolist()], "holes": [[1, None]]})
    path = tmp_path / "a"
    if kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        getattr(frame, f"to_{kind}")(path)
    (found,) = h5traces.load(path, container="numpy")
    np.testing.assert_array_equal(found["hidden_states"], values)
    assert found["holes"] == [1, None]


def test_a_frame_is_its_rows(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "question_id": ["a", None, "ü"],
            "hidden_states": [states(n).numpy() for n in (3, 4, 5)],
            "label": [0, 1, 1],
            "score": [0.5, np.nan, 2.0],
            "object": pd.Series([{"k": 1}, "text", None], dtype=object),
            "ok": [True, False, True],
        }
    ).iloc[::-1]
    for name, protocol in (("a.pkl", 5), ("b.pkl", 2)):
        frame.to_pickle(tmp_path / name, protocol=protocol)
        found = h5traces.load(tmp_path / name, container="numpy")
        assert len(found) == 3
        for row, (_, wanted) in zip(found, frame.iterrows(), strict=True):
            assert list(row) == list(frame.columns)
            np.testing.assert_array_equal(row["hidden_states"], wanted["hidden_states"])
            for key in ("label", "object", "ok"):
                assert row[key] == wanted[key]
            # pandas keeps no None in a column of text.
            assert row["question_id"] == wanted["question_id"] or pd.isna(wanted["question_id"])
            np.testing.assert_equal(row["score"], wanted["score"])


@pytest.mark.parametrize(
    "column", [pd.Categorical(["a", "b"]), pd.to_datetime(["2020-01-01"] * 2, utc=True)]
)
def test_other_columns_are_named(tmp_path: Path, column: Any) -> None:
    pd.DataFrame({"hidden_states": [1, 2], "when": column}).to_pickle(tmp_path / "a.pkl")
    with pytest.raises(UnsafePickleError, match=r"asks for 'pandas|Parquet"):
        h5traces.load(tmp_path / "a.pkl")


# --- objects -------------------------------------------------------------------------------------


def test_nothing_inside_an_output_is_called(tmp_path: Path) -> None:
    """A pickle that begins as an output of transformers, and then asks for os.system."""
    mark = tmp_path / "called"
    code = (
        b"\x80\x04ctransformers.modeling_outputs\nBaseModelOutput\n)R}(X\x01\x00\x00\x00xcos\nsystem\n"
        + b"X"
        + len(f"touch {mark}").to_bytes(4, "little")
        + f"touch {mark}".encode()
        + b"\x85Rub."
    )
    (tmp_path / "a.pkl").write_bytes(code)
    with pytest.raises(ConversionError):
        h5traces.load(tmp_path / "a.pkl")
    assert not mark.exists()


def test_what_is_left_out_of_an_output_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = pytest.importorskip("transformers.modeling_outputs").BaseModelOutputWithPast
    layers = tuple(states())
    written = output(hidden_states=layers, past_key_values=None)
    written["past_key_values"] = pytest.importorskip("transformers").DynamicCache()
    torch.save(written, tmp_path / "a.pt")
    precision = h5traces.PrecisionOptions(dtype="auto")
    report = h5traces.convert(tmp_path / "a.pt", tmp_path / "a.h5", precision=precision)
    (file,) = report.files
    assert "left out of outputs of a model: past_key_values" in file.understood
    print_conversion(report)
    said = " ".join(capsys.readouterr().out.split())
    assert "every bit of their sources but for what was left out of outputs of a model" in said
    assert list(h5traces.open(tmp_path / "a.h5")[0]) == ["hidden_states"]


def test_weights_of_a_model_are_no_traces(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ConversionError, match=r"state_dict\(\) of a model"):
        h5traces.load(tmp_path / "a.pt")


# --- compressed ----------------------------------------------------------------------------------


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, hidden_states=states().numpy(), input_ids=np.arange(TOKENS))
    return buffer.getvalue()


def _torch(*, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    value = {"hidden_states": list(states()), "tokens": torch.arange(TOKENS)}
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _json(form: str) -> bytes:
    row = {"hidden_states": states().tolist(), "input_ids": list(range(TOKENS))}
    return (json.dumps([row]) if form == "array" else json.dumps(row) + "\n").encode()


CONTENTS = {
    "npz": _npz(),
    "torch": _torch(zipped=True),
    "torch-old": _torch(zipped=False),
    "jsonl": _json("lines"),
    "json": _json("array"),
}


@pytest.mark.parametrize(
    "compress", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress]
)
@pytest.mark.parametrize("kind", sorted(CONTENTS))
def test_compressed_files_are_read(tmp_path: Path, kind: str, compress: Any) -> None:
    path = tmp_path / "a"
    packed = compress(CONTENTS[kind])
    path.write_bytes(packed)
    (found,) = h5traces.load(path, container="numpy")
    np.testing.assert_array_equal(np.stack(list(found["hidden_states"])), states())
    for cut in (1, len(packed) // 2):
        path.write_bytes(packed[:-cut])
        # Of a single block that is cut, nothing is known.
        with pytest.raises(ConversionError, match=r"truncated|unknown content"):
            h5traces.load(path)


def test_large_compressed_files_are_read_from_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("h5traces.sources.unpacked._MEMORY_NBYTES", 100)
    (tmp_path / "a.pt.gz").write_bytes(gzip.compress(CONTENTS["torch"]))
    (found,) = h5traces.load(tmp_path / "a.pt.gz", container="numpy")
    np.testing.assert_array_equal(np.stack(found["hidden_states"]), states())


def test_a_compressed_bomb_is_rejected(tmp_path: Path) -> None:
    head = CONTENTS["torch"][:100]
    (tmp_path / "a.pt.gz").write_bytes(gzip.compress(head + bytes(300 << 20), 9))
    with pytest.raises(UnsafePickleError, match="gzip bomb"):
        h5traces.load(tmp_path / "a.pt.gz")


@pytest.mark.parametrize("size", [0, 1, 300_000])
@pytest.mark.parametrize("checksum", [False, True])
def test_frames_of_zstd_are_walked(tmp_path: Path, size: int, checksum: bool) -> None:
    machine = zstandard.ZstdCompressor(write_checksum=checksum)
    for content in (bytes(size), np.random.default_rng(0).bytes(size)):
        skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
        data = machine.compress(content) + skippable + machine.compress(content)
        path = tmp_path / "a.zst"
        path.write_bytes(data)
        with io.FileIO(path) as raw:
            _check_frames(raw)
        for cut in (1, 3, 4):
            path.write_bytes(data[:-cut])
            with io.FileIO(path) as raw, pytest.raises(EOFError):
                _check_frames(raw)


# --- folders -------------------------------------------------------------------------------------


def folder_of_layers(folder: Path) -> Path:
    run = folder / "run"
    run.mkdir()
    for layer in range(LAYERS):
        np.save(run / f"hidden_{layer:03d}.npy", np.stack([states()[layer], states(seed=1)[layer]]))
    np.savez(run / "facts.npz", labels=np.array([0, 1]))
    (run / "notes.txt").write_text("notes")
    return run


MAPPING = """\
folder = true
first_state = "block"
{more}
[fields]
label = {{ name = "facts/labels", axes = "sample" }}
[fields.hidden_states]
name = "hidden_{{layer}}"
axes = "sample token hidden"
"""


def test_a_file_per_layer(tmp_path: Path) -> None:
    run, mapping = folder_of_layers(tmp_path), tmp_path / "m.toml"
    mapping.write_text(MAPPING.format(more='ignore = ["*.txt"]'))
    reading = h5traces.ReadingOptions(mapping=mapping)
    report = h5traces.convert(run, tmp_path / "a.h5", reading=reading)
    assert report.ok, report.problems
    with h5traces.open(tmp_path / "a.h5", container="numpy") as archive:
        assert [each["label"] for each in archive] == [0, 1]
        assert archive[1]["hidden_states"].layers == tuple(range(LAYERS))
        np.testing.assert_array_equal(
            np.stack(list(archive[1]["hidden_states"])), states(seed=1).half()
        )
    mapping.write_text(MAPPING.format(more=""))
    report = h5traces.convert(run, tmp_path / "b.h5", reading=reading)
    assert "notes.txt: is text" in report.problems[0]


def test_one_layer_needs_no_axis(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", states()[0])
    (tmp_path / "m.toml").write_text(
        '[fields.hidden_states]\nname = "array"\naxes = "token hidden"\nlayers = [31]\n'
    )
    reading = h5traces.ReadingOptions(mapping=tmp_path / "m.toml", first_state="block")
    report = h5traces.convert(tmp_path / "a.npy", tmp_path / "a.h5", reading=reading)
    assert report.ok, report.problems
    assert h5traces.open(tmp_path / "a.h5")[0]["hidden_states"].layers == (31,)


def test_rows_with_labels_may_be_samples(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        np.savez(file, layer_0=states()[0], layer_1=states()[1], labels=np.zeros(TOKENS))
    with pytest.raises(ConversionError, match="rows may be samples and not tokens"):
        h5traces.load(tmp_path / "a.npz")
