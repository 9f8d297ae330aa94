"""Long runs in tiers: exact in the spool, encoded when packed, one set of scales for all shards."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import h5traces
from h5traces.archive.scales import stored_scales
from h5traces.errors import ArchiveError, PrecisionError, TargetError
from h5traces.format.precision import TIERS
from h5traces.writing.calibrate import calibrate
from h5traces.writing.options import PrecisionOptions, TargetOptions

if TYPE_CHECKING:
    from pathlib import Path

NUM_SAMPLES = 7


def sample(number: int) -> dict[str, Any]:
    random = np.random.default_rng(number)
    weights = np.tril(random.dirichlet(np.ones(12), size=(2, 12)))
    states = [random.normal(size=(12, 16)).astype("f4") * (1 + layer) for layer in range(2)]
    return {
        "hidden_states": states,
        "attentions": [weights.astype("f4")] * 2,
        "tokens": np.arange(12),
        "question_id": f"q{number}",
    }


def write(path: str, numbers: range, **options: Any) -> None:
    with h5traces.create(path, target=TargetOptions(shard_samples=3), **options) as writer:
        for number in numbers:
            if f"q{number}" not in writer.done:
                writer.append(sample(number))


def check(target: Path, step: float) -> None:
    with h5traces.open(target, lossy_dtype="float32") as archive:
        assert list(archive.ids) == [f"q{number}" for number in range(NUM_SAMPLES)]
        scales = [stored_scales(file.store) for file in archive._files]
        assert len(scales) == 3
        for other in scales[1:]:
            assert scales[0].equals(other)
        for number, trace in enumerate(archive):
            assert trace.metadata.exact_digest != trace.metadata.digest
            for layer, states in enumerate(sample(number)["hidden_states"]):
                found = trace.layer(layer).astype("f8")
                bound = step / 2 * scales[0].layers[f"hidden_states/layer_{layer:03d}"].sigma
                assert (np.abs(found - states.astype("f2")) <= bound).all()


@pytest.mark.parametrize("tier", ["fine", "compact"])
def test_all_shards_have_the_scales_of_the_first(tmp_path: Path, tier: Any) -> None:
    write(f"{tmp_path}/run/", range(NUM_SAMPLES), precision=tier)
    check(tmp_path / "run", TIERS[tier].step)
    for path in (tmp_path / "run").iterdir():
        assert h5traces.verify(path, deep=True).ok


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    """Stopped with a shard packed and a sample spooled; then nothing is done twice."""
    writer = h5traces.create(
        f"{tmp_path}/run/", target=TargetOptions(shard_samples=3), precision="analysis"
    )
    for number in range(4):
        writer.append(sample(number))
    writer.suspend()
    with pytest.raises(ArchiveError, match="precision"):
        h5traces.create(f"{tmp_path}/run/", target=TargetOptions(shard_samples=3), precision="fine")
    write(f"{tmp_path}/run/", range(NUM_SAMPLES), precision="analysis")
    check(tmp_path / "run", 0.1)
    again = h5traces.create(
        f"{tmp_path}/run/", target=TargetOptions(shard_samples=3), precision="analysis"
    )
    assert again.is_finished
    assert again.num_samples == NUM_SAMPLES
    again.close()


@pytest.mark.parametrize("point", ["before", "after"])
def test_killed_while_packing(tmp_path: Path, point: str) -> None:
    """Right before, and right after, a shard gets its name: no sample is lost or stored twice."""
    code = f"""
        import os, signal, sys
        sys.path[:0] = {sys.path!r}
        import h5traces
        from h5traces.storage.publish import PartFile
        from h5traces.writing.options import TargetOptions
        from test_long_run_tiers import sample

        publish = PartFile.publish

        def killed(self, **options):
            is_shard = "traces-" in self.path.name
            if is_shard and {point!r} == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            publish(self, **options)
            if is_shard:
                os.kill(os.getpid(), signal.SIGKILL)

        PartFile.publish = killed
        with h5traces.create(
            {f"{tmp_path}/run/"!r}, target=TargetOptions(shard_samples=3), precision="compact"
        ) as writer:
            for number in range({NUM_SAMPLES}):
                writer.append(sample(number))
    """
    environment = {"PYTHONPATH": f"{sys.path[0]}"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, check=False
    )
    assert done.returncode == -signal.SIGKILL
    write(f"{tmp_path}/run/", range(NUM_SAMPLES), precision="compact")
    check(tmp_path / "run", 0.4)


def test_given_scales_are_used_and_asked_for_again(tmp_path: Path) -> None:
    write(str(tmp_path / "exact.h5"), range(3))
    calibrate(tmp_path, tmp_path / "scales.h5")
    (found,) = (tmp_path / "scales.h5",)
    writer = h5traces.create(
        f"{tmp_path}/run/",
        target=TargetOptions(shard_samples=3),
        precision=PrecisionOptions(tier="fine", scales=found),
    )
    writer.append(sample(0))
    writer.suspend()
    with pytest.raises(ArchiveError, match="calibration"):
        h5traces.create(f"{tmp_path}/run/", target=TargetOptions(shard_samples=3), precision="fine")
    given = PrecisionOptions(tier="fine", scales=found)
    write(f"{tmp_path}/run/", range(NUM_SAMPLES), precision=given)
    check(tmp_path / "run", 0.02)
    with h5traces.open(tmp_path / "run") as archive:
        record = stored_scales(archive._files[0].store).record
    assert record.num_samples == 3


def test_without_a_spool_scales_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match="h5traces calibrate"):
        h5traces.create(tmp_path / "run.h5", spool=False, precision="compact")
    with h5traces.create(tmp_path / "native.h5", spool=False, precision="native") as writer:
        writer.append(sample(0))
    with h5traces.open(tmp_path / "native.h5") as archive:
        assert archive.metadata.precision == TIERS["native"]


def test_a_file_of_scales_is_no_target(tmp_path: Path) -> None:
    write(f"{tmp_path}/exact/", range(3))
    scales = tmp_path / "scales.h5"
    calibrate(tmp_path / "exact", scales)
    (tmp_path / "run.h5").hardlink_to(scales)
    before = scales.read_bytes()
    for name in ("scales.h5", "run.h5"):
        with pytest.raises(TargetError, match="is one of the sources; name another output"):
            h5traces.create(tmp_path / name, precision=PrecisionOptions(tier="fine", scales=scales))
    assert scales.read_bytes() == before
