"""The table ``/index/samples``, as people find samples by it in HDFView and other tools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest

import h5traces
from h5traces.format import text
from h5traces.rewriting.label_table import LabelOptions

if TYPE_CHECKING:
    from pathlib import Path

QUESTION = "  Where\n\tis the\x00 Eiffel\x1b tower?  "
LONG = "word \ud83d" * 40


def sample(number: int, **fields: Any) -> dict[str, Any]:
    states = [np.full((3, 4), number, np.float16)]
    return {"hidden_states": states, "tokens": [1, 2, 3], "question_id": f"q{number}", **fields}


def archive(folder: Path, *samples: dict[str, Any]) -> Path:
    with h5traces.create(folder / "a.h5") as writer:
        for each in samples:
            writer.append(each)
    return folder / "a.h5"


def table(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        found: np.ndarray = file["index/samples"][:]
        return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return archive(
        tmp_path,
        sample(0, question=QUESTION, generated_text="raw", generated_answer_clean="", label=1),
        sample(1, generated_answer=LONG, generated_text="raw"),
        sample(2, question="é" * 64, generated_answer_clean="y" * 1001, label=0),
        sample(3, question=" " * 1000 + "behind"),
    )


def test_what_people_look_for_comes_first_as_one_short_line(path: Path) -> None:
    found = table(path)
    names = ("ordinal", "sample_id", "seq_len", "label", "question", "answer")
    assert found.dtype.names[:6] == names
    questions, answers = (
        [text.decode(each) for each in found[name].tolist()] for name in ("question", "answer")
    )
    assert questions == ["Where is the Eiffel tower?", "", "é" * 64, "…"]
    assert answers[0] == "raw"
    assert answers[1] == " ".join(LONG.split())[:63] + "…"
    assert answers[2:] == ["y" * 63 + "…", ""]
    assert found["label"].tolist() == [1, -(2**63), 0, -(2**63)]


def test_without_texts_there_are_no_columns_of_them(tmp_path: Path) -> None:
    found = table(archive(tmp_path, sample(0), sample(1)))
    assert not {"question", "answer", "label"} & set(found.dtype.names)


def test_a_text_of_a_million_characters_takes_a_line(tmp_path: Path) -> None:
    found = table(archive(tmp_path, sample(0, question="a b\n" * 250_000)))
    assert found.dtype["question"].itemsize == 63 + len("…".encode())


def test_rewriting_keeps_excerpts_and_adds_them_to_older_archives(path: Path) -> None:
    before = table(path)
    with h5py.File(path, "r+") as file:
        kept = [name for name in before.dtype.names if name not in ("question", "answer")]
        del file["index/samples"]
        file.create_dataset("index/samples", data=before[kept], chunks=True, compression="gzip")
    h5traces.seal(path)
    assert h5traces.validate(path)[0].problems == []
    for number, options in enumerate(({}, {"codec": "zstd"}, {"dtype": "float32"})):
        target = path.with_name(f"{number}.h5")
        h5traces.repack(path, target, precision=h5traces.PrecisionOptions(**options))
        assert table(target).tolist() == before.tolist()
        assert h5traces.validate(target)[0].problems == []


def test_labels_of_a_sidecar_are_not_in_the_archive(path: Path) -> None:
    labels = path.with_name("labels.csv")
    labels.write_text("question_id,label\nq1,1\n")
    options = LabelOptions(label_column="label", positive="1")
    h5traces.label(path, labels, options=options, partial=True)
    assert table(path)["label"].tolist()[1] == -(2**63)
    h5traces.repack(path, path.with_name("b.h5"))
    assert table(path.with_name("b.h5"))["label"].tolist()[1] == 1


@pytest.mark.parametrize(("column", "ordinal"), [("question", 0), ("answer", 1)])
def test_an_excerpt_of_another_text_is_a_problem(path: Path, column: str, ordinal: int) -> None:
    with h5py.File(path, "r+") as file:
        rows = file["index/samples"][:]
        rows[column][ordinal] = b"something else"
        file["index/samples"][:] = rows
    h5traces.seal(path)
    (problem,) = h5traces.validate(path)[0].problems
    assert problem.kind == "index_mismatch"
    assert problem.message.startswith(f"row {ordinal} has {column} b'something else', the sample")
    assert h5traces.validate(path, quick=True)[0].ok
