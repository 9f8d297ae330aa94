"""The parts of the vLLM connector that need no engine; `tools/check_vllm.py` runs a real one."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import h5traces
from h5traces.errors import (
    ArchiveError,
    ArchiveExistsError,
    ExtractionError,
    OptionError,
    TargetError,
)
from h5traces.format.dtypes import TypedArray
from h5traces.vllm.recorder import Finished, Recorder, Settings, asked_for, record_of, slots_of

SLOTS = {0: None, 1: 0, 2: 2}


def states(tokens=3, slots=3, hidden=4):
    rng = np.random.default_rng(0)
    return TypedArray.of(rng.standard_normal((tokens, slots, hidden)).astype("<f4"))


def request(name="r0", **options):
    fields = {"question": "Why?", "row": 7}
    known = {"sample_id": "q1", "fields": fields, **options}
    return Finished(name, (5, 6, 7), 2, (7, 8), "stop", **known)


def test_slots_are_blocks():
    assert slots_of([3, 0, 1], 4, None) == SLOTS
    assert slots_of([3, 0, 1], 4, [2]) == {2: 2}


@pytest.mark.parametrize(
    ("ids", "layers", "message"),
    [
        ([3, 99], None, r"\[99\] is repeated or out of range"),
        ([3, 3], None, r"\[3\] is repeated or out of range"),
        ([-1], None, "out of range"),
        ([], None, "nothing is repeated or out of range"),
        ([1, 2], [2], r"vLLM captures blocks \[0, 1\]"),
        ([1, 2], [0, 0], "expected different ones"),
    ],
)
def test_wrong_layers(ids, layers, message):
    with pytest.raises(OptionError, match=message):
        slots_of(ids, 4, layers)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"h5traces": "q1"}, "expected {'sample_id'"),
        ({"h5traces": {"path": "/x"}}, "expected {'sample_id'"),
        ({"h5traces": {"sample_id": 3}}, "sample_id is 3"),
        ({"h5traces": {"fields": {"tokens": 1}}}, "names that the archive has no use for"),
    ],
)
def test_wrong_requests(parameters, message):
    with pytest.raises(OptionError, match=message):
        asked_for(parameters)
    assert asked_for(None) == (None, {})


def test_what_is_stored(tmp_path):
    settings = Settings.of({"target": str(tmp_path / "run.h5"), "dtype": "float32"})
    recorder = Recorder.of(settings, num_layers=4)
    recorder.put(record_of(request(), states(), SLOTS), 144)
    recorder.put(record_of(request("r1", sample_id=None), states(), SLOTS), 144)
    recorder.close()
    (found,) = h5traces.finish(tmp_path / "run.h5")
    assert h5traces.validate(found).ok
    with h5traces.open(found) as archive:
        assert list(archive.ids) == ["q1", "r1"]
        trace = archive[0]
        np.testing.assert_array_equal(trace.layer(2), states().values[:, 2])
        np.testing.assert_array_equal(trace.embedding, states().values[:, 0])
        assert (trace["row"], trace["question"], trace["finish_reason"]) == (7, "Why?", "stop")
        assert list(trace["output_ids"]) == [7, 8]
        assert trace["tokens"].tolist() == [5, 6, 7]


@pytest.mark.parametrize("array", [states(2), states(slots=2)])
def test_a_hook_point_that_changed_its_shape(array):
    with pytest.raises(ExtractionError, match="r0: vLLM gave states of shape"):
        record_of(request(), array, SLOTS)


def test_two_engines_on_one_target_and_a_finished_run(tmp_path):
    settings = Settings.of({"target": str(tmp_path / "run.h5")})
    recorder = Recorder.of(settings)
    with pytest.raises(ArchiveError, match="is writing it"):
        Recorder.of(settings)
    second = Recorder.of(settings, rank=1)
    for each in (recorder, second):
        each.put(record_of(request(), states(), SLOTS), 144)
        each.close()
    h5traces.finish(tmp_path / "run.h5")
    assert h5traces.finish(tmp_path / "run-rank1.h5")
    with pytest.raises(ArchiveExistsError, match="holds a finished run"):
        Recorder.of(settings)


class Slow:
    """A writer that waits to be let on, or fails."""

    def __init__(self, error=None):
        self.go, self.error, self.records = threading.Event(), error, []

    def append(self, record):
        assert self.go.wait(60)
        if self.error:
            raise self.error
        self.records.append(record)

    def suspend(self):
        pass


def test_the_engine_waits_for_room():
    writer = Slow()
    recorder = Recorder(writer, max_nbytes=10)
    recorder.put("a", 6)
    thread = threading.Thread(target=recorder.put, args=("b", 6))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    writer.go.set()
    thread.join(60)
    recorder.close()
    assert writer.records == ["a", "b"]


def test_a_failed_write_stops_the_engine(caplog):
    writer = Slow(OSError("disk full"))
    recorder = Recorder(writer)
    recorder.put(SimpleNamespace(sample_id="q7"), 6)
    writer.go.set()
    with pytest.raises(ExtractionError, match="q7: the trace could not be stored: disk full"):
        recorder.close()
    with pytest.raises(ExtractionError, match="disk full"):
        recorder.put(SimpleNamespace(sample_id="q8"), 6)
    # A server that is asked nothing more says it, too.
    assert "q7: the trace could not be stored: disk full" in caplog.text


PROGRAM = """
import sys
import numpy as np
from h5traces.format.dtypes import TypedArray
from h5traces.vllm.recorder import Finished, Recorder, Settings
recorder = Recorder.of(Settings.of({"target": sys.argv[1]}), num_layers=1)
for number in range(30):
    array = TypedArray.of(np.full((3, 1, 4), number, dtype="<f4"))
    recorder.take(Finished(f"r{number}", (5, 6, 7), 2, (7, 8), "stop"), array, {0: 0})
if sys.argv[2] == "raise":
    raise RuntimeError("the engine failed")
"""


@pytest.mark.parametrize("end", ["return", "raise"])
def test_a_program_that_ends_without_closing(tmp_path, end):
    target = tmp_path / "run.h5"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(target), end],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("the engine failed" in done.stderr) == (end == "raise")
    assert "shutdown" not in done.stderr
    (found,) = h5traces.finish(target)
    with h5traces.open(found) as archive:
        assert list(archive.ids) == [f"r{number}" for number in range(30)]
        assert [int(trace.layer(0)[0, 0]) for trace in archive] == list(range(30))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tir": "fine"}, "'tir' is not a setting; expected target, layers, dtype"),
        ({"handover": "folder"}, "'handover' is not a setting"),
        ({"target": None}, "'target' is missing"),
        ({"target": ""}, "target is ''"),
        ({"target": 3}, "target is 3"),
        ({"layers": "0,1"}, "layers is '0,1', not a list of block numbers"),
        ({"layers": [-1]}, r"layers is \[-1\], not a list of block numbers"),
        ({"layers": 3}, "layers is 3, not a list of block numbers"),
        ({"shard_samples": "many"}, "shard_samples is 'many', not a whole number"),
        ({"max_waiting_nbytes": 1.5}, "max_waiting_nbytes is 1.5, not a whole number"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(OptionError, match=f"kv_connector_extra_config: {message}"):
        Settings.of({"target": "run.h5", **wrong})


def test_a_target_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "run.h5"
    with pytest.raises(TargetError, match=f"{target}: cannot be written: .*Not a directory"):
        Recorder.of(Settings.of({"target": str(target)}))
