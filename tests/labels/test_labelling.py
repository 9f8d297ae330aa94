"""Scores join samples by id: beside an archive or in a new one, and never by guessing."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from commands import run
from legacy_batches import assert_same, bits, make_archive, make_batch

import h5traces
from h5traces.checking.validate import validate
from h5traces.checking.verify import verify
from h5traces.errors import (
    ArchiveExistsError,
    ArgumentError,
    CorruptArchiveError,
    OptionError,
    SchemaError,
    UnsupportedVersionError,
)
from h5traces.rewriting.label import label
from h5traces.rewriting.label_table import LabelOptions
from h5traces.rewriting.repack import repack
from h5traces.writing.options import PrecisionOptions, TargetOptions

if TYPE_CHECKING:
    from collections.abc import Iterable

BATCH = make_batch("full_pkl")
IDS = [each["question_id"] for each in BATCH]
SCORES = [0.1, 0.5, 0.49999, 0.9, -1.25, 0.7]
LABELS = (1, 0, 1, 0, 1, 0)


def write_csv(path: Path, rows: Iterable[Iterable[Any]], header: str = "") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((header or "question_id,bleurt_score").split(","))
        writer.writerows(rows)
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return make_archive(tmp_path, BATCH, name="run.pkl")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "scores.csv", zip(IDS, SCORES, strict=True))


# --- beside the archive ---------------------------------------------------------------------------


def test_open_picks_labels_up(archive: Path, table: Path) -> None:
    before = archive.read_bytes()
    report = label(archive, table)
    assert archive.read_bytes() == before
    assert report.targets == [f"{archive}.labels.json"]
    opened = h5traces.open(archive)
    assert opened.labels == LABELS
    for trace, expected, score, original in zip(opened, LABELS, SCORES, BATCH, strict=True):
        assert trace.metadata.label == trace["label"] == trace.get("label") == expected
        assert trace.metadata.scores == {"bleurt": score}
        assert_same(trace.to_dict(), {**original, "label": expected})
        assert list(trace)[-1] == "label"
        assert len(trace) == len(original) + 1
    assert pickle.loads(pickle.dumps(opened)).labels == LABELS
    assert opened[2:4].labels == LABELS[2:4]
    assert h5traces.open(archive, labels=False).labels == (None,) * 6
    assert "label" not in h5traces.open(archive, labels=False)[0]
    # What is stored is as it was.
    assert verify(archive, deep=True).ok
    assert verify(archive, against=archive.with_suffix(".pkl")).ok
    assert validate(archive).ok


def test_labels_from_beside_read_no_sample(
    archive: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a selection, too; a sample that the table lacks is asked itself."""
    label(archive, table)
    opened = h5traces.open(archive)
    asked = []
    original = type(opened._files[0]).sample_attrs

    def counted(file: Any, index: int) -> Any:
        asked.append(index)
        return original(file, index)

    monkeypatch.setattr(type(opened._files[0]), "sample_attrs", counted)
    assert opened.labels == LABELS
    assert opened[4:1:-1].labels == LABELS[4:1:-1]
    assert asked == []

    def without_one(document: dict[str, Any]) -> None:
        columns = [document["ordinals"], document["sample_ids"], document["labels"]]
        for column in [*columns, *document["scores"].values()]:
            del column[2]

    edited(archive, without_one)
    assert h5traces.open(archive).labels == (*LABELS[:2], None, *LABELS[3:])
    assert asked == [2]


def test_statistics(archive: Path, table: Path) -> None:
    report = label(
        archive, table, options=LabelOptions(threshold=0.6), target=TargetOptions(dry_run=True)
    )
    assert not Path(report.targets[0]).exists()
    assert report.labels == {0: 2, 1: 4}
    assert report.num_labelled == report.num_samples == 6
    stats = report.scores["bleurt"]
    assert (stats.minimum, stats.maximum) == (-1.25, 0.9)
    assert stats.median == statistics.median(SCORES)
    assert stats.mean == pytest.approx(sum(SCORES) / 6)
    assert report.complete


def test_the_full_table(archive: Path, tmp_path: Path) -> None:
    header = (
        "question_id,generated_answer,best_reference,bleurt_score,num_references,all_scores,"
        "min_score,avg_score"
    )
    rows = [
        (name, 'two\nlines, "quoted"', "ref\r\n", score, 2, f"{score};0.1", 0.05, 0.2)
        for name, score in zip(IDS, SCORES, strict=True)
    ]
    path = write_csv(tmp_path / "full.csv", rows, header)
    # As spreadsheets write it.
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    label(archive, path)
    opened = h5traces.open(archive)
    assert opened.labels == LABELS
    assert opened[3].metadata.scores == {"bleurt": 0.9, "min": 0.05, "avg": 0.2}


def test_scores_without_labels(archive: Path, table: Path) -> None:
    report = label(archive, table, options=LabelOptions(scores_only=True))
    assert report.labels == {}
    trace = h5traces.open(archive)[3]
    assert trace.metadata.label is None
    assert "label" not in trace
    assert trace.metadata.scores == {"bleurt": 0.9}


def test_shards_have_a_sidecar_each(archive: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    repack(archive, shards / "run.h5", target=TargetOptions(shard_samples=4))
    rows = [*zip(IDS, SCORES, strict=True), ("elsewhere", 0.3)]
    report = label(shards, write_csv(tmp_path / "s.csv", rows))
    assert report.unknown == ["elsewhere"]
    assert [Path(each).name for each in report.targets] == [
        "run-00000.h5.labels.json",
        "run-00001.h5.labels.json",
    ]
    assert h5traces.open(shards).labels == LABELS
    assert h5traces.open(shards / "run-00001.h5").labels == LABELS[4:]


def test_labels_in_a_folder_of_their_own(archive: Path, table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "labels"
    label(archive, table, folder=folder)
    assert h5traces.open(archive).labels == (None,) * 6
    assert h5traces.open(archive, labels=folder).labels == LABELS
    other = tmp_path / "other"
    other.mkdir()
    repack(archive, other / "run.h5", samples=[0])
    with pytest.raises(SchemaError, match="two archives have this name"):
        label(
            [archive, other / "run.h5"],
            table,
            folder=folder,
            target=TargetOptions(overwrite=True),
            partial=True,
        )


def test_rewriting_takes_labels_along(archive: Path, table: Path, tmp_path: Path) -> None:
    label(archive, table)
    repack(archive, tmp_path / "part.h5", samples=[3, 0], layers=[1])
    repack(archive, tmp_path / "cast.h5", precision=PrecisionOptions(dtype="float32"))
    assert h5traces.open(tmp_path / "part.h5").labels == (0, 1)
    assert h5traces.open(tmp_path / "cast.h5").labels == LABELS


# --- in a new archive -----------------------------------------------------------------------------


def test_a_rewritten_archive_holds_labels_itself(
    archive: Path, table: Path, tmp_path: Path
) -> None:
    target = tmp_path / "labelled.h5"
    report = label(archive, table, output=target)
    assert report.targets == [str(target)]
    assert not list(tmp_path.glob("*.labels.json"))
    with h5traces.open(archive) as old, h5traces.open(target) as new:
        assert new.labels == LABELS
        assert new[0].metadata.scores == {"bleurt": 0.1}
        for before, after in zip(old, new, strict=True):
            assert_same(after.to_dict(), {**before.to_dict(), "label": after.metadata.label})
            for path, entry in before._stored.objects.items():
                # Chunks are copied as they are.
                chunks = after._stored.entry(path).chunks
                assert entry.chunks is None or entry.chunks.checksums == chunks.checksums
    assert validate(target).ok
    assert verify(target, deep=True).ok


def test_labels_beside_win_over_those_inside(archive: Path, table: Path, tmp_path: Path) -> None:
    target = tmp_path / "labelled.h5"
    label(archive, table, output=target)
    report = label(target, write_csv(tmp_path / "new.csv", [(IDS[0], 0.9)]), partial=True)
    assert report.num_replaced == 1
    opened = h5traces.open(target)
    # Where the sidecar says nothing, what is stored stays.
    assert opened.labels == (0, *LABELS[1:])
    assert opened[0].metadata.scores == {"bleurt": 0.9}


@pytest.mark.parametrize("old", ["yes", True, [1, 2], {"a": 1, "b": [None]}, 7])
def test_labels_of_old_dicts_are_replaced(tmp_path: Path, old: Any) -> None:
    batch = [{**each, "label": old} for each in BATCH]
    archive = make_archive(tmp_path, batch, name="run.pkl")
    table = write_csv(tmp_path / "s.csv", zip(IDS[1:], SCORES[1:], strict=True))
    label(archive, table, partial=True)
    label(archive, table, partial=True, output=tmp_path / "copied.h5")
    repack(archive, tmp_path / "cast.h5", precision=PrecisionOptions(dtype="float32"))
    for path in (archive, tmp_path / "copied.h5", tmp_path / "cast.h5"):
        opened = h5traces.open(path)
        assert opened[0]["label"] == old
        assert [each["label"] for each in opened[1:]] == list(LABELS[1:])
        assert list(opened[1]) == list(batch[1])
        assert validate(path).ok


# --- what does not join ---------------------------------------------------------------------------


def test_a_missing_id_is_never_zero(archive: Path, tmp_path: Path) -> None:
    rows = list(zip(IDS, SCORES, strict=True))
    table = write_csv(tmp_path / "s.csv", rows[1:])
    with pytest.raises(SchemaError, match="1 sample has no score") as caught:
        label(archive, table)
    assert f"{archive}: sample 0 ('{IDS[0]}')" in str(caught.value)
    assert not list(tmp_path.glob("*.labels.json"))
    report = label(archive, table, partial=True)
    assert report.missing == [f"{archive}: sample 0 ('{IDS[0]}')"]
    assert not report.complete
    trace = h5traces.open(archive)[0]
    assert trace.metadata.label is None
    assert trace.metadata.scores is None
    with pytest.raises(KeyError):
        trace["label"]


@pytest.mark.parametrize("score", ["", " ", "nan", "NaN"])
def test_an_empty_score_is_missing(archive: Path, tmp_path: Path, score: str) -> None:
    rows = [(IDS[0], score), *zip(IDS[1:], SCORES[1:], strict=True)]
    table = write_csv(tmp_path / "s.csv", rows)
    with pytest.raises(SchemaError, match="1 sample has no score"):
        label(archive, table)
    report = label(archive, table, partial=True)
    assert report.unscored == [IDS[0]]
    assert h5traces.open(archive).labels == (None, *LABELS[1:])


def test_spreadsheets_with_decimal_commas_separate_by_semicolons(
    archive: Path, tmp_path: Path
) -> None:
    table = tmp_path / "scores.csv"
    rows = [f"{name};{score}" for name, score in zip(IDS, SCORES, strict=True)]
    table.write_text("\n".join(["question_id;bleurt_score", *rows]) + "\n")
    label(archive, table)
    assert h5traces.open(archive).labels == tuple(LABELS)
    table.write_text("\n".join(["question_id;bleurt_score", f"{IDS[0]};0,5"]) + "\n")
    with pytest.raises(SchemaError, match=r"line 2: .*the score is '0,5', expected a number"):
        label(archive, table, partial=True, target=TargetOptions(overwrite=True))
    table.write_text("\n".join(["question_id;bleurt_score", f"{IDS[0]};0.5;more"]) + "\n")
    with pytest.raises(SchemaError, match=r"line 2"):
        label(archive, table, partial=True, target=TargetOptions(overwrite=True))


def test_columns_of_json_lines_have_no_separators(archive: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.jsonl"
    table.write_text('{"question_id": "tc", "verdict": 1}\n')
    with pytest.raises(OptionError, match=r"its columns are 'question_id', 'verdict'; name"):
        label(archive, table)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("id,bleurt_score", "no column 'question_id'; its columns, .*, are 'id', 'bleurt_score'"),
        ("question_id,score", r"no column 'bleurt_score'.*\(id_column\) and .*\(score_column\)$"),
        (" ", "its columns, separated by commas, are ' '"),
        ("question_id|bleurt_score", r"'question_id\|bleurt_score'.*replace the delimiter '\|' by"),
    ],
)
def test_columns_that_the_table_lacks(
    archive: Path, tmp_path: Path, header: str, expected: str
) -> None:
    table = write_csv(tmp_path / "bad.csv", [("a", 0.1)], header)
    with pytest.raises(OptionError, match=expected):
        label(archive, table)
    refused = run("label", archive, table, code=2)
    assert "--id-column" in refused.stderr
    assert "--score-column" in refused.stderr


@pytest.mark.parametrize(
    ("rows", "header", "expected"),
    [
        ([("tc", "high")], "", r"line 2: 'tc': the score is 'high', expected a number"),
        ([("tc", "inf")], "", "expected a finite number"),
        ([("", "0.3")], "", "line 2: question_id is empty"),
        ([("a", 0.1), ("a", 0.2)], "", r"line 3: 'a' has other scores than on line 2"),
        ([("a", 0.1, 0.1)], "question_id,bleurt_score,bleurt_score", "more than once"),
        ([("a", 0.1, "x")], "question_id,bleurt_score,generation_index", "generation_index is 'x'"),
        ([("nobody", 0.1)], "", "none of its 1 ids is in the archives"),
        ([], "", "none of its 0 ids"),
    ],
)
def test_bad_tables(
    archive: Path, tmp_path: Path, rows: list[Any], header: str, expected: str
) -> None:
    with pytest.raises(SchemaError, match=expected):
        label(archive, write_csv(tmp_path / "bad.csv", rows, header))
    assert not list(tmp_path.glob("*.labels.json"))


@pytest.mark.parametrize(
    "content", [b"question_id,bleurt_score\n\xff,1\n", b'question_id,bleurt_score\n"a,1\n']
)
def test_what_is_no_table(archive: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(SchemaError, match=r"bad\.csv"):
        label(archive, path)


def test_repeated_rows(archive: Path, tmp_path: Path) -> None:
    rows = [*zip(IDS, SCORES, strict=True), (IDS[0], 0.1)]
    assert label(archive, write_csv(tmp_path / "s.csv", rows)).num_repeated == 1


def test_a_threshold_must_be_a_number(archive: Path, table: Path) -> None:
    with pytest.raises(ArgumentError, match="threshold is nan, expected a number"):
        label(archive, table, options=LabelOptions(threshold=float("nan")))


def test_samples_that_share_an_id(tmp_path: Path) -> None:
    batch = make_batch("full_pkl")
    for trace in batch[:3]:
        trace["question_id"] = "same"
    archive = make_archive(tmp_path, batch, name="run.pkl")
    rows = [("same", 0.1), *zip(IDS[3:], SCORES[3:], strict=True)]
    table = write_csv(tmp_path / "s.csv", rows)
    with pytest.raises(SchemaError, match=r"3 samples share an id.*generation_index"):
        label(archive, table)
    assert label(archive, table, partial=True).unknown == []
    assert h5traces.open(archive).labels == (None, None, None, *LABELS[3:])
    told = [("same", 0.1, 0), ("same", 0.9, 1), ("same", 0.2, 2), ("same", 0.3, 7)]
    told += [(name, score, "") for name, score in rows[1:]]
    table = write_csv(tmp_path / "g.csv", told, "question_id,bleurt_score,generation_index")
    report = label(archive, table, target=TargetOptions(overwrite=True))
    assert report.unknown == ["same (generation 7)"]
    assert h5traces.open(archive).labels == (1, 0, 1, *LABELS[3:])


def test_samples_without_an_id(tmp_path: Path) -> None:
    batch = make_batch("full_pkl")
    del batch[1]["question_id"]
    archive = make_archive(tmp_path, batch, name="run.pkl")
    table = write_csv(tmp_path / "s.csv", zip(IDS, SCORES, strict=True))
    with pytest.raises(SchemaError, match=r"sample 1 \(without an id\)"):
        label(archive, table)


def test_odd_ids(tmp_path: Path) -> None:
    batch = make_batch("full_pkl")
    names = ["\U0001f600", "a,b", 'say "x"', "new\nline", " padded ", "\u65e5\u672c"]
    for trace, name in zip(batch, names, strict=True):
        trace["question_id"] = name
    archive = make_archive(tmp_path, batch, name="run.pkl")
    label(archive, write_csv(tmp_path / "s.csv", zip(names, SCORES, strict=True)))
    assert h5traces.open(archive).labels == LABELS


# --- sidecars that do not fit ---------------------------------------------------------------------


def test_labels_of_another_archive_are_refused(archive: Path, table: Path, tmp_path: Path) -> None:
    label(archive, table)
    sidecar = Path(f"{archive}.labels.json")
    other = tmp_path / "other.h5"
    repack(archive, other, samples=[0, 1])
    shutil.copy(sidecar, f"{other}.labels.json")
    with pytest.raises(SchemaError, match=r"other\.h5.*labels belong to another file"):
        h5traces.open(other)
    (problem,) = validate(other).problems
    assert problem.loc == "other.h5.labels.json"
    assert "labels belong to another file" in problem.message
    # A new run puts it right, whatever lies there.
    with pytest.raises(ArchiveExistsError, match="pass overwrite=True"):
        label(other, table)
    label(other, table, target=TargetOptions(overwrite=True))
    assert h5traces.open(other).labels == LABELS[:2]


def edited(archive: Path, change: Any) -> Path:
    sidecar = Path(f"{archive}.labels.json")
    document = json.loads(sidecar.read_text(encoding="utf-8"))
    change(document)
    sidecar.write_text(json.dumps(document), encoding="utf-8")
    return sidecar


@pytest.mark.parametrize(
    ("change", "kind", "expected"),
    [
        (lambda doc: doc["labels"].pop(), SchemaError, "labels has 5 entries"),
        (lambda doc: doc["ordinals"].reverse(), SchemaError, "strictly ascending"),
        (lambda doc: doc.update(ordinals=[0, 1, 2, 3, 4, 9]), SchemaError, "not one of 6 samples"),
        (lambda doc: doc.update(labels=["a"] * 6), SchemaError, "labels.0"),
        (lambda doc: doc["scores"].update(bleurt=[float("nan")] * 6), SchemaError, "finite"),
        (lambda doc: doc.update(surprise=1), SchemaError, "surprise"),
        (lambda doc: doc.update(format_version="2.0"), UnsupportedVersionError, "upgrade"),
        (lambda doc: doc.update(format="else"), CorruptArchiveError, "something other than labels"),
    ],
)
def test_damaged_sidecars(
    archive: Path, table: Path, change: Any, kind: type[Exception], expected: str
) -> None:
    label(archive, table)
    sidecar = edited(archive, change)
    with pytest.raises(kind, match=expected) as caught:
        h5traces.open(archive)
    assert str(sidecar) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b"[]", b"3"])
def test_what_is_no_sidecar(archive: Path, content: bytes) -> None:
    Path(f"{archive}.labels.json").write_bytes(content)
    with pytest.raises(CorruptArchiveError, match="h5traces label"):
        h5traces.open(archive)


def test_a_row_of_another_sample_is_refused(archive: Path, table: Path) -> None:
    label(archive, table)
    edited(archive, lambda doc: doc["sample_ids"].reverse())
    with pytest.raises(SchemaError, match=r"sample 0 is .* there, but"):
        h5traces.open(archive)[0].metadata  # noqa: B018
    (problem,) = validate(archive).problems
    assert problem.kind == "wrong_labels"


# --- the command ----------------------------------------------------------------------------------


def test_the_command(archive: Path, table: Path, tmp_path: Path) -> None:
    tried = run("label", archive, table, "--dry-run", "--json")
    document = json.loads(tried.stdout)
    assert document["labels"] == {"0": 3, "1": 3}
    assert document["complete"] is True
    assert not list(tmp_path.glob("*.labels.json"))
    done = run("label", archive, table, "--threshold", "0.6")
    assert "label 1 (< 0.6): 4 (66.7%)" in done.stdout
    assert "label 0 (>= 0.6): 2" in done.stdout
    assert "wrote" in done.stdout
    listed = json.loads(run("ls", archive, "--json").stdout)
    assert [each["label"] for each in listed] == [1, 1, 1, 0, 1, 0]
    assert "exists" in run("label", archive, table, code=2).stderr
    run("label", archive, table, "--overwrite", "--scores-only")
    assert h5traces.open(archive).labels == (None,) * 6
    run("label", archive, table, "-o", tmp_path / "new.h5")
    assert h5traces.open(tmp_path / "new.h5").labels == LABELS
    run("label", archive, table, "-o", tmp_path / "x.h5", "--folder", tmp_path, code=2)
    run("label", archive, tmp_path / "nothing.csv", code=2)


def test_the_command_reports_what_does_not_join(archive: Path, tmp_path: Path) -> None:
    rows = [*zip(IDS[2:], SCORES[2:], strict=True), ("elsewhere", 0.3)]
    table = write_csv(tmp_path / "s.csv", rows)
    refused = run("label", archive, table, code=1)
    assert "2 samples have no score" in refused.stderr
    assert "--partial" in refused.stderr
    done = run("label", archive, table, "--partial", "--json")
    assert "2 samples without a score stay without a label" in done.stderr
    assert "elsewhere" in done.stderr
    assert json.loads(done.stdout)["num_labelled"] == 4


def test_nothing_half_written_stays(archive: Path, table: Path, tmp_path: Path) -> None:
    label(archive, table)
    assert not list(tmp_path.glob("*.part"))
    assert bits(h5traces.open(archive)[0]["hidden_states"][0]) == bits(BATCH[0]["hidden_states"][0])


def test_two_archives_that_hold_the_same_ids(archive: Path, table: Path) -> None:
    other = Path(shutil.copy(archive, archive.with_name("other.h5")))
    for partial in (False, True):
        with pytest.raises(SchemaError, match="12 samples share an id") as caught:
            label([archive, other], table, partial=partial)
        assert "one by one" in str(caught.value)
        assert "none of its" not in str(caught.value)
    assert not list(archive.parent.glob("*.labels.json"))


def test_an_empty_table(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.csv"
    path.write_bytes(b"")
    with pytest.raises(OptionError, match=r"empty\.csv: has no column .*are none"):
        label(archive, path)
