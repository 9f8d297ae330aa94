"""Memory of a conversion is bounded by the largest sample, not by the batch."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import h5traces

if TYPE_CHECKING:
    from pathlib import Path

MEBI = 1 << 20
ALLOWED_NBYTES = 200 * 10**6

# Peak memory of the process itself; what the imports take is not the conversion's.
_MEASURED = """
import json, resource, sys
import h5traces, h5traces.rewriting
from h5traces.writing.options import TargetOptions
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
before = peak()
report = h5traces.convert(sys.argv[1], sys.argv[2], target=TargetOptions(workers=2))
assert report.ok, report.files[0].error
print(json.dumps({"before": before, "after": peak(), "num_samples": report.files[0].num_samples}))
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def sample(number: int, seq_len: int, dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    # Random bytes are the worst case for the compressor; cut to finite values.
    hidden = rng.integers(0, 0x3C00, (4, seq_len, 1024), dtype=np.uint16).view(np.float16)
    weights = rng.integers(0, 0x3C00, (4, 8, seq_len, seq_len), dtype=np.uint16).view(np.float16)
    return {
        "hidden_states": list(hidden.astype(dtype)),
        "attentions": list(weights.astype(dtype)),
        "tokens": np.arange(seq_len),
        "tokens_decoded": [f"w{index}" for index in range(seq_len)],
        "generated_answer_clean": "an answer",
        "question_id": f"q{number}",
    }


def nbytes(trace: dict[str, Any]) -> int:
    kinds = ("hidden_states", "attentions")
    return sum(array.nbytes for kind in kinds for array in trace[kind])


def test_conversion_streams(tmp_path: Path) -> None:
    source, target = tmp_path / "batch.pkl", tmp_path / "archive.h5"
    large = {40, 41, 120, 203}
    total = largest = 0
    with source.open("wb") as file:
        # Written item by item, so that this process stays small, too.
        file.write(pickle.PROTO + bytes([3]) + pickle.EMPTY_LIST)
        for number in range(204):
            trace = sample(number, 700 if number in large else 48, "float32")
            total += nbytes(trace)
            largest = max(largest, nbytes(trace))
            file.write(pickle.dumps(trace, 3)[2:-1] + pickle.APPEND)
        file.write(pickle.STOP)
    assert total > 400 * 10**6
    assert largest > 60 * 10**6
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(source), str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["num_samples"] == 204
    grown = measured["after"] - measured["before"]
    assert grown <= ALLOWED_NBYTES + 2 * largest, f"{grown / 1e6:.0f} MB, {largest / 1e6:.0f} MB"
    with h5traces.open(target) as archive:
        for number in (0, 41, 203):
            expected = sample(number, 700 if number in large else 48, "float16")
            found = archive[number]["attentions"][3]
            assert np.array_equal(found.astype(np.float16), expected["attentions"][3])
