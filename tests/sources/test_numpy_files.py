"""Files of numpy.savez and numpy.save."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import h5traces
from h5traces.errors import ConversionError
from h5traces.sources import numpy_file

if TYPE_CHECKING:
    from pathlib import Path

AUTO = h5traces.PrecisionOptions(dtype="auto")
LAYERS, TOKENS, HIDDEN, HEADS = 4, 7, 8, 2


def arrays(dtype: Any = np.float16) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    weights = np.tril(rng.random((LAYERS, HEADS, TOKENS, TOKENS)) + 0.1)
    return {
        "hidden_states": rng.normal(size=(LAYERS, TOKENS, HIDDEN)).astype(dtype),
        "attentions": (weights / weights.sum(-1, keepdims=True)).astype(dtype),
        "tokens": np.arange(TOKENS),
        "tokens_decoded": np.array([f"t{i}" for i in range(TOKENS)]),
        "label": np.int64(1),
        "gold": np.array(["a", "bb"]),
        "score": np.float64(0.5),
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float16, ">f4", np.float64])
def test_a_sample_per_file(tmp_path: Path, save: Any, dtype: Any) -> None:
    path = tmp_path / "q7.npz"
    save(path, **arrays(dtype))
    (item,) = h5traces.load(path)
    with np.load(path) as expected:
        for name in expected.files:
            if name not in ("tokens_decoded", "label"):
                np.testing.assert_array_equal(item[name], expected[name])
        assert item["tokens_decoded"] == expected["tokens_decoded"].tolist()
    assert (item["question_id"], item["label"]) == ("q7", 1)
    target = tmp_path / "q7.h5"
    assert h5traces.convert(path, target, precision=AUTO).ok
    assert all(each.ok for each in h5traces.verify(target, against=path))
    (trace,) = h5traces.open(target)
    assert trace.metadata.label == 1
    back = trace.to_dict()
    for name, value in item.items():
        np.testing.assert_array_equal(back[name], value)


def test_a_run_is_not_read_twice_to_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for number in range(8):
        np.savez_compressed(folder / f"q{number}.npz", **arrays() | {"label": number})
    loaded: list[str] = []
    load = numpy_file.entry_content

    def counted(file: Any, entry: Any, name: str) -> Any:
        if entry.name == "hidden_states.npy":
            loaded.append(name)
        return load(file, entry, name)

    monkeypatch.setattr(numpy_file, "entry_content", counted)
    assert h5traces.convert(folder, tmp_path / "run.h5", merge=True).ok
    assert len(h5traces.open(tmp_path / "run.h5")) == 8
    assert len(loaded) == 10  # the first is tried, and tells what its run establishes


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_file_of_a_run_without_traces_is_no_success(tmp_path: Path, odd: int) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for number in range(3):
        values = {"scores": np.arange(3)} if number == odd else arrays() | {"label": number}
        np.savez(folder / f"q{number}.npz", **values)
    report = h5traces.convert(folder, tmp_path / "run.h5", merge=True)
    assert not report.ok
    (problem,) = report.problems
    assert f"q{odd}.npz" in problem
    assert len(h5traces.open(tmp_path / "run.h5")) == 2


def test_fortran_order(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    found = arrays()
    found["hidden_states"] = np.asfortranarray(found["hidden_states"])
    np.savez(path, **found)
    (item,) = h5traces.load(path)
    np.testing.assert_array_equal(item["hidden_states"], found["hidden_states"])


def test_one_array_per_layer(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    stacked = arrays()["hidden_states"]
    np.savez(path, **{f"layers.{i}": each for i, each in enumerate(stacked)})
    assert h5traces.convert(path, tmp_path / "a.h5").ok
    (trace,) = h5traces.open(tmp_path / "a.h5")
    assert list(trace["hidden_states"].layers) == [0, 1, 2, 3]


def test_positional_arrays_are_ambiguous(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, np.zeros((3, 4)), np.zeros(3))
    with pytest.raises(ConversionError, match=r"holds arr_0 \(3, 4\), arr_1 \(3,\).*mapping"):
        h5traces.load(path)


def test_objects_are_rejected_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays(), answers=np.array(["a", None], object))
    with pytest.raises(ConversionError, match="array 'answers' holds objects, which only running"):
        h5traces.load(path)
    plain = tmp_path / "a.npy"
    np.save(plain, np.array([{}], object))
    with pytest.raises(ConversionError, match="holds objects"):
        h5traces.load(plain)


def test_raw_bytes_and_structures(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(3, "V2"))
    with pytest.raises(ConversionError, match="such as bfloat16; save it as float32"):
        h5traces.load(path)
    np.save(path, np.zeros(3, [("a", "f4"), ("b", "i4")]))
    with pytest.raises(ConversionError, match="holds structures"):
        h5traces.load(path)


def test_a_plain_array_is_read_where_its_axes_are_plain(tmp_path: Path) -> None:
    path = tmp_path / "states.npy"
    values = arrays()["hidden_states"]
    np.save(path, values)
    report = h5traces.convert(path, tmp_path / "a.h5")
    assert not report.ok
    assert "name its axes in a mapping" in report.files[0].error
    np.save(path, values[:, :1][:, None])
    # A batch of one with one position: its order is the only one that fits.
    np.testing.assert_array_equal(h5traces.load(path)[0]["hidden_states"], values[:, :1][:, None])


def test_raw_numbers_need_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "states.bin"
    arrays()["hidden_states"].tofile(path)
    with pytest.raises(
        ConversionError, match="is of an unknown kind; for raw numbers, say their type"
    ):
        h5traces.load(path)


# --- files that contradict themselves -------------------------------------------------------------


def npy(header: str | bytes, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode("latin-1") if isinstance(header, str) else header
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + data


def literal(descr: str = "'<f4'", shape: str = "(2,)", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}"


BAD = {
    "cut": (npy(literal(), bytes(4)), "needs 8 bytes, found 4"),
    "more": (npy(literal(), bytes(12)), "or holds several arrays"),
    "huge": (npy(literal(shape="(1 << 60,)"), bytes(4)), "not a literal"),
    "huge shape": (npy(literal(shape=f"({1 << 59},)"), bytes(4)), "needs"),
    "negative": (npy(literal(shape="(-2,)"), bytes(8)), "expected sizes"),
    "many axes": (npy(literal(shape=str((1,) * 40)), bytes(4)), "expected sizes"),
    "code": (npy("__import__('os').system('true')"), "not a literal of Python"),
    "deep": (npy("[" * 9000), "not a literal of Python"),
    "long": (npy(b" " * 20_000, version=2), "at most 10,000"),
    "version": (npy(literal(), bytes(8), version=9), "version 9"),
    "dtype": (npy(literal("'<f3'"), bytes(8)), "does not know"),
    "nothing": (npy(literal("'<U0'"), bytes(8)), "0 bytes"),
    "characters": (npy(literal("'<U1'", "(1,)"), b"\xff" * 4), "not a Unicode character"),
    "keys": (npy("{'shape': ()}"), "without descr"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("inside", ["npy", "npz"])
def test_arrays_that_do_not_fit(tmp_path: Path, name: str, inside: str) -> None:
    data, message = BAD[name]
    path = tmp_path / f"a.{inside}"
    if inside == "npz":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("hidden_states.npy", data)
    else:
        path.write_bytes(data)
    with pytest.raises(ConversionError, match=message) as caught:
        h5traces.load(path)
    assert str(caught.value).startswith(str(path))


def test_a_wrong_checksum_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays())
    data = bytearray(path.read_bytes())
    place = data.index(arrays()["hidden_states"].tobytes()[:16])
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConversionError, match="does not fit its checksum; copy the file again"):
        h5traces.load(path)


def test_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, hidden_states=np.zeros((4, 10_000, 1000)))
    with pytest.raises(ConversionError, match="expands from"):
        h5traces.load(path)


def test_paths_in_a_zip_file_are_only_names(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "a.npz"
    buffer = io.BytesIO()
    np.save(buffer, arrays()["hidden_states"])
    with zipfile.ZipFile(path, "w") as file:
        for name in ("../../evil.npy", "/tmp/evil.npy", "hidden_states.npy", "C:\\evil.npy"):
            file.writestr(name, buffer.getvalue())
    found = {each for each in tmp_path.rglob("*")}
    (item,) = h5traces.load(path)
    assert "../../evil" in item
    assert {each for each in tmp_path.rglob("*")} == found


def test_a_pickle_in_a_zip_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("hidden_states.npy", pickle.dumps(print))
    with pytest.raises(ConversionError, match="is none of "):
        h5traces.load(path)
