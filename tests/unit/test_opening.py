"""Files that others wrote are recognised by content and give records and dicts, one by one."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from legacy_batches import LAYOUTS, assert_same, make_archive, make_batch, write_layout

import h5traces
from h5traces.archive.tensors import materialised
from h5traces.errors import ConversionError
from h5traces.sources.opening import facts_in_name, open_source, source_stem

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_records_and_dicts_hold_every_sample(tmp_path: Path, layout: str) -> None:
    path = write_layout(tmp_path, layout)
    expected = h5traces.load(path)
    with open_source(path) as source:
        assert_same([materialised(each) for each in source], expected)
        assert source.progress == (path.stat().st_size,) * 2
    with open_source(path) as source:
        records = list(source.records(file=3, layers=(1,)))
        assert source.num_layers == len(expected[0]["hidden_states"])
    places = [each.source for each in records if each.source is not None]
    assert [(each.file, each.position) for each in places] == [
        (3, position) for position in range(len(expected))
    ]
    for record in records:
        names = {each.name for kind in record.layered.values() for each in kind.arrays}
        assert names <= {"layer_001"}


def test_a_record_that_cannot_be_made_names_its_sample(tmp_path: Path) -> None:
    batch = make_batch("full_pkl")
    del batch[2]["hidden_states"], batch[2]["attentions"]
    path = write_layout(tmp_path, "full_pkl", batch)
    with open_source(path) as source, pytest.raises(ConversionError) as caught:
        list(source.records())
    assert str(caught.value).startswith(f"{path}: sample 2: fields 'hidden_states' and ")


def test_an_archive_is_no_source(tmp_path: Path) -> None:
    path = make_archive(tmp_path, make_batch("full_pkl"))
    with pytest.raises(ConversionError, match="is an archive of h5traces; "):
        open_source(path)


def test_names_say_model_and_dataset() -> None:
    facts = {"model_id": "Llama-2-7b", "dataset": "triviaqa"}
    assert facts_in_name("a/Llama-2-7b_triviaqa_batch_0003.pkl.gz") == facts
    assert facts_in_name("Llama-2-7b_triviaqa_batch_0003_sub0001.pickle") == facts
    assert facts_in_name("batch.pkl") == {}
    assert [source_stem(f"a.b{each}") for each in (".pkl.gz", ".pkl", ".h5")] == [
        "a.b",
        "a.b",
        "a.b",
    ]


def test_archives_are_read_without_the_reader_of_pickles(tmp_path: Path) -> None:
    path = make_archive(tmp_path, make_batch("full_pkl"))
    code = (
        "import sys, h5traces\n"
        f"archive = h5traces.open({str(path)!r})\n"
        "print(len([trace.to_dict() for trace in archive]))\n"
        "print([name for name in sys.modules if name == 'h5traces.sources.pickle.machine'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[1] == "[]"
