"""A stranger with h5py or h5dump decodes what is stored, without h5traces."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
from attention import attention
from legacy_batches import make_archive

import h5traces

if TYPE_CHECKING:
    from pathlib import Path

TOKENS, HIDDEN, HEADS = 40, 12, 3


def batch() -> list[dict[str, Any]]:
    rng = np.random.default_rng(2)
    hidden = rng.standard_normal((3, 3, TOKENS, HIDDEN)).astype(np.float16)
    hidden[:, :, 0] *= 100
    hidden[1, 1, 4, 2:4] = np.nan, -np.inf
    return [
        {
            "hidden_states": list(each),
            "attentions": [attention(rng, HEADS, TOKENS) for _ in range(3)],
            "tokens": np.arange(TOKENS),
            "question_id": f"q{number}",
        }
        for number, each in enumerate(hidden)
    ]


@pytest.fixture(scope="module", params=["fine", "analysis", "compact"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("stock"), batch(), tier=request.param)


def test_three_lines_of_h5py(path: Path) -> None:
    """What the formula says, with what it names; numbers that are exceptions come on top."""
    archive = h5traces.open(path, lossy_dtype="float32")
    with h5py.File(path) as file:
        for sample, layer in ((0, 0), (1, 1), (2, 2)):
            kind = file[f"samples/{sample:08d}/hidden_states"]
            stored = kind[f"layer_{layer:03d}"]
            a, scale = stored.attrs, file[stored.attrs["scales"]]
            steps = (stored[:] - float(a["zero_point"])) / a["spacing"] * scale["step"][:]
            values = (scale["offset"][:] + steps).astype("f4")
            table = kind["exceptions"][:] if "exceptions" in kind else np.empty((0, 3))
            mine = table[table[:, 0] == layer]
            values.flat[mine[:, 1].astype(int)] = mine[:, 2]
            expected = archive[sample].layer(layer)
            assert values.dtype == expected.dtype == np.float32
            assert values.tobytes() == expected.tobytes()
            assert len(mine) == a.get("num_exceptions", 0)
            if (sample, layer) == (1, 1):
                assert np.isnan(values[4, 2])
                assert np.isneginf(values[4, 3])


def test_one_line_of_h5py_for_weights(path: Path) -> None:
    archive = h5traces.open(path)
    with h5py.File(path) as file:
        for kind in ("attentions", "attention_mean"):
            if kind not in file["samples/00000001"]:
                continue
            stored = file[f"samples/00000001/{kind}/layer_002"]
            values = (stored[:] / stored.attrs["levels"]) ** 2
            expected = archive[1].layer(2, kind)
            assert values.astype(np.float16).tobytes() == expected.tobytes()
            assert stored.attrs["formula"] == b"(stored / levels) ** 2"


def test_no_module_of_h5traces_is_needed(path: Path, tmp_path: Path) -> None:
    """In its own interpreter that must not import it."""
    script = """
import sys; sys.modules["h5traces"] = None
import h5py, numpy as np
file = h5py.File(sys.argv[1]); stored = file["samples/00000000/hidden_states/layer_001"]
a, scale = stored.attrs, file[stored.attrs["scales"]]
values = scale["offset"][:] + (stored[:] - float(a["zero_point"])) / a["spacing"] * scale["step"][:]
np.save(sys.argv[2], values.astype("f4"))
"""
    target = tmp_path / "values.npy"
    subprocess.run([sys.executable, "-c", script, str(path), str(target)], check=True)
    expected = h5traces.open(path, lossy_dtype="float32")[0].layer(1)
    found = np.load(target)
    with h5py.File(path) as file:
        group = file["samples/00000000/hidden_states"]
        table = group["exceptions"][:] if "exceptions" in group else np.empty((0, 3))
    other = np.ones(expected.shape, bool)
    other.flat[table[table[:, 0] == 1][:, 1].astype(int)] = False
    assert np.array_equal(found[other], expected[other])
    assert other.mean() > 0.8


def test_attributes_tell_a_stranger_what_is_what(path: Path) -> None:
    with h5py.File(path) as file:
        attrs = file["samples/00000001/hidden_states/layer_001"].attrs
        formula = "offset[channel] + (stored - zero_point) / spacing * step[channel]"
        assert attrs["formula"] == formula.encode()
        assert attrs["encoding"] == b"channel-steps"
        assert attrs["encoding_version"] == b"1"
        assert attrs["scales"] == b"/scales/hidden_states/layer_001"
        assert attrs["exceptions"] == b"hidden_states/exceptions"
        assert attrs["num_exceptions"] >= 2
        assert 0 < attrs["max_error_sigma"] < 1
        names = set(file["scales/hidden_states/layer_001"])
        assert names == {"step", "offset", "sigma"}


@pytest.mark.h5tools
def test_h5dump_shows_the_same_integers_and_the_formula(path: Path) -> None:
    place = "/samples/00000000/hidden_states/layer_001"
    shown = subprocess.run(
        ["h5dump", "-y", "-w", "0", "-d", place, str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "offset[channel] + (stored - zero_point) / spacing * step[channel]" in shown
    assert re.search(r"H5T_STD_U(8|16)LE", shown)
    data = shown.split("DATA {", 1)[1].split("}", 1)[0]
    with h5py.File(path) as file:
        expected = file[place][:]
    assert np.array_equal(np.array(re.findall(r"\d+", data), int), expected.reshape(-1))


def test_native_is_float16_to_everybody(tmp_path: Path) -> None:
    made = make_archive(tmp_path, batch(), tier="native")
    with h5py.File(made) as file:
        stored = file["samples/00000000/hidden_states/layer_001"]
        assert stored.dtype == np.float16
        assert stored.attrs["mantissa_bits"] == 5
        assert stored[:].tobytes() == h5traces.open(made)[0].layer(1).tobytes()
        assert "scales" not in file
