"""Exports for people with HDF5 viewers: values instead of codes, and long texts as lines."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

import h5traces
from h5traces.cli.app import app
from h5traces.errors import ConversionError, LossyWarning
from h5traces.format.text import decode_all, wrapped
from h5traces.writing.options import PrecisionOptions

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::h5traces.errors.LossyWarning")
TOKENS = 24
ANSWER = "A first line.\n\n" + "The tower is in Paris, and it is high. " * 5 + "\ud83d end"


def sample(number: int) -> dict[str, Any]:
    noise = np.random.default_rng(number)
    weights = np.tril(noise.random((2, TOKENS, TOKENS)))
    weights /= weights.sum(-1, keepdims=True)
    return {
        "question_id": f"q{number}",
        "question": "Where?",
        "generated_answer_clean": ANSWER,
        "hidden_states": [noise.normal(0, 3, (TOKENS, 16)).astype(np.float16) for _ in range(2)],
        "attentions": [weights.astype(np.float16)] * 2,
        "tokens": list(range(TOKENS)),
        "label": number,
    }


def archive(folder: Path, **precision: Any) -> Path:
    with h5traces.create(folder / "a.h5", precision=PrecisionOptions(**precision)) as writer:
        for number in range(3):
            writer.append(sample(number))
    return folder / "a.h5"


def paths(file: h5py.File) -> set[str]:
    found: list[str] = []
    file.visit(found.append)
    return set(found)


@pytest.mark.parametrize("tier", ["analysis", "compact"])
def test_stock_h5py_reads_what_the_library_restores(tmp_path: Path, tier: str) -> None:
    source = archive(tmp_path, tier=tier)
    target = h5traces.export(source, tmp_path / "b.h5", decoded=True)
    with h5py.File(source) as codes, h5py.File(target) as values:
        layer = "samples/00000001/hidden_states/layer_001"
        assert codes[layer].dtype.kind == "u"
        left = {each for each in paths(codes) if each.endswith("exceptions")}
        added = {each for each in paths(values) if "x_lines" in each}
        # The same places, but for what only codes need.
        scales = {each for each in paths(codes) if each.startswith("scales")}
        assert paths(values) - added == paths(codes) - scales - left
        for number, trace in enumerate(h5traces.open(source)):
            for kind in ("hidden_states", "attentions", "attention_mean"):
                for position, expected in enumerate(trace[kind] if kind in trace else ()):
                    stored = values[f"samples/{number:08d}/{kind}/layer_{position:03d}"]
                    assert stored.dtype == expected.dtype
                    assert np.array_equal(stored[:], expected)
    assert h5traces.validate(target)[0].problems == []
    assert h5traces.validate(target)[0].notes == []
    assert h5traces.verify(target).ok
    with h5traces.open(target) as found, h5traces.open(source) as expected_archive:
        assert [each.to_dict().keys() for each in found] == [
            each.to_dict().keys() for each in expected_archive
        ]
        assert found[2]["generated_answer_clean"] == ANSWER
        assert found.metadata.losses == expected_archive.metadata.losses


def test_a_long_text_has_a_row_for_each_line(tmp_path: Path) -> None:
    target = h5traces.export(archive(tmp_path), tmp_path / "b.h5", decoded=True)
    with h5py.File(target) as file:
        group = file["samples/00000000/x_lines"]
        assert list(group) == ["generated_answer_clean"]
        lines = decode_all(group["generated_answer_clean"][:])
        # The text itself stays whole in its own place.
        assert file["samples/00000000/generated_answer_clean"].shape == (1,)
    assert lines[:2] == ["A first line.", ""]
    assert max(map(len, lines)) <= 80
    assert "".join(lines[2:]) == ANSWER.splitlines()[2]
    assert all(each.endswith(" ") for each in lines[2:-1])
    # Rewriting keeps them, as it keeps whatever users put there.
    h5traces.repack(target, tmp_path / "c.h5")
    with h5py.File(tmp_path / "c.h5") as file:
        assert "samples/00000002/x_lines/generated_answer_clean" in file


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", []),
        ("one line", ["one line"]),
        ("x" * 80, ["x" * 80]),
        ("x" * 161, ["x" * 80, "x" * 80, "x"]),
        ("a\r\nb\n", ["a", "b"]),
        (f"{'x' * 79} y", [f"{'x' * 79} ", "y"]),
        ("\n" * 300_000, [""] * 100_000 + ["…"]),
    ],
)
def test_lines_of_a_text(given: str, expected: list[str]) -> None:
    assert wrapped(given) == expected


@pytest.mark.h5tools
def test_h5dump_prints_values_and_lines(tmp_path: Path) -> None:
    source = archive(tmp_path, tier="compact")
    target = h5traces.export(source, tmp_path / "b.h5", decoded=True)
    name = "/samples/00000000/hidden_states/layer_000"
    command = ["h5dump", "-y", "-w", "0", "-m", "%.9g", "-d", name, str(target)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    body = printed.partition("DATA {")[2].partition("}")[0]
    numbers = np.array(re.findall(r"[-+0-9.e]+", body), np.float16)
    with h5traces.open(source) as found:
        assert np.array_equal(numbers, found[0]["hidden_states"][0].ravel())
    lines = "/samples/00000000/x_lines/generated_answer_clean"
    command = ["h5dump", "-d", lines, str(target)]
    assert "A first line." in subprocess.run(command, capture_output=True, text=True).stdout


def test_a_type_may_be_chosen_and_other_formats_have_values_anyway(tmp_path: Path) -> None:
    source = archive(tmp_path, tier="compact")
    h5traces.export(source, tmp_path / "b.h5", decoded=True, dtype="float32")
    with h5py.File(tmp_path / "b.h5") as file:
        assert file["samples/00000000/hidden_states/layer_000"].dtype == np.float32
    with pytest.raises(ConversionError, match=r"decoded is for \.h5; a pickle has values"):
        h5traces.export(source, tmp_path / "b.pkl", decoded=True)
    with pytest.warns(LossyWarning, match="earlier_precisions"):
        h5traces.export(source, tmp_path / "d.h5", decoded=True)


def test_inspect_says_what_needs_it(tmp_path: Path) -> None:
    run, hint = CliRunner().invoke, "HDF5 viewers show codes; for values: h5traces export"
    source = archive(tmp_path, tier="compact")
    assert hint in run(app, ["inspect", str(source)]).output
    done = run(app, ["export", str(source), "-o", str(tmp_path / "b.h5"), "--decoded"])
    assert done.exit_code == 0, done.output
    assert hint not in run(app, ["inspect", str(tmp_path / "b.h5")]).output
