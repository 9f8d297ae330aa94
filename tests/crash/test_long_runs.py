"""What `h5traces.create` promises, without faults; stops are in ``test_crashes.py``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scenarios import is_same, item, record

import h5traces
from h5traces.errors import (
    ArchiveError,
    ArchiveExistsError,
    ConversionError,
    CorruptArchiveError,
    OptionError,
    SchemaError,
    StoredStateWarning,
    TargetError,
)
from h5traces.format.record import SourcePosition
from h5traces.meaning.records import to_record
from h5traces.writing.options import PrecisionOptions, TargetOptions

ROOT = Path(__file__).parents[2]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write(path, numbers, **options):
    with h5traces.create(path, **options) as writer:
        for number in numbers:
            writer.append(item(number))
    return writer


def suspended(path, numbers, **options):
    writer = h5traces.create(path, **options)
    for number in numbers:
        writer.append(item(number))
    writer.suspend()


@pytest.mark.parametrize("spool", [True, False])
def test_an_h5_name_is_one_archive(tmp_path, spool):
    write(tmp_path / "run.h5", range(5), spool=spool, model_id="tiny")
    assert files(tmp_path) == ["run.h5"]
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert archive.metadata.model_id == "tiny"
        assert all(is_same(trace.to_dict(), item(n)) for n, trace in enumerate(archive))
    assert h5traces.validate(tmp_path / "run.h5").ok


@pytest.mark.parametrize("spool", [True, False])
def test_a_folder_gets_shards(tmp_path, spool):
    write(f"{tmp_path}/run/", range(5), target=TargetOptions(shard_samples=2), spool=spool)
    names = [f"run/traces-{number:05d}.h5" for number in range(3)]
    assert files(tmp_path) == names
    with h5traces.open(tmp_path / "run") as archive:
        assert archive.ids == tuple(f"q{number}" for number in range(5))


def test_a_folder_that_exists_gets_shards(tmp_path):
    (tmp_path / "run.h5").mkdir()
    write(tmp_path / "run.h5", range(2))
    assert files(tmp_path) == ["run.h5/traces-00000.h5"]


def test_the_current_folder_gets_shards(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    suspended(".", [0])
    assert "here.spool/00000000.sample" in files(tmp_path)
    write(".", [1])
    assert files(tmp_path) == ["here/traces-00000.h5"]


def test_a_name_that_is_neither_file_nor_folder(tmp_path):
    for name in (tmp_path / "run", f"{tmp_path}/run"):
        with pytest.raises(TargetError, match="is neither a folder that exists nor a name ending"):
            h5traces.create(name)
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["overwrite", "skip_existing", "dry_run"])
def test_options_that_do_not_apply(tmp_path, name):
    with pytest.raises(TargetError, match=f"{name} does not apply to a run"):
        h5traces.create(tmp_path / "run.h5", target=TargetOptions(**{name: True}))
    assert files(tmp_path) == []


def test_an_h5_name_with_shards(tmp_path):
    write(tmp_path / "run.h5", range(3), target=TargetOptions(shard_samples=2))
    assert files(tmp_path) == ["run-00000.h5", "run-00001.h5"]


def test_a_shard_is_packed_by_the_append_behind_it(tmp_path):
    with h5traces.create(f"{tmp_path}/run/", target=TargetOptions(shard_samples=2)) as writer:
        writer.append(item(0))
        writer.append(item(1))
        assert not (tmp_path / "run").exists()
        writer.append(item(2))
        assert files(tmp_path / "run") == ["traces-00000.h5"]
        assert "00000002.sample" in files(tmp_path / "run.spool")
        assert writer.pack() == []


def test_pack_packs_full_shards(tmp_path):
    with h5traces.create(f"{tmp_path}/run/", target=TargetOptions(shard_samples=2)) as writer:
        writer.append(item(0))
        assert writer.pack() == []
        writer.append(item(1))
        assert writer.pack() == [tmp_path / "run" / "traces-00000.h5"]


def test_a_run_resumes_and_knows_what_is_done(tmp_path):
    suspended(f"{tmp_path}/run/", range(5), target=TargetOptions(shard_samples=3))
    with h5traces.create(f"{tmp_path}/run/", target=TargetOptions(shard_samples=3)) as writer:
        assert writer.done == {f"q{number}": 1 for number in range(5)}
        assert writer.num_samples == 5
        writer.append(item(5))
    with h5traces.open(tmp_path / "run") as archive:
        assert [is_same(t.to_dict(), item(n)) for n, t in enumerate(archive)] == [True] * 6


def test_a_sample_that_somebody_removed_is_told_of_and_done_again(tmp_path):
    suspended(f"{tmp_path}/run/", range(4))
    (tmp_path / "run.spool" / "00000001.sample").unlink()
    with pytest.warns(StoredStateWarning, match=r"00000001\.sample is missing \(1 such\)"):
        writer = h5traces.create(f"{tmp_path}/run/")
    assert set(writer.done) == {"q0", "q2", "q3"}
    writer.append(item(1))
    writer.close()
    with h5traces.open(tmp_path / "run") as archive:
        assert archive.ids == ("q0", "q2", "q3", "q1")


@pytest.mark.parametrize("num_samples", [6, 7])
def test_a_packed_sample_that_cannot_be_removed_at_once_is_removed_later(
    tmp_path, monkeypatch, num_samples
):
    """The spool lost its run.json with samples left in it, and the next start took that for damage;
    where the run ended with a full shard, an empty one followed."""
    unlink, failed = Path.unlink, []

    def refuse_once(path, **options):
        if path.suffix == ".sample" and not failed:
            failed.append(path)
            raise PermissionError(13, "Permission denied")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse_once)
    with h5traces.create(f"{tmp_path}/run/", target=TargetOptions(shard_samples=3)) as writer:
        for number in range(num_samples):
            try:
                writer.append(item(number))
            except PermissionError:
                writer.append(item(number))
    assert failed
    names = [f"run/traces-{number:05d}.h5" for number in range(-(-num_samples // 3))]
    assert files(tmp_path) == names
    with h5traces.create(f"{tmp_path}/run/", target=TargetOptions(shard_samples=3)) as writer:
        assert writer.num_samples == num_samples


def identity(path):
    """What changes when a file is replaced or written; reading changes its access time only."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def test_a_finished_run_has_nothing_to_do(tmp_path):
    write(f"{tmp_path}/run/", range(3), target=TargetOptions(shard_samples=2))
    before = [identity(path) for path in sorted((tmp_path / "run").iterdir())]
    with h5traces.create(f"{tmp_path}/run/", target=TargetOptions(shard_samples=2)) as writer:
        assert set(writer.done) == {"q0", "q1", "q2"}
    assert [identity(path) for path in sorted((tmp_path / "run").iterdir())] == before
    assert files(tmp_path) == ["run/traces-00000.h5", "run/traces-00001.h5"]


def test_a_finished_run_takes_no_sample(tmp_path):
    write(tmp_path / "run.h5", range(2))
    with h5traces.create(tmp_path / "run.h5") as writer:
        with pytest.raises(ArchiveExistsError, match="its run is finished, with 2 samples"):
            writer.append(item(2))


@pytest.mark.parametrize("options", [{"resume": False}, {"spool": False}])
def test_an_existing_target_is_never_replaced(tmp_path, options):
    write(tmp_path / "run.h5", range(2))
    with pytest.raises(ArchiveExistsError, match="exists; name another target"):
        h5traces.create(tmp_path / "run.h5", **options)


def test_a_stopped_run_is_not_begun_anew(tmp_path):
    suspended(tmp_path / "run.h5", range(2))
    with pytest.raises(ArchiveExistsError, match=r"run\.h5\.spool exists"):
        h5traces.create(tmp_path / "run.h5", resume=False)


def test_records_that_come_together_share_a_file_within_their_shard(tmp_path):
    """A file for each of many small samples cost more than computing them."""
    target = TargetOptions(shard_samples=5)
    records = [record(number) for number in range(9)]
    with h5traces.create(f"{tmp_path}/run/", target=target) as writer:
        writer.append_records(records[:3])
        writer.append_records(records[3:8])
        assert (writer.num_samples, writer.nbytes > 0) == (8, True)
        writer.suspend()
    # Three and two fill the first shard, which the next write packed.
    assert [each for each in files(tmp_path) if "run.json" not in each] == [
        "run.spool/00000005.sample",
        "run.spool/lock",
        "run/traces-00000.h5",
    ]
    with h5traces.create(f"{tmp_path}/run/", target=target) as writer:
        assert writer.done == {f"q{number}": 1 for number in range(8)}
        writer.append(records[8])
    with h5traces.open(tmp_path / "run") as archive:
        assert [is_same(t.to_dict(), item(n)) for n, t in enumerate(archive)] == [True] * 9


def test_of_records_that_come_together_those_before_an_error_are_stored(tmp_path):
    records = [record(number) for number in range(4)]
    records[2] = records[2].model_copy(update={"tokens": np.arange(3), "tokens_decoded": ("a",)})
    with h5traces.create(tmp_path / "run.h5") as writer:
        with pytest.raises(SchemaError, match="1 decoded tokens for 3 token ids"):
            writer.append_records(records)
        assert writer.done == {"q0": 1, "q1": 1}
        writer.append_records(records[3:])
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert archive.ids == ("q0", "q1", "q3")
        assert is_same(archive[2].to_dict(), item(3))


def test_a_file_of_several_samples_that_somebody_removed_is_told_of(tmp_path):
    with h5traces.create(f"{tmp_path}/run/") as writer:
        for start in (0, 2, 4):
            writer.append_records([record(start + n) for n in range(2)])
        writer.suspend()
    (tmp_path / "run.spool" / "00000002.sample").unlink()
    with pytest.warns(StoredStateWarning, match=r"00000002\.sample is missing \(2 such\)"):
        writer = h5traces.create(f"{tmp_path}/run/")
    assert set(writer.done) == {"q0", "q1", "q4", "q5"}
    writer.close()


def test_other_options_are_refused(tmp_path):
    suspended(tmp_path / "run.h5", range(2))
    with pytest.raises(ArchiveError, match=r"dtype='auto' \(was 'float16'\)"):
        h5traces.create(tmp_path / "run.h5", precision=PrecisionOptions(dtype="auto"))


def test_what_lies_where_a_shard_would_go_is_not_touched(tmp_path):
    writer = h5traces.create(tmp_path / "run.h5")
    writer.append(item(0))
    (tmp_path / "run.h5").write_bytes(b"mine")
    with pytest.raises(ArchiveExistsError, match="is not of this run"):
        writer.close()
    assert (tmp_path / "run.h5").read_bytes() == b"mine"
    (tmp_path / "run.h5").unlink()
    writer.close()
    assert files(tmp_path) == ["run.h5"]


def test_an_archive_of_another_run_beside_a_spool_is_noticed(tmp_path):
    suspended(tmp_path / "run.h5", [0])
    write(tmp_path / "other.h5", [1])
    (tmp_path / "other.h5").rename(tmp_path / "run.h5")
    with pytest.raises(CorruptArchiveError, match="does not hold the sample"):
        h5traces.create(tmp_path / "run.h5")


def test_a_missing_shard_is_noticed(tmp_path):
    suspended(f"{tmp_path}/run/", range(5), target=TargetOptions(shard_samples=2))
    (tmp_path / "run" / "traces-00001.h5").unlink()
    with pytest.raises(ArchiveError, match=r"traces-00001\.h5 is missing"):
        h5traces.create(f"{tmp_path}/run/", target=TargetOptions(shard_samples=2))


def test_a_second_writer_is_refused(tmp_path):
    code = "import sys, h5traces; h5traces.create(sys.argv[1])"
    with h5traces.create(tmp_path / "run.h5") as writer:
        writer.append(item(0))
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "run.h5"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"process {os.getpid()} on {os.uname().nodename}" in done.stderr
        assert "is writing it; wait until it ends, or stop it" in done.stderr
        writer.append(item(1))


def test_a_forked_child_neither_writes_nor_holds_the_lock(tmp_path):
    code = """
import os, sys, time
import h5traces
from scenarios import item
from h5traces.errors import ArchiveError
writer = h5traces.create(sys.argv[1])
writer.append(item(0))
child = os.fork()
if child == 0:
    try:
        writer.append(item(1))
    except ArchiveError as error:
        print(error, flush=True)
    os.close(1)
    os.close(2)
    time.sleep(60)
print(f"child {child} ", flush=True)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path / "run.h5"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        timeout=60,
    )
    # The two processes write to one pipe, in any order.
    child = int(re.search(r"child (\d+) ", done.stdout)[1])
    try:
        assert "the writer belongs to process" in done.stdout
        with h5traces.create(tmp_path / "run.h5") as writer:
            assert set(writer.done) == {"q0"}
    finally:
        os.kill(child, 9)


def test_an_error_stores_nothing_and_the_run_goes_on(tmp_path):
    with h5traces.create(tmp_path / "run.h5") as writer:
        writer.append(item(0))
        with pytest.raises(ConversionError, match="'hidden_states' and 'attentions' are missing"):
            writer.append({"tokens": np.arange(3)})
        fewer = item(1)
        fewer["hidden_states"].pop()
        fewer["attentions"].pop()
        with pytest.raises(SchemaError, match="one set of layers"):
            writer.append(fewer)
        with pytest.raises(ConversionError, match="found int"):
            writer.append(3)
        writer.append(item(1))
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert archive.ids == ("q0", "q1")


def test_layers_are_compared_with_those_of_earlier_runs(tmp_path):
    suspended(f"{tmp_path}/run/", range(3), target=TargetOptions(shard_samples=2))
    fewer = item(3)
    fewer["attentions"].pop()
    with h5traces.create(f"{tmp_path}/run/", target=TargetOptions(shard_samples=2)) as writer:
        with pytest.raises(SchemaError, match="hidden_states has layers"):
            writer.append(fewer)


def test_several_samples_of_one_id(tmp_path):
    suspended(f"{tmp_path}/run/", [0, 0, 1], target=TargetOptions(shard_samples=2))
    with h5traces.create(f"{tmp_path}/run/", target=TargetOptions(shard_samples=2)) as writer:
        assert writer.done["q0"] == 2
        assert writer.done["q7"] == 0
        writer.append(item(0))
    with h5traces.open(tmp_path / "run") as archive:
        assert [t.metadata.generation_index for t in archive] == [0, 1, 0, 2]


def test_sample_ids_from_the_caller(tmp_path):
    plain = item(0)
    del plain["question_id"]
    with h5traces.create(tmp_path / "run.h5") as writer:
        writer.append(plain, "mine")
        with pytest.raises(SchemaError, match="'yours', but the sample itself says 'q0'"):
            writer.append(item(0), "yours")
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert archive.ids == ("mine",)
        assert is_same(archive[0].to_dict(), plain)


def test_records_and_stored_traces(tmp_path):
    write(tmp_path / "first.h5", [0])
    record = to_record(item(1), source=SourcePosition(file=0, position=0))
    with h5traces.open(tmp_path / "first.h5") as archive:
        with h5traces.create(tmp_path / "run.h5") as writer:
            writer.append(archive[0])
            writer.append(record.model_copy(update={"source": None}))
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert [is_same(t.to_dict(), item(n)) for n, t in enumerate(archive)] == [True] * 2


def test_torch_tensors_come_back_as_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    plain = item(0)
    plain["hidden_states"] = [
        torch.from_numpy(each).to(torch.bfloat16).requires_grad_()
        for each in plain["hidden_states"]
    ]
    plain["more"] = {"logits": torch.arange(3)}
    with h5traces.create(
        tmp_path / "run.h5", precision=PrecisionOptions(dtype="bfloat16")
    ) as writer:
        writer.append(plain)
    with h5traces.open(tmp_path / "run.h5") as archive:
        found = archive[0].to_dict()
    assert all(map(torch.equal, found["hidden_states"], plain["hidden_states"]))
    assert torch.equal(found["more"]["logits"], plain["more"]["logits"])


def test_nothing_written_leaves_nothing(tmp_path):
    write(tmp_path / "run.h5", [])
    assert files(tmp_path) == []


def test_a_closed_writer_says_so(tmp_path):
    writer = write(tmp_path / "run.h5", [0])
    writer.close()
    with pytest.raises(ArchiveError, match="the writer is closed"):
        writer.append(item(1))


def test_wrong_options(tmp_path):
    with pytest.raises(OptionError, match="dtype is 'float8', expected one of 'float16'"):
        h5traces.create(tmp_path / "run.h5", precision=PrecisionOptions(dtype="float8"))
    with pytest.raises(SchemaError, match="num_layers: "):
        h5traces.create(tmp_path / "run.h5", num_layers=0)
    assert files(tmp_path) == []


def test_damage_of_the_spool_is_named(tmp_path):
    suspended(tmp_path / "run.h5", [0])
    (tmp_path / "run.h5.spool" / "run.json").write_text("{}")
    with pytest.raises(CorruptArchiveError, match=r"run\.json is damaged"):
        h5traces.create(tmp_path / "run.h5")
    (tmp_path / "run.h5.spool" / "run.json").unlink()
    with pytest.raises(CorruptArchiveError, match=r"run\.json is missing"):
        h5traces.create(tmp_path / "run.h5")


def test_a_direct_writer_loses_its_shard_but_no_other(tmp_path):
    writer = h5traces.create(f"{tmp_path}/run/", target=TargetOptions(shard_samples=2), spool=False)
    for number in range(3):
        writer.append(item(number))
    with pytest.raises(ConversionError):
        writer.append({})
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
    assert files(tmp_path) == ["run/traces-00000.h5"]


def test_the_code_of_the_document_runs(tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "writing.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    questions = [f"q{number}" for number in range(4)]
    names = {"questions": questions, "generate": lambda question: item(int(question[1:]))}
    exec(code, names)
    assert names["archive"].ids == tuple(questions)
