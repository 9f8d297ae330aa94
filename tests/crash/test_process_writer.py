"""A writer in its own process does what one in the same process does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scenarios import is_same, item, record

import h5traces
from h5traces.errors import ArchiveError, ArchiveExistsError, SchemaError
from h5traces.format.archive import ExtractionMetadata
from h5traces.writing.options import TargetOptions
from h5traces.writing.process_writer import ProcessWriter

EXTRACTION = ExtractionMetadata(
    model_class="TinyForCausalLM",
    config={"layers": [1, 2], "nothing": None},
    transformers_version="5",
    torch_version="2",
    model_dtype="float32",
    device="cpu",
    generation={"max_new_tokens": 3},
    seed=1,
    batch_size=2,
)


def ended(process):
    """Whether a process is gone, or is a zombie that nobody waited for."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def test_it_writes_and_resumes(tmp_path):
    with ProcessWriter(
        f"{tmp_path}/run/", target=TargetOptions(shard_samples=2), extraction=EXTRACTION
    ) as writer:
        for number in range(3):
            writer.append(record(number))
        assert (writer.num_samples, writer.is_finished) == (3, False)
        assert writer.nbytes > 1000
        writer.suspend()
    with ProcessWriter(
        f"{tmp_path}/run/", target=TargetOptions(shard_samples=2), extraction=EXTRACTION
    ) as writer:
        assert dict(writer.done) == {"q0": 1, "q1": 1, "q2": 1}
        writer.append(record(3))
    with h5traces.open(tmp_path / "run") as archive:
        assert all(is_same(trace.to_dict(), item(n)) for n, trace in enumerate(archive))
        assert archive.metadata.extraction == EXTRACTION
    with ProcessWriter(f"{tmp_path}/run/", target=TargetOptions(shard_samples=2)) as writer:
        assert writer.is_finished


def test_it_writes_several_together(tmp_path):
    with ProcessWriter(tmp_path / "run.h5") as writer:
        writer.append_records([record(number) for number in range(3)])
        assert writer.num_samples == 3
        assert [path.name for path in (tmp_path / "run.h5.spool").glob("*.sample")] == [
            "00000000.sample"
        ]
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert all(is_same(trace.to_dict(), item(n)) for n, trace in enumerate(archive))


def test_errors_are_those_of_the_writer(tmp_path):
    with ProcessWriter(tmp_path / "run.h5", extraction=EXTRACTION) as writer:
        writer.append(record(0))
        odd = record(1).model_copy(update={"tokens": np.arange(3), "tokens_decoded": ("a",)})
        with pytest.raises(SchemaError, match="1 decoded tokens for 3 token ids") as caught:
            writer.append(odd)
        assert caught.value.problems
        with pytest.raises(ArchiveError, match=r"process .* is writing it"):
            ProcessWriter(tmp_path / "run.h5", extraction=EXTRACTION)
        writer.append(record(1))
        writer.suspend()
    other = EXTRACTION.model_copy(update={"seed": 2, "generation": {"max_new_tokens": 4}})
    with pytest.raises(
        ArchiveError, match=r"generation.max_new_tokens=4 \(was 3\), seed=2 \(was 1\)"
    ):
        ProcessWriter(tmp_path / "run.h5", extraction=other)
    with pytest.raises(ArchiveError, match=r"extraction=None \(was recorded\)"):
        ProcessWriter(tmp_path / "run.h5")
    with pytest.raises(ArchiveExistsError):
        ProcessWriter(tmp_path / "run.h5", extraction=EXTRACTION, resume=False)


def test_a_process_that_was_killed_is_told_apart(tmp_path):
    with ProcessWriter(tmp_path / "run.h5") as writer:
        writer.append(record(0))
        os.kill(writer.process_id, signal.SIGKILL)
        with pytest.raises(ArchiveError, match=r"was killed \(signal 9\).* start again"):
            writer.append(record(1))
        writer.suspend()
    with ProcessWriter(tmp_path / "run.h5") as writer:
        assert writer.num_samples == 1


def test_signals_of_the_terminal_do_not_reach_it(tmp_path):
    with ProcessWriter(tmp_path / "run.h5") as writer:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(writer.process_id, number)
        writer.append(record(0))
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert len(archive) == 1


def test_it_ends_with_its_program(tmp_path):
    """Else the next start would find the lock taken."""
    code = (
        "import sys; from h5traces.writing.process_writer import ProcessWriter; "
        f"writer = ProcessWriter({str(tmp_path / 'run.h5')!r}); "
        "print(writer.process_id, flush=True); "
        "sys.stdin.read()"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process = int(program.stdout.readline())
    assert not ended(process)
    program.kill()
    program.communicate()
    for _ in range(100):
        if ended(process):
            break
        time.sleep(0.1)
    assert ended(process)
    ProcessWriter(tmp_path / "run.h5").close()


def test_it_finds_what_its_program_found(tmp_path):
    """Programs that came to h5traces by a path of their own, as notebooks do."""
    folder = str(Path(h5traces.__file__).parents[1])
    code = (
        f"import sys; sys.path.insert(0, {folder!r}); "
        "from h5traces.writing.process_writer import ProcessWriter; "
        f"ProcessWriter({str(tmp_path / 'run.h5')!r}).close()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
