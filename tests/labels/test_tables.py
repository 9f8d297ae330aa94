"""Tables as people have them: labels taken as they are, or rejected by line; never inverted."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import h5py
import pytest
from commands import run
from legacy_batches import make_archive, make_batch

import h5traces
from h5traces import LabelOptions
from h5traces.errors import ArgumentError, OptionError, SchemaError
from h5traces.rewriting.label import label
from h5traces.rewriting.label_table import read_table
from h5traces.rewriting.repack import merge, repack, split
from h5traces.torch_data import TraceDataset
from h5traces.writing.options import TargetOptions

BATCH = make_batch("full_pkl", num_samples=4)
for _number, _trace in enumerate(BATCH):
    _trace["question_id"] = f"q{_number}"
DRY = TargetOptions(dry_run=True)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return make_archive(tmp_path, BATCH, name="run.pkl")


def table(archive: Path, content: str | bytes, name: str = "table.csv") -> Path:
    path = archive.with_name(name)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def labelled(archive: Path, content: str | bytes, **options: Any) -> tuple[int | None, ...]:
    """The labels that a table gives."""
    label(
        archive,
        table(archive, content),
        options=LabelOptions(**options),
        target=TargetOptions(overwrite=True),
    )
    return h5traces.open(archive).labels


# --- classes --------------------------------------------------------------------------------------

ZERO_ONE = "question_id,label\nq0,1\nq1,0\nq2,1\nq3,0\n"
WORDS = "question_id,label\nq0,hallucinated\nq1,correct\nq2,hallucinated\nq3,correct\n"
JSON_LINES = "".join(f'{{"question_id": "q{n}", "label": {1 - n % 2}}}\n' for n in range(4))
CLASSES = {
    "zero and one": (ZERO_ONE, "1"),
    "one means correct": ("question_id,label\nq0,0\nq1,1\nq2,0\nq3,1\n", "0"),
    "words": (WORDS, "hallucinated"),
    "JSON Lines": (JSON_LINES, "1"),
    "JSON": (json.dumps([json.loads(each) for each in JSON_LINES.splitlines()]), "1"),
    "JSON, indented": (
        json.dumps([json.loads(each) for each in JSON_LINES.splitlines()], indent=2),
        "1",
    ),
    "truth in JSON": (JSON_LINES.replace(" 1}", " true}").replace(" 0}", " false}"), "true"),
    "truth of Python": (ZERO_ONE.replace(",1", ",True").replace(",0", ",False"), "true"),
    "truth of spreadsheets": (ZERO_ONE.replace(",1", ",TRUE").replace(",0", ",FALSE"), "True"),
    "numbers of pandas": (ZERO_ONE.replace(",1", ",1.0").replace(",0", ",0.0"), "1"),
    "a table with tabs": (ZERO_ONE.replace(",", "\t"), "1"),
    "a mark, and ends of Windows": ("\ufeff" + ZERO_ONE.replace("\n", "\r\n"), "1"),
    "ends of old Macs": (ZERO_ONE.replace("\n", "\r"), "1"),
    "no end": (ZERO_ONE.rstrip(), "1"),
    "blank lines": (ZERO_ONE.replace("\n", "\n\n"), "1"),
    "an index of pandas": (
        ",question_id,label\n0,q0,1\n1,q1,0\n2,q2,1\n3,q3,0\n",
        "1",
    ),
    "spaces and case": (
        "question_id,label\nq0,Hallucinated\nq1,correct \nq2, hallucinated\nq3,CORRECT\n",
        "HALLUCINATED",
    ),
    "another order and columns": (
        "note,label,question_id\n,0,q3\n,1,q2\n,0,q1\n\u2028,1,q0\n",
        "1",
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_labels_are_taken_as_they_are(archive: Path, name: str) -> None:
    content, positive = CLASSES[name]
    assert labelled(archive, content, label_column="label", positive=positive) == (1, 0, 1, 0)
    assert h5traces.open(archive)[0].metadata.scores is None


@pytest.mark.parametrize("name", ["labels.csv", "labels.jsonl", "labels.txt", "labels"])
def test_the_content_decides_and_not_the_name(archive: Path, name: str) -> None:
    for content, positive in CLASSES.values():
        path = table(archive, content, name)
        options = LabelOptions(label_column="label", positive=positive)
        assert label(archive, path, options=options, target=DRY).labels == {0: 2, 1: 2}


@pytest.mark.parametrize("positive", [1, True, "1"])
def test_classes_may_be_named_by_numbers(archive: Path, positive: Any) -> None:
    content = ZERO_ONE if positive is not True else CLASSES["truth of Python"][0]
    assert labelled(archive, content, label_column="label", positive=positive) == (1, 0, 1, 0)
    numbers = {positive: 5, type(positive)(0): 6} if positive != "1" else {1: 5, 0: 6}
    assert labelled(archive, content, label_column="label", class_labels=numbers) == (5, 6, 5, 6)


def test_wrong_arguments(archive: Path) -> None:
    path = table(archive, ZERO_ONE)
    with pytest.raises(ArgumentError, match=r"options is {.*}.*, expected a LabelOptions"):
        label(archive, path, options={"label_column": "label"})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"table is {.*}.*, expected the name of a file"):
        label(archive, {"q0": 1})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="is a folder, expected a table"):
        label(archive, archive.parent)
    with pytest.raises(FileNotFoundError):
        label(archive, archive.with_name("nothing.csv"))


FOREIGN: dict[str, tuple[Any, str]] = {
    "a workbook": (
        lambda path: zipped(path, "[Content_Types].xml"),
        "is an office document, .*; save its table as CSV",
    ),
    "an archive": (lambda path: shutil.copy(path.with_name("run.h5"), path), "an archive of h5tr"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({"q0": 1})), "is a pickle, expected"),
    "a packed table": (
        lambda path: path.write_bytes(gzip.compress(ZERO_ONE.encode())),
        "is a table of text, compressed by gzip, expected CSV",
    ),
    "an array": (
        lambda path: path.write_bytes(b"\x93NUMPY\x01\x00v\x00"),
        "is a file of numpy.save",
    ),
    "a pointer": (
        lambda path: path.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
        ),
        "is a pointer of Git LFS, .* git lfs pull",
    ),
    "a web page": (
        lambda path: path.write_text("<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"),
        "is a web page, saved in place of the file",
    ),
}


def zipped(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, bytes(range(256)))


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_table_is_named(archive: Path, name: str) -> None:
    build, expected = FOREIGN[name]
    path = archive.with_name("table.csv")
    build(path)
    with pytest.raises((SchemaError, OptionError), match=expected):
        label(archive, path)


THREE = "question_id,label\nq0,wrong\nq1,right\nq2,unsure\nq3,right\n"


def test_more_than_two_classes(archive: Path) -> None:
    classes = {"wrong": 1, "right": 0, "unsure": 2}
    assert labelled(archive, THREE, label_column="label", class_labels=classes) == (1, 0, 2, 0)
    sidecar = json.loads(Path(f"{archive}.labels.json").read_text(encoding="utf-8"))
    assert sidecar["label_column"] == "label"
    assert sidecar["classes"] == {"wrong": 1, "right": 0, "unsure": 2}
    classes = {"wrong": 1, "right": 0, "unsure": None}
    assert labelled(archive, THREE, label_column="label", class_labels=classes) == (1, 0, None, 0)
    report = label(
        archive,
        table(archive, THREE),
        options=LabelOptions(label_column="label", class_labels=classes),
        target=TargetOptions(dry_run=True, overwrite=True),
    )
    assert report.complete
    assert report.classes == {"wrong": 1, "right": 2, "unsure": 1}
    assert (report.labels, report.num_excluded, report.num_without_label) == ({0: 2, 1: 1}, 1, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {},
            r"has the classes 'wrong' \(1 row\), 'right' \(2 rows\), 'unsure' .*positive='\.\.\.'",
        ),
        ({"positive": "wrong"}, "with more than two, give the label of each by class_labels"),
        ({"positive": "wron"}, "'unsure' .* and not positive='wron'"),
        ({"class_labels": {"wrong": 1, "right": 0}}, "does not say which label 'unsure' gets"),
    ],
)
def test_classes_that_nobody_named(archive: Path, options: Any, expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        labelled(archive, THREE, label_column="label", **options)
    assert not list(archive.parent.glob("*.labels.json"))


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_class_is_no_class(archive: Path, empty: str) -> None:
    content = ZERO_ONE.replace("q3,0", f"q3,{empty}")
    with pytest.raises(SchemaError, match=r"1 sample has no label: .*sample 3 \('q3'\)"):
        labelled(archive, content, label_column="label", positive="1")
    options = LabelOptions(label_column="label", positive="1")
    report = label(archive, table(archive, content), options=options, partial=True)
    assert report.unscored == ["q3"]
    assert report.num_without_label == 1
    assert h5traces.open(archive).labels == (1, 0, 1, None)


def test_null_is_no_class_in_json(archive: Path) -> None:
    content = JSON_LINES.replace('"q3", "label": 0', '"q3", "label": null')
    with pytest.raises(SchemaError, match="1 sample has no label"):
        labelled(archive, content, label_column="label", positive="1")


def test_scores_beside_classes_make_no_labels(archive: Path) -> None:
    content = "question_id,label,bleurt_score\nq0,1,0.9\nq1,0,0.1\nq2,1,0.8\nq3,0,0.2\n"
    found = labelled(
        archive, content, label_column="label", positive="1", score_column="bleurt_score"
    )
    assert found == (1, 0, 1, 0)
    assert h5traces.open(archive)[0].metadata.scores == {"bleurt": 0.9}
    with pytest.raises(SchemaError, match="line 6: 'q0' has other values than on line 2"):
        labelled(archive, content + "q0,0,0.9\n", label_column="label", positive="1")


# --- scores ---------------------------------------------------------------------------------------

SCORES = "question_id,{}\nq0,0.1\nq1,0.9\nq2,0.2\nq3,0.5\n"


@pytest.mark.parametrize(
    ("column", "higher_means", "expected"),
    [
        ("bleurt_score", None, (1, 0, 1, 0)),
        ("bleurt_score", "correct", (1, 0, 1, 0)),
        ("rougeL", "correct", (1, 0, 1, 0)),
        ("entropy", "hallucinated", (0, 1, 0, 1)),
    ],
)
def test_directions_of_scores(
    archive: Path, column: str, higher_means: Any, expected: tuple[int, ...]
) -> None:
    content = SCORES.format(column)
    found = labelled(archive, content, score_column=column, higher_means=higher_means)
    assert found == expected
    sidecar = json.loads(Path(f"{archive}.labels.json").read_text(encoding="utf-8"))
    assert sidecar["higher_means"] == (higher_means or "correct")
    assert sidecar["threshold"] == 0.5


@pytest.mark.parametrize(
    ("column", "options", "expected"),
    [
        ("rougeL", {}, "what high values of 'rougeL' mean is not known; say higher_means="),
        ("label", {}, "if the column holds labels, name it as label_column"),
        (
            "bleurt_score",
            {"higher_means": "hallucinated"},
            r"'bleurt_score' mean correct \(Sellam, .*\), and not higher_means='hallucinated'",
        ),
    ],
)
def test_directions_that_are_not_known(
    archive: Path, column: str, options: Any, expected: str
) -> None:
    with pytest.raises(OptionError, match=expected):
        labelled(archive, SCORES.format(column), score_column=column, **options)


def test_labels_are_never_taken_for_scores(archive: Path) -> None:
    content = ZERO_ONE.replace("label", "bleurt_score")
    with pytest.raises(OptionError, match="nothing but 0 and 1, which looks like labels"):
        labelled(archive, content)
    with pytest.raises(OptionError, match="has no column 'bleurt_score'"):
        labelled(archive, ZERO_ONE)
    # Whoever says what high means gets what was said.
    assert labelled(archive, content, higher_means="correct") == (0, 1, 0, 1)
    found = labelled(archive, ZERO_ONE, score_column="label", higher_means="hallucinated")
    assert found == (1, 0, 1, 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"positive": "1"}, "name the column"),
        ({"class_labels": {"a": 1}}, "name the column"),
        ({"label_column": "x", "positive": "1", "class_labels": {"a": 1}}, "leave one out"),
        ({"label_column": "x", "threshold": 0.4}, "label_column gives labels .* out threshold"),
        ({"label_column": "x", "higher_means": "correct"}, "leave out higher_means"),
        ({"label_column": "x", "scores_only": True}, "leave out scores_only=True"),
        ({"scores_only": True, "threshold": 0.4}, "leave out threshold"),
        ({"higher_means": "better"}, "expected 'correct' or 'hallucinated'"),
        ({"threshold": "0.5"}, "expected a number"),
        ({"threshold": float("inf")}, "expected a finite number"),
        ({"threshold": True}, "expected a number"),
        ({"id_column": None}, "id_column is None, expected text"),
        ({"label_column": 3}, "label_column is 3, expected text"),
        ({"score_column": b"x"}, "expected text"),
        ({"label_column": "x", "positive": ["a"]}, "expected text, a whole number"),
        ({"label_column": "x", "class_labels": {None: 1}}, "an integer or None by name"),
        ({"label_column": "x", "class_labels": {}}, "expected the label of every class"),
        ({"label_column": "x", "class_labels": ["a"]}, "expected a mapping"),
        ({"label_column": "x", "class_labels": {"a": True}}, "an integer or None by name"),
        ({"label_column": "x", "class_labels": {"a": 2**63}}, "an integer or None by name"),
        ({"label_column": "x", "class_labels": {"a": 1, "A ": 0}}, "names a class twice"),
    ],
)
def test_options_that_contradict(options: Any, expected: str) -> None:
    with pytest.raises((OptionError, ArgumentError), match=expected):
        LabelOptions(**options)


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "question_id,bleurt_score\nq0,0,1\nq1,0,9\n",
            r"line 2: has 3 cells \('q0', '0', '1'\), expected 2 \('question_id', 'bleurt_score'\)"
            "; did a decimal comma split a cell",
        ),
        (
            "question_id,answer,bleurt_score\nq0,Well, yes,0.5\n",
            "line 2: has 4 cells .* expected 3 .*; put text with separators into quotes",
        ),
        ("question_id,bleurt_score\nq0,0.1\nq1\n", r"line 3: has 1 cell \('q1'\), expected 2"),
        ('question_id,note,bleurt_score\nq0,"a\nb",1\nq1,x\n', "line 4: has 2 cells"),
        (
            '{"question_id": "q0", "bleurt_score": 1}\n{"question_id": "q1"}',
            "line 2: 'q1': has no 'bleu",
        ),
        ('{"question_id": "q0", "bleurt_score": 1}\n[1]', "line 2: holds list, expected an object"),
        ('[{"question_id": "q0", "bleurt_score": 1}, 3]', "row 2: holds int, expected an object"),
        ('{"question_id": "q0", "bleurt_score": 1}\n{"a"}', "line 2: is not JSON"),
        ('{"question_id": "q0", "bleurt_score": 1, "bleurt_score": 0}', "has 'bleurt_score' twice"),
        ('{"question_id": 1.0, "bleurt_score": 1}', "1.0, expected text or an integer"),
        ('{"question_id": true, "bleurt_score": 1}', "True, expected text or an integer"),
        ('{"question_id": ["q0"], "bleurt_score": 1}', "holds list, expected text or a number"),
        ('{"question_id": "q0", "bleurt_score": [1]}', r"the score is \[1\], expected a number"),
        ('{"question_id": "q0", "bleurt_score": true}', "the score is True, expected a number"),
        ("question_id,bleurt_score,note\nq0,1,a\rq9,1,b\n", "line 2: .* holds a carriage return"),
        (b"question_id,bleurt_score\nq0,0.1\nq\xe9,0.2\n", "line 3: byte 0xe9 is not UTF-8 te"),
        ("question_id,bleurt_score\nq0,1\n".encode("utf-16"), "is not UTF-8 text but UTF-16"),
    ],
)
def test_rows_are_rejected_by_line(archive: Path, content: str | bytes, expected: str) -> None:
    with pytest.raises(SchemaError, match=expected) as caught:
        labelled(archive, content)
    assert str(caught.value).startswith(f"{archive.with_name('table.csv')}: ")
    assert not list(archive.parent.glob("*.labels.json"))


NOT_PLAIN = (
    "1e400 -1e999 inf -Infinity 1_000 \u0663 True 0x1 1,5 \u00bd --1 1e . 0.5% 1.2.3 nan(1)".split()
)


@pytest.mark.parametrize("number", [*NOT_PLAIN, "1 000", "9" * 400])
def test_numbers_that_are_none(archive: Path, number: str) -> None:
    content = f'question_id,bleurt_score\nq0,"{number}"\nq1,0.1\nq2,0.1\nq3,0.1\n'
    with pytest.raises(SchemaError, match=r"line 2: 'q0': the score is .*, expected a"):
        labelled(archive, content)


@pytest.mark.parametrize("number", ["0.5", " 0.5 ", "+.5", "5e-1", "0.50", "5.E-1", "00.5"])
def test_numbers_that_are_plain(archive: Path, number: str) -> None:
    content = f"question_id,bleurt_score\nq0,{number}\nq1,0.1\nq2,0.1\nq3,0.1\n"
    assert labelled(archive, content) == (0, 1, 1, 1)
    assert h5traces.open(archive)[0].metadata.scores == {"bleurt": 0.5}


def test_cells_of_any_length(archive: Path) -> None:
    text = "x" * 3_000_000
    rows = "".join(f'q{n},0.{n + 3},"{text}"\n' for n in range(4))
    content = f"question_id,bleurt_score,answer\n{rows}"
    assert labelled(archive, content) == (1, 1, 0, 0)
    lines = (
        json.dumps({"question_id": f"q{n}", "bleurt_score": n, "answer": text}) for n in range(4)
    )
    assert labelled(archive, "\n".join(lines)) == (1, 0, 0, 0)
    # What a message shows of one is short.
    with pytest.raises(SchemaError, match="the score is 'xxx") as caught:
        labelled(archive, f"question_id,bleurt_score\nq0,{text}\n")
    assert len(str(caught.value)) < 1000


def test_a_pipe_is_a_table(archive: Path) -> None:
    script = f"h5traces label {archive} <(printf '{ZERO_ONE}') --label-column label --positive 1"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert h5traces.open(archive).labels == (1, 0, 1, 0)


ODD = list("ab,;\t\"'|\n\r {}[]0.\ufeff\u2028\x85\xa0\xe9\u65e5\U0001f600")
WRITERS: dict[str, Any] = {
    "CSV": {},
    "CSV, all quoted": {"quoting": csv.QUOTE_ALL},
    "CSV, ends of Unix": {"lineterminator": "\n"},
    "TSV": {"delimiter": "\t"},
    "TSV, all quoted": {"delimiter": "\t", "quoting": csv.QUOTE_ALL, "lineterminator": "\n"},
}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("form", [*WRITERS, "JSON Lines", "JSON Lines, ASCII", "JSON"])
def test_what_others_write_is_read(tmp_path: Path, form: str, seed: int) -> None:
    """Tables of odd text, written by Python's own modules, come back cell by cell."""
    random = Random(seed)

    # Python before 3.13 leaves a carriage return without quotes where lines end otherwise.
    letters = [each for each in ODD if each != "\r" or "Unix" not in form]

    def text() -> str:
        return "".join(random.choices(letters, k=random.randrange(1, 9)))

    ids = list(dict.fromkeys(text() for _ in range(random.randrange(1, 20))))
    rows = [
        {"note": text(), "question_id": each, "label": random.choice(["yes", "no"])} for each in ids
    ]
    path = tmp_path / "table"
    if form in WRITERS:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), **WRITERS[form])
            writer.writeheader()
            writer.writerows(rows)
    elif form == "JSON":
        path.write_text(json.dumps(rows, indent=random.choice([None, 1])), encoding="utf-8")
    else:
        lines = (json.dumps(each, ensure_ascii=form.endswith("ASCII")) for each in rows)
        path.write_text("\n".join(lines), encoding="utf-8", newline="")
    options = LabelOptions(label_column="label", class_labels={"yes": 1, "no": 0})
    found = read_table(path, options)
    assert {key: entry.label for key, entry in found.entries.items()} == {
        (each["question_id"], None): int(each["label"] == "yes") for each in rows
    }


# --- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd", ["q3 ", " q3", "Q3", "\ufeffq3", "\u201cq3\u201d", "'q3'", "\uff513"]
)
@pytest.mark.parametrize("partial", [False, True])
def test_ids_that_differ_a_little_are_never_merged(archive: Path, odd: str, partial: bool) -> None:
    content = ZERO_ONE.replace("q3,0", f"{odd},0")
    options = LabelOptions(label_column="label", positive="1")
    with pytest.raises(SchemaError, match="in spaces, case, quotes or zeros only: ") as caught:
        label(archive, table(archive, content), options=options, partial=partial)
    assert f"{odd!r} is 'q3' in the archives" in str(caught.value)
    assert not list(archive.parent.glob("*.labels.json"))


@pytest.mark.parametrize("odd", ["007", "7.0", "7 "])
def test_numbers_that_spreadsheets_change(tmp_path: Path, odd: str) -> None:
    batch = [{**each, "question_id": f"{number + 7}"} for number, each in enumerate(BATCH)]
    archive = make_archive(tmp_path, batch, name="run.pkl")
    content = f"question_id,bleurt_score\n{odd},0.1\n8,0.1\n9,0.1\n10,0.1\n"
    with pytest.raises(SchemaError, match=f"'{odd}' is '7' in the archives"):
        labelled(archive, content)


def test_similar_ids_that_all_exist(tmp_path: Path) -> None:
    names = ["q", "Q", " q", "q "]
    batch = [{**each, "question_id": name} for name, each in zip(names, BATCH, strict=True)]
    archive = make_archive(tmp_path, batch, name="run.pkl")
    content = "question_id,label\nq,1\nQ,0\n q,1\nq ,0\n"
    assert labelled(archive, content, label_column="label", positive="1") == (1, 0, 1, 0)


def test_a_similar_id_beside_the_right_one_is_named(archive: Path) -> None:
    path = table(archive, f"{ZERO_ONE}Q3,1\n")
    arguments = ("label", archive, path, "--label-column", "label", "--positive", "1")
    done = run(*arguments)
    assert "1 id of the table is in none of the archives: 'Q3'" in done.stderr
    assert "'Q3' is 'q3' in the archives" in done.stderr
    assert h5traces.open(archive).labels == (1, 0, 1, 0)


def test_repeated_ids(archive: Path) -> None:
    same = LabelOptions(label_column="label", positive="1")
    report = label(archive, table(archive, f"{ZERO_ONE}q0,1.0\n"), options=same, target=DRY)
    assert (report.num_repeated, report.labels) == (1, {0: 2, 1: 2})
    with pytest.raises(SchemaError, match="line 6: 'q0' has other values than on line 2"):
        label(archive, table(archive, f"{ZERO_ONE}q0,0\n"), options=same)


# --- the command ----------------------------------------------------------------------------------


def test_the_report_comes_before_anything_is_written(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(archive, WORDS)
    arguments = ["label", archive, path, "--label-column", "label", "--positive", "hallucinated"]
    expected = (
        "4 of 4 samples get a label\n"
        "  label 0 ('correct'): 2 (50.0%)\n"
        "  label 1 ('hallucinated'): 2 (50.0%)\n"
    )
    tried = run(*arguments, "--dry-run")
    assert tried.stdout == f"{expected}would write {archive}.labels.json\n"
    assert not list(archive.parent.glob("*.labels.json"))

    def fail(*_: Any, **__: Any) -> None:
        message = "the disk is full"
        raise OSError(message)

    with monkeypatch.context() as patched:
        patched.setattr("h5traces.rewriting.label._write_sidecar", fail)
        refused = run(*arguments, code=1)
    assert refused.stdout == expected
    assert "the disk is full" in refused.stderr
    assert run(*arguments).stdout == f"{expected}wrote {archive}.labels.json\n"


def test_an_incomplete_table_is_reported_too(archive: Path) -> None:
    path = table(archive, WORDS.replace("q3,correct\n", ""))
    arguments = ["label", archive, path, "--label-column", "label", "--positive", "hallucinated"]
    refused = run(*arguments, code=1)
    assert "3 of 4 samples get a label" in refused.stdout
    assert "without a label: 1" in refused.stdout
    assert "1 sample has no label" in refused.stderr
    document = json.loads(run(*arguments, "--json", code=1).stdout)
    assert (document["complete"], document["num_without_label"]) == (False, 1)
    run(*arguments, "--partial")
    assert h5traces.open(archive).labels == (1, 0, 1, None)


def test_classes_by_options(archive: Path) -> None:
    path = table(archive, THREE)
    arguments = ["label", archive, path, "--label-column", "label"]
    refused = run(*arguments, code=2)
    assert "--positive" in refused.stderr
    assert "--class-labels" in refused.stderr
    done = run(*arguments, "--class-labels", "wrong=1,right=0,unsure=none")
    assert "no label ('unsure'): 1" in done.stdout
    assert h5traces.open(archive).labels == (1, 0, None, 0)
    for wrong in ("wrong", "wrong=x", "wrong=1.5", "=1", "wrong=1;right=0", "wrong=1,", ""):
        refused = run(*arguments, "--class-labels", wrong, code=2)
        assert "--class-labels" in refused.stderr
    assert "twice" in run(*arguments, "--class-labels", "wrong=1,wrong=0", code=2).stderr


def test_names_of_classes_may_hold_anything(archive: Path) -> None:
    names = ["yes, well=1", "no", "a=b", "-1"]
    rows = "".join(f'q{number},"{name}"\n' for number, name in enumerate(names))
    path = table(archive, f"question_id,label\n{rows}")
    given = "yes, well=1=1,no=0,a=b=-2,-1=3"
    run("label", archive, path, "--label-column", "label", "--class-labels", given)
    assert h5traces.open(archive).labels == (1, 0, -2, 3)


def test_options_are_named_as_options(archive: Path) -> None:
    path = table(archive, ZERO_ONE)
    for arguments, expected in (
        (["--label-column", "label", "--positive", "yes"], "--positive yes"),
        (["--score-column", "label"], "--higher-means correct"),
        (["--label-column", "label", "--threshold", "0.5"], "--label-column"),
        (["--positive", "1"], "--label-column"),
    ):
        assert expected in run("label", archive, path, *arguments, code=2).stderr


# --- what becomes of labels -----------------------------------------------------------------------


def test_labels_stay_through_every_rewrite(archive: Path, tmp_path: Path) -> None:
    expected = labelled(archive, WORDS, label_column="label", positive="hallucinated")
    assert expected == (1, 0, 1, 0)
    repack(archive, tmp_path / "repacked.h5")
    assert h5traces.open(tmp_path / "repacked.h5").labels == expected
    split(archive, f"{tmp_path}/shards/", 3)
    assert h5traces.open(tmp_path / "shards").labels == expected
    merge(tmp_path / "shards", tmp_path / "merged.h5")
    assert h5traces.open(tmp_path / "merged.h5").labels == expected
    h5traces.export(archive, tmp_path / "again.pkl")
    assert [each["label"] for each in h5traces.load(tmp_path / "again.pkl")] == list(expected)
    again = make_archive(tmp_path, h5traces.load(tmp_path / "again.pkl"), name="twice.pkl")
    assert h5traces.open(again).labels == expected
    h5traces.export(archive, tmp_path / "wide.h5", dtype="float32")
    assert h5traces.open(tmp_path / "wide.h5").labels == expected
    assert TraceDataset(archive, labels="label").labels == list(expected)
    run("features", archive, "--last-token", "--allow-nan", "-o", tmp_path / "features.h5")
    with h5py.File(tmp_path / "features.h5") as file:
        assert file["samples/label"][:].tolist() == list(expected)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"question_id,bleurt_score\nq0," + bytes(3000), "line 2"),
        (b'question_id,bleurt_score\n"' + b"q\n" * 1500, "line 2"),
        (b'{"question_id": "' + b"q" * 3000, "line 1"),
        (b'{"question_id": "q0", "bleurt_score": 1}\n' + bytes(3000), "line 2"),
        (b"[" + b"\n" * 3000, "content"),
    ],
)
def test_rows_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, place: str
) -> None:
    monkeypatch.setattr("h5traces.sources.rows._LARGEST_ROW", 2000)
    table = tmp_path / "scores.csv"
    table.write_bytes(content)
    with pytest.raises(SchemaError, match=f"scores.csv: {place}: has more than 2,000 characters"):
        read_table(table, LabelOptions())


@pytest.mark.parametrize("value", ["[" + "1," * 99, "[]" * 40, "{" * 40])
def test_rows_of_too_many_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setattr("h5traces.sources.rows._MOST_VALUES", 100)
    table = tmp_path / "scores.jsonl"
    table.write_text(f'{{"question_id": {value}', encoding="utf-8")
    with pytest.raises(SchemaError, match=r"scores.jsonl: line 1: holds too many values at once"):
        read_table(table, LabelOptions())


def test_a_header_of_many_columns_is_not_told_whole(tmp_path: Path) -> None:
    table = tmp_path / "scores.csv"
    table.write_text(",".join(f"column_{number}" for number in range(10_000)), encoding="utf-8")
    with pytest.raises(OptionError, match="and 9970 more") as caught:
        read_table(table, LabelOptions())
    assert len(str(caught.value)) < 2000
