"""What traces give, torch tensors or numpy arrays: by default what the source held."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from legacy_batches import assert_same, make_archive, make_batch, with_torch, write_batch

import h5traces
from h5traces.errors import OptionError
from h5traces.features import compute_features
from h5traces.fidelity import compare

if TYPE_CHECKING:
    from pathlib import Path

torch = pytest.importorskip("torch")

PLAIN = make_batch("full_pkl", num_samples=6, dtype="float32")
ARRAYS = [trace | {"probes": {"w": np.arange(3.0)}, "names": np.array(["a"])} for trace in PLAIN]
LAYERS = len(PLAIN[0]["hidden_states"])


def in_torch(dtype: str) -> list[dict[str, Any]]:
    batch: list[dict[str, Any]] = with_torch(PLAIN, dtype)
    return [trace | {"probes": {"w": torch.arange(3.0)}} for trace in batch]


@pytest.fixture(params=["float16", "float32", "bfloat16"])
def tensors(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    batch = in_torch(request.param)
    return make_archive(tmp_path, batch, dtype="auto"), batch


def test_an_archive_of_tensors_gives_tensors(tensors: tuple[Path, list[dict[str, Any]]]) -> None:
    path, batch = tensors
    archive = h5traces.open(path)
    for trace, source in zip(archive, batch, strict=True):
        assert_same(trace["hidden_states"][1], source["hidden_states"][1])
        assert_same(trace["hidden_states"][:], source["hidden_states"])
        assert_same(trace.layer(2, "attentions"), source["attentions"][2])
        assert_same(trace["tokens"], source["tokens"])
        assert_same(trace["probes"], source["probes"])
        assert_same(trace.to_dict(), source)
    found = archive.read([5, 0], layers=[1])
    assert_same(found[0]["hidden_states"], [batch[5]["hidden_states"][1]])
    assert_same(archive[1:][0].to_dict(), batch[1])
    assert_same(h5traces.load(path), batch)


def test_existing_code_works_on_open_as_on_load(
    tensors: tuple[Path, list[dict[str, Any]]],
) -> None:
    path, batch = tensors
    for each in (h5traces.open(path)[5], h5traces.load(path)[5]):
        states = each["hidden_states"]
        assert_same(states[0].float(), batch[5]["hidden_states"][0].float())
        for join in (torch.stack, torch.cat):
            assert_same(join(states), join(batch[5]["hidden_states"]))
        assert_same(torch.stack(states, dim=1), torch.stack(batch[5]["hidden_states"], dim=1))
        assert_same(torch.stack(tensors=states), torch.stack(batch[5]["hidden_states"]))
        assert states[0].to("cpu").dtype == batch[5]["hidden_states"][0].dtype
        states[0].add_(1)  # writable


def numpy_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, dict):
        return {key: numpy_of(each) for key, each in value.items()}
    return [numpy_of(each) for each in value] if isinstance(value, list) else value


def tensor_of(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fi":
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {key: tensor_of(each) for key, each in value.items()}
    return [tensor_of(each) for each in value] if isinstance(value, list) else value


def test_arrays_of_tensors(tensors: tuple[Path, list[dict[str, Any]]]) -> None:
    path, batch = tensors
    archive = h5traces.open(path, container="numpy")
    wanted = [numpy_of(trace) for trace in batch]
    assert_same([trace.to_dict() for trace in archive], wanted)
    assert_same(archive[5]["hidden_states"][0], wanted[5]["hidden_states"][0])
    assert_same(archive.read(5)[0]["attentions"], wanted[5]["attentions"])
    assert_same(h5traces.load(path, container="numpy"), wanted)
    assert_same(h5traces.load(path.with_suffix(".pkl"), container="numpy"), wanted)
    assert_same(h5traces.open(path)[5].to_dict(container="numpy"), wanted[5])


def test_tensors_of_arrays(tmp_path: Path) -> None:
    path = make_archive(tmp_path, ARRAYS, dtype="auto")
    archive = h5traces.open(path, container="torch")
    wanted = [tensor_of(trace) for trace in ARRAYS]
    assert_same([trace.to_dict() for trace in archive], wanted)
    assert_same(archive[5]["attentions"][0], wanted[5]["attentions"][0])
    assert_same(h5traces.load(path, container="torch"), wanted)
    assert_same(h5traces.load(path.with_suffix(".pkl"), container="torch"), wanted)
    assert_same([trace.to_dict() for trace in h5traces.open(path)], ARRAYS)


def test_steps_in_tensors(tmp_path: Path) -> None:
    batch = with_torch(make_batch("step_clean"))
    archive = h5traces.open(make_archive(tmp_path, batch))
    assert_same([trace.to_dict() for trace in archive], batch)
    assert_same(archive[5]["attentions"][1], batch[5]["attentions"][1])


def test_other_rooms_have_containers_of_their_own(
    tensors: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    path, _ = tensors
    finite = [0, 1, 3, 4, 5]
    names = ["last_token", "mean", "attention_entropy"]
    results = [
        compute_features(h5traces.open(path, container=container)[finite], names)  # type: ignore[arg-type]
        for container in ("source", "numpy", "torch")
    ]
    for name in names:
        assert results[0][name].dtype == np.float32
        assert np.array_equal(results[0][name], results[1][name])
        assert np.array_equal(results[0][name], results[2][name])
    copied = h5traces.repack(path, tmp_path / "copy.h5")
    assert copied
    assert compare(path, tmp_path / "copy.h5")


def test_containers_that_are_none(tmp_path: Path) -> None:
    path = make_archive(tmp_path, PLAIN[:1])
    for call in (
        lambda: h5traces.open(path, container="jax"),  # type: ignore[arg-type]
        lambda: h5traces.load(path, container="jax"),  # type: ignore[arg-type]
        lambda: h5traces.open(path)[0].to_dict(container="jax"),  # type: ignore[arg-type]
    ):
        with pytest.raises(OptionError, match="container is 'jax', expected one of 'source'"):
            call()


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_without_torch(tmp_path: Path) -> None:
    path = make_archive(tmp_path, in_torch("float16"), dtype="auto")
    write_batch(tmp_path / "batch.pkl", in_torch("float16"))
    code = f"""
import sys; sys.modules["torch"] = None
import h5traces
from h5traces.errors import MissingDependencyError
archive = h5traces.open({str(path)!r})
print(archive[0].metadata.sample_id, archive[0]["question_id"], archive.ids[1])
for call in (
    lambda: archive[0]["hidden_states"][0],
    lambda: archive.read(0),
    lambda: archive[0].to_dict(),
    lambda: h5traces.load({str(path)!r}),
    lambda: h5traces.load({str(tmp_path / "batch.pkl")!r}),
):
    try:
        call()
    except MissingDependencyError as error:
        assert "install h5traces[torch], or ask for arrays with container='numpy'" in str(error)
        print("named")
try:
    h5traces.open({str(path)!r}, container="torch")
except MissingDependencyError as error:
    print(error)
print(type(h5traces.open({str(path)!r}, container="numpy")[0]["hidden_states"][0]).__name__)
"""
    lines = run(code).splitlines()
    assert lines[0] == "tc_0 tc_0 tc_1"
    assert lines[1:6] == ["named"] * 5
    assert lines[6].startswith("container='torch' needs torch")
    assert lines[7] == "ndarray"


def test_torch_is_not_imported_for_arrays(tmp_path: Path) -> None:
    path = make_archive(tmp_path, PLAIN)
    code = f"""
import sys, h5traces
for opened in (h5traces.open({str(path)!r}), h5traces.load({str(path)!r})):
    for trace in opened:
        dict(trace), [layer.sum() for layer in trace["hidden_states"]], trace == trace
    opened == opened
h5traces.open({str(path)!r}).read([0, 1])
h5traces.open({str(path)!r})[0].to_dict()
print("torch" in sys.modules)
"""
    assert run(code) == "False"
