"""Catalogues of many shards: what they list, how they are opened, and what they cost."""

from __future__ import annotations

import base64
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from legacy_batches import make_archive
from pyarrow import parquet as pq
from typer.testing import CliRunner

import h5traces
from h5traces.archive.open_files import MAX_OPEN_FILES
from h5traces.cli.app import app
from h5traces.errors import (
    ArchiveError,
    CorruptArchiveError,
    LossyArchiveError,
    NotAnArchiveError,
    TraceNotFoundError,
)
from h5traces.storage.files import LocalFile

if TYPE_CHECKING:
    from collections.abc import Iterator

NUM_SHARDS, PER_SHARD = 5, 3


def batch(number: int, num_samples: int = PER_SHARD, hidden: int = 8) -> list[dict[str, object]]:
    rng = np.random.default_rng(number)
    return [
        {
            "hidden_states": [rng.random((4 + each, hidden)).astype("f2") for _ in range(3)],
            "attentions": [rng.random((2, 4 + each, 4 + each)).astype("f2") for _ in range(3)],
            "tokens": np.arange(4 + each),
            "generated_answer_clean": f"answer {each} of {number}",
            "question_id": f"q_{number}_{each}",
            "label": each % 2,
        }
        for each in range(num_samples)
    ]


def num_open() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder of shards in two folders."""
    folder = tmp_path / "run"
    for number in range(NUM_SHARDS):
        place = folder / f"rank{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        make_archive(place, batch(number), name=f"b{number}.pkl")
    for each in folder.rglob("*.pkl"):
        each.unlink()
    return folder


@pytest.fixture
def catalogue(run: Path) -> Path:
    h5traces.index(run, run / "catalogue.parquet")
    return run / "catalogue.parquet"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that were opened for reading."""
    found: list[str] = []
    before = LocalFile.__init__

    def noting(self: LocalFile, path: Path) -> None:
        found.append(path.name)
        before(self, path)

    monkeypatch.setattr(LocalFile, "__init__", noting)
    return found


def test_it_opens_as_the_shards_do_without_touching_one(
    run: Path, catalogue: Path, opened: list[str]
) -> None:
    found = h5traces.open(catalogue)
    assert (len(found), found.layers) == (NUM_SHARDS * PER_SHARD, (0, 1, 2))
    ids, labels = found.ids, found.labels
    assert not opened
    shards = h5traces.open(run)
    assert (ids, labels, found.paths) == (shards.ids, shards.labels, shards.paths)
    assert found == shards
    assert found[4:9].labels == shards[4:9].labels
    assert found.metadata.num_samples == len(shards)
    assert [*(found + shards)] == [*shards, *shards]


def test_one_look_up_opens_one_shard(catalogue: Path, opened: list[str]) -> None:
    found = h5traces.open(catalogue)
    assert found.by_id("q_3_1")["generated_answer_clean"] == "answer 1 of 3"
    assert set(opened) == {"b3.h5"}
    view = found[[5, 12, 0]]
    ids = [found.ids[each] for each in (5, 12, 0)]
    assert [view.by_id(each).ordinal for each in ids] == [5, 12, 0]
    with pytest.raises(TraceNotFoundError, match="no trace has the sample id 'q_9_9'"):
        found.by_id("q_9_9")
    with pytest.raises(TraceNotFoundError, match="no trace has the sample id"):
        view.by_id(found.ids[1])


def test_ids_that_repeat_are_told_by_generation(tmp_path: Path) -> None:
    for number in range(2):
        samples = batch(number)
        for each in samples:
            each["question_id"] = "same"
        make_archive(tmp_path, samples, name=f"b{number}.pkl")
    h5traces.index(str(tmp_path / "*.h5"), tmp_path / "c.parquet")
    found, shards = h5traces.open(tmp_path / "c.parquet"), h5traces.open(tmp_path / "b0.h5")
    with pytest.raises(TraceNotFoundError, match=r"6 traces have the sample id 'same', at \[0, 1"):
        found.by_id("same")
    assert found[:3].by_id("same", 1) == shards.by_id("same", 1)


def test_queries_give_indices_of_the_archive(catalogue: Path) -> None:
    where = "label = 1 AND seq_len = 5 AND path LIKE 'rank1/%'"
    query = f"SELECT ordinal FROM '{catalogue}' WHERE {where} ORDER BY ordinal"
    rows = [row for (row,) in duckdb.sql(query).fetchall()]
    found = h5traces.open(catalogue)
    assert {each["question_id"] for each in found[rows]} == {"q_1_1", "q_3_1"}
    frame = pl.scan_parquet(catalogue).filter(pl.col("label") == 1).collect()
    assert len(frame) == NUM_SHARDS
    assert frame["ordinal"].to_list() == [n for n, each in enumerate(found.labels) if each == 1]


def test_offsets_are_those_of_the_sample(run: Path, catalogue: Path) -> None:
    table = pq.read_table(catalogue).to_pylist()
    for row, trace in zip(table, h5traces.open(catalogue), strict=True):
        objects = trace._stored.objects.values()
        ranges = [each for entry in objects if entry.chunks for each in entry.chunks.ranges]
        assert row["offset"] == min(start for start, _ in ranges)
        assert row["offset"] + row["nbytes"] == max(start + size for start, size in ranges)
        assert run / row["path"] == trace.path


def test_texts_are_an_option(run: Path) -> None:
    target = run / "texts.parquet"
    h5traces.index(run, target, texts=True)
    texts = pq.read_table(target, columns=["generated_answer_clean"]).to_pydict()
    assert texts["generated_answer_clean"][4] == h5traces.open(run)[4]["generated_answer_clean"]
    # Other columns are not columns to take over.
    assert h5traces.index(run, target).num_read == NUM_SHARDS


def test_only_what_changed_is_read_again(run: Path, catalogue: Path) -> None:
    before = catalogue.read_bytes()
    report = h5traces.index(run, catalogue)
    assert (report.num_read, report.num_kept, report.gone) == (0, NUM_SHARDS, [])
    assert catalogue.read_bytes() == before
    make_archive(run / "rank0", batch(7, 2), name="a7.pkl")
    (run / "rank1" / "b1.h5").unlink()
    report = h5traces.index(run, catalogue)
    assert (report.num_read, report.num_kept) == (1, NUM_SHARDS - 1)
    assert report.gone == ["rank1/b1.h5"]
    assert h5traces.open(catalogue) == h5traces.open(run)
    anew = run / "anew.parquet"
    h5traces.index(run, anew)
    assert pq.read_table(anew).equals(pq.read_table(catalogue))


def test_labels_that_come_later_are_listed(run: Path, catalogue: Path) -> None:
    table = run / "labels.csv"
    table.write_text("question_id,label\nq_2_0,1\nq_2_1,0\nq_2_2,1\n")
    options = h5traces.LabelOptions(label_column="label", positive="1")
    h5traces.label(str(run / "rank0" / "b2.h5"), table, options=options)
    assert h5traces.index(run, catalogue).num_read == 1
    found = h5traces.open(catalogue)
    assert found.labels[found.ids.index("q_2_0")] == 1 == found.by_id("q_2_0").metadata.label


def test_a_folder_moves_with_its_catalogue(run: Path, catalogue: Path) -> None:
    moved = run.rename(run.with_name("moved"))
    assert h5traces.open(moved / catalogue.name) == h5traces.open(moved)


def test_a_shard_that_was_replaced_is_an_error(run: Path, catalogue: Path) -> None:
    found, target = h5traces.open(catalogue), run / "rank0" / "b2.h5"
    status = target.stat()
    target.unlink()
    make_archive(run / "rank0", batch(8), name="b2.pkl")
    with pytest.raises(CorruptArchiveError, match=r"b2\.h5: was replaced since it was catalogued"):
        found.by_id("q_2_0")
    # With the time of the old one, only its archive_id tells.
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert h5traces.index(run, catalogue, check=True).num_read == 1
    target.unlink()
    with pytest.raises(CorruptArchiveError, match=r"b2\.h5: is in the catalogue .* but not there"):
        h5traces.open(catalogue).by_id("q_8_0")


def test_a_copy_of_a_shard_is_an_error(run: Path, catalogue: Path) -> None:
    shutil.copy(run / "rank0" / "b0.h5", run / "rank1" / "copy.h5")
    before = catalogue.read_bytes()
    with pytest.raises(ArchiveError, match=r"rank0/b0\.h5 and rank1/copy\.h5 are copies"):
        h5traces.index(run, catalogue)
    assert catalogue.read_bytes() == before
    assert not list(run.glob("*.part"))


def test_shards_of_two_models_do_not_open_as_one(run: Path, catalogue: Path) -> None:
    make_archive(run / "rank0", batch(7, hidden=16), name="a7.pkl")
    h5traces.index(run, catalogue)
    with pytest.raises(ArchiveError, match=r"hidden_size=8, but .* has hidden_size=16"):
        h5traces.open(catalogue)


def test_lossless_is_known_without_the_shards(run: Path, catalogue: Path) -> None:
    assert len(h5traces.open(catalogue, lossless=True)) == NUM_SHARDS * PER_SHARD
    h5traces.repack(run / "rank0" / "b0.h5", run / "rank0" / "s.h5", precision="fine")
    (run / "rank0" / "b0.h5").unlink()
    h5traces.index(run / "rank0" / "s.h5", run / "small.parquet")
    with pytest.raises(LossyArchiveError, match=r"s\.h5: is not lossless"):
        h5traces.open(run / "small.parquet", lossless=True)


def test_files_that_are_open_are_few(tmp_path: Path) -> None:
    for number in range(MAX_OPEN_FILES + 6):
        make_archive(tmp_path, batch(number, 1), name=f"b{number}.pkl")
    h5traces.index(tmp_path, tmp_path / "c.parquet")
    found = h5traces.open(tmp_path / "c.parquet")
    gc.collect()  # files of other tests may be closed at any time
    before = num_open()
    assert sum(len(each["tokens"]) for each in found) == 4 * len(found)
    assert num_open() - before <= MAX_OPEN_FILES
    again = pickle.loads(pickle.dumps(found))
    assert again.by_id("q_9_0") == found.by_id("q_9_0")
    found.close()
    again.close()
    gc.collect()
    assert num_open() <= before


def test_what_is_no_catalogue_is_said(run: Path, catalogue: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), other)
    with pytest.raises(NotAnArchiveError, match="Parquet, but no catalogue that 'h5traces index'"):
        h5traces.open(other)
    other.write_bytes(catalogue.read_bytes()[:-100])
    with pytest.raises(NotAnArchiveError, match="is not a whole Parquet file"):
        h5traces.open(other)
    table = pq.read_table(catalogue)
    facts = {**pq.read_metadata(catalogue).metadata}
    del facts[b"ARROW:schema"]
    for key, value in (
        (b"h5traces.shards", base64.b64encode(b"no table")),
        (b"h5traces", json.dumps({"format": "h5traces-catalogue", "version": 1}).encode()),
    ):
        pq.write_table(table.replace_schema_metadata({**facts, key: value}), other)
        with pytest.raises(CorruptArchiveError, match="the catalogue is damaged"):
            h5traces.open(other)
    pq.write_table(table.slice(1).replace_schema_metadata(facts), other)
    with pytest.raises(CorruptArchiveError, match="has 14 rows for 15 samples"):
        h5traces.open(other)


def test_the_command_has_a_default_for_folders(run: Path) -> None:
    done = CliRunner().invoke(app, ["index", str(run)])
    assert done.exit_code == 0
    assert done.stdout.replace("\n", "").endswith("15 samples in 5 shards, 5 read, 0 unchanged")
    done = CliRunner().invoke(app, ["index", str(run), "--json"])
    assert json.loads(done.stdout)["num_kept"] == NUM_SHARDS
    done = CliRunner().invoke(app, ["head", str(run / "catalogue.parquet"), "-n", "2"])
    assert done.exit_code == 0
    assert "answer 1 of 0" in done.stdout
    assert CliRunner().invoke(app, ["index", str(run), str(run)]).exit_code == 2


def test_the_benchmark_runs_on_few_shards() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "catalogue.py"
    command = [sys.executable, str(script), "--shards", "20", "--samples", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "60 samples in 20 shards" in done.stdout
